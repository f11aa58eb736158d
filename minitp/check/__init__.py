"""`minitp check`: compare every step of every rank with the oracle and find the first wrong one.

run.py          records the steps of all ranks and checks them
replay.py       the expected value of every step, from the inputs that the rank recorded
expected.py     the expected value of each operation, and the scale of its rounding errors
tolerance.py    the bounds, with a worked example; start here
sums.py         the error of a sum of products, which depends on how the device adds it up
plan.py         the check of the sharding plan, derived from config.json alone
result.py       the findings, and which of them to blame
difference.py   the relative and absolute difference of two arrays
"""
