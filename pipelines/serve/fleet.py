"""What the gateway knows of the replicas, and what it asks of them.

Each replica reports itself twice a second; the answer to a report is the version that the replica
is to change to, if any. Serve gives nobody a way to speak to one replica, so replicas ask.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from pipelines.serve.names import Version

REPORT_S = 0.5
LOST_S = 10.0  # a replica that has not reported for so long is gone


@dataclass(frozen=True, slots=True)
class Refusal:
    """Weights that did not go into an engine, why, and at which Unix time."""

    version: Version
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica says of itself.

    Attributes:
        replica: its own number, as Serve has it.
        group: of models that share its engine.
        version: the weights in its engine.
        announced: the weights that it is changing to; as `version` where it is not.
        running, waiting: requests.
        swaps, swap_s: changes of weights so far, and seconds that they took.
        answered, cancelled: requests so far that ended, that nobody wanted any more.
        longest_wait_s: for the engine, so far.
        restarts_at: when it started, in Unix seconds.
        refused: the last order that it could not follow.
    """

    replica: str
    group: str
    version: Version
    announced: Version
    running: int
    waiting: int
    swaps: int
    swap_s: float
    answered: int
    cancelled: int
    longest_wait_s: float
    restarts_at: float
    refused: Refusal | None = None


class Fleet:
    """The replicas that live, and the orders that they are to follow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[float, Report]] = {}
        self._orders: dict[str, Version] = {}
        self._refused: dict[str, Refusal | None] = {}  # known when the order was given

    def report(self, report: Report) -> Version | None:
        """Take a replica's report; returns what it is to change to."""
        self._reports[report.replica] = (self._clock(), report)
        order = self._orders.get(report.replica)
        if order is not None and (order == report.version or self.refusal(report.replica)):
            del self._orders[report.replica]
            return None
        return order

    def order(self, replica: str, version: Version) -> None:
        """Let a replica change its weights: it ends what it has, then swaps."""
        found = self._reports.get(replica)
        self._refused[replica] = None if found is None else found[1].refused
        self._orders[replica] = version

    def cancel(self, replica: str) -> None:
        """Take an order back; a change that has begun goes on."""
        self._orders.pop(replica, None)

    def refusal(self, replica: str) -> Refusal | None:
        """Why a replica did not follow the last order."""
        found = self._reports.get(replica)
        refused = None if found is None else found[1].refused
        return None if refused == self._refused.get(replica) else refused

    def has(self, replica: str, version: Version) -> bool:
        """Whether a replica has reported these weights."""
        found = self._reports.get(replica)
        return found is not None and found[1].version == version

    def replicas(self, group: str | None = None) -> list[Report]:
        """Those that live, of one group or of all, in the order of their numbers."""
        now = self._clock()
        for replica, (seen, _) in list(self._reports.items()):
            if now - seen > LOST_S:
                del self._reports[replica]
                self._orders.pop(replica, None)
        found = [report for _, report in self._reports.values()]
        return sorted(
            (r for r in found if group in (None, r.group)), key=lambda report: report.replica
        )
