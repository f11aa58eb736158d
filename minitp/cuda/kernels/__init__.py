"""The kernels of a model, each a .cu with a Python file of the same name, compiled for the model's shapes.

A token:        begin_decode, linear (all products), attention_decode, sample; with several ranks all_reduce
A prompt:       rms_norm, cache_write, attention_prefill, swiglu
Several ranks:  join_columns, which puts gathered logits side by side
bench:          read_memory
"""

from functools import cached_property

from minitp.cuda.compiler import Compiler
from minitp.cuda.kernels.attention_decode import AttentionDecode
from minitp.cuda.kernels.attention_prefill import AttentionPrefill
from minitp.cuda.kernels.begin_decode import BeginDecode
from minitp.cuda.kernels.cache_write import CacheWrite
from minitp.cuda.kernels.join_columns import JoinColumns
from minitp.cuda.kernels.linear import Linear
from minitp.cuda.kernels.rms_norm import RmsNorm
from minitp.cuda.kernels.sample import Sample
from minitp.cuda.kernels.swiglu import Swiglu


class Kernels:
    """The kernels of one rank's model, compiled, or found in CuPy's cache.

    Those of a prompt are compiled here, while nobody waits for this rank; those of a decoding step depend on
    the batch, see `DecodeGraph`.

    Parameters
    ----------
    model : Model
        On a GPU, of a 16-bit dtype.
    compiler : Compiler, optional
        Another than for this model's GPU and dtype.
    """

    def __init__(self, model, compiler=None):
        self._model, self._cupy = model, model.device.cupy
        self.compiler = compiler or Compiler(self._cupy, model.device.dtype)
        self.linear = Linear(self.compiler)
        self.rms_norm = RmsNorm(self.compiler)
        self.swiglu = Swiglu(self.compiler)
        self.cache_write = CacheWrite(self.compiler, model.config.head_dim)

    @cached_property
    def join_columns(self):
        return JoinColumns(self.compiler, self._cupy, self._model.vocab_widths)

    @cached_property
    def sample(self):
        return Sample(self.compiler)

    def begin_decode(self, block_size):
        """For caches of such blocks."""
        return BeginDecode(self.compiler, block_size, self._model.vocab_start)

    def attention_prefill(self, block_size):
        """For caches of such blocks."""
        m = self._model
        return AttentionPrefill(
            self.compiler, self._cupy, m.query_groups, m.config.head_dim, block_size, m.config.windows[0]
        )

    def attention_decode(self, block_size, batch, max_context):
        """For caches of such blocks; it has memory of its own, for so many sequences of such lengths."""
        m, device = self._model, self._cupy.cuda.Device()
        return AttentionDecode(
            self.compiler,
            self._cupy,
            m.query_groups,
            m.config.head_dim,
            block_size,
            batch,
            max_context,
            device.attributes["MultiProcessorCount"],
            m.config.windows[0],
        )
