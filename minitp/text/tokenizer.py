"""Text to tokens and back: a tokenizer.json through the `tokenizers` library, and text as it streams."""

from pathlib import Path

from minitp.errors import InputError

REPLACEMENT = "\ufffd"  # what a half character decodes to


def load_tokenizer(directory):
    """The directory's Tokenizer, or None if it has no tokenizer.json."""
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        return None
    import tokenizers

    try:
        return Tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: not a tokenizer.json: {' '.join(str(error).split())}") from error


class Tokenizer:
    """Text to tokens. Special tokens such as BOS are added where the tokenizer's post-processor says so.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def encode(self, text, add_special_tokens=True):
        """Token ids of a text; without special tokens if, as a rendered conversation, it has its own."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the text has half a character at {error.start}, which is no text") from error
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def token_text(self, token_id):
        """The text of one token within a text, special ones included.

        Decoded behind itself: at the beginning of a text a tokenizer may drop its space.
        """
        once, twice = (self._tokenizer.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once) :]

    def decode(self, token_ids):
        """The text of tokens, without the special ones."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)


class TextStream:
    """Turns tokens into text one by one, never handing out half a character.

    A character may be spread over several tokens, and how a token reads may depend on the one before it (a
    leading space is dropped at the start of a text). So the new tokens are decoded together with those of
    the piece handed out before, which begin with a whole character; the difference is the new text, once it
    no longer ends in half a character.

    Parameters
    ----------
    tokenizer : Tokenizer
    prompt_ids : list of int
        What came before; its text is not handed out.
    """

    def __init__(self, tokenizer, prompt_ids):
        self._decode = tokenizer.decode
        self._ids = list(prompt_ids)
        self._known = len(self._ids)  # tokens of _ids whose text has been handed out

    def push(self, token_id):
        """The text that is complete with this token; may be empty."""
        self._ids.append(token_id)
        return self._take(final=False)

    def finish(self):
        """The rest, with a replacement character for each one that stayed incomplete."""
        return self._take(final=True)

    def _take(self, final):
        before = self._decode(self._ids[: self._known])
        text = self._decode(self._ids)
        if not final and text.endswith(REPLACEMENT):
            return ""
        piece = text[len(before) :]
        if piece:  # else (special tokens have no text) the earlier ones are still needed
            self._ids = self._ids[self._known :]
        self._known = len(self._ids)
        return piece
