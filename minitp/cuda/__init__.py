"""NVIDIA GPUs: their arrays, how ranks on them meet, and the model through fused kernels.

gpu.py           a rank's GPU: its stream, its memory, the way to the host and back
arrays.py        the array module that `ops` computes with
loader.py        a rank's weights, uploaded as they are read
comm.py          ranks on GPUs that meet through their hosts
nccl.py          NCCL, by `cupy.cuda.nccl`
peer.py          small sums through the GPUs' own memory
compiler.py      .cu files to kernels
kernels/         each .cu with a Python file of the same name that launches it
fused.py         the model made of them
decode_graph.py   one token of each sequence, as a captured graph
"""
