"""Turns that a row says are not learned.

Oracle: the same conversation without weights, of which the tokens of these turns are taken out.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
from training_files import align_config, write_rows
from transformers import AutoTokenizer

from pipelines.errors import InputError
from pipelines.train import plan_alignment
from pipelines.train.data import TokenTable

SFT: dict[str, Any] = {"objective": {"name": "sft"}}


def table_of(rows: list[Any], model: Path, folder: Path, **fields: Any) -> TokenTable:
    data = write_rows(folder / "rows.jsonl", rows)
    return plan_alignment(align_config(model, data, **fields), folder / "cache").table


def turns(keys: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A question and an answer for each of some keys, which the answer has."""
    found = []
    for number, more in enumerate(keys):
        found.append({"role": "user", "content": f"{number} a"})
        found.append({"role": "assistant", "content": f"yes {number}", **more})
    return found


@pytest.mark.parametrize("key", ["weight", "train"])
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_turns_of_weight_0_are_not_learned(
    form: str, key: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Every choice of three turns but none."""
    values = {"weight": (0, 1), "train": (False, True)}[key]
    choices = [each for each in product(values, repeat=3) if any(each)]
    conversations = [turns([{key: value} for value in choice]) for choice in choices]
    conversations.append(turns([{}, {key: None}, {}]))  # all are learned
    rows: list[Any] = [{"messages": each} for each in conversations]
    if form == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        rows = [
            {
                "conversations": [
                    {"from": names[m["role"]], "value": m["content"]}
                    | ({key: m[key]} if key in m else {})
                    for m in each
                ]
            }
            for each in conversations
        ]
    table = table_of(rows, tiny_llama, tmp_path, **SFT)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    whole_ids, whole = table.sequences(len(choices))[0]
    assert whole.sum() == 9  # yes, the number and the end, three times
    for number, choice in enumerate(choices):
        ids, marks = table.sequences(number)[0]
        assert ids.tolist() == whole_ids.tolist()
        text = tokenizer.decode(ids[marks.astype(bool)])
        assert text.split() == [
            word for turn, kept in enumerate(choice) if kept for word in ("yes", str(turn), "</s>")
        ]
    assert not table.counts.unused


REFUSED = {
    "weight: found 0.5 in a message; allowed: 0, 1": {"weight": 0.5},
    "weight: found False in a message; allowed: 0, 1": {"weight": False},
    "weight: found '0' in a message; allowed: 0, 1": {"weight": "0"},
    "train: found 0 in a message; allowed: false, true": {"train": 0},
    "a message has weight 0 and train true": {"weight": 0, "train": True},
    "train_detail: parts of a turn cannot be left out": {"train_detail": []},
    "all turns of the assistant have weight 0 or train false": {"weight": 0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_honoured_is_a_bad_row(
    message: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=f"row 1: messages/conversations: {message}"):
        table_of([{"messages": turns([REFUSED[message]])}], tiny_llama, tmp_path, **SFT)


def test_turns_that_are_not_the_assistants(tiny_llama: Path, tmp_path: Path) -> None:
    """They are never learned: to say so is right, to ask for it is not."""
    asked, said = turns([{}])
    table = table_of([{"messages": [asked | {"weight": 0}, said]}], tiny_llama, tmp_path, **SFT)
    assert table.response_lengths.tolist() == [[3]]
    with pytest.raises(InputError, match=r"train: found true in a turn of role 'user'; allowed: "):
        table_of([{"messages": [asked | {"train": True}, said]}], tiny_llama, tmp_path, **SFT)


@pytest.mark.parametrize("column", ["chosen", "rejected", "completion"])
def test_responses_are_learned_whole(column: str, tiny_llama: Path, tmp_path: Path) -> None:
    """In a prompt nothing is learned, and so weights there are honoured."""
    asked, said = turns([{}])
    first = turns([{"weight": 0}])
    row = {"prompt": [*first, asked], "chosen": [said], "rejected": [said | {"content": "no"}]}
    fields: dict[str, Any] = {}
    if column == "completion":
        row, fields = {"prompt": row["prompt"], "completion": row["chosen"]}, SFT
    assert table_of([row], tiny_llama, tmp_path, **fields).num_rows == 1
    told = f"{column}: a turn has weight 0 or train false; allowed in messages, which sft learns"
    with pytest.raises(InputError, match=told):
        table_of(
            [row | {column: [{**row[column][0], "train": False}]}], tiny_llama, tmp_path, **fields
        )
