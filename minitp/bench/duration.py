"""An estimate of how long a benchmark takes, from the machine's limits, so that it can be announced."""

from minitp.bench.cpu_roofline import LEAST_S

SLOWER = 1.5  # a model takes about this times as long as its limit, including what is not measured


def expected_seconds(job, limits, model):
    """Return the expected time in seconds of a Job without --requests.

    Parameters
    ----------
    job : Job
    limits : dict
        The result of `Roofline.measure`.
    model : Model
    """
    if job.sweep == "context":
        points = [(1, context) for context in job.points]
    elif job.sweep == "batch":
        points = [(batch, job.prompt_tokens) for batch in job.points]
    else:
        points = [(1, job.prompt_tokens)]
    return sum(job.rounds * round_seconds(job, limits, model, *point) for point in points)


def round_seconds(job, limits, model, sequences, prompt_tokens):
    """Return the expected time of one round: the prompts, the new tokens, and their limits."""
    prompts = sequences * prompt_seconds(limits, model, prompt_tokens)
    reading = limits["bytes_per_token"] / (1e9 * limits["bandwidth_gb_per_s"])
    decode = max(reading, prompt_seconds(limits, model, 1) * sequences)
    bare = 2 * LEAST_S + prompt_seconds(limits, model, prompt_tokens)
    return SLOWER * (prompts + job.new_tokens * decode) + bare


def prompt_seconds(limits, model, tokens):
    """Return the time of a prompt's products at the matrix rate; all keys count for every token."""
    config, elements = model.config, limits["bytes_per_token"] / model.device.dtype.itemsize
    columns = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    operations = 2 * tokens * elements + 4 * tokens * tokens * columns
    return operations / (1e9 * limits["matrix_gflop_per_s"])
