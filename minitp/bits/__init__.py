"""`minitp bits`: the same tokens in several runs, and the first step whose bits change.

run.py          the runs of a model, or the recordings in files, compared one by one; start here
variants.py     the runs of a prompt: again, in a batch, in chunks, one token per pass
recording.py    the passes and steps of a run, in a rank's file or in a recording of any engine
names.py        the steps among the arrays of a dump, also under the names of an engine's modules
placing.py      the positions of a recording's rows: its sequence of a batch, its padding, and its passes
alike.py        the rows of two recordings that are of the same token
rows.py         the rows that two arrays have in common, by position
compare.py      the comparison of two recordings: the steps in which changes begin
changes.py      a change, and the result of a comparison
difference.py   the bits of two arrays, and the error that another order of a sum may cause
forced.py       every block on the inputs of the reference run, so that only the shapes differ
exact.py        a large difference, checked with the bounds of `check`
copies.py       the steps that only copy, and cannot round
reasons.py      the reasons, from the shapes of the two runs
"""
