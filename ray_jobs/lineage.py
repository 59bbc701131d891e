"""`poise lineage`: what weights are, from the records below a folder."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.companions import RECORD_FILE
from pipelines.checkpoints.digests import model_digest
from pipelines.checkpoints.reader import has_all_weights
from pipelines.lineage import Archive, Lineage, Measured, Model, lineage

NUM_TASKS = 4  # named of an evaluation without groups


def run_lineage(what: str, folder: Path, *, as_json: bool) -> None:
    """Print the ancestors, training runs, data and evaluations of weights as a tree.

    Args:
        what: a digest of weights, its beginning, or the folder of a model, which is read.
        folder: below which records are looked for.

    Raises:
        InputError: no such folder, or weights of which nothing is known.
    """
    archive = Archive()
    archive.add(folder)
    if (path := Path(what)).is_dir() and has_all_weights(path):
        archive.add(path)
        weights, changed = _read(path, archive)
    else:
        weights, changed = archive.digest_of(what), []
    found = lineage(archive, weights)
    found.contradictions[:0] = changed
    for line in archive.remarks:
        print(f"poise lineage: left out: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps(_described(found, archive), indent=2, default=str))
        return
    print("\n".join(_tree(found)))
    for line in found.contradictions:
        print(f"contradiction: {line}")


def _read(path: Path, archive: Archive) -> tuple[str, list[str]]:
    """The digest of a folder's weights, and a line where its record tells of others."""
    weights = model_digest(Checkpoint.at(path)).weights
    own = [each for each in archive.all_records if each.folder.resolve() == path.resolve()]
    return weights, [
        f"{path}: its weights are {weights}; its {RECORD_FILE} tells of {each.weights}"
        for each in own[:1]
        if each.weights != weights and "weights" in each.content
    ]


def _described(found: Lineage, archive: Archive) -> dict[str, Any]:
    """For `--json`: each model once, by its digest."""
    return {
        "weights": found.weights,
        "models": {digest: asdict(model) for digest, model in found.models.items()},
        "used_by": found.used_by,
        "contradictions": found.contradictions,
        "left_out": archive.remarks,
        "searched": archive.searched,
    }


def _tree(found: Lineage) -> Iterator[str]:
    """A line for each fact; a model that was shown above is only named."""
    shown: set[str] = set()
    # What is left to print, the next at the end: the line's beginning, the beginning of those
    # below it, the role, the digest, and what stands for a model whose digest is not known.
    waiting = [("", "", "", found.weights, "")]
    while waiting:
        head, below, role, weights, unknown = waiting.pop()
        model = found.models.get(weights)
        if model is None:
            yield f"{head}{role}{unknown}"
            continue
        again = weights in shown and bool(model.makings)
        yield f"{head}{role}{weights if not role else weights[:12]}  {_title(model, again)}"
        if again:
            continue
        shown.add(weights)
        parents = [each for making in model.makings for each in making.parents]
        inner = below + ("│  " if parents else "   ")
        yield from (f"{inner}{line}" for line in _facts(model))
        if not role:
            yield from (f"{inner}used by {folder}" for folder in found.used_by)
        for number, parent in reversed(list(enumerate(parents, 1))):
            last = number == len(parents)
            text = f"{parent.name}, of which no record is here ({parent.known or parent.weights})"
            waiting.append(
                (
                    below + ("└─ " if last else "├─ "),
                    below + ("   " if last else "│  "),
                    f"{parent.role} ",
                    "" if _is_outside(found, parent.weights) else str(parent.weights),
                    text,
                )
            )


def _is_outside(found: Lineage, weights: str | None) -> bool:
    """Whether nothing is known of a parent but its name."""
    model = None if weights is None else found.models.get(weights)
    return model is None or not (model.makings or model.measured)


def _title(model: Model, again: bool) -> str:
    """How a model was made; several ways where records tell of several."""
    told = "; also ".join(dict.fromkeys(making.told for making in model.makings))
    return (told or "no record of how it was made") + (" (see above)" if again else "")


def _facts(model: Model) -> Iterator[str]:
    """Where a model lies, its data and evaluations."""
    for making in model.makings:
        yield from (f"in {folder}" for folder in making.folders)
        yield from (f"data {line}" for line in making.data)
    yield from (f"evaluated in {_numbers(each)}" for each in model.measured)


def _numbers(measured: Measured) -> str:
    """An evaluation's place, name and numbers."""
    told = ", ".join(_number(name, each) for name, each in measured.groups.items())
    if not told:
        more = f" and {len(measured.tasks) - NUM_TASKS} more" * (len(measured.tasks) > NUM_TASKS)
        told = ", ".join(measured.tasks[:NUM_TASKS]) + more
    return f"{measured.place} as {measured.name} ({measured.split}): {told}"


def _number(name: str, number: Mapping[str, float | None]) -> str:
    value, error = number.get("value"), number.get("stderr")
    if value is None:
        return f"{name} –"
    return f"{name} {value:.4g}" + ("" if error is None else f" ±{error:.2g}")
