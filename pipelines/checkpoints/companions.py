"""What stands beside a model's weights: which of its files travel with it, and which stay behind.

All files travel, in subfolders too, except

- weights, their indexes, and weights of other formats, most of them pickles, which can run code;
- subfolders with such weights: exports, training checkpoints and other models. Those that
  modules.json or router_config.json names (2_Dense of an embedding model) and adapters are parts of
  the model: they travel with their safetensors;
- what tells how the old model came about: model cards, records, logs; folders of Poise's results;
- hidden files and caches.

Nothing is run or loaded: a model's own Python files are text here.
"""

import json
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.checkpoints.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from pipelines.checkpoints.reader import INDEX, WEIGHTS, read_json
from pipelines.errors import InputError

RECORD_FILE = "poise.json"
NUM_LISTED = 5
_RECORDS = {RECORD_FILE, "metrics.jsonl", "tensorboard", "mergekit_config.yml", "__pycache__"}
_RESULTS = (RECORD_FILE, "evaluation.json", "sweep.json", "steps.json")  # of a folder of its own
_LEFT_BEHIND = re.compile(
    r"\..*|readme([^a-z].*)?\.(md|markdown|rst|txt|html)|readme|model_?card.*"
    r"|events\.out\.tfevents.*|.*(\.pyc|~|\.lock|\.tmp)"
)
_INDEX = re.compile(r".*\.(safetensors|bin|pt|h5|msgpack)\.index\.json$")
_OTHER_FORMATS = re.compile(
    r".*\.(bin|pt|pth|ckpt|pkl|pickle|joblib|dill|h5|hdf5|keras|msgpack|npy|npz|ot|pte|gguf|ggml"
    r"|ggmlv3|llamafile|tflite|mlmodel|engine|nemo|mar|distcp|onnx|onnx[._]data.*)$|openvino.*\.xml$"
)
_OF_TOKENIZER = re.compile(
    r"tokenizer.*|tokenization.*\.py|special_tokens_map\.json|added_tokens\.json|merges\.txt"
    r"|.*vocab.*\.(json|txt)|.*\.(model|tiktoken|spm)|tekken\.json|bpe\.codes|dict\.txt"
    r"|normalizer\.json|chat_template\.(jinja|json)|generation_config\.json"
)
TEMPLATES_FOLDER = "additional_chat_templates"


@dataclass(frozen=True, slots=True)
class Companions:
    """The files beside a model's weights.

    Attributes:
        files: those that travel, by their places below the folder (`1_Pooling/config.json`).
        parts: those among them that hold weights, of parts that are not merged.
        left_out: weights of other formats and folders with other models, which stay.
        foreign: links that lead outside the folder, which nobody may copy.
    """

    files: dict[str, Path] = field(default_factory=dict)
    parts: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)


def companions_of(folder: Path) -> Companions:
    """Sort the files of a model's folder; nothing of them is read but the lists of parts."""
    found = {file.relative_to(folder).as_posix(): file for file in _walk(folder, (folder,))}
    staying, merged = _staying(found, _parts(folder)), _merged_files(folder)
    result = Companions()
    for place, file in found.items():
        if place in staying:
            if place not in merged or staying[place] != place:
                result.left_out.append(staying[place])
        elif leads_outside(file, folder):
            result.foreign.append(place)
        elif file.is_file():
            result.files[place] = file
            if file.suffix == ".safetensors":
                result.parts.append(place)
    result.left_out[:] = dict.fromkeys(result.left_out)
    return result


def lists_of(places: Collection[str]) -> list[str]:
    """The files among those of a hub's model that say which others are parts of it."""
    names = ["modules.json", "router_config.json", *([] if WEIGHTS in places else [INDEX])]
    return [name for name in names if name in places]


def needed_files(places: Collection[str], folder: Path) -> list[str]:
    """The files that a model needs of all that the hub has of it: its weights and what travels with
    them, but no Python files.

    Args:
        places: of all files, below the model's folder.
        folder: holds the files of `lists_of` already.
    """
    results = {str(PurePosixPath(p).parent) for p in places if PurePosixPath(p).name in _RESULTS}
    found = [place for place in places if not _is_passed_over(PurePosixPath(place), results)]
    staying = _staying(found, _parts(folder))
    merged = {WEIGHTS, ADAPTER_WEIGHTS} if WEIGHTS in places else _merged_files(folder)
    return [
        place
        for place in found
        if (place in merged or place not in staying) and not place.endswith(".py")
    ]


def _is_passed_over(path: PurePosixPath, results: Collection[str]) -> bool:
    """Whether `_walk` would not give a file: by its name, or for the folder that it is in."""
    parents = [str(parent) for parent in path.parents][:-1]
    return any(
        name in _RECORDS or _LEFT_BEHIND.fullmatch(name.lower()) for name in path.parts
    ) or any(parent in results for parent in parents)


def check_links(folder: Path, foreign: Iterable[str]) -> None:
    """Raise InputError where a file that is to be copied is a link out of the model's folder."""
    for place in foreign:
        file = folder / place
        raise InputError(
            f"{file}: is a link to {file.readlink()}; allowed: links to files of the folder, or to "
            "the blobs of a hub's cache"
        )


def leads_outside(file: Path, folder: Path) -> bool:
    """Whether a link leads out of its model's folder, other than to a hub cache's blobs, or to
    nothing at all.
    """
    if not file.is_symlink():
        return False
    real = file.resolve()
    if real.is_relative_to(folder.resolve()) or is_blob(real):
        return not real.exists()
    return True


def is_blob(file: Path) -> bool:
    """Whether a file is one of a hub's cache: `models--NAME/blobs/HASH`, to which the files of
    `models--NAME/snapshots/REVISION` are links.
    """
    return file.parent.name == "blobs" and (file.parent.parent / "snapshots").is_dir()


def is_of_tokenizer(place: str) -> bool:
    """Whether a file goes with the tokenizer: its vocabulary, settings, code, chat templates, and
    generation_config.json, whose numbers are tokens.
    """
    path = PurePosixPath(place)
    if len(path.parts) > 1:
        return path.parts[0] == TEMPLATES_FOLDER
    return _OF_TOKENIZER.fullmatch(path.name) is not None


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copy files, links as what they lead to, to their places below a folder."""
    for place, file in files.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def told(folder: Path, companions: Companions) -> list[str]:
    """A line for each thing that a user would not expect of a copy."""
    lines = []
    if companions.parts:
        lines.append(f"{folder}: copied as they are, not merged: {_listed(companions.parts)}")
    if companions.left_out:
        lines.append(
            f"{folder}: not copied: {_listed(companions.left_out)} (weights of other formats, "
            "or other models)"
        )
    parts = _parts(folder)
    for place in companions.left_out:
        if any(PurePosixPath(place).is_relative_to(part) for part in parts):
            lines.append(
                f"{folder / place}: is a pickle, and so the output lacks this part of the model; "
                "allowed: safetensors"
            )
    return lines


def _listed(places: list[str]) -> str:
    more = f" and {len(places) - NUM_LISTED} more" if len(places) > NUM_LISTED else ""
    return ", ".join(places[:NUM_LISTED]) + more


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """All files below a folder, by name, without what is left behind; of links to folders those
    inside the model are followed, others are given themselves.
    """
    for file in sorted(folder.iterdir()):
        if file.name in _RECORDS or _LEFT_BEHIND.fullmatch(file.name.lower()):
            continue
        if not file.is_dir():
            if file.is_file() or file.is_symlink():
                yield file
        elif leads_outside(file, above[0]):
            yield file
        elif any((file / name).is_file() for name in _RESULTS):
            continue
        elif file.resolve() not in [each.resolve() for each in above]:
            yield from _walk(file, (*above, file))


def _staying(found: Collection[str], parts: Collection[str]) -> dict[str, str]:
    """The files that do not travel, by their places, and what names each: itself or its folder."""
    strangers, result = _strangers(found, parts), {}
    for place in found:
        path = PurePosixPath(place)
        stranger = next((s for s in strangers if path.is_relative_to(s)), None)
        if stranger is not None:
            result[place] = f"{stranger}/"
        elif _is_weight(path.name) and not _travels(path, parts, found):
            result[place] = place
    return result


def _is_weight(name: str) -> bool:
    name = name.lower()
    is_other = _OTHER_FORMATS.fullmatch(name) or _INDEX.fullmatch(name)
    return name.endswith(".safetensors") or is_other is not None


def _travels(path: PurePosixPath, parts: Iterable[str], found: Collection[str]) -> bool:
    """Whether weights in a subfolder are a part's, or an adapter's, in safetensors."""
    if len(path.parts) == 1 or not re.search(r"\.safetensors(\.index\.json)?$", path.name):
        return False
    is_adapter = (path.parent / ADAPTER_CONFIG).as_posix() in found
    return is_adapter or any(path.is_relative_to(part) for part in parts)


def _strangers(found: Collection[str], parts: Iterable[str]) -> list[str]:
    """Subfolders whose weights are not this model's: the outermost with weights."""
    holding = {PurePosixPath(place).parent for place in found if _is_weight(Path(place).name)}
    strangers = [
        each
        for each in sorted(holding - {PurePosixPath()})
        if not any(each.is_relative_to(part) for part in parts)
        and (each / ADAPTER_CONFIG).as_posix() not in found
    ]
    return [str(s) for s in strangers if not any(s != o and s.is_relative_to(o) for o in strangers)]


def _parts(folder: Path) -> list[str]:
    """The subfolders that the model's own lists name as parts of it."""
    named: list[Any] = []
    for each in _json_list(folder / "modules.json"):
        named.append(each.get("path") if isinstance(each, dict) else None)
    router = folder / "router_config.json"
    if router.is_file():
        types = read_json(router).get("types")
        named.extend(types if isinstance(types, dict) else ())
    return [name for name in named if isinstance(name, str) and name.strip("./")]


def _json_list(path: Path) -> list[Any]:
    """A JSON file's list; empty without the file, and where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from None
    return found if isinstance(found, list) else []


def _merged_files(folder: Path) -> set[str]:
    """The files of the model's own weights."""
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return {WEIGHTS, INDEX, ADAPTER_WEIGHTS}
    places = read_json(folder / INDEX).get("weight_map")
    return {INDEX, *(map(str, places.values()) if isinstance(places, dict) else ())}
