"""The lint of an engine's shards: which rows of the checkpoint each rank holds, and whether it should.

names.py           the names that say what a tensor is, and those that are not compared
tensors.py         the tensors of an engine over all ranks
experts.py         the numbers of the experts that a rank holds
pieces.py          the checkpoint's rows and columns, found by their content
layout.py          the rows that each rank is expected to hold
origin.py          the origin of the rows of each rank
values.py          the difference between a shard's values and the checkpoint's
judgement.py       each tensor by itself, then the tensors of a block together
blocks.py          the agreement of the tensors of a block
wrong_tensor.py    a wrong tensor, as the next three files see it
mistakes.py        the common mistakes, each named if it explains what the ranks hold
piece_mistakes.py  those in which rows or columns a rank holds, and in their values
head_mistakes.py   those in the order of heads and of joined parts
words.py           rows and columns in words
run.py             all of it
"""
