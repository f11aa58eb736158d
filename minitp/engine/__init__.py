"""Many requests at once: they share the steps of one model and the blocks of one pool.

scheduler.py   which tokens go through the model in the next step, and in which blocks; rank 0 alone
blocks.py      which blocks are free, shared, or still hold a prefix that may come again; rank 0 alone
engine.py      the step that all ranks run together
service.py     steps while there are requests, sleep while there are none; what rank 0 and its caller say
ranks.py       the other end: ranks that have been started or joined, as their caller sees them
"""
