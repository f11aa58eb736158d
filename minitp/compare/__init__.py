"""`minitp compare`: two traces or dumps, whoever made them.

run.py         compares the steps of two files
pairing.py     which name in one file is which in the other
layouts.py     the ways in which the axes of a step may lie
files.py       the arrays of a .safetensors or .npz file
diagnosis.py   what kind of mistake a difference looks like
"""
