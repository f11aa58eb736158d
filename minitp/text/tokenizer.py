"""Conversion of text to tokens and back with the `tokenizers` library, and streamed text."""

import re
from functools import cache, cached_property
from pathlib import Path

from minitp.errors import InputError, shown
from minitp.text.tokenizer_config import named_tokens, read_tokenizer_config, token_text, unnamed_tokens

FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")  # flags of an added token
REPLACEMENT = "\ufffd"  # the text of an incomplete character
LONG_TEXT = 10_000  # characters, which take milliseconds to tokenize
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # the name of a byte in vocabularies of SentencePiece


def load_tokenizer(directory):
    """Return the directory's Tokenizer, or None if it has no tokenizer.json."""
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        return None
    import tokenizers

    try:
        raw = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: not a valid tokenizer.json: {' '.join(str(error).split())}") from error
    fields = read_tokenizer_config(directory)
    named = named_tokens(fields)
    add_tokens(raw, fields["added_tokens_decoder"], list(named.values()), unnamed_tokens(fields))
    raw.encode_special_tokens = fields.get("split_special_tokens") is True
    return Tokenizer(raw, raw.token_to_id(token_text(named.get("eos_token", ""))))


def add_tokens(raw, listed, named, unnamed):
    """Add the tokens that tokenizer.json does not list as added tokens, so that their text is never split.

    A listed token whose id would differ is left out, because the model has another embedding there. One that
    tokenizer.json lists with other flags gets those of `listed`.

    Parameters
    ----------
    raw : tokenizers.Tokenizer
    listed : dict
        Tokens by id: the field `added_tokens_decoder` of `read_tokenizer_config`.
    named, unnamed : list
        The special tokens, which are strings or objects like those of `listed`; those outside the vocabulary
        get the next ids.
    """
    names = {token_text(token) for token in named}
    known = {token.content: repr(token) for token in raw.get_added_tokens_decoder().values()}
    for number, token in sorted(listed.items(), key=lambda item: int(item[0])):
        text, new = token["content"], added_token(token)
        found = raw.token_to_id(text)
        same_id = int(number) == (raw.get_vocab_size() if found is None else found)
        if same_id and repr(new) != known.get(text):
            new.special = new.special or text in names
            raw.add_tokens([new])
            known[text] = repr(new)
    for token in map(added_token, [*named, *unnamed]):
        if token.content and token.content not in known:
            token.special = token.special or token.content in names
            raw.add_tokens([token])


def added_token(token):
    """Return the AddedToken of a text, which is special, or of an object like those of `listed`."""
    from tokenizers import AddedToken

    fields = {"content": token, "special": True} if isinstance(token, str) else token
    try:
        return AddedToken(fields["content"], **{key: bool(fields[key]) for key in FLAGS if key in fields})
    except UnicodeEncodeError as error:
        text = shown(fields["content"])
        raise InputError(
            f"the special token {text} has an unpaired surrogate; correct it in tokenizer_config.json"
        ) from error


class Tokenizer:
    """A tokenizer whose post-processor adds special tokens, such as BOS.

    Settings that would change a prompt or make it random are off: truncation, padding, and BPE dropout.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
    eos_token_id : int, optional
        The token that ends a text or an answer, if the tokenizer knows it.
    """

    def __init__(self, tokenizer, eos_token_id=None):
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
        self._tokenizer, self.eos_token_id = tokenizer, eos_token_id

    def encode(self, text, add_special_tokens=True):
        """Return the token ids of a text.

        A rendered conversation already contains its special tokens, so it needs add_special_tokens=False.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"the text has an unpaired surrogate at character {error.start}; use valid Unicode"
            ) from error
        if len(text) < LONG_TEXT:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        # Lets other threads run, unlike `encode`, but starts threads, so that a later fork prints a warning.
        return self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def token_text(self, token_id):
        """Return the text of a token, which may be special, as it appears in the middle of a text.

        The token is decoded after a copy of itself: a tokenizer may drop a space at the start of a text.
        """
        once, twice = (self._tokenizer.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once) :]

    def token_bytes(self, token_id):
        """Return the bytes of a token in the middle of a text, which may be only a part of a character."""
        text, name = self.token_text(token_id), self._tokenizer.id_to_token(token_id)
        if REPLACEMENT in text and BYTE_TOKEN.fullmatch(name):
            return bytes.fromhex(name[3:5])
        if REPLACEMENT in text and byte_of_character().keys() >= set(name):
            return bytes(byte_of_character()[character] for character in name)
        return text.encode()

    def is_special(self, token_id):
        """Return whether a token is special, so that `decode` leaves it out by default."""
        return token_id in self._special_ids

    @cached_property
    def _special_ids(self):
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {number for number, token in added if token.special}

    def vocabulary_texts(self, token_ids):
        """Return the names of tokens in the vocabulary, such as "ĠHello"; None for an id without a token."""
        return [self._tokenizer.id_to_token(token) for token in token_ids]

    def decode(self, token_ids, skip_special_tokens=True):
        """Return the text of tokens, by default leaving out special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)


@cache
def byte_of_character():
    """Return the byte of each character in the names of byte-level tokens.

    GPT-2 (Radford et al., 2019) names the printable bytes by their Latin-1 characters, and the others, in
    order, by the characters from 256.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class TextStream:
    """A stream that turns tokens into text one by one and returns only complete characters.

    A character may be spread over several tokens, and a token's text may depend on the token before it (a
    leading space is dropped at the start of a text). So the new tokens are decoded together with those of the
    previous piece, which begin with a whole character. The difference is the new text, which is returned once
    it no longer ends in an incomplete character.

    Parameters
    ----------
    tokenizer : Tokenizer
    prompt_ids : list of int
        The tokens of the prompt, whose text is not returned.
    """

    def __init__(self, tokenizer, prompt_ids):
        self._decode = tokenizer.decode
        self._ids = self._end_of(prompt_ids)
        self._known = len(self._ids)  # tokens of _ids whose text has been returned

    def push(self, token_id):
        """Add a token, and return the text that it completes, which may be empty."""
        self._ids.append(token_id)
        return self._next_piece(final=False)

    def finish(self):
        """Return the remaining text, with a replacement character for each incomplete character."""
        return self._next_piece(final=True)

    def _end_of(self, prompt_ids):
        """Return the last tokens of the prompt: few, but their text must begin with a whole character."""
        for count in (8, 64, 1024):
            for start in range(-count, 4 - count):  # a character may be spread over four tokens
                text = self._decode(prompt_ids[start:])
                if text and not text.startswith(REPLACEMENT):
                    return list(prompt_ids[start:])
        return list(prompt_ids[-1024:])

    def _next_piece(self, final):
        before = self._decode(self._ids[: self._known])
        text = self._decode(self._ids)
        if not final and text.endswith(REPLACEMENT):
            return ""
        piece = text[len(before) :]
        if piece:  # otherwise (special tokens have no text) the earlier tokens are still needed
            self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        return piece
