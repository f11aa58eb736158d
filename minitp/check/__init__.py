"""`minitp check`: compare every step of every rank with the oracle and find the first wrong one.

run.py          the whole check, from the plan to the result; start here
plan.py         the check of the sharding plan, derived from config.json alone
passes.py       the forward passes that are run: a prompt whole and in chunks, decoding, batches
step_file.py    the temporary file in which a rank keeps the steps that it records
rank.py         a rank's check of its own weights and steps: local errors and equal bits
replay.py       the expected value of every step, from the inputs that the rank recorded
expected.py     the expected value of each operation, and the scale of its rounding errors
tolerance.py    the bounds of the local errors, with a worked example
sums.py         the error of a sum of products, which depends on how the device adds it up
totals.py       the total errors and their bounds, from the oracle's own runs
rounding.py     the warning of steps that round more than once
result.py       the findings, and which of them to blame
difference.py   the relative and absolute difference of two arrays
replicas.py     the bits of all replicas, compared
"""
