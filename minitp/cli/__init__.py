"""The `minitp` command.

main.py        parses the arguments, runs the command, turns errors into exit codes
arguments.py   the parser: option groups, examples, error messages
commands.py    the table of all commands
command.py     the base class of commands, and the three ways to run one
options.py     options that several commands share

Each command is a file with its options, help and behavior: generate, chat (with terminal, editors,
conversation), serve, check (check_text), judge (judge_text), lint (lint_text), bits, trace, compare,
perplexity, logprobs (logprobs_file), shard (shard_text), plan (plan_result, plan_text), bench, tour, info
(info_text), and the internal command ranks.
They share inputs.py (checks of prompts and files), likelihood.py, load_progress.py and color.py.
"""
