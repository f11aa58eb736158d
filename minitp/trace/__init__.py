"""The steps of a forward pass, by name: recorded, assembled over the ranks, written to a file.

names.py       every step's name, shape, and how the ranks share it
record.py      this rank's steps, as the model makes them
assemble.py    the whole of a step from the ranks' parts
reference.py   the oracle's own steps
write.py       a trace file
"""
