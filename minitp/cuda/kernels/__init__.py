"""The kernels of a model, compiled for its shapes; each is a .cu file with a Python file of the same name.

Decode:         begin_decode, linear (all products), attention_decode, sample; with several ranks all_reduce
Prefill:        rms_norm, cache_write, attention_prefill, swiglu
Some families:  heads (norms of q and k heads; in a prefill also partial RoPE and padded heads)
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
from minitp.cuda.kernels.heads import Heads
from minitp.cuda.kernels.join_columns import JoinColumns
from minitp.cuda.kernels.linear import Linear
from minitp.cuda.kernels.rms_norm import RmsNorm
from minitp.cuda.kernels.route import Route
from minitp.cuda.kernels.sample import Sample
from minitp.cuda.kernels.swiglu import Swiglu
from minitp.cuda.loader import padded


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
        self.processors = self._cupy.cuda.Device().attributes["MultiProcessorCount"]
        c = model.config
        norm = {"PLUS_ONE": 1} if c.norm_plus_one else {}
        activation = {} if c.hidden_act == "silu" else {"GELU": 1}
        cap = {} if c.final_logit_softcapping is None else {"SOFT_CAP": 1}
        self.linear = Linear(self.compiler, self.processors, **norm, **activation, **cap)
        self.rms_norm = RmsNorm(self.compiler, c.post_norms, **norm)
        self.swiglu = Swiglu(self.compiler, **activation)
        self.cache_write = self.heads = None  # a prefill needs one of the two
        if c.rotary_dim == c.head_dim == padded(c.head_dim) and not c.qk_norm:
            self.cache_write = CacheWrite(self.compiler, c.head_dim)
        else:
            self.heads = Heads(self.compiler, c.head_dim, c.rotary_dim, c.rms_norm_eps, **norm)
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
        m = self._model
        return BeginDecode(self.compiler, block_size, m.vocab_start, m.embedding_multiplier)

    def attention_prefill(self, block_size):
        """Return an AttentionPrefill for each window of the model's layers, by window."""
        m = self._model
        shape = self._cupy, m.query_groups, m.config.head_dim, block_size
        return {
            window: AttentionPrefill(self.compiler, *shape, window, **m.score_options)
            for window in set(m.config.windows)
        }

    def attention_decode(self, block_size, batch, max_context):
        """Return an AttentionDecode for up to `batch` sequences of `max_context` tokens, by window."""
        m = self._model
        shape = self._cupy, m.query_groups, m.config.head_dim, block_size, batch, max_context, self.processors
        return {
            window: AttentionDecode(self.compiler, *shape, window, **m.score_options)
            for window in set(m.config.windows)
        }
