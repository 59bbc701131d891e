"""Attacks on templates. Oracle: brute force over all prompts that an attack may write, with scores
that are made up as functions of the prompt.
"""

import itertools
import zlib
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.errors import InputError
from pipelines.robustness.attacks import STRESS, Attack, num_edits
from pipelines.robustness.config import AttackConfig
from pipelines.robustness.edits import edits, levenshtein
from pipelines.robustness.search import Asking, ranked
from pipelines.robustness.template import PromptTemplate

TEXT = "Classify the sentence as positive or negative: {{ sentence }}\nKeep answers short\nAnswer:"
LABELS = ["positive", "negative"]
PLAIN = PromptTemplate.parse(TEXT, "Read every sentence carefully. ")
WORDS = PLAIN.changeable(LABELS)


def attack(name: str = "deepwordbug", start: PromptTemplate = PLAIN, **fields: Any) -> Attack:
    return Attack(AttackConfig(attack=name, task="t", **fields), start, LABELS)


def noise(template: PromptTemplate) -> float:
    """A score without any order."""
    return zlib.crc32(repr(template.key).encode()) / 2**32


def separable(template: PromptTemplate) -> float:
    """A score to which each word adds its own part."""
    return sum(zlib.crc32(piece.encode()) % 1000 for piece in template.pieces) / 1000


def test_pieces_give_the_template_back() -> None:
    assert (PLAIN.description, PLAIN.text) == ("Read every sentence carefully. ", TEXT)
    found = [PLAIN.pieces[place] for place in WORDS]
    assert (
        found == "Read every sentence carefully Classify sentence Keep answers short Answer".split()
    )
    assert "{content}" in PLAIN.shown and "{{" not in PLAIN.shown


@given(
    st.lists(
        st.one_of(
            st.text(alphabet=" .:aBé'\n9", max_size=12),
            st.sampled_from(["{{ a }}", "{{ '}}' }}", "{% if word %}", "{# word #}"]),
        )
    )
)
def test_no_word_is_within_an_expression(parts: list[str]) -> None:
    found = PromptTemplate.parse("".join(parts))
    assert found.text == "".join(parts)
    assert all("word" not in found.pieces[place] for place in found.words)


@given(st.text(alphabet="abcDE", min_size=2, max_size=9), st.integers(0, 99))
def test_edits_are_small_and_drawn_by_the_seed(word: str, seed: int) -> None:
    found = edits(word, Random(seed))
    assert found == edits(word, Random(seed))
    assert word not in found and len(found) <= 4
    assert all(levenshtein(word, each) in (1, 2) for each in found)


@given(st.text(alphabet="abc", max_size=5), st.text(alphabet="abc", max_size=5))
def test_levenshtein_is_the_recursion(first: str, second: str) -> None:
    def slow(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        same = slow(a[1:], b[1:]) + (a[0] != b[0])
        return min(same, slow(a[1:], b) + 1, slow(a, b[1:]) + 1)

    assert levenshtein(first, second) == slow(first, second)


def choices(seed: int, order: list[int]) -> list[list[str]]:
    """What may stand in the attacked places."""
    return [
        [PLAIN.pieces[place], *edits(PLAIN.pieces[place], Random(f"{seed} {place}"))]
        for place in order
    ]


@pytest.mark.parametrize("seed", range(8))
def test_the_greedy_prompt_is_the_lowest_of_all_where_words_add_up(seed: int) -> None:
    order = Random(f"{seed} words").sample(list(WORDS), 10)[:3]
    every = [
        separable(PLAIN.with_words(dict(zip(order, words, strict=True))))
        for words in itertools.product(*choices(seed, order))
    ]
    found = attack(seed=seed).run(separable)
    assert found.value == min(every) and found.unattacked == separable(PLAIN)
    assert separable(found.template) == found.value


@pytest.mark.parametrize("seed", range(8))
def test_each_step_is_the_lowest_of_its_own(seed: int) -> None:
    order = Random(f"{seed} words").sample(list(WORDS), 10)[:3]
    current = PLAIN
    for place, words in zip(order, choices(seed, order), strict=True):
        current = min((current.with_words({place: word}) for word in words), key=noise)
    found = attack(seed=seed).run(noise)
    assert found.template == current
    assert len(found.asked) <= attack(seed=seed).most_queries == 12


def test_stress_is_the_worst_of_three_even_where_it_helps() -> None:
    def score(template: PromptTemplate) -> float:
        return 1.0 + len(template.text)

    found = attack("stresstest").run(score)
    assert found.template.text == TEXT + STRESS[0] and found.value > found.unattacked
    assert (" and true is true ", " and false is not true ", STRESS[0] * 5) == STRESS
    assert [t.text for t, _ in found.asked] == [TEXT + each for each in STRESS]


@pytest.mark.parametrize("ranking", ["replace", "delete", "head", "tail", "combined"])
def test_words_are_ranked_by_what_is_lost_without_them(ranking: Any) -> None:
    words = WORDS

    def kept(some: Any, other: str = "") -> float:
        return noise(PLAIN.with_words({w: other for n, w in enumerate(words) if n not in some}))

    every = set(range(len(words)))
    scores = {
        "replace": lambda n: noise(PLAIN) - kept(every - {n}, "[UNK]"),
        "delete": lambda n: noise(PLAIN) - kept(every - {n}),
        "head": lambda n: kept(range(n + 1)) - kept(range(n)),
        "tail": lambda n: kept(range(n, 10)) - kept(range(n + 1, 10)),
    }
    scores["combined"] = lambda n: scores["head"](n) + scores["tail"](n)
    expected = sorted(range(len(words)), key=lambda n: -scores[ranking](n))
    asking = Asking(noise, PLAIN, None)
    assert ranked(PLAIN, words, ranking, 1, asking) == [words[n] for n in expected]
    ready = attack(ranking=ranking, words=1)
    assert len(asking.asked) == ready.most_queries - 4
    assert set(ready.run(noise).template.pieces) ^ set(PLAIN.pieces) <= {
        PLAIN.pieces[words[expected[0]]],
        *choices(1, [words[expected[0]]])[0],
    }


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 999),
    st.integers(1, 10),
    st.integers(1, 30),
    st.lists(st.sampled_from(["keep", "Answers SHORT", "classify"]), max_size=3),
    st.none() | st.integers(1, 20),
)
def test_bounds_hold(
    seed: int, words: int, max_edits: int, protect: list[str], most: int | None
) -> None:
    fields: dict[str, Any] = {
        "words": words,
        "max_edits": max_edits,
        "protect": protect,
        "max_queries": most,
    }
    ready = attack(seed=seed, **fields)
    asked: list[PromptTemplate] = []

    def score(template: PromptTemplate) -> float:
        asked.append(template)
        return noise(template)

    found = ready.run(score)
    assert found == attack(seed=seed, **fields).run(noise)
    assert len(asked) == len(found.asked) + 1 <= ready.most_queries + 1
    assert most is None or len(found.asked) <= most
    places = {place for place, _ in enumerate(PLAIN.pieces)} - set(
        PLAIN.changeable([*LABELS, *protect])
    )
    for template in asked:
        assert levenshtein(template.text, TEXT) <= max_edits
        assert num_edits(template, PLAIN) <= max_edits
        assert all(template.pieces[place] == PLAIN.pieces[place] for place in places)
        assert sum(a != b for a, b in zip(template.pieces, PLAIN.pieces, strict=True)) <= words
    assert found.value == min(map(noise, asked))


def test_words_of_a_table(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("classify sort\nclassify order label\nkeep sort2\nanswers responses\n")
    found = attack("substitution", source=str(file), words=10).run(lambda t: -len(t.text))
    changed = {b for a, b in zip(PLAIN.pieces, found.template.pieces, strict=True) if a != b}
    assert changed == {"responses"}
    tried = {word for t, _ in found.asked for word in t.pieces}
    assert {"Sort", "Order"} <= tried and "Label" not in tried
    assert found.without_candidates.count("Keep") == 1  # its other word is no word


@pytest.mark.parametrize(
    ("name", "fields", "start", "message"),
    [
        ("deepwordbug", {}, "{{ a }} is it positive", "no word of the prompt may be changed"),
        ("deepwordbug", {"protect": TEXT.split()}, "Answer", "'Answer' has stop words, words of"),
        (
            "deepwordbug",
            {"ranking": "delete", "max_queries": 1},
            "one two",
            "max_queries: found 1; allowed: more than 2",
        ),
    ],
)
def test_attacks_that_find_no_word(
    name: str, fields: dict[str, Any], start: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        attack(name, PromptTemplate.parse(start), **fields)


def test_an_attack_without_any_other_word(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("elsewhere somewhere\n")
    ready = attack("substitution", PromptTemplate.parse("Reply now"), source=str(file))
    with pytest.raises(InputError, match=r"t\+substitution: no other word was found for: Reply"):
        ready.run(noise)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attack": "stresstest", "words": 2}, "attacks.words: has no effect with stresstest"),
        ({"attack": "deepwordbug", "mask": True}, "attacks.mask: has no effect with deepwordbug"),
        ({"attack": "substitution"}, "attacks.source: required by substitution"),
        ({"attack": "bertattack"}, "attacks.model: required by bertattack"),
        (
            {"attack": "substitution", "source": "x", "min_cosine": 0.5},
            "attacks.min_cosine: has no effect without encoder",
        ),
        ({"attack": "deepwordbug", "name": "a/b"}, "should match pattern"),
    ],
)
def test_fields_without_effect(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttackConfig(task="t", **fields)
