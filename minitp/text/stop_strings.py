"""Ending a text at a stop string, though it comes in pieces."""


class StopStrings:
    """Passes text on up to the first stop string, holding back what may be the beginning of one."""

    def __init__(self, stops):
        self._stops = stops
        self._held = ""
        self.found = False

    def push(self, text):
        """The part of the text so far that is now certain to come before any stop string."""
        if self.found:
            return ""
        self._held += text
        found = [(self._held.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start) for start, stop in found if start >= 0]
        if ends:  # the first to be complete, whatever pieces the text comes in
            self.found = True
            _, cut = min(ends)
        else:
            cut = len(self._held) - self._longest_beginning()
        certain, self._held = self._held[:cut], self._held[cut:]
        return certain

    def finish(self):
        """What was held back, once no more text comes."""
        rest, self._held = ("" if self.found else self._held), ""
        return rest

    def _longest_beginning(self):
        for n in range(max(map(len, self._stops), default=1) - 1, 0, -1):
            if any(len(stop) > n and self._held.endswith(stop[:n]) for stop in self._stops):
                return n
        return 0
