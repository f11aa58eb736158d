"""`minitp compare`: compare two files of intermediate arrays, written by any programs.

run.py          the comparison of two files, step by step
pairing.py      the pairs of names in the two files that refer to the same step
result.py       the difference of each step, and what was left out
files.py        the arrays of a .safetensors or .npz file
open_other.py   the file or folder that is compared with the reference
rank_folder.py  a folder with a file for each rank
assembled.py    the ranks' arrays, put together
mapped.py       the arrays of another engine under the names of the steps
fit.py          the layouts in which each pair of arrays can be compared
layouts.py      the possible orders and groupings of a step's axes
partial.py      the part that two arrays share if no layout fits: padding, a batch, the last token
heads.py        the interleaved and the half-split order of a head's dimensions
jump.py         the judgement of a 16-bit step's error by those of its inputs
inputs.py       the inputs of each step, and the step recomputed from them
diagnosis.py    the likely causes of a difference
picture.py      the pictures of two arrays and of their difference, for a report
"""
