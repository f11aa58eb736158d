"""Make tests/support/transformers_configs.json: what Hugging Face transformers knows of config.json.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/support/make_transformers_configs.py

The file has two parts, and other versions of transformers add their defaults to the first:

    defaults   version -> family -> the fields of a config.json in which every default is written; the fields
               that all families of a version share stand under "shared"
    rope       for the RoPE of some published models: the fields of config.json, the inverse frequencies and
               the attention factor, and whether transformers warns of unknown fields
"""

import json
import logging
from pathlib import Path

import transformers
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

FILE = Path(__file__).parent / "transformers_configs.json"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma2", "granite", "mixtral", "phi3")
FAMILIES += ("qwen3_moe", "gemma3_text")

YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
QWEN = {"model_type": "qwen3", "head_dim": 128, "hidden_size": 4096, "num_attention_heads": 32}
QWEN |= {"max_position_embeddings": 131072, "rope_theta": 1000000}
MISTRAL = {"model_type": "mistral", "hidden_size": 4096, "num_attention_heads": 32, "rope_theta": 10000.0}
PHI = {"model_type": "phi3", "hidden_size": 3072, "num_attention_heads": 24, "rope_theta": 10000.0}
PHI |= {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
FACTORS = {"short_factor": [1 + i / 16 for i in range(48)], "long_factor": [1 + i for i in range(48)]}
ROPES = {
    "yarn": QWEN | {"rope_scaling": {**YARN, "rope_type": "yarn"}},
    "yarn with attn_factor": QWEN
    | {"rope_scaling": {**YARN, "rope_type": "yarn", "attn_factor": 0.8782488562869419}},
    "yarn with finetuned": MISTRAL
    | {"max_position_embeddings": 32768}
    | {"rope_scaling": {**YARN, "type": "yarn", "factor": 16.0, "finetuned": True}},
    "yarn with DeepSeek's fields": QWEN
    | {"rope_scaling": {**YARN, "type": "yarn", "mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 16}},
    "linear with the field of another type": MISTRAL
    | {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}},
    "longrope of 96 of 128 dimensions": PHI
    | {"partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope", **FACTORS}},
    "default of 96 of 128 dimensions": PHI
    | {"rope_parameters": {"partial_rotary_factor": 0.75, "rope_theta": 1e6, "rope_type": "default"}},
}


def defaults():
    """Return the fields of each family that this version of transformers has, and those that all share."""
    families = [name for name in FAMILIES if name in CONFIG_MAPPING]
    written = {name: AutoConfig.for_model(name).to_json_string(use_diff=False) for name in families}
    fields = {name: json.loads(text) for name, text in written.items()}
    first, *others = fields.values()
    shared = {k: v for k, v in first.items() if all(k in each and each[k] == v for each in others)}
    return {
        "shared": shared,
        **{name: {k: v for k, v in f.items() if k not in shared} for name, f in fields.items()},
    }


def rope(fields):
    """Return a row of the file: what transformers computes from these fields, and whether it warns."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

    warnings = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    config = AutoConfig.for_model(**json.loads(json.dumps(fields)))
    logger.removeHandler(handler)
    kind = config.rope_parameters["rope_type"]
    plain = Phi3RotaryEmbedding.compute_default_rope_parameters
    frequencies, factor = (plain if kind == "default" else ROPE_INIT_FUNCTIONS[kind])(config)
    warned = any("Unrecognized keys" in text for text in warnings)
    rounded = [float(f"{x:.7g}") for x in frequencies.tolist()]
    return {"fields": fields, "frequencies": rounded, "attention_factor": factor, "warned": warned}


def main():
    found = json.loads(FILE.read_text()) if FILE.exists() else {"defaults": {}}
    found["defaults"][transformers.__version__] = defaults()
    if transformers.__version__ == "5.23.0":
        found["rope"] = {name: rope(fields) for name, fields in ROPES.items()}
    FILE.write_text(text_of(found) + "\n")


def text_of(found, depth=3):
    """Return JSON with a line for each family of a version, and for each field of a RoPE."""
    if depth == 0 or not isinstance(found, dict):
        return json.dumps(found, sort_keys=True)
    inner = (f"{json.dumps(name)}: {text_of(value, depth - 1)}" for name, value in sorted(found.items()))
    return "{\n" + ",\n".join(inner) + "\n}"


if __name__ == "__main__":
    main()
