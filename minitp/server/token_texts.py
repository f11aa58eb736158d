"""The texts, names and bytes of tokens in responses with log-probabilities."""

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
        """Return the text of tokens; an empty one without a tokenizer."""
        return "" if self._tokenizer is None else self._tokenizer.decode(token_ids)

    def bytes(self, token):
        """Return the bytes of a token, which may be special."""
        return str(token).encode() if self._tokenizer is None else self._tokenizer.token_bytes(token)

    def shown_bytes(self, token):
        """Return the bytes of a token in a text, which a special token does not have."""
        return b"" if self._tokenizer is None or self.is_special(token) else self.bytes(token)

    def is_special(self, token):
        """Return whether texts leave out a token."""
        return self._tokenizer is not None and self._tokenizer.is_special(token)

    def chat_name(self, token):
        r"""Return the name of a token in a chat: its text, or the bytes of a part of a character as \xe2."""
        return self._name(token, "")

    def completion_name(self, token):
        r"""Return the name of a token in a completion: its text, or the bytes of a part as bytes:\xe2."""
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
        The beginning of the text, if it is known: tokenizers may drop a space at the start of a text.

    Attributes
    ----------
    length : int
        The number of characters of the tokens so far.
    """

    def __init__(self, text=" "):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.length, self._dropped = 0, b"" if text.startswith(" ") else b" "

    def of_next(self, data):
        """Return the offset of the next token, and add its bytes to the text."""
        offset = self.length
        if data:
            data, self._dropped = data.removeprefix(self._dropped), b""
        self.length += len(self._decoder.decode(data))
        return offset
