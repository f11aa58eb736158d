"""The tokenizer that a GGUF file's metadata describes, built with the `tokenizers` library."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from minitp.errors import InputError, one_line
from minitp.loading.gguf.splits import SPLITS, Splits

# tokenizer.ggml.token_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4


def make_tokenizer(metadata, where):
    """Return the tokenizers.Tokenizer that the metadata describes, or None if it describes none.

    `where` names the file in errors.

    Raises
    ------
    InputError
        if the tokenizer is neither byte-level BPE with a known pattern nor SentencePiece's BPE.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind != "llama" and (kind != "gpt2" or pre not in SPLITS):
        raise InputError(
            f"{where}: tokenizer {kind!r} with tokenizer.ggml.pre {pre!r} is not supported; supported: "
            f"'llama', and 'gpt2' with one of {', '.join(SPLITS)}"
        )
    splits = Splits(bos=True) if kind == "llama" else SPLITS[pre]  # SentencePiece does not split
    try:
        tokenizer = sentencepiece_bpe(metadata) if kind == "llama" else byte_level_bpe(metadata, splits)
        add_special_tokens(tokenizer, metadata)
        add_bos_and_eos(tokenizer, metadata, splits.bos)
    except Exception as error:  # an entry is missing or invalid; the library raises plain Exception
        raise InputError(f"{where}: cannot build a tokenizer from its metadata: {one_line(error)}") from error
    return tokenizer


def byte_level_bpe(metadata, splits):
    """Build GPT-2's tokenizer, which merges bytes in a listed order (Radford et al., 2019, section 2.2)."""
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    model = models.BPE(vocabulary(metadata), merges, ignore_merges=splits.whole_words_first)
    tokenizer = Tokenizer(model)
    stages = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in splits.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits.gpt_2)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*stages, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_bpe(metadata):
    """Build SentencePiece's BPE (Kudo and Richardson, SentencePiece, 2018, section 3.1).

    SentencePiece joins the two neighbors whose union has the highest score, which is equivalent to a list of
    merges sorted by score. Text that no piece covers is written as bytes, <0x00> to <0xFF>.
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
    """Return the ids of all tokens, by token."""
    return {token: number for number, token in enumerate(metadata["tokenizer.ggml.tokens"])}


def add_special_tokens(tokenizer, metadata):
    """Add the tokens that are never split; decoding without special tokens omits the control tokens."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type", [])
    special = [token for token, type_ in zip(tokens, types, strict=False) if type_ == CONTROL]
    whole = [token for token, type_ in zip(tokens, types, strict=False) if type_ == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in whole])


def add_bos_and_eos(tokenizer, metadata, bos):
    """Make the tokenizer add BOS before a text and EOS after it, as the file says.

    `bos` is the default for BOS, for a file without that entry.
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
