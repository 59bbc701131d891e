"""The ancestors of weights, from the records of an archive.

A merge's record names its inputs by the digests of their weights. A training's record names its
models by a fingerprint of their files, so a folder is taken for the model only when its files have
this fingerprint. Records may contradict each other, as files can be changed: this is named.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pipelines.fingerprint import CHECKPOINT_FILES, fingerprint_directory
from pipelines.lineage.archive import Archive, Measured, Record, input_digests

_TOLD_BYTES = 1 << 30  # files of more than this are read with a line on stderr


@dataclass(frozen=True, slots=True)
class Parent:
    """A model that another was made from.

    Attributes:
        role: the config's field, or `model`, `base`.
        name: as the record has it, a path or a name on the hub.
        weights: its digest; None where only a fingerprint of its files is known.
        known: what the record has instead of the digest.
    """

    role: str
    name: str
    weights: str | None
    known: str


@dataclass(frozen=True, slots=True)
class Making:
    """One way in which a model was made, by its record.

    Attributes:
        folders: of all records that tell of it; the model lies there.
        kind: merged, aligned, exported, extracted, ...
        told: in words.
        data: training data, with the fingerprint of the rows.
    """

    folders: list[Path]
    kind: str
    told: str
    parents: list[Parent]
    data: list[str]
    record: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Model:
    """Weights, with the ways in which they were made: none where there is no record of it."""

    weights: str
    makings: list[Making]
    measured: list[Measured]


@dataclass
class Lineage:
    """Weights with all their known ancestors.

    Attributes:
        models: by digest, the asked ones first.
        used_by: folders of models that were made from the asked weights.
        contradictions: a line each.
    """

    weights: str
    models: dict[str, Model] = field(default_factory=dict)
    used_by: list[Path] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)


def lineage(archive: Archive, weights: str) -> Lineage:
    """What these weights are: each ancestor once, to wherever records lead."""
    found, waiting = Lineage(weights), [weights]
    links = _Links(archive, found.contradictions)
    while waiting:
        digest = waiting.pop()
        if digest in found.models:
            continue
        makings = list(_makings(archive.records.get(digest, []), links))
        found.models[digest] = Model(digest, makings, archive.measured.get(digest, []))
        parents = [each.weights for making in makings for each in making.parents]
        waiting += [each for each in reversed(parents) if each is not None]
    found.used_by = [
        record.folder for record in archive.all_records if weights in input_digests(record).values()
    ]
    found.contradictions += [*_two_results(archive, found), *_circles(found)]
    return found


def _makings(records: list[Record], links: "_Links") -> Iterator[Making]:
    """The different ways among records of one model; copies of a folder are one."""
    ways: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        key = (str(record.content["kind"]), str(record.content.get("fingerprint")))
        ways.setdefault(key, []).append(record)
    for (kind, _), same in ways.items():
        content, config = same[0].content, same[0].content.get("config") or {}
        parents = [parent for record in same[:1] for parent in links.parents(record)]
        yield Making(
            [record.folder for record in same],
            kind,
            _told(kind, content, config),
            parents,
            _data(content, config),
            content,
        )


class _Links:
    """Leads from a record's inputs to the weights that they were."""

    def __init__(self, archive: Archive, contradictions: list[str]) -> None:
        self._archive, self._contradictions = archive, contradictions
        self._by_folder = {each.folder.resolve(): each for each in archive.all_records}
        self._fingerprints: dict[Path, str] = {}

    def parents(self, record: Record) -> Iterator[Parent]:
        """The models among a record's inputs."""
        config = record.content.get("config") or {}
        digests = input_digests(record)
        for name, known in record.content["inputs"].items():
            if name in digests:
                role = "base" if name == config.get("base_model") else "model"
                self._compare(record, name, digests[name])
                yield Parent(role, name, digests[name], "")
            elif record.content["kind"] not in ("aligned", "exported"):
                yield Parent("model", name, self._of_old_digest(str(known)), str(known))
            elif (path := _value(config, name)) is not None and not name.endswith("data"):
                if name == "model" and config.get("init") == "random":
                    continue  # of this folder only config and tokenizer were read
                yield Parent(name, path, self._of_files(record, path, str(known)), str(known))

    def _compare(self, record: Record, name: str, weights: str) -> None:
        """Name an input whose folder has a record of other weights."""
        there = self._by_folder.get(Path(name).resolve())
        if there is not None and there.weights != weights:
            self._contradictions.append(
                f"{record.folder} was made from {name} with the weights {weights}; the record "
                f"there is of {there.weights}"
            )

    def _of_old_digest(self, known: str) -> str | None:
        """The model whose record has the one digest of earlier versions."""
        return known if known in self._archive.records else None

    def _of_files(self, record: Record, path: str, known: str) -> str | None:
        """The recorded weights of the folder whose files have this fingerprint: at its path, or
        with its name elsewhere.
        """
        there = self._by_folder.get(Path(path).resolve())
        named = [each for each in self._by_folder.values() if each.folder.name == Path(path).name]
        for each in ([there] if there is not None else []) + named:
            if self._fingerprint(each.folder) == known:
                return each.weights
        if there is not None:
            self._contradictions.append(
                f"{record.folder} was trained from {path} with files of the fingerprint {known}; "
                f"those there have {self._fingerprint(there.folder)}"
            )
        return None

    def _fingerprint(self, folder: Path) -> str:
        """As a training takes it of a model's files, which are read."""
        if folder not in self._fingerprints:
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            if size > _TOLD_BYTES:
                print(f"  reading {folder} ({size / 1e9:.1f} GB)", file=sys.stderr)
            self._fingerprints[folder] = fingerprint_directory(folder, CHECKPOINT_FILES)
        return self._fingerprints[folder]


def _two_results(archive: Archive, found: Lineage) -> Iterator[str]:
    """Records of one config and inputs that have different weights, one of them in the lineage."""
    first: dict[tuple[str, str], Record] = {}
    for record in archive.all_records:
        key = (str(record.content["kind"]), str(record.content.get("fingerprint")))
        other = first.setdefault(key, record)
        if other.weights != record.weights and {other.weights, record.weights} & {*found.models}:
            yield (
                f"{other.folder} and {record.folder} are of one config and inputs (fingerprint "
                f"{key[1]}), with the weights {other.weights} and {record.weights}"
            )


def _circles(found: Lineage) -> Iterator[str]:
    """Weights that are among their own ancestors, by other weights than themselves."""
    parents = {
        digest: {each.weights for making in model.makings for each in making.parents} - {digest}
        for digest, model in found.models.items()
    }
    try:
        TopologicalSorter(parents).prepare()
    except CycleError as error:
        circle = " from ".join(map(str, reversed(error.args[1])))
        yield f"by the records, weights were made from themselves: {circle}"


def _value(config: Mapping[str, Any], name: str) -> str | None:
    """A config's field by its dotted name, as text."""
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else None


def _told(kind: str, content: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """How a model was made, in words."""
    seed = "" if content.get("seed") is None else f", seed {content['seed']}"
    if kind == "merged":
        given = "".join(f", {k} {v}" for k, v in (config.get("parameters") or {}).items())
        return f"merged by {config.get('merge_method', 'several methods')}{given}{seed}"
    if kind in ("aligned", "exported"):
        step = f", step {content['step']}" if "step" in content else ""
        start = ", from new weights" if config.get("init") == "random" else ""
        return (
            f"trained by {_name(config.get('objective'))} with {_name(config.get('optimizer'))}, "
            f"{_length(config)} of {config.get('global_batch_size')} rows{step}{start}{seed}"
        )
    return f"{kind}{seed}"


def _length(config: Mapping[str, Any]) -> str:
    steps, epochs = config.get("num_steps"), config.get("num_epochs")
    return f"{steps} steps" if steps is not None else f"{epochs} epochs"


def _name(part: Any) -> str:
    """The name of an objective, of several, or of an optimizer."""
    parts = part if isinstance(part, list) else [part]
    names = (each.get("name") if isinstance(each, Mapping) else each for each in parts)
    flat = (n for name in names for n in (name if isinstance(name, list) else [name]))
    return "+".join(str(each) for each in flat)


def _data(content: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The data sets of a training, with the fingerprint of their rows."""
    found = []
    for name, known in content["inputs"].items():
        if not (name == "data" or name.endswith(".data")) or not isinstance(known, str):
            continue
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        sets = value if isinstance(value, list) else [value]
        paths = [str(each.get("path") if isinstance(each, Mapping) else each) for each in sets]
        commits = {h.get("id"): h.get("commit") for h in content.get("hub") or [] if h.get("kind")}
        pinned = [p if "@" in p or p not in commits else f"{p}@{commits[p]}" for p in paths]
        what = "" if name == "data" else f"{name}: "
        found.append(f"{what}{', '.join(pinned)} ({known})")
    return found
