"""Which generation of the handlers is in charge, and what a reload request leads to.

A generation is one template process with the code and settings it was started with. A candidate takes over only when
it has imported everything; until then, and if it never does, nothing changes. Requests during a reload are not lost:
one more reload follows, since the files may have changed after the candidate read them.
"""

from __future__ import annotations


class Generations:
    def __init__(self) -> None:
        self.current = 0  # 0: none yet
        self.candidate: int | None = None
        self._last = 0
        self._again = False

    def request(self) -> int | None:
        """A reload is wanted: the number of the candidate to start, or None while one is under way."""
        if self.candidate is not None:
            self._again = True
            return None
        self._last += 1
        self.candidate = self._last
        return self.candidate

    def ready(self, generation: int) -> bool:
        """The candidate imported everything. Returns whether it is in charge now."""
        if generation != self.candidate:
            return False
        self.current, self.candidate = generation, None
        return True

    def failed(self, generation: int) -> bool:
        """The candidate is no good. Returns whether it was the candidate."""
        if generation != self.candidate:
            return False
        self.candidate = None
        return True

    def wants_another(self) -> bool:
        """Whether a request came during the reload that has just ended; asks once."""
        again, self._again = self._again, False
        return again
