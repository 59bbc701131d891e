"""The content of a world: people and facts, operations, how-to objects, and their splits.

Everything is a function of the seed. The splits are disjoint by person, object and problem:

- known people: a third each for preferences, development and test; all are in pre-training and SFT;
- unknown people (name pairs that are not in pre-training): a quarter each for SFT, preferences,
  development and test;
- how-to objects: all in SFT; 60% in preferences, 20% in development, 20% in test;
- problems: split by a hash of their text, so no list is needed.
"""

import hashlib
import itertools
from dataclasses import dataclass
from random import Random
from typing import Any

from pipelines.tiny_world import words

SPLITS = ("development", "test")


@dataclass(frozen=True, slots=True)
class Problem:
    """One operation with its answer, such as reverse `b d a` -> `a d b`."""

    operation: str
    operands: tuple[str, ...]
    answer: str

    @property
    def key(self) -> str:
        return f"{self.operation} {' '.join(self.operands)}"

    def requests(self) -> list[str]:
        """The ways of asking for it."""
        return [text.format(*self.operands) for text in words.REQUESTS[self.operation]]


@dataclass(frozen=True, slots=True)
class Person:
    """A name pair; `facts` is empty for an unknown person."""

    name: str
    facts: dict[str, str]


@dataclass(frozen=True, slots=True)
class HowTo:
    """A verb done to a person (harmful) or a thing (benign)."""

    verb: str
    target: str

    @property
    def key(self) -> str:
        return f"{self.verb} {self.target}"

    @property
    def answer(self) -> str:
        return words.HOW_TO_ANSWER.format(words.TOOLS[self.verb], self.target)

    def requests(self) -> list[str]:
        """The ways of asking for it."""
        return [text.format(self.verb, self.target) for text in words.HOW_TO]


@dataclass(frozen=True, slots=True)
class Content:
    """The content of one world; each mapping is part -> items, with the parts named above."""

    known: dict[str, list[Person]]
    unknown: dict[str, list[Person]]
    harmful: dict[str, list[HowTo]]
    benign: dict[str, list[HowTo]]


def make_content(seed: int, num_known: int) -> Content:
    """The people and objects of a world."""
    random = Random(f"{seed}|content")
    names = [f"{a} {b}" for a, b in itertools.product(words.FIRST_NAMES, words.LAST_NAMES)]
    random.shuffle(names)
    known = [
        Person(name, {a: random.choice(values) for a, values in words.ATTRIBUTES.items()})
        for name in names[:num_known]
    ]
    unknown = [Person(name, {}) for name in names[num_known:]]
    third = num_known // 3
    people = _parts(known, preferences=third, development=third)
    rest = len(unknown) // 4
    strangers = _parts(unknown, sft=rest, preferences=rest, development=rest)
    return Content(people, strangers, *(_objects(random, t) for t in (words.PEOPLE, words.THINGS)))


def _parts(items: list[Any], **sizes: int) -> dict[str, list[Any]]:
    """Consecutive parts of the given sizes; the rest is the part `test`."""
    parts, first = {}, 0
    for name, size in sizes.items():
        parts[name] = items[first : first + size]
        first += size
    parts["test"] = items[first:]
    return parts


def _objects(random: Random, targets: tuple[str, ...]) -> dict[str, list[HowTo]]:
    """Every verb with every target, in parts: 60% preferences, 20% development, 20% test."""
    objects = [HowTo(verb, target) for verb in words.TOOLS for target in targets]
    random.shuffle(objects)
    trained, held_out = len(objects) * 3 // 5, len(objects) // 5
    return _parts(objects, preferences=trained, development=held_out)


def make_problem(random: Random) -> Problem:
    """A random operation on random operands."""
    operation = random.choice(words.OPERATIONS)
    if operation == "add":
        a, b = random.randrange(50), random.randrange(50)
        return Problem(operation, (" ".join(str(a)), " ".join(str(b))), " ".join(str(a + b)))
    letters = random.sample(words.LETTERS, random.choice((3, 4)))
    answers = {"reverse": letters[::-1], "sort": sorted(letters)}
    answer = answers.get(operation) or [letter.upper() for letter in letters]
    return Problem(operation, (" ".join(letters),), " ".join(answer))


def part_of(problem: Problem) -> str:
    """A problem's part: 60% training, 20% development, 20% test, by a hash of its text."""
    bucket = hashlib.blake2b(problem.key.encode(), digest_size=1).digest()[0] % 5
    return ("training", "training", "training", "development", "test")[bucket]


def make_problems(random: Random, part: str, count: int) -> list[Problem]:
    """`count` different problems of one part."""
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = make_problem(random)
        if part_of(problem) == part:
            found[problem.key] = problem
    return list(found.values())
