"""The comparison of `minitp compare`: two traces or dumps, made by any program.

run.py         the comparison of two files, step by step
pairing.py     pairs of names in the two files that are the same step
layouts.py     the possible orders and groupings of a step's axes
files.py       the arrays of a .safetensors or .npz file
diagnosis.py   likely causes of a difference
"""
