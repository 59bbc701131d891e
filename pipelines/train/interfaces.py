"""What the parts of a training need of its config and of its state, so that other trainings than
alignments use them, too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class OnWorkers(Protocol):
    """The config of a run on Ray Train's workers."""

    @property
    def num_workers(self) -> int:
        """Workers of the group."""

    @property
    def max_failures(self) -> int:
        """Restarts in a row without progress."""


class KeepsCheckpoints(Protocol):
    """The config of a run with resumable checkpoints."""

    @property
    def keep_checkpoints(self) -> int:
        """How many are kept."""

    @property
    def asynchronous_checkpoints(self) -> bool:
        """Whether they are written while steps go on."""


class Tracked(Protocol):
    """The config of a run whose numbers others may get, too."""

    @property
    def tensorboard(self) -> bool:
        """Whether event files are written."""

    @property
    def trackers(self) -> Sequence[str]:
        """Names of `pipelines.train.trackers.TRACKERS`."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The settings, for the trackers."""


class Saves(Protocol):
    """The state of a run that can be written for resuming."""

    def save(self, folder: Path) -> None:
        """Write the state into an existing folder."""
