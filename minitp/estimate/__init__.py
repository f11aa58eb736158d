"""The arithmetic of `minitp plan`: whether a model fits, and how fast it will be.

estimate.py   arithmetic on a model's config, its sharding plan and the hardware
hardware.py   memory, bandwidth and links of machines, each figure with its source
work.py       the bytes and operations of a forward pass on one rank
kernels.py    the measured times of minitp's kernels
ranks.py      the ranks one by one, if they are unequal
"""
