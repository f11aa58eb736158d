"""The end of a text at a stop string, found although the text arrives in pieces."""


class StopStrings:
    """A filter that passes on text up to the first stop string and holds back what may begin one."""

    def __init__(self, stops):
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text):
        """Add text, and return what is now certain to come before any stop string."""
        if self.found:
            return ""
        self._held += text
        starts = [(self._held.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if ends:  # the stop string that is complete first, however the text was cut into pieces
            self.found = True
            _, cut = min(ends)
        else:
            cut = len(self._held) - self._longest_beginning()
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def finish(self):
        """Return the text that was held back, after the last of it has been added."""
        rest, self._held = ("" if self.found else self._held), ""
        return rest

    def _longest_beginning(self):
        for n in range(max(map(len, self._stops), default=1) - 1, 0, -1):
            if any(len(stop) > n and self._held.endswith(stop[:n]) for stop in self._stops):
                return n
        return 0
