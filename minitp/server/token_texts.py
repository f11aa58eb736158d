"""The names, bytes and offsets of tokens in responses with log-probabilities."""

import codecs

from minitp.text.tokenizer import REPLACEMENT


class TokenTexts:
    """The texts of a tokenizer's tokens; without a tokenizer, a token's text is its id.

    A token that is only a part of a character has no text. OpenAI's API names it by its bytes.

    Parameters
    ----------
    tokenizer : Tokenizer or None
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def decode(self, token_ids):
        """Return the text of tokens, which is empty without a tokenizer."""
        return "" if self._tokenizer is None else self._tokenizer.decode(token_ids)

    def bytes(self, token):
        """Return the bytes of a token, which may be special."""
        return str(token).encode() if self._tokenizer is None else self._tokenizer.token_bytes(token)

    def shown_bytes(self, token):
        """Return the bytes that a token adds to a text that shows it: none without a tokenizer."""
        return b"" if self._tokenizer is None else self.bytes(token)

    def is_special(self, token):
        """Return whether a token is special, so that texts leave it out."""
        return self._tokenizer is not None and self._tokenizer.is_special(token)

    def chat_name(self, token):
        r"""Return a token's name in a chat: its text, or its bytes, as in \xe2, for a part of a character."""
        return self._name(token, "")

    def completion_name(self, token):
        r"""Return a token's name in a completion, where bytes have a prefix, as in bytes:\xe2."""
        return self._name(token, "bytes:")

    def _name(self, token, prefix_of_bytes):
        text = str(token) if self._tokenizer is None else self._tokenizer.token_text(token)
        if REPLACEMENT not in text or (data := self.bytes(token)) == text.encode():
            return text
        return prefix_of_bytes + "".join(f"\\x{byte:02x}" for byte in data)


class TextOffsets:
    """The offsets of tokens in a text, in characters; a character counts where its last byte is.

    Parameters
    ----------
    text : str
        The beginning of the text. If it does not start with a space, but the bytes of its first token do,
        this space does not count: tokenizers like Llama's add it and drop it.

    Attributes
    ----------
    length : int
        The number of characters of the tokens so far.
    """

    def __init__(self, text=" "):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.length, self._uncounted = 0, b"" if text.startswith(" ") else b" "

    def add(self, data):
        """Add the bytes of the next token to the text, and return its offset."""
        offset = self.length
        if data:
            data, self._uncounted = data.removeprefix(self._uncounted), b""
        self.length += len(self._decoder.decode(data))
        return offset
