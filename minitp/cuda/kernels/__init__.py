"""The kernels of a model, compiled for its shapes; each is a .cu file with a Python file of the same name.

Decode:         begin_decode, linear (all products), attention_decode, sample; with several ranks all_reduce
Prefill:        rms_norm, cache_write, attention_prefill, swiglu
Several ranks:  join_columns, which concatenates the logits gathered from all ranks
Experts:        route, expert_linear, expert_sum, in decode and in prefill
bench:          read_memory
"""

from functools import cached_property

from minitp.cuda.compiler import Compiler
from minitp.cuda.kernels.attention_decode import AttentionDecode
from minitp.cuda.kernels.attention_prefill import AttentionPrefill
from minitp.cuda.kernels.begin_decode import BeginDecode
from minitp.cuda.kernels.cache_write import CacheWrite
from minitp.cuda.kernels.expert_linear import ExpertLinear
from minitp.cuda.kernels.expert_sum import ExpertSum
from minitp.cuda.kernels.join_columns import JoinColumns
from minitp.cuda.kernels.linear import Linear
from minitp.cuda.kernels.rms_norm import RmsNorm
from minitp.cuda.kernels.route import Route
from minitp.cuda.kernels.sample import Sample
from minitp.cuda.kernels.swiglu import Swiglu


class Kernels:
    """The kernels of one rank's model, compiled or loaded from CuPy's cache.

    The kernels of a prefill are compiled in the constructor, while no other rank waits for this one. The
    kernels of a decode pass depend on the batch size, so `DecodeGraph` compiles them.

    Parameters
    ----------
    model : Model
        A model on a GPU, of a 16-bit dtype.
    compiler : Compiler, optional
        A replacement for the compiler of this model's GPU and dtype.
    """

    def __init__(self, model, compiler=None):
        self._model, self._cupy = model, model.device.cupy
        self.compiler = compiler or Compiler(self._cupy, model.device.dtype)
        self.linear = Linear(self.compiler)
        self.rms_norm = RmsNorm(self.compiler)
        self.swiglu = Swiglu(self.compiler)
        self.cache_write = CacheWrite(self.compiler, model.config.head_dim)
        if model.config.num_local_experts:
            self.route = Route(self.compiler, self._cupy, model.config.norm_topk_prob)
            self.expert_linear = ExpertLinear(self.compiler)
            self.expert_sum = ExpertSum(self.compiler)

    @cached_property
    def join_columns(self):
        return JoinColumns(self.compiler, self._cupy, self._model.vocab_widths)

    @cached_property
    def sample(self):
        return Sample(self.compiler)

    def begin_decode(self, block_size):
        """Return a BeginDecode for caches with blocks of `block_size` positions."""
        return BeginDecode(self.compiler, block_size, self._model.vocab_start)

    def attention_prefill(self, block_size):
        """Return an AttentionPrefill for caches with blocks of `block_size` positions."""
        m = self._model
        return AttentionPrefill(
            self.compiler, self._cupy, m.query_groups, m.config.head_dim, block_size, m.config.windows[0]
        )

    def attention_decode(self, block_size, batch, max_context):
        """Return an AttentionDecode for up to `batch` sequences of `max_context` tokens."""
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
