"""Columns: what is mapped, what is refused, what is named; rows that are of no use.

Oracle: rows' texts written by hand.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from training_files import align_config, preference_rows, write_rows

from pipelines.config import load_config
from pipelines.errors import InputError
from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.data import TokenTable
from pipelines.train.rows.columns import kind_of_column
from ray_jobs.align import describe_plan
from ray_jobs.cli import main
from tests.tiny_models import tiny_tokenizer

PAIR = {"chosen": "a b yes", "rejected": "a b no"}
USER = {"role": "user", "content": "a b"}
YES, NO = {"role": "assistant", "content": "yes c"}, {"role": "assistant", "content": "no"}


def plan_of(rows: list[Any], model: Path, folder: Path, **fields: Any) -> Any:
    """The plan of a run on rows."""
    data = write_rows(folder / "rows.jsonl", rows)
    return plan_alignment(align_config(model, data, **fields), folder / "cache")


def texts(table: TokenTable, row: int = 0) -> list[tuple[str, str]]:
    """Of each of a row's sequences, what is given and what is learned."""
    tokenizer = tiny_tokenizer()
    return [
        (tokenizer.decode(ids[marks == 0]), tokenizer.decode(ids[marks == 1]))
        for ids, marks in table.sequences(row)
    ]


def test_a_question_is_not_lost(tiny_llama: Path, tmp_path: Path) -> None:
    """Orca's columns: one line that says how to map them; mapped, the question and the system text
    are in the tokens; ignored, the system text is not.
    """
    rows = [{"system": "c", "question": "d", **PAIR}]
    with pytest.raises(InputError) as error:
        plan_of(rows, tiny_llama, tmp_path, max_bad_share=0.9)
    assert str(error.value) == (
        f"data: {tmp_path / 'rows.jsonl'} row 1: columns that may be content are not used: system, "
        "question; found: system, question, chosen, rejected; needed: prompt, chosen, rejected (or "
        "chosen, rejected that begin with the prompt); map with columns: {system: system, prompt: "
        "question}, or leave out with ignored_columns: [system, question]"
    )
    both = {"prompt": "question", "system": "system"}
    table = plan_of(rows, tiny_llama, tmp_path, columns=both).table
    start = "<s> <assistant> c </s> <user> d <assistant>"  # the template knows user and others
    assert texts(table) == [(start, "a b yes </s>"), (start, "a b no </s>")]
    alone = {"columns": {"prompt": "question"}, "ignored_columns": ["system"]}
    rows[0]["question"] = "d "  # as text: prompt and response follow each other as they stand
    assert texts(plan_of(rows, tiny_llama, tmp_path, **alone).table)[0] == ("d", "a b yes </s>")
    joined = {"columns": {"prompt": ["system", "question"]}}
    assert texts(plan_of(rows, tiny_llama, tmp_path, **joined).table)[0][0] == "c d"  # two lines


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"system": "c"}, "are not used: system; .*map with columns: {system: system}, or leave"),
        ({"history": [["a", "b"]]}, "not used: history; .* leave out with ignored_columns"),
        ({"question": "a"}, "are not used: question; "),
        ({"context": "a"}, "are not used: context; "),
        ({"tools": [{"name": "x"}]}, "row 1: tools: texts have no chat template"),
        ({"image": {"bytes": "x"}}, "row 1: holds image, which are not supported"),
    ],
)
def test_content_is_not_dropped_in_silence(
    more: dict[str, Any], told: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """A column that could be content ends the plan; empty, it is as if it were not there."""
    row = {"prompt": "c ", **PAIR}
    with pytest.raises(InputError, match=told):
        plan_of([row | more], tiny_llama, tmp_path)
    empty = dict.fromkeys(more, None)
    assert texts(plan_of([row | empty], tiny_llama, tmp_path).table)[0] == ("c", "a b yes </s>")
    (name,) = more
    ignored = plan_of([row | more], tiny_llama, tmp_path, ignored_columns=[name])
    assert texts(ignored.table)[0] == ("c", "a b yes </s>")


def test_unused_columns_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    """In the plan; metadata apart, and not among the first lines of a run."""
    row = {"prompt": "c ", **PAIR, "source": "x", "score_chosen": 1.0, "note": "y", "empty": ""}
    data = write_rows(tmp_path / "rows.jsonl", [row])
    plan = describe_plan(align_config(tiny_llama, data))
    assert "columns unused  note; metadata: score_chosen, source" in plan
    counts = plan_alignment(align_config(tiny_llama, data), tmp_path / "cache").table.counts
    assert counts.remarks() == "columns not used: note"


def test_kinds_of_columns() -> None:
    """By their names."""
    kinds = {
        "content": "system system_prompt instruction question input query context history tools "
        "conversations documents output answer functions input_text question1",
        "media": "image images video audios user_image",
        "metadata": "id prompt_id source score_chosen chosen_score rating model question_id "
        "conversation_hash language category num_turns is_safe in_gsm8k_train tool_count_id",
        "other": "note name foo",
        "twice": "prompt messages label",
    }
    found = {name: kind_of_column(name) for names in kinds.values() for name in names.split()}
    assert found == {name: kind for kind, names in kinds.items() for name in names.split()}


def test_a_column_that_is_not_there(tiny_llama: Path, tmp_path: Path) -> None:
    """A mapping without effect is an error."""
    rows = [{"prompt": "c ", **PAIR}]
    with pytest.raises(InputError, match="no row has the column 'sys'; found: chosen, prompt, rej"):
        plan_of(rows, tiny_llama, tmp_path, columns={"system": "sys"})
    with pytest.raises(InputError, match="has no column 'q'; found: prompt, chosen, rejected"):
        plan_of(rows, tiny_llama, tmp_path, columns={"prompt": "q"})


def test_a_prompt_as_text_before_messages(tiny_llama: Path, tmp_path: Path) -> None:
    """It is the user's turn where the responses have none; where they have others, it is named."""
    rows = [{"prompt": "a b", "chosen": [YES], "rejected": [NO]}]
    table = plan_of(rows, tiny_llama, tmp_path).table
    assert texts(table)[0] == ("<s> <user> a b <assistant>", "yes c </s>")
    rows = [{"prompt": "z", "chosen": [USER, YES], "rejected": [USER, NO]}]
    counts = plan_of(rows, tiny_llama, tmp_path).table.counts
    assert counts.unused == ["prompt"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": " 4", "rejected": " 4"},
        {"chosen": "Q: a\nA: 4", "rejected": "Q: a\nA: 4"},
        {"prompt": [USER], "chosen": [YES], "rejected": [YES]},
        {"chosen": [USER, YES], "rejected": [USER, YES]},
    ],
)
def test_equal_responses_are_left_out(
    row: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """As texts and as messages, with a prompt and without; the likelihood term has use for them."""
    rows = [*preference_rows(3), row]
    plan = plan_of(rows, tiny_llama, tmp_path)
    assert plan.table.num_rows == 3
    assert plan.table.counts.remarks() == (
        "of 4 rows: 1 left out whose chosen and rejected are the same"
    )
    kept = {"objective": {"name": "dpo", "rpo_alpha": 0.5}}
    assert plan_of(rows, tiny_llama, tmp_path, **kept).table.num_rows == 4
    kept = {"objective": {"name": ["dpo", "sft"]}}
    assert plan_of(rows, tiny_llama, tmp_path, **kept).table.num_rows == 4
    labelled = plan_of(rows, tiny_llama, tmp_path, objective={"name": "kto"}).table
    assert (labelled.num_rows, labelled.counts.rows) == (6, 8)
    with pytest.raises(InputError, match="all 1 rows were bad or dropped, 1 left out whose chosen"):
        plan_of([row], tiny_llama, tmp_path)


def test_repeated_prompts_are_remarked(tiny_llama: Path, tmp_path: Path) -> None:
    """In a response (texts stay, messages are taken off), and in another row."""
    rows = [
        {"prompt": "a b ", "chosen": "a b yes", "rejected": "a b no"},
        {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    ]
    counts = plan_of(rows, tiny_llama, tmp_path).table.counts
    assert counts.remarks() == (
        "of 3 rows: 2 whose response repeats the prompt, 1 with the prompt of an earlier row"
    )
    sft = [{"messages": [USER, YES]}, {"messages": [USER, NO]}, {"text": "a b"}, {"text": "a c"}]
    found = plan_of(sft, tiny_llama, tmp_path, objective={"name": "sft"}).table.counts
    assert found.repeated_prompts == 1


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([USER, YES, USER], "messages: the last turn is the user's"),
        ([USER, {"role": "assistant", "content": ""}, USER, YES], "turn of the assistant is empty"),
        ([USER], "holds no message of role 'assistant'"),
    ],
)
def test_bad_conversations(
    turns: list[dict[str, str]], told: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Counted like other bad rows."""
    rows = [{"messages": [USER, YES]}, {"messages": turns}]
    with pytest.raises(InputError, match=told):
        plan_of(rows, tiny_llama, tmp_path, objective={"name": "sft"})
    some = plan_of(rows, tiny_llama, tmp_path, objective={"name": "sft"}, max_bad_share=0.5)
    assert some.table.num_rows == 1


def test_settings_that_cannot_act(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and status 2."""
    path = tmp_path / "c.yaml"
    start = "model: m\noptimizer: {learning_rate: 1.0e-3}\nnum_steps: 1\nstrategy: single\n"
    start += "num_workers: 1\n"
    for text, told in {
        "data: [a.jsonl, b/a.jsonl]": "data: found two sets called 'a'; give each another name",
        "data: []": "data: found no set; allowed: one or more",
        "data: [{path: a, weight: 0.7}]": "weight: unknown field; share (of the set's rows) or",
        "data: [{path: a, share: 1, rows: 2}]": "give either share or rows",
        "data: [{path: a, sharee: 1}]": "data.0.sharee: unknown field; allowed: columns, dimension",
        "data: {path: a}\nsplit: train": "split: has no effect where data are sets; allowed in ea",
        "data: a\ncolumns: {question: a}": "columns: found 'question'; allowed: prompt, chosen,",
        "data: a\nreader: orcas": "reader: found 'orcas'; allowed: 'text_pairs', 'rewardbench',",
        "data: a\nreader: orca\ncolumns: {prompt: a}": "columns: has no effect with reader orca",
        "data: a\nreader: orca\nreader_options: {x: 1}": "orca has no option 'x'; allowed: min_sco",
        "data: a\nreader: pku_saferlhf\nreader_options: {prefer: x}": "options.prefer: found",
        "data: a\nreader_options: {x: 1}": "reader_options: has no effect without a reader",
        "data: a\nreader: orca\nobjective: {name: sft}": "orca gives preference pairs, which objec",
    }.items():
        path.write_text(start + text + "\n")
        monkeypatch.setattr(sys, "argv", ["poise", "align", str(path), "--plan"])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr().err
        assert stop.value.code == 2 and told in said and said.count("\n") == 1, said
    path.write_text(start + "data: [a.jsonl, {path: b, split: train}]\n")
    assert [each.title for each in load_config(path, AlignConfig).sets] == ["a", "b"]


KEYED = {"role": "assistant", "content": "yes c", "mood": 0, "style": False, "id": "m1"}


@pytest.mark.parametrize("kind", ["texts", "pairs", "reader"])
def test_keys_of_messages_that_are_not_used_are_named(
    kind: str, tiny_llama: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"objective": {"name": "sft"}} if kind == "texts" else {}
    row: dict[str, Any] = {"messages": [USER, KEYED]}
    column = "messages"
    if kind != "texts":
        row, column = {"chosen": [USER, KEYED], "rejected": [USER, NO]}, "chosen"
    if kind == "reader":
        fields, row = {"reader": "ultrafeedback"}, row | {"prompt": "a b"}
    counts = plan_of([row], tiny_llama, tmp_path, **fields).table.counts
    named = [f"mood in {column}", f"style in {column}"]
    assert counts.unused_columns() == (named, [f"id in {column}"])
    assert f"columns not used: {', '.join(named)}" in counts.remarks()


def test_a_key_that_the_chat_template_reads_is_used(tiny_llama: Path, tmp_path: Path) -> None:
    """Tools' and thoughts' keys always are, and null ones say nothing."""
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    path = model / "chat_template.jinja"
    path.write_text(path.read_text().replace("{{ m.content }}", "{{ m.mood }}{{ m.content }}"))
    thought = {"reasoning": "a", "tool_call_id": "1", "name": "b", "rank": None}
    rows = [{"messages": [USER, KEYED | thought | {"style": None, "id": None}]}]
    counts = plan_of(rows, model, tmp_path, objective={"name": "sft"}).table.counts
    assert counts.unused == []
