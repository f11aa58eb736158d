"""The engine: many requests at once, in shared batches of one model and shared blocks of one pool.

options.py        the options of the ranks, EngineOptions
batch.py          sequences and scheduled batches
scheduler.py      the next batch: its tokens and their blocks; only on rank 0
blocks.py         the free blocks, and the number of sequences that use each block; only on rank 0
prefix_cache.py   full blocks, looked up by their tokens; only on rank 0
engine.py         a batch's forward pass, which all ranks run together
service.py        the loop that runs batches for a caller, and the messages between rank 0 and the caller
run.py            a rank's work, from loading the model to the last request
ranks.py          the caller's side: requests to ranks, and their output
client.py         ranks that the caller has started or joined
leaders.py        replica groups that the caller has joined, whose leaders are other processes
replica.py        one of several replicas, with its ranks and its load
replicas.py       several replicas, as one
routing.py        the replica that a request goes to
completion.py     the results that callers get
"""
