"""Stop strings: found wherever token borders fall, and never shown in part."""

from __future__ import annotations

from collections.abc import Sequence

from mlm_cli.errors import UsageError


class StopScanner:
    """Watches one growing text for stop strings.

    A piece of text is let through only once it can no longer be the beginning of a stop string. The match that *ends*
    first wins (of those the longest), so the outcome does not depend on how the text was cut into tokens.

    Raises:
        UsageError: an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise UsageError("an empty stop string would end every answer at once", hint="leave `--stop` out")
        self._stops = tuple(stops)
        self._held = ""
        self.found: str | None = None

    def feed(self, piece: str) -> str:
        """Take the next piece, return what may be shown. After a match ``found`` is set and nothing more comes."""
        if self.found is not None:
            return ""
        if not self._stops:
            return piece
        self._held += piece
        matches = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if matches:
            _, start, self.found = min(matches)
            shown, self._held = self._held[:start], ""
            return shown
        keep = self._ambiguous_tail()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back, once the text has ended for another reason."""
        shown, self._held = self._held, ""
        return shown

    def _ambiguous_tail(self) -> int:
        """Length of the longest tail of the held text that begins a stop string."""
        longest = max(map(len, self._stops)) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
