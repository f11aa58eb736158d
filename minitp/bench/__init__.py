"""What `minitp bench` measures: the limits of the machine, and how near to them the model runs.

measure.py        one measurement after another, into one dict
runs.py           prefill, decode, and the profile of their steps
requests.py       many requests at once
load_rate.py      how fast a model was loaded
roofline.py       what a pass takes at least: reads and products
cpu_roofline.py   the same, measured on a CPU
gpu_roofline.py   the same, measured on a GPU
gpu_profile.py    a decoding step on a GPU, kernel by kernel
this_machine.py   the figures of this CPU, for `minitp plan`
fake_weights.py   weights that cost nothing to make
table.py          the results for people
plot.py           a sweep, drawn
"""
