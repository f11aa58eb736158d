"""Tokenizers with all kinds of settings, and what Hugging Face transformers makes of them.

The expected values in tokenizer_settings.json are made by running this file with transformers:

    pip install torch==2.13.0 transformers==5.23.0 jinja2==3.1.6      (the file records the versions)
    PYTHONPATH=tests/support:. python tests/support/tokenizer_settings.py

They are, for each case: the token ids of TEXT with and without special tokens, and the rendering of the
case's chat template, or of TOKENS if it has none.
"""

import json
import tempfile
from pathlib import Path

from tiny import CONFIG, byte_tokenizer

EXPECTED = Path(__file__).with_name("tokenizer_settings.json")
TEXT = "Hi <s>there</s>, <t> <unk> and <|im_end|> end"
NAMES = [
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
    "image_token",
]
TOKENS = "|".join(f"{{{{ {name} }}}}{{{{ {name} is defined }}}}" for name in NAMES)
MESSAGES = [{"role": "user", "content": "Hi", "tool_calls": None}, {"role": "assistant", "content": "Yo"}]

TRUNCATION = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDING = {"direction": "Right", "pad_id": 257, "pad_token": "</s>", "pad_type_id": 0}
PADDING |= {"strategy": {"Fixed": 64}, "pad_to_multiple_of": None}
BOTH = {"bos_token": "<s>", "eos_token": "</s>"}
MAP = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": "</s>"}
DECODER = {"256": {"content": "<s>", "special": True}, "257": {"content": "</s>", "special": True}}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
PIECES = {"pre_tokenizer": METASPACE, "decoder": METASPACE}
STRIPPED = {"__type": "AddedToken", "content": "<unk>", "lstrip": True, "rstrip": True, "special": True}
FOLDER = "additional_chat_templates"
VOCABULARY = ["<s>", "</s>", "<unk>", "<pad>", "<bos>", "<eos>", "<mask>", "<|endoftext|>"]  # ids 256 to 263
NEXT = {"264": {"content": "<t>", "special": True}, "265": {"content": "<|im_end|>", "special": False}}
GENERATION = """{% for m in messages %}{{ m.role }}:{% generation %}{% set x = 1 %}
  {{ m.content }}{% endgeneration %}{% endfor %}{{ x is defined }}"""
ARGUMENTS = """{% if tools is defined and tools is none and documents is none %}no tools{% endif %}
{% for m in messages %}{% for key in m %} {{ key }}{% endfor %}{% endfor %}
{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{{ bos_token }}"""
NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "the default"}]


def case(tokenizer=None, config=None, drop=(), variables=None, **files):
    """Return a case: changes of tokenizer.json, tokenizer_config.json, and other files by their stems.

    `drop` are tokens that are in the vocabulary, but not among the added tokens.
    """
    return {
        "tokenizer": tokenizer or {},
        "config": config,
        "drop": list(drop),
        "files": files,
        "variables": variables or {},
    }


CASES = {
    "plain": case(),
    "truncation": case({"truncation": TRUNCATION}),
    "padding": case({"padding": PADDING}),
    "padding and truncation": case({"padding": PADDING, "truncation": TRUNCATION}, BOTH),
    "padding, null pad_token": case({"padding": PADDING}, {"pad_token": None}),
    "config": case(
        config=BOTH | {"image_token": "<t>", "unk_token": {"__type": "AddedToken", "content": "<unk>"}}
    ),
    "map only": case(special_tokens_map=MAP),
    "map over config": case(config={"bos_token": "</s>", "unk_token": "<s>"}, special_tokens_map=MAP),
    "map is a copy": case(config={"added_tokens_decoder": DECODER}, special_tokens_map=MAP),
    "null in the map": case(config=BOTH, special_tokens_map={"bos_token": None}),
    "not added": case(drop=["<s>", "</s>"]),
    "not added, named": case(config=BOTH, drop=["<s>", "</s>"]),
    "not added, listed": case(config={"added_tokens_decoder": DECODER}, drop=["<s>", "</s>"]),
    "next ids listed": case(config={"added_tokens_decoder": DECODER | NEXT}),
    "added_tokens.json": case(config=BOTH, added_tokens={"<t>": 264, "<|im_end|>": 265}),
    "add BOS": case(config=BOTH | {"add_bos_token": True}),
    "add both": case(config=BOTH | {"add_bos_token": True, "add_eos_token": True}),
    "add no BOS": case({"bos": True}, BOTH | {"add_bos_token": False}),
    "add no EOS": case({"bos": True}, BOTH | {"add_eos_token": False}),
    "post-processor": case({"bos": True}, BOTH),
    "split special tokens": case(config=BOTH | {"split_special_tokens": True}),
    "Llama's class": case(
        {"pre_tokenizer": METASPACE, "decoder": METASPACE}, {"tokenizer_class": "LlamaTokenizerFast"}
    ),
    "Gemma's class": case(config={"tokenizer_class": "GemmaTokenizer", "mask_token": None}),
    "Qwen's class": case(config={"tokenizer_class": "Qwen2Tokenizer", "eos_token": "</s>"}),
    "GPT-2's class": case(config={"tokenizer_class": "GPT2TokenizerFast"}),
    "Llama's class, byte-level": case(config={"tokenizer_class": "LlamaTokenizer"}),
    "Qwen's class and padding": case({"padding": PADDING}, {"tokenizer_class": "Qwen2Tokenizer"}),
    "extra": case(config=BOTH | {"extra_special_tokens": ["<t>", "<unk>"]}),
    "extra, named": case(config=BOTH | {"extra_special_tokens": {"image_token": "<t>", "boi": "<unk>"}}),
    "additional": case(config={"additional_special_tokens": ["<|im_end|>", STRIPPED], "eos_token": "</s>"}),
    "flags": case(config={"eos_token": STRIPPED, "bos_token": "<unk>", "sep_token": "<pad>"}),
    "flags listed": case(config={"added_tokens_decoder": {"256": STRIPPED | {"content": "<s>"}}}),
    "flags and added_tokens.json": case(added_tokens={"<s>": 256, "<t>": 264}),
    "generation": case(config={"chat_template": GENERATION}),
    "arguments": case(config=BOTH | {"chat_template": ARGUMENTS}, variables={"enable_thinking": False}),
    "override": case(config=BOTH | {"chat_template": ARGUMENTS}, variables={"bos_token": "<x>"}),
    "named list": case(config={"chat_template": NAMED}),
    "named object": case(config={"chat_template": {one["name"]: one["template"] for one in NAMED}}),
    "jinja file": case(config={"chat_template": NAMED}, chat_template="the file\n"),
    "jinja folder": case(**{"chat_template": "the file", f"{FOLDER}/rag": "documents"}),
    "jinja in a folder only": case(
        **{"additional_chat_templates/default": "the file", "additional_chat_templates/rag": "documents"}
    ),
}


def write_case(directory, name):
    """Write the directory of a case, with a chat template in any case."""
    case = CASES[name]
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TOKENS} | (case["config"] or {})
    (directory / FOLDER).mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json(case)))
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    for stem, content in case["files"].items():
        if isinstance(content, str):
            (directory / f"{stem}.jinja").write_text(content)
        else:
            (directory / f"{stem}.json").write_text(json.dumps(content))


def tokenizer_json(case):
    """Return the object in a case's tokenizer.json: a byte tokenizer, changed."""
    fields = dict(case["tokenizer"])
    raw = json.loads(byte_tokenizer(fields.pop("bos", False)).to_str()) | fields
    raw["model"]["vocab"] |= {token: 256 + number for number, token in enumerate(VOCABULARY)}
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in case["drop"]]
    return raw


def expected(directory, variables):
    """Return the expected values of a case, computed by transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    return {
        "ids": tokenizer(TEXT)["input_ids"],
        "without special tokens": tokenizer(TEXT, add_special_tokens=False)["input_ids"],
        "decoded": tokenizer.decode(tokenizer(TEXT)["input_ids"], skip_special_tokens=True),
        "eos_token_id": tokenizer.eos_token_id,
        "prompt": tokenizer.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=True, **variables
        ),
    }


def main():
    import jinja2
    import tokenizers
    import transformers

    values = {
        "versions": {module.__name__: module.__version__ for module in (transformers, tokenizers, jinja2)}
    }
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as work:
            write_case(Path(work) / "model", name)
            values[name] = expected(Path(work) / "model", case["variables"])
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()]
    EXPECTED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
