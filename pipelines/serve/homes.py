"""Where requests are answered: which group's engines have what a name means, and what it tries."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from pipelines.serve.calls import Pool
from pipelines.serve.groups import Group
from pipelines.serve.names import Names, Version


@dataclass(frozen=True, slots=True)
class Pin:
    """What answers one request.

    Attributes:
        group: the key of the group whose engines answer.
        pool: the way to them.
    """

    version: Version
    group: str
    pool: Pool


class Homes:
    """The groups of a server's names, and the requests under way.

    Args:
        groups: of models that share engines.
        pool: makes the way to the engines of a group, by its key.

    Attributes:
        groups: of what each name means now.
        trials: of the canaries, by name.
        pinned: how many requests are under way, by the weights that answer them.
    """

    def __init__(self, names: Names, groups: Iterable[Group], pool: Callable[[str], Pool]) -> None:
        groups = list(groups)
        self._names, self._pool = names, pool
        self.groups = {name: group for group in groups for name in group.names}
        self.trials = {name: group for group in groups for name in group.trials}
        self.pools = {group.key: pool(group.key) for group in groups}
        self.pinned: Counter[Version] = Counter()
        self._waiting: Counter[str] = Counter()

    def pin(self, name: str) -> Pin:
        """Give a request to what its name means now, or to the canary when it is its turn."""
        version = self._names.pick(name)
        is_tried = version == self._names.meaning(name).canary
        group = self.trials[name] if is_tried else self.groups[name]
        self.pinned[version] += 1
        self._waiting[group.key] += 1
        return Pin(version, group.key, self.pools[group.key])

    def unpin(self, pin: Pin) -> None:
        """A request has ended."""
        self.pinned[pin.version] -= 1
        self._waiting[pin.group] -= 1

    def waits_for(self, key: str) -> bool:
        """Whether requests are under way that the engines of a group answer."""
        return self._waiting[key] > 0

    def known(self) -> dict[str, Group]:
        """The groups that some name means or tries, by their keys."""
        return {each.key: each for each in [*self.groups.values(), *self.trials.values()]}

    def add(self, key: str) -> None:
        """Know the way to the engines of a new group."""
        self.pools[key] = self._pool(key)

    def current(self, key: str) -> Version | None:
        """What an engine of a group is to begin with: what one of its names means."""
        meaning = self._names.meaning
        found = [meaning(name).current for name, group in self.groups.items() if group.key == key]
        tried = [meaning(name).canary for name, group in self.trials.items() if group.key == key]
        return next((each for each in [*found, *tried] if each is not None), None)
