"""What a pipeline's runs have done, in its storage: `.pipelines/NAME/state.json`.

It tells `poise status` what runs and what failed, keeps the seconds that stages took, and the
fingerprints of stages whose commands keep none. Whether a stage stands, its own result says.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from pipelines.commit import lock, make_folder
from pipelines.errors import InputError
from pipelines.evaluate.places import Folder, Place, open_place

FOLDER = ".pipelines"
STATE_FILE = "state.json"
LOCK_FILE = "lock"
StageState = Literal["waiting", "running", "stands", "done", "failed"]


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What is known of a stage.

    Attributes:
        key: of its config and inputs, where the pipeline decides whether it stands.
        seconds: that its work took, in the last run that did any.
        reason: why it failed, or why it waits.
        at: when this was written, in UTC.
    """

    kind: str
    out: str
    state: StageState
    key: str = ""
    seconds: float | None = None
    reason: str = ""
    at: str = ""


class State:
    """The records of a pipeline's stages, by name; each change is written at once.

    Args:
        storage: a folder or an address.
        name: the pipeline's.

    Raises:
        InputError: the storage cannot be used, or holds a file that is no state.
    """

    def __init__(self, storage: str, name: str) -> None:
        self.place, self.name = open_place(f"{storage}/{FOLDER}/{name}"), name
        self.stages: dict[str, StageRecord] = _read(self.place)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the pipeline's only run in the block.

        Raises:
            InputError: another run is under way.
        """
        if isinstance(self.place, Folder):
            make_folder(self.place.path)
            with lock(self.place.path / LOCK_FILE):
                yield
            return
        with self.place.writing():
            yield

    def set(self, name: str, record: StageRecord) -> None:
        """Write what is known of a stage."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self.stages[name] = StageRecord(**asdict(record) | {"at": now})
        self._write()

    def keep(self, names: Iterator[str] | list[str]) -> None:
        """Forget stages that the pipeline has no longer."""
        self.stages = {name: self.stages[name] for name in names if name in self.stages}
        self._write()

    def _write(self) -> None:
        stages = {name: asdict(record) for name, record in self.stages.items()}
        self.place.write(STATE_FILE, json.dumps({"schema": 1, "stages": stages}, indent=2) + "\n")


def _read(place: Place) -> dict[str, StageRecord]:
    try:
        found: dict[str, Any] = json.loads(place.read(STATE_FILE))
        return {name: StageRecord(**each) for name, each in found["stages"].items()}
    except FileNotFoundError:
        return {}
    except NotADirectoryError:
        raise InputError(f"{place.address}: cannot be a folder: a file is in its way") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{place.address}/{STATE_FILE}: is no state of a pipeline; remove it to begin anew"
        ) from None
