"""The blocks of a run, each on the inputs of another run: same inputs, other shapes.

In a run of its own, a block gets inputs that have already changed, and hides whether it changes bits, too.
Here every block of every layer gets the inputs that the reference run recorded, with the number of rows and
sequences and the kind of cache of the other run. A difference is then the effect of the shapes on this block
alone, and may only be as large as rounding.
"""

from dataclasses import replace

import numpy as np

from minitp.bits.recording import RankRecording, own_index, pass_names
from minitp.bits.variants import new_caches
from minitp.model import ForwardContext
from minitp.trace.names import full_name
from minitp.trace.record import Recorder

PREFIX = "forced."  # before the name of a pass


def run_forced(model, a, b):
    """Run all blocks with the inputs of a and the shapes of b; all ranks call this.

    Parameters
    ----------
    model : Model
    a, b : RankRecording
        Recordings in the same StepFile. A pass of b has positions of a single pass of a.

    Returns
    -------
    RankRecording
        The steps of the layers, in passes named after those of b.
    """
    recorder = Recorder(model.device, None, b.write)
    passes = []
    for pass_ in b.passes:
        source = next(one for one in a.passes if one.start <= pass_.start and pass_.stop <= one.stop)
        passes.append(replace(pass_, name=PREFIX + pass_.name))
        for layer in range(a.layers):
            _run_layer(model, a, b, source, pass_, layer, recorder)
    return RankRecording(b.steps, passes, b.tp, b.windows)


def _run_layer(model, a, b, source, pass_, layer, recorder):
    """Run both blocks of a layer as in a pass of b, with the inputs that the pass `source` of a recorded."""
    xp, tokens = model.device.xp, pass_.stop - pass_.start
    count = pass_.rows // tokens

    def rows(layer, step):
        array = a.read(full_name(source.name, layer, step))  # [T, D] of the whole pass
        return array[pass_.start - source.start : pass_.stop - source.start]  # [n, D]

    caches = new_caches(model, count, pass_.stop)
    _fill(a, source, layer, pass_.start, caches, xp)
    recorder.begin(*pass_names(PREFIX + pass_.name, count), rows=[tokens] * count)
    parts = [(range(tokens), cache) for cache in caches]  # only the number of tokens matters
    context = ForwardContext(xp, parts, model.rotations, model.config, recorder)
    x = rows(layer - 1, "mlp.residual") if layer else rows(None, "embed")  # [n, D]
    x = xp.asarray(np.tile(x, (count, 1)))  # [count * n, D]: attention needs no rows of the neighbors
    model._attention(layer, model.weights.layers[layer], x, context)
    sequences = [rows(layer, "attn.residual")] * count  # [n, D] each
    for n, name in enumerate(pass_names(pass_.name, count)):
        if n != own_index(count):  # the neighbors' tokens share the experts
            sequences[n] = b.read(full_name(name, layer, "attn.residual"))  # [n, D]
    model._mlp(layer, model.weights.layers[layer], xp.asarray(np.concatenate(sequences)), context)


def _fill(a, source, layer, start, caches, xp):
    """Write the keys and values before the position `start` to the caches, as a has recorded them."""
    arrays = [a.read(full_name(source.name, layer, f"attn.{part}_cache")) for part in "kv"]  # [K_r, S, d]
    first = source.stop - arrays[0].shape[1]  # position of the first key
    for cache in caches:
        cache.length = min(first, start)
        if first < start:
            cache.append(layer, *(xp.asarray(array[:, : start - first]) for array in arrays))
        cache.length = start
