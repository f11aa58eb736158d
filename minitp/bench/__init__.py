"""The measurements of `minitp bench`: the machine's limits, and how close the model comes to them.

measure.py        all measurements, collected in one dict
rounds.py         timed prompts and continuations, and the profile of their steps
concurrency.py    many concurrent requests
load_rate.py      the speed of loading the model
duration.py       an estimate of how long a measurement takes
roofline.py       the reads and products that no forward pass can do without
cpu_roofline.py   their time on a CPU
gpu_roofline.py   their time on a GPU
gpu_profile.py    a decode pass on a GPU, kernel by kernel
this_machine.py   the speed of this machine's CPU, for `minitp plan`
fake_weights.py   weights that cost almost nothing to make
table.py          the results as text
plot.py           plots of a sweep
"""
