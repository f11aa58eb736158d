"""Hooks on the modules of a Hugging Face transformers model, and on its RoPE and attention functions."""

import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from threading import get_ident

import numpy as np

from minitp.errors import InputError
from minitp.mapping.transformers import LAYERS, TRANSFORMERS
from minitp.probe.hooks import add_hooks
from minitp.probe.recorder import ProbeRecorder, to_numpy
from minitp.trace.names import full_name
from minitp.util.format import counted

ROPE, ATTENTION, ALL_REDUCE = "apply_rotary_pos_emb", "eager_attention_forward", "all_reduce"
NOT_A_MODEL = (
    "the probe needs a causal language model of transformers, mlx-lm or vLLM itself, without a wrapper (of "
    "torch.compile: model._orig_mod; of PEFT: model.merge_and_unload())"
)


class TransformersRecorder(ProbeRecorder):
    """The steps of the forward passes of a transformers model."""

    engine, recipes = "transformers", TRANSFORMERS
    block = thread = None  # "attn" or "mlp" while such a block of the layer runs, and the thread that runs it

    @staticmethod
    def fields_of(model):
        """Return the object in the config.json of a model."""
        if not hasattr(model, "set_attn_implementation"):
            raise InputError(f"{NOT_A_MODEL}, not a {type(model).__name__}")
        return model.config.to_dict()

    @contextmanager
    def hooked(self, model, recipe):
        """Record what the modules and functions of a model get and return, within a `with` block.

        Eager attention is switched on meanwhile, which has probabilities.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        self.check_modules(model, modules)
        with ExitStack() as stack:
            self.attention = model.config._attn_implementation
            stack.callback(partial(model.set_attn_implementation, self.attention))
            model.set_attn_implementation("eager")
            add_hooks(stack, model, modules, recipe, self)

            def add(register, hook):
                stack.callback(register(hook).remove)

            for layer in range(self.layers):
                for block, part in (("attn", "self_attn"), ("mlp", "mlp")):
                    module = modules[f"{LAYERS.format(i=layer)}.{part}"]
                    add(module.register_forward_pre_hook, partial(self.enter_block, block, layer))
                    add(module.register_forward_hook, self.leave_block)
            attention = modules[f"{LAYERS.format(i=0)}.self_attn"]
            functions = sys.modules[type(attention).__module__]
            observed = [(functions, ROPE), (functions, ATTENTION)]
            if self.ranks > 1 and "torch" in sys.modules:
                observed.append((sys.modules["torch"].distributed, ALL_REDUCE))
            for module, name in observed:
                original = getattr(module, name)
                stack.callback(setattr, module, name, original)
                setattr(module, name, self.observed(name, original))
            yield

    def check_modules(self, model, modules):
        """Raise an InputError unless a model has an output matrix and the attention of all layers."""
        compiled = next((path for path in modules if path.endswith("._orig_mod")), None)
        if compiled is not None:
            raise InputError(
                f"{compiled.removesuffix('._orig_mod')} is compiled by torch.compile, which calls no hooks; "
                "record the model before it is compiled"
            )
        attention = [f"{LAYERS.format(i=layer)}.self_attn" for layer in range(self.layers)]
        missing = [path for path in ("lm_head", *attention) if path not in modules]
        if missing[:1] == attention[:1] and "model.layers.0" in modules:
            raise InputError(
                f"this {type(model).__name__} has no {missing[0]}, and the probe finds arrays by the names "
                "of transformers' modules; name yours alike, or save the arrays yourself, as in \"Any other "
                'engine" of docs/judge.md'
            )
        if missing and missing[0] in ("lm_head", attention[0]):
            raise InputError(f"{NOT_A_MODEL}; this {type(model).__name__} has no {missing[0]}")
        if missing:
            raise InputError(
                f"the config has {counted(self.layers, 'layer')}, and the model has no {missing[0]}"
            )

    def begin(self, module, args, kwargs):
        """Begin a forward pass of the whole model, whose tokens are its first argument or input_ids."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or ids.shape[0] != 1:
            raise InputError("the probe records passes of one sequence, with input_ids [1, T]")
        if not isinstance(kwargs.get("logits_to_keep", 0), int):
            raise InputError("the probe needs logits of the last positions; pass logits_to_keep as an int")
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if getattr(mask, "ndim", 0) == 2 and not bool(mask.all()):
            raise InputError("the attention_mask hides tokens; pass the sequence without padding")
        if getattr(cache, "is_compileable", False):
            raise InputError(
                f"the probe cannot record a {type(cache).__name__}, which has positions that are not written "
                'yet; use a DynamicCache (in generate: cache_implementation="dynamic")'
            )
        length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else len(self.token_ids)
        if length != len(self.token_ids):
            raise InputError(
                f"this pass reads a cache of {counted(length, 'position')}, but the recording has "
                f"{counted(len(self.token_ids), 'token')}: record a prompt from its beginning, and without "
                "methods that take tokens back (prompt lookup, an assistant model)"
            )
        self.begin_pass(ids[0].tolist())

    def enter_block(self, block, layer, module, args):
        """Note that a block of a layer begins."""
        self.block, self.layer, self.thread = block, layer, get_ident()

    def leave_block(self, module, args, output):
        """Note that the block has ended."""
        self.block = None

    def runs(self, block):
        """Return whether this thread runs such a block of the model; other models share its functions."""
        return self.block == block and self.thread == get_ident()

    def take_input(self, source, layer, module, args, kwargs):
        """Record an input of a module, and with the first layer's the positions."""
        super().take_input(source, layer, module, args, kwargs)
        if source.step == "embed" and kwargs.get("position_ids") is not None:
            self.keep("positions", None, to_numpy(kwargs["position_ids"])[0].astype(np.int64))

    def keep_rotated(self, args, results):
        """Record the results of RoPE: q and k, or one of them if the model rotates each by itself.

        A result for both arguments being one tensor is q or k by its number of elements, compared with those
        of the projections; if these are equal, the first is q. Later ones are not recorded.
        """
        steps = "attn.q_rope", "attn.k_rope"
        if len(results) == 1 or (len(args) > 1 and args[0] is args[1]):
            tensor, pass_name = to_numpy(results[0]), self.passes[-1][0]
            free = [step for step in steps if full_name(pass_name, self.layer, step) not in self.arrays]
            of_size = [
                step
                for step in free
                if np.size(self.arrays.get(full_name(pass_name, self.layer, step.removesuffix("_rope")), ()))
                == tensor.size
            ]
            steps, results = (of_size or free)[:1], results[:1]
        for step, result in zip(steps, results, strict=False):
            letter = "H" if step == "attn.q_rope" else "K"
            self.keep_in_layout(step, self.layer, to_numpy(result), f"1 {letter} T d", self.sizes)

    def observed(self, name, function):
        """Return a function that records arguments and results of a function.

        The functions are the model's RoPE and attention, and all_reduce, whose first argument within a block
        is a partial sum of the block's output.
        """

        def observed_rope(*args, **kwargs):
            results = function(*args, **kwargs)
            if not self.runs("attn"):
                return results
            self.keep_rotated(args, results if isinstance(results, tuple | list) else (results,))
            return results

        def observed_attention(module, query, key, value, *args, **kwargs):
            if not self.runs("attn"):
                return function(module, query, key, value, *args, **kwargs)
            pass_name, start, _ = self.passes[-1]
            if start > 0 and key.shape[2] == query.shape[2]:
                raise InputError(
                    f"{pass_name} reads no cache: record one prompt in a file, and give its later passes the "
                    "cache of the one before (use_cache=True, past_key_values)"
                )
            for step, tensor in (("attn.k_cache", key), ("attn.v_cache", value)):
                self.keep_in_layout(step, self.layer, to_numpy(tensor), "1 K S d", self.sizes)
            output, probs = function(module, query, key, value, *args, **kwargs)
            if probs is not None:
                self.keep_in_layout("attn.probs", self.layer, to_numpy(probs), "1 H T S", self.sizes)
            return output, probs

        def observed_all_reduce(tensor, *args, **kwargs):
            step = f"{self.block}.out_partial"
            is_output = (
                self.runs(self.block) and self.block and tensor.shape[-1] == self.fields["hidden_size"]
            )
            if is_output and full_name(self.passes[-1][0], self.layer, step) not in self.arrays:
                partial_sum = to_numpy(tensor)  # [1, T, D] or [T, D]
                self.keep(step, self.layer, partial_sum.reshape(-1, partial_sum.shape[-1]))
            return function(tensor, *args, **kwargs)

        return {ROPE: observed_rope, ATTENTION: observed_attention, ALL_REDUCE: observed_all_reduce}[name]
