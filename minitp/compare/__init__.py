"""`minitp compare`: compare two files of intermediate arrays, written by any programs.

run.py         the comparison of two files, step by step
pairing.py     the pairs of names in the two files that refer to the same step
layouts.py     the possible orders and groupings of a step's axes
files.py       the arrays of a .safetensors or .npz file
diagnosis.py   the likely causes of a difference
"""
