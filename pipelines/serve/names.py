"""What a served name means: which weights, in which folder. It survives a restart.

The file `names.json` in the server's state folder holds, for each name that was changed,

    configured   the path in the config at that time; where it is another now, the config counts
    current      weights (the digest) and path
    previous     those before, the newest last
    canary       weights that are tried on a part of the requests, if any; share is this part, in %

It is written before a change takes effect, in one step.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipelines.commit import write_atomically
from pipelines.errors import InputError

FILE = "names.json"
SIGNATURE = "x-poise-weights"  # the header of an answer with the digest of what made it
KEPT = 20  # versions before the current one


@dataclass(frozen=True, slots=True)
class Version:
    """Weights that a name can mean.

    Attributes:
        weights: their digest.
        path: of the checkpoint's folder.
    """

    weights: str
    path: str


@dataclass(slots=True)
class Meaning:
    """What one name means, and meant."""

    configured: str
    current: Version
    previous: list[Version] = field(default_factory=list)
    canary: Version | None = None
    share: int = 0


Meant = tuple[Version, Version | None]  # current, canary


class Names:
    """The table of names; only the gateway has one that it changes.

    Args:
        configured: what the config says, by name.
        folder: of the state.

    Raises:
        InputError: a file that cannot be read.
    """

    def __init__(self, configured: Mapping[str, Version], folder: Path) -> None:
        self._file = folder / FILE
        self._configured = dict(configured)
        self._meanings = {name: Meaning(v.path, v) for name, v in configured.items()}
        self._picked: Counter[str] = Counter()
        for name, meaning in _read(self._file).items():
            if name in configured and meaning.configured == configured[name].path:
                self._meanings[name] = meaning

    def __iter__(self) -> Any:
        return iter(self._meanings)

    @property
    def versions(self) -> tuple[dict[str, Version], dict[str, Version]]:
        """What each name means now, and the canaries of those that have one."""
        found = self._meanings.items()
        return (
            {name: meaning.current for name, meaning in found},
            {name: meaning.canary for name, meaning in found if meaning.canary is not None},
        )

    @property
    def meant(self) -> dict[str, Meant]:
        """The same by name, with None for no canary."""
        return {name: (each.current, each.canary) for name, each in self._meanings.items()}

    def resolve(self, name: str) -> Version:
        """What a request for a name is pinned to.

        Raises:
            KeyError: no such name.
        """
        return self._meanings[name].current

    def meaning(self, name: str) -> Meaning:
        """With what it meant before."""
        return self._meanings[name]

    def uses(self, name: str, version: Version) -> bool:
        """Whether requests for a name may be pinned to a version."""
        meaning = self._meanings[name]
        return version in (meaning.current, meaning.canary)

    def pick(self, name: str) -> Version:
        """What the next request for a name is pinned to: of 100 requests in a row just `share` are
        the canary's.

        Raises:
            KeyError: no such name.
        """
        meaning = self._meanings[name]
        if meaning.canary is None:
            return meaning.current
        count = self._picked[name]
        self._picked[name] += 1
        is_canary = (count + 1) * meaning.share // 100 > count * meaning.share // 100
        return meaning.canary if is_canary else meaning.current

    def change(self, name: str, version: Version) -> None:
        """Let a name mean another version from now on; the file has it first."""
        old = self._meanings[name]
        kept = [*old.previous, old.current][-KEPT:]
        self._write(name, Meaning(old.configured, version, kept))

    def back(self, name: str) -> None:
        """Let a name mean again what it meant before."""
        old = self._meanings[name]
        self._write(name, Meaning(old.configured, old.previous[-1], old.previous[:-1]))

    def try_out(self, name: str, version: Version, share: int) -> None:
        """Give a part of a name's requests, in percent, to another version."""
        self._picked[name] = 0
        self._write(name, replace(self._meanings[name], canary=version, share=share))

    def drop(self, name: str) -> None:
        """End what `try_out` began."""
        self._write(name, replace(self._meanings[name], canary=None, share=0))

    def _write(self, name: str, meaning: Meaning) -> None:
        changed = {**self._meanings, name: meaning}
        others = {n: m for n, m in _read(self._file).items() if n not in changed}
        stored = others | {
            n: m
            for n, m in changed.items()
            if m.previous or m.canary or m.current != self._configured[n]
        }
        content = {"schema": 1, "names": {n: asdict(m) for n, m in stored.items()}}
        write_atomically(self._file, json.dumps(content, indent=2) + "\n")
        self._meanings = changed


def _read(file: Path) -> dict[str, Meaning]:
    """The names in a file; none where there is no file."""
    if not file.is_file():
        return {}
    try:
        return {
            name: Meaning(
                found["configured"],
                Version(**found["current"]),
                [Version(**each) for each in found["previous"]],
                Version(**found["canary"]) if found["canary"] else None,
                found["share"],
            )
            for name, found in json.loads(file.read_text())["names"].items()
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: cannot be read ({error}); move it away to begin anew") from None
