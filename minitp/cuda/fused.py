"""The model built from fused kernels, which computes the same as `model.Model` in fewer launches."""

import dataclasses
from contextlib import contextmanager
from itertools import chain

import numpy as np

from minitp.cuda.batches_ahead import BatchesAhead
from minitp.cuda.decode_graph import DecodeGraph
from minitp.cuda.experts import FusedExperts
from minitp.cuda.kernels import Kernels
from minitp.cuda.kernels.linear import MAX_TOKENS
from minitp.cuda.kernels.route import MAX_EXPERTS
from minitp.cuda.lanes import Lanes, OnTheWay, logprobs_of
from minitp.cuda.loader import PACK, padded
from minitp.cuda.prefill import Prefill
from minitp.model import Model, unrecorded
from minitp.paged_cache import BlockPool, PagedCache
from minitp.sampling import PENDING

BLOCK_SIZE = 16
KEPT_BLOCKS = (
    64  # a kept pool has a multiple of this many blocks, so that a slightly longer sequence still fits
)
LARGEST_HEAD = 256
# The fields of Config with an option of some families for which there are kernels.
SUPPORTED = {
    *("qk_norm", "norm_plus_one", "post_norms", "hidden_act", "layers_without_rope", "local_rope"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
}


def unfit(config, plan, device, kv_dtype):
    """Return why a model cannot use the fused path, or None; the answer is the same on all ranks."""
    if device.dtype.itemsize != 2:
        return f"its kernels compute in 16 bits, not in {device.dtype.name}"
    if kv_dtype not in ("auto", device.dtype.name):
        return f"its kernels read a cache of {device.dtype.name}, not of {kv_dtype}"
    if config.head_dim > LARGEST_HEAD:
        return f"its kernels support a head_dim of up to {LARGEST_HEAD}, not {config.head_dim}"
    if config.num_local_experts > MAX_EXPERTS:
        return f"its kernels choose among at most {MAX_EXPERTS} experts, not {config.num_local_experts}"
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if "words" in field.metadata and field.name not in SUPPORTED and value != field.default:
            return f"it has no kernels for {field.metadata['words'].format(value)}"
    return None


class Pool(BlockPool):
    """A BlockPool with the graphs that have been captured for it."""

    def __init__(self, *shape, **options):
        super().__init__(*shape, **options)
        self.blocks = self.storage[0][0].capacity // self.block_size
        self.graphs = {}  # batch -> DecodeGraph
        self.lanes = None  # the Lanes of its sequences
        self.prompt_graphs = {}  # (rows, sequences) -> PromptPass


class FusedModel(Model):
    """One rank of a tensor-parallel transformer on a GPU, in 16 bits; the fused counterpart of Model.

    Passes with one token per sequence use a captured graph (`decode_graph`); other passes (prompts) use
    cuBLAS for the products and kernels for the rest. All caches are paged.
    """

    fused = True
    prefill_chunk = 2048  # cuBLAS needs many rows to be fast, and attention stores no scores in memory

    def __init__(self, *parts, **options):
        super().__init__(*parts, **options)
        self.kernels = Kernels(self)
        self.prefill = Prefill(self)
        self.experts = FusedExperts(self) if self.config.num_local_experts else None
        self.width = padded(self.config.hidden_size)  # the distance between two rows of x
        frequencies, factors = zip(*self.rotations.values(), strict=True)
        self.rope_tables = (  # float32 [ropes, R/2], float32 [ropes]
            self.device.cupy.stack(frequencies),
            self.device.from_host(np.array(factors, np.float32)),
        )
        self._kept_pool = None  # the pool of the last sequence_cache

    def connect(self):
        self.comm = self.comm.reserve(self.kernels.compiler, self.width)

    def new_cache(self, capacity=64):
        """Return an empty cache for one sequence of up to `capacity` positions."""
        blocks = -(-capacity // BLOCK_SIZE)
        return PagedCache(self.new_pool(blocks, BLOCK_SIZE), list(range(blocks)))

    @contextmanager
    def sequence_cache(self, capacity):
        """Yield a cache like Model.sequence_cache; keep its pool and captured graph for the next sequence.

        A capture takes about as long as twenty tokens. All ranks enter and leave this context together, so
        either all of them capture a graph or none does.
        """
        pool, self._kept_pool = self._kept_pool, None  # a second sequence at the same time gets its own pool
        blocks = -(-capacity // BLOCK_SIZE)
        if pool is not None and pool.blocks < blocks:
            pool.prompt_graphs.clear()
            pool.graphs.clear()  # graphs refer to the pool, which must be freed before a new one is allocated
            pool = None
        if pool is None:
            pool = self.new_pool(-(-blocks // KEPT_BLOCKS) * KEPT_BLOCKS)
        try:
            yield PagedCache(pool, list(range(blocks)))
        finally:
            self._kept_pool = pool

    def new_pool(self, blocks, block_size=BLOCK_SIZE):
        *shape, head_dim = self._cache_shape()
        pool = Pool(*shape, padded(head_dim), blocks, block_size)
        if head_dim % PACK:  # kernels read the padding, which must be zero, and never write it
            for stored in chain(*pool.storage):
                stored.values.fill(0)
        pool.lanes = Lanes(self.device, 1)
        return pool

    def without_padding(self, x):
        """Return the columns of x [T, D and padding] that are not padding: [T, D]."""
        return x if self.width == self.config.hidden_size else x[:, : self.config.hidden_size]

    def forward_batch(self, parts, logits_at=slice(None), record=unrecorded):
        """Run a pass over some sequences like Model.forward_batch; `record` gets the steps of this path."""
        one_each = all(len(ids) == 1 for ids, _ in parts)
        if one_each and len(parts) <= MAX_TOKENS and logits_at is not None:
            logits = self._decode(parts, record)[logits_at]
        else:
            logits = self.prefill(parts, logits_at, record)
        for ids, cache in parts:
            cache.advance(len(ids))
        return logits

    def decode_ahead(self, cache, prompt_ids, token, params, draws):
        """Yield the tokens that follow `token`, each with its log-probabilities or None.

        The GPU runs one token ahead of the host.

        Parameters
        ----------
        cache : PagedCache
            The sequence's cache, with room for all these tokens.
        prompt_ids : list of int
        token : int
            The first token of the continuation.
        params : SamplingParams
        draws : float64 [n]
            Uniform random numbers in [0, 1), one for each token to generate.
        """
        if not len(draws):
            return
        graph, on_the_way = self.decode_graph(cache.pool, 1), None
        cache.pool.lanes.start(0, params, prompt_ids, [token], room=len(draws))
        graph.fill([PENDING], [cache.length], [cache.block_table], lanes=[0])
        try:
            for draw in draws:
                if params.temperature > 0:
                    graph.draw.fill(draw)
                graph.launch()
                cache.advance(1)
                previous, on_the_way = on_the_way, OnTheWay(self.device)
                on_the_way.add(graph.results_of([params]))
                if previous is not None:
                    yield self._choice(previous, params)
            yield self._choice(on_the_way, params)
        except GeneratorExit:  # the host needs no more tokens
            on_the_way.read()
            raise

    def _choice(self, on_the_way, params):
        results = on_the_way.read()[0][:, 0].tolist()  # [n]
        self.comm.check()
        return int(results[0]), logprobs_of(results, params)

    def batches_ahead(self, pool, sequences):
        """Return the BatchesAhead of an engine that runs up to `sequences` sequences at the same time."""
        return BatchesAhead(self, pool, sequences)

    def decode_graph(self, pool, sequences):
        """Return a pool's DecodeGraph for `sequences`, rounded up to a power of two to save captures."""
        batch = 1
        while batch < sequences:
            batch *= 2
        if batch not in pool.graphs:
            context = min(self.config.max_position_embeddings, pool.blocks * pool.block_size)
            pool.graphs[batch] = DecodeGraph(self, pool, batch, -(-context // pool.block_size))
        return pool.graphs[batch]

    def _decode(self, parts, record):
        """Return the logits [n, V] of one token of each of n sequences; the next pass overwrites them."""
        tokens, caches = [int(ids[0]) for ids, _ in parts], [cache for _, cache in parts]
        graph = self.decode_graph(caches[0].pool, len(parts))
        graph.fill(tokens, [cache.length for cache in caches], [cache.block_table for cache in caches])
        if record is unrecorded:
            graph.launch()
        else:
            graph.run(record)
        return graph.logits[: len(parts)]
