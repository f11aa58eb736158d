"""Launch route.cu, the GPU counterpart of `moe.route`."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from minitp.cuda.kernels.linear import MAX_TOKENS

THREADS, TOKENS = 1024, 32  # threads and tokens per block, as in route.cu
MAX_EXPERTS = 4096  # their counts are in shared memory


@dataclass
class Routing:
    """The experts of T tokens, and the T * X pairs of a token and an expert as rows, sorted by expert.

    A slot is a group of up to `slot_rows` rows of one expert, whose products share each load of its weights.

    Attributes
    ----------
    chosen : int32 [T, X]
        The experts of each token in ascending order; -1 for a row of padding.
    weights : float32 [T, X]
    position : int32 [T, X]
        The row of each pair; -1 for padding.
    token_of : int32 [T * X]
        The token of each row.
    slots : int32 [slots, 4]
        The expert, the first row and the number of rows of each slot; 0 rows if the slot is not used.
    slot_rows : int
    """

    chosen: Any
    weights: Any
    position: Any
    token_of: Any
    slots: Any
    slot_rows: int


def new_routing(cupy, tokens, experts, per_token):
    """Allocate a Routing of T = `tokens` tokens with enough slots for any choice of experts."""
    pairs, slot_rows = tokens * per_token, min(tokens, MAX_TOKENS)
    slots = min(experts, pairs)  # each chosen expert has a slot that may be partly empty
    if tokens > MAX_TOKENS:
        slots += pairs // MAX_TOKENS
    return Routing(
        chosen=cupy.zeros((tokens, per_token), np.int32),
        weights=cupy.zeros((tokens, per_token), np.float32),
        position=cupy.zeros((tokens, per_token), np.int32),
        token_of=cupy.zeros(pairs, np.int32),
        slots=cupy.zeros((slots, 4), np.int32),
        slot_rows=slot_rows,
    )


class Route:
    """A kernel that chooses the experts of each token and sorts the tokens by expert.

    Parameters
    ----------
    compiler : Compiler
    cupy : module
    normalized : bool
        Whether the weights of each token add up to 1.
    """

    def __init__(self, compiler, cupy, normalized):
        self._kernel = compiler.kernel("route.cu", "route")
        self._counter, self._normalized = cupy.zeros(1, np.uint32), normalized

    def __call__(self, router, routing, seen=None):
        """Fill `routing` from the logits `router`, 16-bit [T, E].

        `seen`, int32 [T], is 0 for each row that only pads the batch; None if there is no padding.
        """
        tokens, experts = router.shape
        per_token = routing.chosen.shape[1]
        r = routing
        sizes = (tokens, experts, per_token, self._normalized, len(r.slots), r.slot_rows)
        arrays = (router, seen, r.chosen, r.weights, r.position, r.token_of, r.slots, self._counter)
        numbers = [np.int32(n) for n in sizes]
        args, grid = (*arrays, *numbers), (-(-tokens // TOKENS),)
        self._kernel(grid, (THREADS,), args, shared_mem=4 * experts, dependent=True)
