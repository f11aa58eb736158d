"""Requests for tests of the engine, run in batches or alone."""

import random
from collections import Counter

from minitp.engine.engine import Engine
from minitp.generate import generate
from minitp.request import Request
from minitp.sampling import SamplingParams

CONTEXT = 512

SHAPES = {
    "plain": {},
    "window": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 6},
    "windows that differ": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "query_pre_attn_scalar": 8,
        "sliding_window": 6,
    },
    "uneven": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48},
}


def requests(count, seed=0, longest=30, most_new=25, prefixes=1):
    """Return requests with random prompts, some with a common prefix, and random limits."""
    rng = random.Random(seed)
    heads = [[rng.randrange(256) for _ in range(20)] for _ in range(prefixes)]
    found = []
    for _ in range(count):
        prompt = [rng.randrange(256) for _ in range(rng.randint(1, longest))]
        if rng.random() < 0.5:
            prompt = rng.choice(heads)[: rng.randint(1, 20)] + prompt
        params = SamplingParams(max_new_tokens=rng.randint(1, most_new), ignore_eos=True)
        found.append(Request(params, (), prompt, CONTEXT))
    return found


def alone(model, request):
    """Return the tokens of a request that runs alone."""
    again = Request(request.params, (), request.prompt_ids, CONTEXT)
    return list(generate(model, request.prompt_ids, again if model.comm.rank == 0 else None))


def check_blocks(scheduler):
    """Check the reference counts against the block tables, and the order of the queues."""
    allocator = scheduler.allocator
    stopped = {chunk.sequence for batch in scheduler._in_flight for chunk in batch if chunk.sequence.stopped}
    users = Counter(block for s in [*scheduler.running, *stopped] for block in s.block_table)
    assert [users[block] for block in range(allocator.num_blocks)] == allocator.ref_count
    assert allocator.num_free_blocks == allocator.ref_count.count(0)
    assert all(not s.block_table for s in scheduler.waiting)
    numbers = [s.number for s in [*scheduler.running, *scheduler.waiting]]
    assert numbers == sorted(numbers), "a younger sequence has overtaken an older one"


def run_requests(model, wanted, num_blocks, block_size, later=(), **limits):
    """Run requests, to which those of `later` are added in the meantime; return the scheduler (on rank 0)."""
    engine = Engine(model, num_blocks, block_size, **limits)
    scheduler = engine.scheduler
    if scheduler:
        for request in wanted:
            engine.add(request)
    for n in range(10_000):
        if scheduler and n % 3 == 2 and later:
            engine.add(later.pop(0))
        if engine.run_batch() is None:
            break
        if scheduler:
            check_blocks(scheduler)
    return scheduler
