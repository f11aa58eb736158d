"""Stop strings, which end a text that arrives in pieces."""

from functools import lru_cache


class StopStrings:
    """A filter that returns text up to the first stop string and holds back text that may begin one.

    Each character is read once, with the algorithm of Knuth, Morris and Pratt (Fast Pattern Matching in
    Strings, 1977): for each stop string, the filter keeps the length of its longest beginning that ends the
    text so far. So the work for a piece does not depend on the length of the text before it.
    """

    def __init__(self, stops):
        self._stops = [(stop, shorter_beginnings(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # length of the beginning of each stop string that ends the text
        self._held = ""
        self.found = False

    def push(self, text):
        """Add text, and return the text that now certainly precedes any stop string."""
        if self.found:
            return ""
        end = len(self._held)
        self._held += text
        for char in text if self._stops else "":
            end += 1
            if length := self._complete(char):
                self.found = True
                return self._held[: end - length]
        cut = len(self._held) - max(self._matched, default=0)
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def finish(self):
        """Return the text that is still held back; call this once, after the last push."""
        rest, self._held = ("" if self.found else self._held), ""
        return rest

    def _complete(self, char):
        """Read one character; return the length of the longest stop string that ends with it, or 0."""
        longest = 0
        for n, (stop, shorter) in enumerate(self._stops):
            length = self._matched[n]
            while length and stop[length] != char:
                length = shorter[length]
            if stop[length] == char:
                length += 1
            self._matched[n] = length
            if length == len(stop):
                longest = max(longest, length)
        return longest


@lru_cache(maxsize=1024)  # the choices of a request have the same stop strings
def shorter_beginnings(stop):
    """Return, for each n, the length of the longest beginning of `stop` below n that ends `stop[:n]`."""
    lengths = [0, 0]
    for n in range(1, len(stop)):
        length = lengths[n]
        while length and stop[length] != stop[n]:
            length = lengths[length]
        lengths.append(length + (stop[length] == stop[n]))
    return tuple(lengths)
