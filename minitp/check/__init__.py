"""`minitp check`: every step of every rank against the oracle, to find the first wrong one.

run.py          record the steps of all ranks and judge them
replay.py       the expected value of every step, from the inputs that the rank recorded
expected.py     the expected value of each operation, and what bounds its error
tolerance.py    the bounds themselves, with a worked example: start here
sums.py         the error of a sum of products, which depends on how the device adds it up
plan.py         the check of the sharding plan, derived from config.json alone
result.py       the findings, and the ones to blame
difference.py   the error of one array against another
"""
