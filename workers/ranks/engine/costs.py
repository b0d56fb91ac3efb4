"""What a row took of the device: its part of the steps of its attempt, by tokens. Pure."""

from __future__ import annotations


class Costs:
    """Rows share passes, and what one takes of a pass cannot be measured. So the seconds of an attempt's steps
    are spread over the tokens that were computed in them: what is there when a row is finished is shared
    between its tokens and those of the rows that are not. All rows together have all seconds, but for
    those of rows that got an error."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._tokens = 0

    def spend(self, tokens: int, seconds: float) -> None:
        """A step, or the attempt's share of one."""
        self._tokens += tokens
        self._seconds += seconds

    def charge(self, tokens: int) -> float:
        """Seconds of a row that is finished, with so many tokens in the steps up to now."""
        if not 0 < tokens <= self._tokens:
            return 0.0
        seconds = self._seconds * tokens / self._tokens
        self._seconds -= seconds
        self._tokens -= tokens
        return seconds
