"""The `minitp` command.

main.py        parses the arguments, runs the command, turns errors into exit codes
arguments.py   the parser: groups of options, examples, what it says of a mistake
commands.py    the table of all commands
command.py     the form of a command, and the three ways to run one
options.py     the options that several commands share

One file for each command has its options, help and behavior: generate, chat (terminal, conversation), serve,
check, trace, compare, perplexity, shard (shard_text), plan (plan_result, plan_text), bench, tour,
info (info_text), and ranks, which is internal. They share inputs.py (prompts and files, checked),
load_progress.py and color.py.
"""
