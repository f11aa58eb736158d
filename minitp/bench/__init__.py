"""The measurements of `minitp bench`: the limits of the machine, and how close to them the model runs.

measure.py        all measurements, collected in one dict
rounds.py         timed prompts and continuations, and the profile of their steps
concurrency.py    many requests at once
load_rate.py      the speed of loading the model
roofline.py       the reads and products that a forward pass needs at least
cpu_roofline.py   the time of these, measured on a CPU
gpu_roofline.py   the time of these, measured on a GPU
gpu_profile.py    a decode pass on a GPU, kernel by kernel
this_machine.py   the figures of this CPU, for `minitp plan`
fake_weights.py   weights that cost almost nothing to make
table.py          the results as text
plot.py           a plot of a sweep
"""
