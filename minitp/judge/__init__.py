"""`minitp judge`: repeat the recorded operations of another engine, and name the first wrong one.

run.py          the judgement: each recorded step against the operation on its recorded inputs; start here
files.py        the files of a recording, one or one for each rank
recording.py    the recording: its tokens, passes, dtype and sharding plan
rank_steps.py, fitting.py, sizes.py, dump.py: the steps of a rank in the shapes of a trace, and their layouts;
                sizes and tokens of arrays without metadata
names.py        the names of arrays: a map of them, unknown ones, those of an engine
weights.py      a rank's parts of the checkpoint
roundings.py    the steps that an engine rounds to a smaller dtype than its own
ties.py         experts with equal router logits, of which the engine may choose any; experts that it never
                chose
hypotheses.py   the mistakes, tried one by one on the first wrong step
mistakes/       what each operation may compute instead
"""
