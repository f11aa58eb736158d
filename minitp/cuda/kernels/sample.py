"""Launch sample.cu, the GPU counterpart of `sampling.Sampler.choose` and `sampling.token_logprobs`."""

import numpy as np

from minitp.sampling import GPU_LOGPROBS

THREADS = 256  # the same number as in sample.cu
RESULTS = (
    2 + 2 * GPU_LOGPROBS
)  # numbers per row: its token, the log-probability, and (id, log-probability) pairs
SETTINGS = np.dtype(  # the struct Settings of sample.cu
    [
        *((name, np.float64) for name in ("temperature", "top_p", "min_p")),
        ("history", np.uint64),
        *((name, np.float32) for name in ("repetition", "frequency", "presence")),
        *((name, np.int32) for name in ("top_k", "logprobs", "unused")),
    ]
)
WORDS = SETTINGS.itemsize // 8  # settings are arrays of 64-bit words
CHANGE = np.dtype([("id", np.int32), ("count", np.int32), ("bias", np.float32), ("original", np.float32)])


class Sample:
    """A kernel that samples the next token of each row of logits, with the settings of the row's lane.

    Parameters
    ----------
    compiler : Compiler
    """

    def __init__(self, compiler):
        self._kernel = compiler.kernel("sample.cu", "sample")

    def __call__(self, logits, lane, settings, draw, chosen, results):
        """Choose the next token of each row; the host would choose the same for the same draw.

        Parameters
        ----------
        logits : float32 [B, V]
            The array may be a view of a wider one, but rows must begin at multiples of 16 bytes. A row with
            NaN or +inf, or with only -inf, gets the greedy choice, and NaN counts as the largest.
        lane : int32 [B]
            The index of the row's sequence in `settings` and `chosen`; a row below 0 is skipped (padding, or
            the host chooses).
        settings : uint64 [lanes, WORDS]
            The result of `settings_of` for each lane.
        draw : float64 [B]
            Uniform random numbers in [0, 1).
        chosen : int32 [lanes]
            An output: the token of each lane.
        results : float64 [RESULTS, B]
            An output: the token, its log-probability, and the ids and log-probabilities of the most probable
            tokens in turn. Only as many as the settings ask for are written.
        """
        rows, size = logits.shape
        stride = logits.strides[0] // 4
        if stride % 4:
            raise ValueError(f"rows of logits are {stride} elements apart, which is not a multiple of 4")
        args = (logits, lane, settings, draw, chosen, results, np.int32(size), np.int32(stride))
        self._kernel((rows,), (THREADS,), args)


def settings_of(params, history=0):
    """Return a lane's settings, uint64 [WORDS], from SamplingParams and the address of its history."""
    settings = np.zeros(1, SETTINGS)
    settings["history"] = history
    for name in ("temperature", "top_p", "min_p"):
        settings[name] = getattr(params, name)
    for name in ("repetition", "frequency", "presence"):
        settings[name] = getattr(params, f"{name}_penalty")
    settings["top_k"] = min(params.top_k, np.iinfo(np.int32).max)
    settings["logprobs"] = -1 if params.logprobs is None else params.logprobs
    return settings.view(np.uint64)


def results_needed(params, vocabulary):
    """Return the number of results per row that some SamplingParams ask for, from the first."""
    tops = [min(one.logprobs, vocabulary) for one in params if one.logprobs is not None]
    return 2 + 2 * max(tops) if tops else 1


def history_of(params, prompt_ids, new_ids, room):
    """Return the tokens whose logits `params` change, and their counts: CHANGE [1 + n + room].

    Parameters
    ----------
    params : SamplingParams
    prompt_ids, new_ids : list of int
        The tokens of the prompt and the continuation so far.
    room : int
        The number of tokens that the kernel may add.
    """
    bias = params.logit_bias or {}
    prompt = prompt_ids if params.repetition_penalty != 1 else ()
    ids = np.unique(np.array([*bias, *prompt, *new_ids], np.int32))  # [n]
    history = np.zeros(1 + len(ids) + room, CHANGE)
    history["id"][0] = len(ids)
    entries = history[1 : 1 + len(ids)]
    entries["id"], entries["count"] = ids, -1
    entries["count"][np.searchsorted(ids, prompt)] = 0
    new, times = np.unique(np.array(new_ids, np.int32), return_counts=True)  # [m] each
    entries["count"][np.searchsorted(ids, new)] = times
    entries["bias"][np.searchsorted(ids, list(bias))] = list(bias.values())
    return history
