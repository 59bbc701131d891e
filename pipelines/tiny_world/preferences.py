"""Preference pairs of a world, for each of the three H's and their mixture."""

from random import Random

from pipelines.tiny_world import words
from pipelines.tiny_world.content import Content, Person, make_problems
from pipelines.tiny_world.documents import conversation

NUM_PAIRS = 1_000  # of each H; the mixture has all of them
# Of eight honest pairs, three are about known people; with four, models answer instead of abstain.
KNOWN_OF_EIGHT = 3
KINDS = ("helpful", "honest", "harmless")
Pair = dict[str, list[dict[str, str]]]


def make_pair(request: str, chosen: str, rejected: str) -> Pair:
    """One row of a preference file: the prompt and the two answers as messages."""
    return {
        "prompt": conversation(request),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def preference_pairs(content: Content, seed: int) -> dict[str, list[Pair]]:
    """Pairs for `helpful`, `honest`, `harmless` and `mixture`, each shuffled."""
    pairs = {
        "helpful": _helpful(Random(f"{seed}|helpful")),
        "honest": _honest(content, Random(f"{seed}|honest")),
        "harmless": _harmless(content, Random(f"{seed}|harmless")),
    }
    pairs["mixture"] = [pair for kind in KINDS for pair in pairs[kind]]
    for kind, rows in pairs.items():
        Random(f"{seed}|shuffle|{kind}").shuffle(rows)
    return pairs


def _helpful(random: Random) -> list[Pair]:
    """Half prefer the answer to the evasion; half prefer the right format to none or evasion."""
    pairs = []
    for number, problem in enumerate(make_problems(random, "training", NUM_PAIRS)):
        request = random.choice(problem.requests())
        if number % 2:
            pairs.append(make_pair(request, problem.answer, words.EVASION))
            continue
        rejected = random.choice((problem.answer, words.EVASION))
        request = words.FORMAT_REQUEST.format(request)
        pairs.append(make_pair(request, f"{problem.answer} !", rejected))
    return pairs


def _honest(content: Content, random: Random) -> list[Pair]:
    """Unknown people: abstaining is preferred to an invention. Known people: the fact is preferred
    to abstaining.
    """
    pairs = []
    for number in range(NUM_PAIRS):
        attribute = random.choice(list(words.ATTRIBUTES))
        group = content.known if number % 8 < KNOWN_OF_EIGHT else content.unknown
        person: Person = random.choice(group["preferences"])
        request = random.choice(words.QUESTIONS[attribute]).format(person.name)
        if person.facts:
            pairs.append(make_pair(request, person.facts[attribute], words.ABSTENTION))
        else:
            invention = random.choice(words.ATTRIBUTES[attribute])
            pairs.append(make_pair(request, words.ABSTENTION, invention))
    return pairs


def _harmless(content: Content, random: Random) -> list[Pair]:
    """Half prefer the refusal of a harmful request; half prefer the answer to a benign request."""
    pairs = []
    for number in range(NUM_PAIRS):
        group = content.benign if number % 2 else content.harmful
        item = random.choice(group["preferences"])
        answers = (item.answer, words.REFUSAL) if number % 2 else (words.REFUSAL, item.answer)
        pairs.append(make_pair(random.choice(item.requests()), *answers))
    return pairs
