"""All kernels of a model, compiled for its shapes."""

from functools import cached_property

from minitp.cuda.attention_decode import AttentionDecode
from minitp.cuda.attention_prefill import AttentionPrefill
from minitp.cuda.begin_step import BeginStep
from minitp.cuda.cache_write import CacheWrite
from minitp.cuda.compiler import Compiler
from minitp.cuda.join_columns import JoinColumns
from minitp.cuda.linear import Linear
from minitp.cuda.rms_norm import RmsNorm
from minitp.cuda.sample import Sample
from minitp.cuda.swiglu import Swiglu


class Kernels:
    """The kernels of one rank's model. Each is compiled when it is first used, or found in CuPy's cache.

    Parameters
    ----------
    model : Model
        On a GPU, of a 16-bit dtype.
    """

    def __init__(self, model):
        self._model, self._cupy = model, model.device.cupy
        self._compiler = Compiler(self._cupy, model.device.dtype)
        self.linear = Linear(self._compiler)
        self.rms_norm = RmsNorm(self._compiler)

    @cached_property
    def swiglu(self):
        return Swiglu(self._compiler)

    @cached_property
    def cache_write(self):
        return CacheWrite(self._compiler, self._model.config.head_dim)

    @cached_property
    def join_columns(self):
        return JoinColumns(self._compiler, self._cupy, self._model.vocab_widths)

    @cached_property
    def sample(self):
        return Sample(self._compiler)

    def begin_step(self, block_size):
        """For caches of such blocks."""
        return BeginStep(self._compiler, block_size, self._model.vocab_start)

    def attention_prefill(self, block_size):
        """For caches of such blocks."""
        m = self._model
        return AttentionPrefill(
            self._compiler, self._cupy, m.query_groups, m.config.head_dim, block_size, m.config.sliding_window
        )

    def attention_decode(self, block_size, batch, max_context):
        """For caches of such blocks; it has memory of its own, for so many sequences of such lengths."""
        m, device = self._model, self._cupy.cuda.Device()
        return AttentionDecode(
            self._compiler,
            self._cupy,
            m.query_groups,
            m.config.head_dim,
            block_size,
            batch,
            max_context,
            device.attributes["MultiProcessorCount"],
            m.config.sliding_window,
        )
