"""Edits of characters as in DeepWordBug (Gao et al. 2018, "Black-box generation of adversarial text
sequences to evade deep learning classifiers", section 3.2): neighbours swapped, a character
replaced, left out or put in.
"""

from collections.abc import Mapping, Sequence
from random import Random
from string import ascii_lowercase

from pipelines.robustness.template import is_plain

Characters = Mapping[str, Sequence[str]]  # a character -> those that it is mistaken for
NUM_KINDS = 4


def edits(word: str, random: Random, characters: Characters | None = None) -> list[str]:
    """One edit of each of the four kinds, at drawn places, where there is one.

    Args:
        word: two letters or more.
        characters: what a character may be replaced by, and what may come before it; default: any
            letter of a to z. Characters that are not in it are left alone.
    """
    pairs = [place for place in range(len(word) - 1) if word[place] != word[place + 1]]
    found = []
    if pairs:
        place = random.choice(pairs)
        found.append(word[:place] + word[place + 1] + word[place] + word[place + 2 :])
    found += _mistaken(word, random, characters, 1)
    place = random.randrange(len(word))
    found.append(word[:place] + word[place + 1 :])
    found += _mistaken(word, random, characters, 0)
    return list(dict.fromkeys(found))


def _mistaken(word: str, random: Random, characters: Characters | None, length: int) -> list[str]:
    """The word with another character for `length` of its own: 1 replaces one, 0 puts one before
    it. None where no character has another.
    """
    others = [_others(letter, characters) for letter in word]
    places = [place for place, each in enumerate(others) if each]
    if not places:
        return []
    place = random.choice(places)
    other = random.choice(others[place])
    other = other.upper() if word[place].isupper() else other
    return [word[:place] + other + word[place + length :]]


def _others(letter: str, characters: Characters | None) -> Sequence[str]:
    """What a letter may be replaced by."""
    found: Sequence[str] = ascii_lowercase
    if characters is not None:
        found = characters.get(letter) or characters.get(letter.lower()) or ()
    return [each for each in found if each.lower() != letter.lower() and is_plain(each)]


def levenshtein(first: str, second: str) -> int:
    """The fewest characters to put in, leave out or replace that make one text of another."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]
