"""Generation: prefill the prompt, then decode one token per pass, on all ranks together.

Only rank 0 samples from the logits. It broadcasts the token, so all ranks continue with the same one. On the
fused GPU path the GPU of every rank chooses the token itself, from the same logits and with the same random
numbers; it is an error if a rank's choice differs from rank 0's.
"""

from minitp.errors import RankError
from minitp.request import check_prompt

# Maximum number of attention scores [H_r, T, S] in a prefill pass: 64 MB, and as much for the probabilities.
MAX_SCORES = 1 << 24


def prefill(model, cache, token_ids, chunk=None):
    """Run a prompt through the model in passes of at most `chunk` tokens; return the last logits [V]."""
    for start, stop in chunks(model, len(token_ids), chunk):
        last = stop == len(token_ids)
        logits_at = slice(-1, None) if last else None
        logits = model.forward(token_ids[start:stop], cache, logits_at)  # [1, V] or None
    return host_logits(model, logits)[0]


def chunks(model, tokens, chunk=None):
    """Split a prompt of `tokens` tokens into passes; yield the (start, stop) of each."""
    start = 0
    while start < tokens:
        stop = min(tokens, start + largest_pass(model, start, chunk))
        yield start, stop
        start = stop


def largest_pass(model, past, chunk=None):
    """Return the maximum number of tokens in a pass that follows `past` positions.

    The maximum is `chunk` (None: the model's `prefill_chunk`), or less if there would be more than MAX_SCORES
    attention scores. The fused path does not store scores, so only `chunk` limits it.
    """
    chunk = model.prefill_chunk if chunk is None else chunk
    if model.fused:
        return chunk
    heads = max(stop - start for start, stop in model.plan.head_ranges)  # the largest H_r of all ranks
    keys = max(min(past, window or past) for window in model.config.windows) + chunk
    return min(chunk, max(1, MAX_SCORES // (heads * keys)))


def host_logits(model, logits):
    """Copy logits to the host, waiting for the GPU; raise RankError if a collective of the GPU has failed."""
    host = model.device.to_host(logits)
    model.comm.check()
    return host


def generate(model, prompt_ids, request, use_cache=True):
    """Yield the new tokens, on every rank.

    All ranks must consume the same number of tokens before they close the generator.

    Parameters
    ----------
    model : Model
    prompt_ids : list of int
    request : Request or None
        The request, on rank 0, which samples and decides when to stop. The other ranks may pass None.
    use_cache : bool
        False recomputes the whole sequence for each token: the same tokens, but O(n^2) work.

    Raises
    ------
    InputError
        On every rank, if the prompt is empty, fills the context, or has an id outside the vocabulary.
    """
    comm, ids = model.comm, list(prompt_ids)
    check_prompt(ids, model.config, model.config.max_position_embeddings)
    positions = comm.broadcast(request and request.params.max_new_tokens and request.positions)
    if not positions:  # max_new_tokens is 0
        return
    with model.sequence_cache(positions) as cache:
        logits = prefill(model, cache, ids)  # [V]
        if model.fused and use_cache and not comm.broadcast(request and request.params.needs_host):
            yield from generate_ahead(model, cache, ids, logits, request)
            return
        while True:
            token, last = next_token(comm, request, logits)
            yield token
            if last:
                return
            ids.append(token)
            if use_cache:
                logits = model.forward([token], cache, logits_at=slice(-1, None))  # [1, V]
                logits = host_logits(model, logits)[0]  # [V]
            else:
                logits = prefill(model, model.new_cache(len(ids)), ids)  # [V]


def next_token(comm, request, logits):
    """Choose the next token on rank 0, from logits [V]; return (token, is it the last) on every rank."""
    return comm.broadcast(request.sample(logits) if comm.rank == 0 else None)


def generate_ahead(model, cache, prompt_ids, logits, request):
    """Yield the new tokens as `generate` does, from a GPU that chooses them without waiting for the host.

    The GPU begins the next pass before the host has seen the last token. The GPU of every rank chooses from
    the same logits with the same random numbers, which rank 0 draws beforehand.
    """
    comm, first = model.comm, None
    if comm.rank == 0:
        token, last = request.sample(logits)
        remaining = request.positions - len(request.prompt_ids) - 1
        first = token, last, request.params, request.sampler.draws(0 if last else remaining)
    token, last, params, draws = comm.broadcast(first)
    yield token
    if last:
        return
    for chosen, logprobs in model.decode_ahead(cache, prompt_ids, token, params, draws):
        last = comm.rank == 0 and request.append_token(chosen, logprobs)
        token, last = comm.broadcast((chosen, last))
        check_choice(comm, chosen, token)
        yield token
        if last:
            return


def check_choice(comm, chosen, token):
    """Raise RankError unless the GPU of this rank has chosen rank 0's token."""
    if chosen != token:
        choices = f"rank {comm.rank} chose token {chosen} and rank 0 chose {token}"
        raise RankError(f"{choices}: their GPUs disagree")
