"""The steps of each engine, looked up by the names that its arrays have in a dump.

A dump calls the output of a module by the module's path, or by the path and `.output`, and an input by the
path and `.input`. A number may follow, as in `.input.1`, if there are several.
"""

import re

from minitp.mapping.llama_cpp import llama_cpp_steps
from minitp.mapping.lookup import number_pattern
from minitp.mapping.megatron import MEGATRON
from minitp.mapping.mlx import MLX
from minitp.mapping.table import OUT, out
from minitp.mapping.transformers import TRANSFORMERS
from minitp.mapping.vllm import VLLM
from minitp.trace.names import AFTER, BEFORE

NAME = re.compile(r"(.*?)(?:\.(?P<where>input|output)(?:\.(?P<index>\d+))?)?")


def step_table(engine, config):
    """Return the steps of an engine's modules in a model: path -> list of Source, with {i} for a layer."""
    if engine == "megatron":
        return MEGATRON
    if engine == "llama.cpp":
        return names_in_dumps(llama_cpp_steps(config.model_type))
    if engine == "vllm" and config.model_type in VLLM:  # it runs others with the modules of transformers
        return VLLM[config.model_type]
    table = (MLX if engine == "mlx" else TRANSFORMERS)[config.model_type]
    if config.embedding_multiplier == 1:  # else it is multiplied outside the module
        table = table | {"model.embed_tokens": [out("embed")]}
    if config.logits_scaling == 1 and config.final_logit_softcapping is None:
        table = table | {"lm_head": [out("logits", "1 T V")]}
    return table


def names_in_dumps(table):
    """Return the part of llama.cpp's table that a dump by name can use.

    Left out are names without the number of their layer, and arrays that have room for more positions.
    """
    return {
        name: sources
        for name, sources in table.items()
        if "{i}" in name or sources[0].step in BEFORE | AFTER
        if not any("S" in source.layout.split() for source in sources)
    }


class StepLookup:
    """The steps of an engine, for one model.

    Parameters
    ----------
    engine : str
    config : Config
    """

    def __init__(self, engine, config):
        table, self._config = step_table(engine, config), config
        self._table = [(number_pattern(path), sources) for path, sources in table.items()]

    def find(self, name):
        """Return (layer or None, Source) of an array's name, or None if it is no step.

        >>> from minitp.loading.source import open_config
        >>> layer, source = StepLookup("hf", open_config("random:smollm2-135m")).find(
        ...     "model.layers.3.self_attn.o_proj.input"
        ... )
        >>> layer, source.step
        (3, 'attn.context')
        """
        path, where, index = NAME.fullmatch(name).groups()
        for pattern, sources in self._table:
            found = pattern.fullmatch(path)
            for source in sources if found else ():
                if source.where == (where or OUT) and source.index == int(index or 0):
                    return self._layer_of(source, found.groupdict().get("i")), source
        return None

    def _layer_of(self, source, number):
        """Return the layer of a step, by the number in its module's path; None means after the layers."""
        if source.step in BEFORE | AFTER:
            return None
        return (self._config.num_hidden_layers if number is None else int(number)) + source.offset
