"""Conversion of text to tokens and back with the `tokenizers` library, and streamed text."""

from pathlib import Path

from minitp.errors import InputError

REPLACEMENT = "\ufffd"  # an incomplete character decodes to it


def load_tokenizer(directory):
    """Return the directory's Tokenizer, or None if it has no tokenizer.json."""
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        return None
    import tokenizers

    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: not a valid tokenizer.json: {' '.join(str(error).split())}") from error


class Tokenizer:
    """A tokenizer whose post-processor adds special tokens, such as BOS.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

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
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def token_text(self, token_id):
        """Return the text of a token, which may be special, as it appears in the middle of a text.

        The token is decoded after a copy of itself: a tokenizer may drop a space at the start of a text.
        """
        once, twice = (self._tokenizer.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once) :]

    def decode(self, token_ids):
        """Return the text of tokens, leaving out special tokens."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


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
        self._ids = list(prompt_ids)
        self._known = len(self._ids)  # tokens of _ids whose text has been returned

    def push(self, token_id):
        """Add a token, and return the text that it completes, which may be empty."""
        self._ids.append(token_id)
        return self._next_piece(final=False)

    def finish(self):
        """Return the remaining text, with a replacement character for each incomplete character."""
        return self._next_piece(final=True)

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
