"""How many requests are in the server: a bound on each model's queue."""

import math
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.serve.failures import ApiError

_LONGEST_S = 60
_RECENT = 50  # requests of which the mean time is taken


class Admission:
    """Lets requests in, up to a bound for each model, and tells the others when to come back.

    Attributes:
        inside: requests that are in the server, by model.
    """

    def __init__(self) -> None:
        self.inside: Counter[str] = Counter()
        self._seconds: dict[str, deque[float]] = {}

    @contextmanager
    def entered(self, name: str, at_once: int, max_queued: int) -> Iterator[None]:
        """In the block, a request is in the server.

        Args:
            at_once: requests that the model's engines work on at once.
            max_queued: how many more may wait.

        Raises:
            ApiError: 429, the queue is full.
        """
        if self.inside[name] >= at_once + max_queued:
            raise ApiError(
                429,
                f"model {name}: {self.inside[name]} requests are here, of which {max_queued} may "
                "wait; come back later",
                "model",
                "queue_full",
                retry_after=self.retry_after(name, at_once),
            )
        self.inside[name] += 1
        try:
            yield
        finally:
            self.inside[name] -= 1

    @property
    def total(self) -> int:
        """Requests that are in the server, for all models."""
        return self.inside.total()

    def took(self, name: str, seconds: float) -> None:
        """A request was answered in so many seconds."""
        self._seconds.setdefault(name, deque(maxlen=_RECENT)).append(seconds)

    def retry_after(self, name: str, at_once: int) -> int:
        """Seconds until the present queue is probably done: the mean time of an answer for each
        round of requests; 1 to 60.
        """
        recent = self._seconds.get(name)
        mean = sum(recent) / len(recent) if recent else 1.0
        rounds = max(1.0, self.inside[name] / max(at_once, 1))
        return max(1, min(_LONGEST_S, math.ceil(mean * rounds)))
