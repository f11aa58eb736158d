"""Stop strings, which end a text that arrives in pieces."""


class StopStrings:
    """A filter that returns text up to the first stop string and holds back text that may begin one."""

    def __init__(self, stops):
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text):
        """Add text, and return the text that now certainly precedes any stop string."""
        if self.found:
            return ""
        self._held += text
        starts = [(self._held.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if ends:  # the stop string that ends first, so that the result does not depend on the pieces
            self.found = True
            _, cut = min(ends)
        else:
            cut = len(self._held) - self._longest_beginning()
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def finish(self):
        """Return the text that is still held back; call this once, after the last push."""
        rest, self._held = ("" if self.found else self._held), ""
        return rest

    def _longest_beginning(self):
        for n in range(max(map(len, self._stops), default=1) - 1, 0, -1):
            if any(len(stop) > n and self._held.endswith(stop[:n]) for stop in self._stops):
                return n
        return 0
