"""Generation: prefill the prompt, then one token a step, all ranks together.

Rank 0 alone looks at the logits and decides; the others learn the token from its broadcast, so the ranks
never disagree about what comes next. On the fused GPU path every rank's GPU chooses, from the same logits and
by the same draws, and a choice that is not rank 0's is an error.
"""

from minitp.errors import RankError
from minitp.request import check_prompt

SCORES = 1 << 24  # [H_r, T, S] of a prefill pass, at most: 64 MB, and as much again for what comes of them


def prefill(model, cache, token_ids, chunk=None):
    """Run a prompt through in passes of at most `chunk` tokens; return the last logits [V], on the host."""
    for start, stop in chunks(model, len(token_ids), chunk):
        last = stop == len(token_ids)
        logits_at = slice(-1, None) if last else None
        logits = model.forward(token_ids[start:stop], cache, logits_at)  # [1, V] or None
    return host_logits(model, logits)[0]


def chunks(model, tokens, chunk=None):
    """(start, stop) of the passes in which a prompt goes through the model."""
    start = 0
    while start < tokens:
        stop = min(tokens, start + largest_pass(model, start, chunk))
        yield start, stop
        start = stop


def largest_pass(model, past, chunk=None):
    """How many tokens a pass may take after `past` of them, so that [H_r, T, S] stays below SCORES.

    `chunk` is the most of them; None: the model's own. The fused path keeps no scores.
    """
    chunk = model.prefill_chunk if chunk is None else chunk
    if model.fused:
        return chunk
    heads = max(stop - start for start, stop in model.plan.head_ranges)  # of the rank that has most
    keys = max(min(past, window or past) for window in model.config.windows) + chunk
    return min(chunk, max(1, SCORES // (heads * keys)))


def host_logits(model, logits):
    """Logits as a NumPy array, which also waits for a GPU; RankError if a collective has failed on it."""
    host = model.device.to_host(logits)
    model.comm.check()
    return host


def generate(model, prompt_ids, request, use_cache=True):
    """Yield the new tokens, on every rank. All ranks must go on, or close the generator, at the same place.

    Parameters
    ----------
    model : Model
    prompt_ids : list of int
    request : Request
        Decides on rank 0; the other ranks may pass None.
    use_cache : bool
        False computes the whole sequence anew for each token, the O(n^2) way, to the same tokens.

    Raises
    ------
    InputError
        on every rank, if the prompt is empty, fills the context, or has an id outside the vocabulary.
    """
    comm = model.comm
    ids = list(prompt_ids)
    check_prompt(ids, model.config, model.config.max_position_embeddings)
    with model.sequence_cache(comm.broadcast(request.positions if comm.rank == 0 else None)) as cache:
        logits = prefill(model, cache, ids)  # [V]
        if model.fused and use_cache and comm.broadcast(request.params.logprobs is None if request else None):
            yield from generate_ahead(model, cache, logits, request)
            return
        while True:
            token, last = comm.broadcast(request.sample(logits) if comm.rank == 0 else None)
            yield token
            if last:
                return
            ids.append(token)
            if use_cache:
                logits = model.forward([token], cache, logits_at=slice(-1, None))  # [1, V]
                logits = host_logits(model, logits)[0]  # [V]
            else:
                logits = prefill(model, model.new_cache(len(ids)), ids)  # [V]


def generate_ahead(model, cache, logits, request):
    """The same on a GPU that chooses the tokens itself, and begins a step before the last one is looked at.

    So the GPU never waits for the host. Every rank's GPU chooses from the same logits, by the same draws.
    """
    comm, job = model.comm, None
    if comm.rank == 0:
        token, last = request.sample(logits)
        steps = request.positions - len(request.prompt_ids) - 1
        job = token, last, request.params, request.sampler.draws(0 if last else steps)
    token, last, params, draws = comm.broadcast(job)
    yield token
    if last:
        return
    for chosen in model.decode_ahead(cache, token, params, draws):
        token, last = comm.broadcast((chosen, request.append_token(chosen)) if comm.rank == 0 else None)
        if token != chosen:
            raise RankError(f"rank {comm.rank} chose token {chosen} and rank 0 {token}: their GPUs disagree")
        yield token
        if last:
            return
