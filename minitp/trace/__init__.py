"""The named steps of a forward pass: recorded, assembled over the ranks, and written to a file.

names.py       the name and shape of every step, and its distribution over the ranks
record.py      a recorder of this rank's steps
assemble.py    the whole array of a step, from the ranks' parts
reference.py   the oracle's steps
write.py       the file of a trace
"""
