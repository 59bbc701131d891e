"""Readers of published sets, on made-up rows in the published columns.

Oracle: the pairs that the sets' descriptions imply, written by hand.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training_files import align_config, write_rows

from pipelines.errors import InputError
from pipelines.train import plan_alignment
from pipelines.train.data import TokenTable
from pipelines.train.data.cache import token_table
from pipelines.train.data.rows import parts_of
from pipelines.train.data.tokenizing import TokenSettings
from pipelines.train.row_kinds import ROW_KINDS
from pipelines.train.rows.columns import Reading, WrongColumnsError
from pipelines.train.rows.examples import LeftOutError
from pipelines.train.rows.readers import READERS, dialogue
from pipelines.train.rows.source import RowSource

Pair = tuple[str, str, str, str]  # system, prompt, chosen, rejected


def pairs_of(
    name: str, rows: list[dict[str, Any]], seed: int = 0, **options: Any
) -> list[Pair | str]:
    """What a reader makes of rows: pairs, or why a row is left out."""
    reading = Reading(reader=name, options=tuple(options.items()), seed=seed)
    source = RowSource(ROW_KINDS["pairs"], reading)
    found: list[Pair | str] = []
    for _, row in source.arranged(("", row) for row in rows):
        try:
            for standard in source.rows(row):
                (example,) = source.examples(standard)
                prompt = {message["role"]: message["content"] for message in example.prompt}
                answers = [each[-1]["content"] for each in example.responses]
                found.append((prompt.get("system", ""), prompt["user"], answers[0], answers[1]))
        except LeftOutError as left:
            found.append(left.reason)
    return found


def rated(prompt: str, response: str, helpful: int, correct: int, coherent: int) -> dict[str, Any]:
    """A row of HelpSteer."""
    return {
        "prompt": prompt,
        "response": response,
        "helpfulness": helpful,
        "correctness": correct,
        "coherence": coherent,
        "complexity": 4 - helpful,
        "verbosity": 1,
    }


def said(*texts: str) -> list[dict[str, str]]:
    """A conversation that the user begins."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


ORCA = {"system": "s", "input": "q", "chosen": "c", "rejected": "r", "status": "unchanged"}
ORCA |= {"chosen_score": 9.0, "in_gsm8k_train": False, "generations": ["c", "r"], "order": ["a"]}
SAFE = {"prompt": "q", "response_0": "zero", "response_1": "one", "is_response_0_safe": False}
SAFE |= {"is_response_1_safe": True, "better_response_id": 0, "safer_response_id": 1}
ULTRA = {"instruction": "q", "source": "x"}
NECTAR = {"prompt": "\n\nHuman: q\n\nAssistant: ", "turns": 1, "good_natured": False}
NECTAR |= {
    "answers": [
        {"answer": answer, "model": "m", "rank": rank}
        for answer, rank in (("third", 3.0), ("first", 1.0), ("second", 2.0), ("second too", 2.0))
    ]
}
TIE = "that are a tie"
CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], list[Pair | str]]] = {
    "helpsteer": (
        "helpsteer",
        [
            rated("a", "middle", 3, 4, 4),
            rated("b", "alone", 3, 4, 4),
            rated("a", "best", 4, 2, 2),
            rated("c", "one", 2, 3, 1),
            rated("a", "worst", 3, 4, 3),
            rated("c", "two", 2, 2, 2),
        ],
        {},
        [("", "a", "best", "worst"), "with one response alone", TIE],
    ),
    "py_dpo": (
        "py_dpo",
        [{"prompt": "q", "chosen": "c", "rejected": "r", "id": "x"}],
        {},
        [("", "q", "c", "r")],
    ),
    "rewardbench": (
        "rewardbench",
        [{"prompt": "q", "chosen": "c", "rejected": "r", "subset": "hep-go", "id": 3}],
        {},
        [("", "q", "c", "r")],
    ),
    "orca": (
        "orca",
        [ORCA, ORCA | {"status": "tie"}, ORCA | {"chosen_score": 5.0, "system": ""}],
        {},
        [("s", "q", "c", "r"), TIE, ("", "q", "c", "r")],
    ),
    "orca, the best": (
        "orca",
        [ORCA, ORCA | {"chosen_score": 5.0}, ORCA | {"in_gsm8k_train": True}],
        {"min_score": 8.0, "leave_out_gsm8k": True},
        [
            ("s", "q", "c", "r"),
            "whose chosen_score is below 8",
            "that are in GSM8K's training set",
        ],
    ),
    "capybara": (
        "capybara",
        [{"chosen": said("q", "c"), "rejected": said("q", "r"), "conversation": [{"input": "q"}]}],
        {},
        [("", "q", "c", "r")],
    ),
    "ultrasafety": (
        "ultrasafety",
        [
            ULTRA
            | {
                "completions": [
                    {"model": "a", "response": "bad", "rating": 0},
                    {"model": "b", "response": "good", "rating": "1"},
                ]
            },
            ULTRA | {"completions": [{"model": "a", "response": "bad", "rating": 0}]},
        ],
        {},
        [("", "q", "good", "bad"), "without both a harmless and a harmful response"],
    ),
    "truthy": (
        "truthy",
        [{"id": "1", "source": "x", "system": "s", "prompt": "q", "chosen": "c", "rejected": "r"}],
        {},
        [("s", "q", "c", "r")],
    ),
    "grath": (
        "grath",
        [{"question": "q", "correct": "c", "incorrect": "r"}],
        {},
        [("", "q", "c", "r")],
    ),
    "ultrafeedback": (
        "ultrafeedback",
        [
            {"prompt": "q", "prompt_id": "x", "messages": said("q", "c"), "score_chosen": score}
            | {"chosen": said("q", "c"), "rejected": said("q", answer), "score_rejected": 2.0}
            for score, answer in ((8.0, "r"), (2.0, "r"), (8.0, "c"))
        ],
        {},
        [("", "q", "c", "r"), TIE, "whose chosen and rejected are the same"],
    ),
    "pku_saferlhf": (
        "pku_saferlhf",
        [SAFE, SAFE | {"better_response_id": 1}],
        {},
        [("", "q", "zero", "one"), ("", "q", "one", "zero")],
    ),
    "pku_saferlhf, safer": (
        "pku_saferlhf",
        [SAFE, SAFE | {"safer_response_id": 0}],
        {"prefer": "safer"},
        [("", "q", "one", "zero"), ("", "q", "zero", "one")],
    ),
    "pku_saferlhf, agree": (
        "pku_saferlhf",
        [SAFE, SAFE | {"safer_response_id": 0}],
        {"prefer": "agree"},
        ["whose better response is not the safer one", ("", "q", "zero", "one")],
    ),
    "nectar, all": (
        "nectar",
        [NECTAR],
        {"pairs": "all"},
        [
            ("", "q", *answers)
            for answers in (
                ("first", "second"),
                ("first", "second too"),
                ("first", "third"),
                ("second", "third"),
                ("second too", "third"),
            )
        ],
    ),
    "nectar, good-natured": (
        "nectar",
        [NECTAR, NECTAR | {"answers": NECTAR["answers"][:1], "good_natured": True}],
        {"good_natured_only": True},
        ["that are not good-natured", TIE],
    ),
    "text_pairs": (
        "text_pairs",
        [{"prompt": "q", "chosen": "c", "rejected": "r", "system": "s"}],
        {},
        [("s", "q", "c", "r")],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pairs(case: str) -> None:
    """Which responses make a pair, and which rows make none."""
    name, rows, options, wanted = CASES[case]
    assert pairs_of(name, rows, **options) == wanted


def test_every_reader_is_tried() -> None:
    tried = {name for name, *_ in CASES.values()}
    assert tried == set(READERS)


@pytest.mark.parametrize("name", READERS)
def test_another_set_is_refused(name: str) -> None:
    """What was expected, and what was found."""
    with pytest.raises(WrongColumnsError) as error:
        pairs_of(name, [{"prompt": "q", "answer": "x"}])
    wanted = READERS[name].columns
    assert str(error.value).startswith(f"reader {name} expects the columns {', '.join(wanted)}")
    assert "found: prompt, answer; missing: " in str(error.value)


def test_draws_are_those_of_the_seed() -> None:
    """Equal for one seed; over seeds, each answer below the first is drawn about as often."""
    found = [pairs_of("nectar", [NECTAR], seed=seed)[0] for seed in range(600)]
    assert found[:20] == [pairs_of("nectar", [NECTAR], seed=seed)[0] for seed in range(20)]
    assert {pair[2] for pair in found} == {"first"}
    for answer in ("second", "second too", "third"):
        assert 150 < sum(pair[3] == answer for pair in found) < 250  # 200 +- 11.5


def test_dialogues() -> None:
    """The turns of Nectar's prompts; a text that is none is refused."""
    text = "\n\nHuman: a\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    assert dialogue(text) == said("a\nb", "c", "d")
    for bad in ("Human: a", "\n\nHuman: a", "\n\nAssistant: a", "x\n\nHuman: a\n\nAssistant:"):
        with pytest.raises(InputError, match="prompt: does not"):
            dialogue(bad)


@pytest.fixture
def tables(tiny_llama: Path, tmp_path: Path) -> Callable[..., TokenTable]:
    """Rows as tokens, by a reader."""

    def make(rows: list[Any], kind: str = "pairs", **reading: Any) -> TokenTable:
        settings = TokenSettings(str(tiny_llama), kind, 64, "error", reading=Reading(**reading))
        data = write_rows(tmp_path / "rows.jsonl", rows)
        return token_table(data, None, settings, tmp_path / "c", max_bad_share=0.5)[0]

    return make


def test_groups_across_parts(
    tables: Callable[..., TokenTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a prompt may stand anywhere; bad rows and columns are counted with them."""
    rows = CASES["helpsteer"][1]
    more = [*rows, [3], rated("d", "x", 1, 1, 1) | {"note": 1}]
    monkeypatch.setattr("pipelines.train.data.cache.parts_of", lambda files: parts_of(files, 100))
    table = tables(more, reader="helpsteer")
    assert (table.num_rows, table.counts.rows, table.counts.bad) == (1, 5, 1)
    assert table.counts.left_out == {"with one response alone": 2, TIE: 1}
    assert table.counts.unused == ["note"]


def test_two_labelled_rows_each(tables: Callable[..., TokenTable]) -> None:
    """For kto, what is left out counts as what is kept."""
    table = tables([ORCA, ORCA | {"status": "tie"}], "labelled", reader="orca")
    assert (table.num_rows, table.counts.rows, table.counts.left_out) == (2, 4, {TIE: 2})
    bad = [SAFE, SAFE | {"better_response_id": 2}, SAFE | {"response_0": None}, SAFE]
    with_bad = tables(bad, reader="pku_saferlhf")
    assert (with_bad.num_rows, with_bad.counts.bad) == (2, 2)
    assert "better_response_id: found 2; allowed: 0, 1" in with_bad.counts.first_bad[0]


def test_a_config_names_a_reader(tiny_llama: Path, tmp_path: Path) -> None:
    """As a field, with its options; the seed is part of the tokens only where it draws."""
    data = write_rows(tmp_path / "rows.jsonl", [SAFE])
    plans = [
        plan_alignment(
            align_config(
                tiny_llama,
                data,
                reader="pku_saferlhf",
                reader_options={"prefer": prefer},
                seed=seed,
            ),
            tmp_path / "c",
        )
        for prefer, seed in (("better", 0), ("better", 1), ("safer", 0))
    ]
    keys = [plan.data_key for plan in plans]
    assert keys[0] == keys[1] != keys[2]
    assert READERS["nectar"].draws and READERS["ultrasafety"].draws
