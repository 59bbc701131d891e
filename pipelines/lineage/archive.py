"""The records below a folder, found by the digests of weights: `poise.json` beside models, and the
stores of evaluations.

Only records are read, never weights. Hidden folders are passed over, as unfinished and replaced
results are hidden; links to folders are followed, each folder once. What does not read is named.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from pipelines.checkpoints.companions import RECORD_FILE
from pipelines.checkpoints.reader import read_json
from pipelines.errors import InputError
from pipelines.evaluate.store import CELL_FILE, RESULT_FILE, SAMPLES, STORE_FILE
from pipelines.provenance import read_record, recorded_digest

DIGEST_DIGITS = 32
FEWEST_DIGITS = 4
NUM_NEAREST = 3
ALIKE = 0.6  # of a digest's digits, in their order: a typing error or two


@dataclass(frozen=True, slots=True)
class Record:
    """A model's `poise.json`.

    Attributes:
        weights: the digest of its weights, as recorded; of the oldest merges, which have none, the
            one digest of weights and companions.
        content: with the current fields.
    """

    folder: Path
    weights: str
    content: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """What an evaluation says of a model.

    Attributes:
        place: the evaluation's folder.
        name: the model's in it.
        groups: value and standard error of each group; empty where only samples are there.
        tasks: measured ones.
    """

    place: Path
    name: str
    split: str
    groups: dict[str, dict[str, float | None]]
    tasks: list[str]


@dataclass
class Archive:
    """What is known below some folders.

    Attributes:
        records, measured: by the digest of weights.
        remarks: a line for each thing that does not read.
    """

    records: dict[str, list[Record]] = field(default_factory=dict)
    measured: dict[str, list[Measured]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    num_folders: int = 0
    num_evaluations: int = 0
    _seen: set[tuple[int, int]] = field(default_factory=set)

    @property
    def all_records(self) -> list[Record]:
        """Every record, in the order of digests and folders."""
        return [each for weights in sorted(self.records) for each in self.records[weights]]

    def add(self, root: Path) -> None:
        """Read all records below a folder, with its own.

        Raises:
            InputError: no such folder.
        """
        if not root.is_dir():
            raise InputError(f"--in {root}: no such folder")
        waiting = [root]
        while waiting:
            folder = waiting.pop()
            waiting += reversed(list(self._folders_in(folder)))

    def digest_of(self, text: str) -> str:
        """The whole digest of known weights that begins so.

        Raises:
            InputError: no digest at all, none that is known, or several.
        """
        wanted = text.strip().lower()
        if not re.fullmatch(rf"[0-9a-f]{{{FEWEST_DIGITS},{DIGEST_DIGITS}}}", wanted):
            raise InputError(
                f"DIGEST: found {text!r}; allowed: the digest of weights or its beginning, "
                f"{FEWEST_DIGITS} to {DIGEST_DIGITS} hex digits, or a checkpoint's folder"
            )
        known = self._known()
        found = [weights for weights in known if weights.startswith(wanted)]
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(f"{each} ({known[each]})" for each in found[:NUM_NEAREST])
            raise InputError(f"DIGEST: {wanted} begins {len(found)} digests: {listed}")
        near = sorted(known, key=lambda each: -_likeness(wanted, each))
        near = [each for each in near if _likeness(wanted, each) >= ALIKE][:NUM_NEAREST]
        hint = "".join(f", {each} ({known[each]})" for each in near)
        raise InputError(
            f"DIGEST: nothing is known of {wanted}; searched: {self.searched}"
            + (f"; nearest: {hint[2:]}" if hint else "")
        )

    @property
    def searched(self) -> str:
        """What was read, in words."""
        counts = (
            (self.num_folders, "folder"),
            (len(self.all_records), "record"),
            (self.num_evaluations, "evaluation"),
        )
        return ", ".join(f"{count:,} {name}{'' if count == 1 else 's'}" for count, name in counts)

    def _known(self) -> dict[str, str]:
        """Every digest of weights, and where it is from."""
        found = {weights: str(each[0].folder) for weights, each in self.records.items()}
        for weights, measured in self.measured.items():
            found.setdefault(weights, f"evaluated in {measured[0].place}")
        for record in self.all_records:
            for name, weights in input_digests(record).items():
                found.setdefault(weights, f"read by {record.folder} as {name}")
        return found

    def _folders_in(self, folder: Path) -> Iterator[Path]:
        """Read what a folder holds, where it was not seen; gives the folders in it."""
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in self._seen:
                return
            self._seen.add((status.st_dev, status.st_ino))
            names = sorted(file.name for file in folder.iterdir())
        except OSError as error:
            self.remarks.append(f"{folder}: {error.strerror}")
            return
        self.num_folders += 1
        if RECORD_FILE in names:
            self._read(folder / RECORD_FILE, self._take_record)
        if STORE_FILE in names:
            self._take_evaluation(folder)
            return
        yield from (
            folder / name for name in names if not name.startswith(".") and (folder / name).is_dir()
        )

    def _read(self, file: Path, take: Any) -> None:
        """Take what a file says; a remark where it does not say it."""
        try:
            take(file)
        except (InputError, OSError) as error:
            self.remarks.append(str(error))
        except (AttributeError, KeyError, TypeError, ValueError):
            self.remarks.append(f"{file}: not a record of this version")

    def _take_record(self, file: Path) -> None:
        content = read_record(file.parent)
        found = None if content is None else recorded_digest(content)
        weights = found["weights"] if isinstance(found, dict) else found
        if content is None or not _is_digest(weights) or not isinstance(content["inputs"], dict):
            raise ValueError
        assert weights is not None
        self.records.setdefault(weights, []).append(Record(file.parent, weights, content))

    def _take_evaluation(self, folder: Path) -> None:
        """Finished numbers, and cells that are in none of them."""
        self.num_evaluations += 1
        if (folder / RESULT_FILE).is_file():
            self._read(folder / RESULT_FILE, self._take_numbers)
        cells: dict[tuple[str, str, str], list[str]] = {}

        def take(file: Path) -> None:
            found = read_json(file)
            key = (str(found["digest"]["weights"]), str(found["model"]), str(found["split"]))
            cells.setdefault(key, []).append(str(found["task"]))

        for file in sorted((folder / SAMPLES).glob(f"*/*/{CELL_FILE}")):
            self._read(file, take)
        for (weights, name, split), tasks in cells.items():
            known = self.measured.setdefault(weights, [])
            if not any(each.place == folder for each in known):
                known.append(Measured(folder, name, split, {}, sorted(set(tasks))))

    def _take_numbers(self, file: Path) -> None:
        content = json.loads(file.read_text("utf-8"))
        if content["schema"] != 2:
            raise ValueError
        for name, entry in content["models"].items():
            found = Measured(
                file.parent, name, content["split"], dict(entry["groups"]), list(entry["tasks"])
            )
            self.measured.setdefault(str(entry["digest"]), []).append(found)


def input_digests(record: Record) -> dict[str, str]:
    """The digests of the weights that a record names among its inputs."""
    return {
        name: str(known["weights"])
        for name, known in record.content["inputs"].items()
        if isinstance(known, dict) and _is_digest(known.get("weights"))
    }


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and re.fullmatch(rf"[0-9a-f]{{{DIGEST_DIGITS}}}", text) is not None


def _likeness(wanted: str, known: str) -> float:
    """How alike a digest, or its beginning, is to a known one: 0 to 1."""
    return SequenceMatcher(None, wanted, known[: len(wanted)], autojunk=False).ratio()
