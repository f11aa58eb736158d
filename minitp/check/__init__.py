"""`minitp check`: every step of every rank against the oracle, to find the first wrong one.

run.py          records the steps of all ranks and judges them
replay.py       what a step should have been, given the inputs that the rank really had
expected.py     the same for each operation, with what its error may come from
tolerance.py    how far off a value may be
sums.py         how far off a sum of products may be, by the device that adds it up
plan.py         whether the sharding plan covers the model, derived from config.json alone
result.py       the findings, and who is to blame
difference.py   how far one array is from another
"""
