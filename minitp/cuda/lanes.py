"""The state of sampling on the GPU: a lane for each running sequence, with its settings and last token."""

import numpy as np

from minitp.cuda.kernels.sample import WORDS, history_of, settings_of


class Lanes:
    """The lanes of a pool's sequences. A sequence keeps its lane while its row in the batches changes.

    A history has room for every token that may still be chosen, so the kernel adds tokens without the host.

    Parameters
    ----------
    gpu : Gpu
    count : int

    Attributes
    ----------
    settings : uint64 [lanes, WORDS]
        The SamplingParams of each lane; see `kernels.sample.settings_of`.
    chosen : int32 [lanes]
        The last token of each lane.
    """

    def __init__(self, gpu, count):
        self._gpu, self._histories = gpu, [None] * count
        self.settings = gpu.cupy.zeros((count, WORDS), np.uint64)
        self.chosen = gpu.cupy.zeros(count, np.int32)

    def start(self, lane, params, prompt_ids, new_ids, room):
        """Let a lane choose up to `room` tokens after a prompt and the tokens `new_ids`.

        A history is freed by the next sequence in its lane. Launches that still use it come first on the
        stream, on which its memory is used again.
        """
        history = None
        if params.changes_logits:
            history = self._gpu.from_host(history_of(params, prompt_ids, new_ids, room).view(np.int32))
        self._histories[lane] = history
        settings = settings_of(params, 0 if history is None else history.data.ptr)  # [WORDS]
        self.settings[lane] = self._gpu.from_host(settings)
        if new_ids:
            self.chosen[lane : lane + 1] = self._gpu.from_host(np.array(new_ids[-1:], np.int32))


def logprobs_of(results, params):
    """Return the log-probabilities in a row of `sample`'s results, like `sampling.token_logprobs`.

    Parameters
    ----------
    results : list of float
        At least as many as `params` asks for, if the vocabulary has as many tokens.
    params : SamplingParams

    Returns
    -------
    (float, list of (int, float)) or None
        None if `params` asks for none.
    """
    if params.logprobs is None:
        return None
    top = results[2 : 2 + 2 * params.logprobs]
    pairs = zip(top[::2], top[1::2], strict=True)
    return results[1], [(int(token), logprob) for token, logprob in pairs]


class OnTheWay:
    """A set of copies of GPU arrays to pinned memory of the host, which the host waits for later.

    CuPy reuses freed pinned memory at once. So `read` must be called even if no one needs the copies.

    Parameters
    ----------
    gpu : Gpu
    """

    def __init__(self, gpu):
        self._gpu, self._event = gpu, gpu.cupy.cuda.Event(disable_timing=True)
        self._arrays, self._kept = [], []

    def keep(self, memory):
        """Keep memory until `read` has waited for all work already on the stream, which uses it."""
        self._kept.append(memory)
        self._event.record(self._gpu.stream)

    def add(self, array):
        """Copy a contiguous array after all work already on the stream; return its index in `read`."""
        import cupyx

        runtime, stream = self._gpu.cupy.cuda.runtime, self._gpu.stream
        pinned, kind = cupyx.empty_pinned(array.shape, array.dtype), runtime.memcpyDeviceToHost
        runtime.memcpyAsync(pinned.ctypes.data, array.data.ptr, array.nbytes, kind, stream.ptr)
        self._event.record(stream)
        self._arrays.append(pinned)
        return len(self._arrays) - 1

    def read(self):
        """Wait for the copies and return them, NumPy arrays of the same shapes."""
        self._event.synchronize()
        return self._arrays
