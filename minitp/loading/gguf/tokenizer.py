"""The tokenizer that a GGUF file's metadata describes, built with the `tokenizers` library."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minitp.errors import InputError, one_line

# tokenizer.ggml.token_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4

# How byte-level BPE cuts a text before it merges, by tokenizer.ggml.pre: the patterns of the models' own
# tokenizer.json. None: GPT-2's, which the library knows.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt-2": None,
    "smollm": None,  # each digit on its own
    "llama-bpe": LLAMA_3,
    "qwen2": LLAMA_3.replace("{1,3}", ""),
}
WHOLE_WORDS_FIRST = ("llama-bpe",)  # a word of the vocabulary is one token, whatever the merges say


def make_tokenizer(metadata, where):
    """The tokenizers.Tokenizer of a file's metadata, or None if it has none; `where` is for errors.

    Raises
    ------
    InputError
        if it is neither byte-level BPE with a known way to cut words nor SentencePiece's BPE.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind != "llama" and (kind != "gpt2" or pre not in PATTERNS):
        raise InputError(
            f"{where}: tokenizer {kind!r} with tokenizer.ggml.pre {pre!r} is not supported; supported: "
            f"'llama', and 'gpt2' with one of {', '.join(PATTERNS)}"
        )
    try:
        tokenizer = sentencepiece_bpe(metadata) if kind == "llama" else byte_level_bpe(metadata, pre)
        add_special_tokens(tokenizer, metadata)
        surround(tokenizer, metadata, bos=kind == "llama" or pre == "llama-bpe")
    except Exception as error:  # what is missing or does not fit; the library raises plain Exception
        raise InputError(f"{where}: no tokenizer can be made of its metadata: {one_line(error)}") from error
    return tokenizer


def byte_level_bpe(metadata, pre):
    """GPT-2's tokenizer (Radford et al., 2019, section 2.2): bytes are characters, merged by a list."""
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    whole = pre in WHOLE_WORDS_FIRST
    tokenizer = Tokenizer(models.BPE(vocabulary(metadata), merges, ignore_merges=whole))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=PATTERNS[pre] is None)
    steps = [byte_level]
    if pre == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if PATTERNS[pre] is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(PATTERNS[pre]), behavior="isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(metadata):
    """SentencePiece's BPE: pieces have scores, and what is no piece is written in bytes, <0x00> to <0xFF>.

    It joins the two neighbours whose union has the highest score, so that a list of merges in the order of
    scores does the same (Kudo and Richardson, SentencePiece, 2018, section 3.1).
    """
    pieces, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    numbers = vocabulary(metadata)
    merges = []
    for piece in sorted(numbers, key=lambda piece: -scores[numbers[piece]]):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(a, b) for a, b in halves if a in numbers and b in numbers]
        merges += sorted(pairs, key=lambda pair: (numbers[pair[0]], numbers[pair[1]]))
    types = metadata["tokenizer.ggml.token_type"]
    unknown = next((piece for piece, type_ in zip(pieces, types, strict=True) if type_ == UNKNOWN), None)
    tokenizer = Tokenizer(
        models.BPE(numbers, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True),
    )
    space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if space else spaces)
    back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if space else back)
    return tokenizer


def vocabulary(metadata):
    """Token to its number."""
    return {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def add_special_tokens(tokenizer, metadata):
    """Tokens that are read as a whole wherever they stand; control tokens have no text of their own."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type", [])
    special = [token for token, type_ in zip(tokens, types, strict=False) if type_ == CONTROL]
    whole = [token for token, type_ in zip(tokens, types, strict=False) if type_ == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])


def surround(tokenizer, metadata, bos):
    """Have the tokenizer put BOS before a text, and EOS behind it, where the file wants them.

    `bos` is what is done if the file does not say.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    template, specials = ["$A"], []
    if metadata.get("tokenizer.ggml.add_bos_token", bos):
        number = metadata["tokenizer.ggml.bos_token_id"]
        template.insert(0, tokens[number])
        specials.append((tokens[number], number))
    if metadata.get("tokenizer.ggml.add_eos_token", False):
        number = metadata["tokenizer.ggml.eos_token_id"]
        template.append(tokens[number])
        specials.append((tokens[number], number))
    if specials:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
