"""`minitp bits`: the same tokens in several runs, and the first step whose bits change.

run.py          the runs of a model, or the recordings in files, compared one by one; start here
variants.py     the runs of a prompt: again, in a batch, in chunks, one token per pass
recording.py    the passes and steps of a run, in a rank's file or in a recording of any engine
compare.py      the comparison of two recordings, position by position
difference.py   the bits of two arrays, and the error that another order of a sum may cause
forced.py       every block on the inputs of the reference run, so that only the shapes differ
reasons.py      the reasons, from the shapes of the two runs
"""
