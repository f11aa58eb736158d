"""Support for NVIDIA GPUs: arrays, collectives between GPUs, and the model built from fused kernels.

gpu.py             a rank's GPU: its stream, its memory, and copies to and from the host
arrays.py          the array module that `ops` computes with
loader.py          a rank's weights, uploaded as they are read
uploads.py         threads that read into pinned memory, from which the GPU copies
comm.py            collectives of GPU arrays through the hosts' memory
nccl.py            collectives through NCCL, called by `cupy.cuda.nccl`
peer.py            small all-reduces through memory that all GPUs of a host can read
choice.py          the choice of --comm auto between these transports
read_rate.py       the rate at which a GPU reads its memory, for --split auto
compiler.py        compiles the .cu files
launch.py          launches with attributes that CuPy cannot set: dependent launches and clusters
kernels/           each .cu file with a Python file of the same name that launches it
fused.py           the model built from these kernels
decode_graph.py    a decode pass (one token of each sequence), captured as a CUDA graph
decode_pass.py     the launches of such a pass
prefill.py         passes over prompts; small ones are captured, too
prompt_pass.py     the launches of a pass over prompts
experts.py         the mixture of experts of such a model
lanes.py           the state of sampling on the GPU
batches_ahead.py   the engine's batches, each launched before the last one has been read
"""
