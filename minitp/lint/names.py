"""The names of an engine's tensors: the weights of the model, and the tensors that are not compared."""

import re
from dataclasses import replace

from minitp.loading.checkpoint import BUFFERS
from minitp.loading.weights import EMBED, LM_HEAD

# Entries of engines that are no weights: states of layers, RoPE's tables, scales of a cache.
IGNORED = re.compile(
    r"_extra_state|(^|\.)rope_freqs\.weight$|(^|\.)rotary_emb\w*\.\w+$|\.attn\._?(q|k|v|prob)_(scale|range)$"
)
# Modules that put their own name before those of the language model's tensors.
WRAPPERS = {
    "module",
    "model",
    "language_model",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "base_model",
    "text_model",
    "llm",
}
# Modules of other models next to the language model.
OTHER_MODEL = re.compile(
    r"(?:^|.*?\.)(?:vision_\w+|visual|image_\w+|audio_\w+|speech_\w+|embed_(?:vision|audio)"
    r"|multi_?modal_projector|mm_projector|ema|ema_model)(?=\.|$)"
)
LAYER = re.compile(r"(?<=^model\.layers\.)\d+(?=\.)")
EXPERT = re.compile(r"(?<=\.experts\.)(\d+|\{n\})(?=\.)")


def is_ignored(name):
    """Return whether a name is that of a buffer, which is not compared."""
    return bool(BUFFERS.search(name) or IGNORED.search(name))


def other_model(name):
    """Return the module of another model that a tensor belongs to, or "".

    >>> other_model("model.vision_tower.layers.0.mlp.fc1.weight"), other_model("model.norm.weight")
    ('model.vision_tower', '')
    """
    found = OTHER_MODEL.match(name)
    return found[0] if found else ""


class KnownNames:
    """The names that say which tensors of the checkpoint a tensor joins.

    Parameters
    ----------
    lookup : TensorLookup
    pieces : CheckpointPieces
    """

    def __init__(self, lookup, pieces):
        self._lookup, self._pieces = lookup, pieces
        self._patterns = {pattern_of(name) for name in pieces.names}

    def layout(self, name):
        """Return the EngineTensor of a name, or None if the name does not say what the tensor is."""
        return next((layout for layout in self._layouts(name) if self._exists(layout.parts)), None)

    def excess(self, name):
        """Return a text about a layer or an expert that the model does not have, or ""."""
        for layout in self._layouts(name):
            if not self._patterns.issuperset(map(pattern_of, layout.parts)):
                continue
            for number, noun in ((LAYER, "layer"), (EXPERT, "expert")):
                found = number.search(layout.parts[0])
                known = {own[0] for own in map(number.search, self._pieces.names) if own}
                if found and found[0] not in {*known, "{n}"}:
                    return f"belongs to {noun} {found[0]}, but there are only {noun}s 0:{len(known)}"
        return ""

    def _layouts(self, name):
        """Yield the layouts of a name with and without the names of wrappers."""
        words = name.split(".")
        for start in range(len(words)):
            if not WRAPPERS.issuperset(words[:start]):
                return
            for candidate in (".".join(words[start:]), ".".join(["model", *words[start:]])):
                layout = self._lookup.find(candidate)
                tied = LM_HEAD not in self._pieces
                parts = tuple(EMBED if tied and part == LM_HEAD else part for part in layout.parts)
                yield replace(layout, parts=parts)

    def _exists(self, parts):
        """Return whether the checkpoint has all parts."""
        return all(part.replace("{n}", "0") in self._pieces for part in parts)


def pattern_of(name):
    """Return a checkpoint's name without the numbers of the layer and the expert.

    >>> pattern_of("model.layers.3.mlp.experts.12.up_proj.weight")
    'model.layers.*.mlp.experts.*.up_proj.weight'
    """
    return EXPERT.sub("*", LAYER.sub("*", name))
