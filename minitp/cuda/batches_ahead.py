"""Batches of an engine on a GPU that chooses the tokens, each launched before the last one has been read.

Chunks of one token go through a captured decode pass, together; the others, through one prefill. In a decode
pass, a sequence keeps its row, and only the head of the graph is copied to the GPU: 24 bytes per row. The
tokens, and log-probabilities if a request asks for them, come back by a copy that the host waits for only
after it has launched the next batch.
"""

from collections import deque

import numpy as np

from minitp.cuda.decode_pass import NO_LANE, NOTHING_NEW, PADDING, parts_of
from minitp.cuda.kernels.linear import MAX_TOKENS
from minitp.cuda.kernels.sample import RESULTS, results_needed
from minitp.cuda.lanes import Lanes, OnTheWay, logprobs_of


class BatchesAhead:
    """One rank's batches on a FusedModel, whose tokens are read one batch later.

    Every rank chooses the same tokens from the same logits and draws. Lanes are assigned in the order of the
    batches, so all ranks agree about them, too.

    Parameters
    ----------
    model : FusedModel
    pool : Pool
    sequences : int
        The maximum number of running sequences.
    """

    def __init__(self, model, pool, sequences):
        self.model, self.pool = model, pool
        pool.lanes = Lanes(model.device, sequences)
        self._free_lanes = list(reversed(range(sequences)))
        self._lanes = {}  # sequence number -> (lane, SamplingParams)
        self._rows = {}  # batch size of a graph -> GraphRows
        self._launched = deque()  # the Launched of each batch, the oldest first
        self._compiled = model.kernels.sample  # while no other rank waits for this one

    @property
    def unread(self):
        """The number of launched batches that `read` has not returned."""
        return len(self._launched)

    def launch(self, batch, parts):
        """Launch a ScheduledBatch; `parts` has the (tokens, cache) of each of its chunks."""
        self._assign_lanes(batch)
        index_at = {row: index for index, row in enumerate(batch.logits_at)}
        decoding, prompts, launched, row = [], [], Launched(self.model), 0
        for tokens, cache in parts:
            indices = [index_at.get(n) for n in range(row, row + len(tokens))]
            (decoding if len(tokens) == 1 else prompts).append((tokens, cache, indices))
            row += len(tokens)
        for start in range(0, len(decoding), MAX_TOKENS):
            self._decode(batch, decoding[start : start + MAX_TOKENS], launched)
        if prompts:
            self._prefill(batch, prompts, launched)
        self._launched.append(launched)

    def read(self):
        """Return the rows of the oldest launched batch that has not been read, in the order of `logits_at`.

        A row is (token, log-probabilities or None) if the GPU has chosen the token, else logits, float32 [V].
        """
        rows = self._launched.popleft().read()
        self.model.comm.check()
        return rows

    def _assign_lanes(self, batch):
        for number in batch.finished:
            if number in self._lanes:
                self._free_lanes.append(self._lanes.pop(number)[0])
        for number, sampling in batch.sampling.items():
            lane = self._free_lanes.pop()
            self._lanes[number] = lane, sampling[0]
            self.pool.lanes.start(lane, *sampling)

    def _choice(self, batch, index):
        """Return a row's (lane, draw, SamplingParams); NO_LANE if the host needs its logits, or no one."""
        if index is None or batch.choices[index] is None:
            return NO_LANE, 0.0, None
        number, draw = batch.choices[index]
        lane, params = self._lanes[number]
        return lane, draw, params

    def _decode(self, batch, decoding, launched):
        """Launch a decode pass over up to MAX_TOKENS chunks of one token."""
        graph = self.model.decode_graph(self.pool, len(decoding))
        if graph.batch not in self._rows:
            self._rows[graph.batch] = GraphRows(graph)
        choices = [self._choice(batch, indices[0]) for _, _, indices in decoding]
        inputs = [(t[0], cache, *choice[:2]) for (t, cache, _), choice in zip(decoding, choices, strict=True)]
        rows, head = self._rows[graph.batch].launch(inputs)
        launched.keep(head)
        indices = [indices[0] for _, _, indices in decoding]
        launched.add(rows, indices, [choice[2] for choice in choices], graph.results, graph.logits)
        for _, cache, _ in decoding:
            cache.advance(1)

    def _prefill(self, batch, prompts, launched):
        """Run a pass over chunks of prompts, and choose the tokens after those that end."""
        m, gpu = self.model, self.model.device
        indices = [index for _, _, chunk in prompts for index in chunk]  # one per token
        at = [row for row, index in enumerate(indices) if index is not None]
        logits_at = gpu.from_host(np.array(at, np.int64)) if at else None
        logits = m.forward_batch([(tokens, cache) for tokens, cache, _ in prompts], logits_at)  # [n, V]
        if not at:
            return
        indices = [indices[row] for row in at]
        lanes, draws, params = zip(*(self._choice(batch, index) for index in indices), strict=True)
        results = gpu.cupy.zeros((RESULTS, len(at)), np.float64)  # [RESULTS, n]
        if any(params):
            lane, draw = gpu.from_host(np.array(lanes, np.int32)), gpu.from_host(np.array(draws))  # [n] each
            logits, state = aligned(gpu.cupy, logits), self.pool.lanes
            m.kernels.sample(logits, lane, state.settings, draw, state.chosen, results)
        launched.add(range(len(at)), indices, params, results, logits)


class GraphRows:
    """The rows of a DecodeGraph, each of which belongs to one sequence for as long as possible.

    Parameters
    ----------
    graph : DecodeGraph
    """

    def __init__(self, graph):
        self._graph = graph
        self._caches = [None] * graph.batch  # the owner of each row, a PagedCache
        self._known = [0] * graph.batch  # blocks of each row that are in the graph's block table
        self._row_of = {}  # PagedCache -> row

    def launch(self, inputs):
        """Launch a pass over some (token, cache, lane, draw); return their rows and the head's memory."""
        import cupyx

        graph = self._graph
        rows = self._rows_for([cache for _, cache, _, _ in inputs])
        numbers = [
            [0.0] * graph.batch,
            *([fill] * graph.batch for fill in (0, PADDING, NO_LANE, NOTHING_NEW)),
        ]
        draws, tokens, lengths, lanes, new_blocks = numbers
        for row, (token, cache, lane, draw) in zip(rows, inputs, strict=True):
            draws[row], tokens[row], lengths[row], lanes[row] = draw, token, cache.length, lane
            if len(cache.block_table) != self._known[row]:
                new_blocks[row] = self._new_block(row, cache)
        head = cupyx.empty_pinned(6 * graph.batch, np.int32)
        for part, values in zip(parts_of(head, graph.batch), numbers, strict=True):
            part[:] = values
        gpu = graph.model.device
        runtime = gpu.cupy.cuda.runtime
        target, kind = graph.head.data.ptr, runtime.memcpyHostToDevice
        runtime.memcpyAsync(target, head.ctypes.data, head.nbytes, kind, gpu.stream.ptr)
        graph.launch()
        return rows, head

    def _rows_for(self, caches):
        """Return the row of each cache; caches without one take the rows of sequences that are not there."""
        missing = [cache for cache in caches if cache not in self._row_of]
        if missing:
            present = set(caches)
            free = [row for row, owner in enumerate(self._caches) if owner not in present]
            free.sort(key=lambda row: self._caches[row] is not None)  # rows without an owner first
            for row, cache in zip(free, missing, strict=False):
                self._row_of.pop(self._caches[row], None)
                self._caches[row], self._known[row], self._row_of[cache] = cache, 0, row
        return [self._row_of[cache] for cache in caches]

    def _new_block(self, row, cache):
        """Return the block that the graph adds to its block table, or copy all blocks of the sequence."""
        blocks, known = cache.block_table, self._known[row]
        self._known[row] = len(blocks)
        if len(blocks) == known + 1 and cache.length // cache.pool.block_size == known:
            return blocks[-1]
        copy = self._graph.model.device.from_host(np.array(blocks, np.int32))  # [blocks]
        self._graph.block_table[row, : len(blocks)] = copy
        return NOTHING_NEW


class Launched:
    """The results of one batch, on their way to the host.

    Parameters
    ----------
    model : FusedModel
    """

    def __init__(self, model):
        self._gpu, self._on_the_way = model.device, OnTheWay(model.device)
        self._places = []  # (index in the batch's logits_at, array, row, SamplingParams or None)

    def keep(self, memory):
        """Keep memory that the GPU reads until the batch has been read."""
        self._on_the_way.keep(memory)

    def add(self, rows, indices, params, results, logits):
        """Add the rows of a pass that have an index: its results, or its logits if the params are None."""
        chosen = [one for one in params if one is not None]
        if chosen:
            number = self._on_the_way.add(results[: results_needed(chosen, logits.shape[1])])  # [n, B]
            wanted = zip(indices, rows, params, strict=True)
            self._places += [(index, number, row, one) for index, row, one in wanted if one is not None]
        of_host = [
            (i, row)
            for i, row, one in zip(indices, rows, params, strict=True)
            if one is None and i is not None
        ]
        if of_host:
            taken = logits[self._gpu.from_host(np.array([row for _, row in of_host]))]  # [h, V]
            self.keep(taken)
            number = self._on_the_way.add(taken)
            self._places += [(index, number, row, None) for row, (index, _) in enumerate(of_host)]

    def read(self):
        """Wait for the batch, and return its rows as BatchesAhead.read does."""
        arrays, rows, columns = self._on_the_way.read(), [None] * len(self._places), {}
        for index, number, row, params in self._places:
            if params is None:
                rows[index] = arrays[number][row]  # [V]
                continue
            if number not in columns:
                columns[number] = arrays[number].T.tolist()
            results = columns[number][row]
            rows[index] = int(results[0]), logprobs_of(results, params)
        return rows


def aligned(cupy, logits):
    """Return logits [n, V] whose rows begin at multiples of 16 bytes; a copy if V is no multiple of 4."""
    rows, vocabulary = logits.shape
    if vocabulary % 4 == 0:
        return logits
    wide = cupy.empty((rows, -(-vocabulary // 4) * 4), logits.dtype)[:, :vocabulary]  # [n, V]
    wide[...] = logits
    return wide
