"""The `minitp` command.

main.py             reads the options and starts ranks, or is one
options.py          every command with its options and their help
shared_options.py   the options that several commands share
commands.py         what a command does, before ranks are started and on each of them
inputs.py           prompts, sampling parameters and output files, checked
load_progress.py    loading a model, with its progress shown

One file for each command: generate, trace, check, compare, perplexity, shard, plan (plan_text), bench, serve,
chat, tour, info (info_text).
"""
