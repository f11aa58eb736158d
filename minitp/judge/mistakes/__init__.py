"""The common mistakes of each operation, computed from the inputs that the engine really had.

wrong_step.py   a wrong step, with access to its inputs and weights
attention.py    the cache, and the weighted sum of the values
scores.py       the scores, their mask and their softmax
rope.py         the rotation of queries and keys
norms.py        the norms
projections.py, joined.py: products with a weight, and matrices that are joined in another order
experts.py, shares.py: mixtures of experts, and the shares of the experts
ranks.py        the sums over the ranks, and the parts that a rank has
other.py        the activation, the residual stream, the embedding and the logits
roundings.py    inputs, weights or results of any operation that are rounded to a smaller dtype
orders.py       parts in another order
"""
