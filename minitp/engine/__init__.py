"""Many requests at once: they share the steps of one model and the blocks of one pool.

options.py        what the ranks can be told: EngineOptions
scheduler.py      which tokens go through the model in the next step, and in which blocks; rank 0 alone
blocks.py         which blocks are free and how many use them; rank 0 alone
prefix_cache.py   full blocks, found again by the tokens that they hold; rank 0 alone
engine.py         the step that all ranks run together
service.py        steps while there are requests, sleep while there are none; what rank 0 and its caller say
run.py            a rank's work from loading to the last request
client.py         the other end: ranks that have been started or joined, as their caller sees them
completion.py     what a caller gets
"""
