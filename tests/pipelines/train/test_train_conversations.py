"""Conversations as they are published: tokens, and which of them are learned.

Oracle: TRL's own tokenisation with published chat templates; transformers' marks of what the
assistant says, from templates that say so themselves.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from training_files import write_rows
from transformers import PreTrainedTokenizerFast

from pipelines.errors import InputError
from pipelines.train.data import TokenSettings, TokenTable, token_table
from pipelines.train.rows.columns import Reading

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|eot_id|>"]
SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cUser\uff5c>"]
SPECIAL += ["<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"]
ENDS = {"qwen3": "<|im_end|>", "qwen2_5": "<|im_end|>", "llama3_1": "<|eot_id|>"}
ENDS |= {"gemma3": "<end_of_turn>", "deepseek_r1_distill": SPECIAL[-1]}
STARTS = {"llama3_1": "<|begin_of_text|>", "gemma3": "<bos>", "deepseek_r1_distill": SPECIAL[10]}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "d",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "c1", "type": "function"}
CALL |= {"function": {"name": "weather", "arguments": {"city": "Paris"}}}


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content, **more}


ASKED = [said("user", "What is 2 + 2?")]
PAIR = {"prompt": ASKED, "chosen": [said("assistant", "4")], "rejected": [said("assistant", "5")]}
TWO = [*ASKED, said("assistant", "4"), said("user", "And 3 + 3?"), said("assistant", "6")]


@pytest.fixture(scope="module")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a byte-level tokenizer with a published chat template, as TRL ships it, or another."""
    trl = importlib.util.find_spec("trl")
    assert trl is not None and trl.origin is not None
    templates = Path(trl.origin).parent / "chat_templates"
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trained.train_from_iterator(
        ["What is 2 + 2? And 3 + 3? The weather in Paris. assistant user system"] * 4,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )

    def save_one(name: str, template: str | None = None) -> Path:
        path = tmp_path_factory.mktemp(name)
        PreTrainedTokenizerFast(
            tokenizer_object=trained,
            bos_token=STARTS.get(name),
            eos_token=ENDS[name],
            chat_template=template or (templates / f"{name}.jinja").read_text(),
        ).save_pretrained(path)
        return path

    return save_one


def table_of(
    rows: list[Any], kind: str, tokenizer: Path, folder: Path, **reading: Any
) -> TokenTable:
    """Rows as tokens."""
    settings = TokenSettings(str(tokenizer), kind, 2048, "error", reading=Reading(**reading))
    return token_table(write_rows(folder / "rows.jsonl", rows), None, settings, folder / "c")[0]


def learned(table: TokenTable, tokenizer: Any, row: int = 0) -> list[str]:
    """The stretches of a conversation that are learned, as text."""
    ids, marks = table.sequences(row)[0]
    parts, last = [], 0
    for token, mark in zip(ids.tolist(), marks.tolist(), strict=True):
        if mark:
            parts = [*parts[:-1], [*parts[-1], token]] if last else [*parts, [token]]
        last = mark
    return [tokenizer.decode(part) for part in parts]


def trl_pairs(rows: list[dict[str, Any]], tokenizer: Any) -> Any:
    """The rows through TRL's own preparation for DPO."""
    from trl import DPOTrainer

    trainer = object.__new__(DPOTrainer)
    trainer._tokenizer = tokenizer
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    return trainer._prepare_dataset(Dataset.from_list(rows), tokenizer, args, "train")


PAIRS = {
    "plain": PAIR,
    "two turns": PAIR | {"prompt": [*TWO[:3]]},
    "system": PAIR | {"prompt": [said("system", "Be brief."), *ASKED]},
    "tools": PAIR | {"tools": [WEATHER]},
    "kwargs": PAIR | {"chat_template_kwargs": {"enable_thinking": False}},
    "call": PAIR | {"chosen": [said("assistant", None, tool_calls=[CALL])], "tools": [WEATHER]},
}


TEMPLATES = ["qwen2_5", "qwen3", "llama3_1", "gemma3"]
# Gemma's template knows no calls; TRL's rows for Llama's have a null key that it refuses.
TAKEN = [(c, t) for c in PAIRS for t in TEMPLATES if c != "call" or t.startswith("qwen")]


@pytest.mark.parametrize(("case", "template"), TAKEN)
def test_pairs_are_those_of_trl(
    case: str, template: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    """Prompts and responses, with tools, calls and arguments of the template."""
    path = save(template)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    rows = [PAIRS[case]]
    table = table_of(rows, "pairs", path, tmp_path)
    theirs = trl_pairs(rows, tokenizer)[0]
    for (ids, marks), name in zip(table.sequences(0), ("chosen", "rejected"), strict=True):
        assert ids.tolist() == theirs["prompt_ids"] + theirs[f"{name}_ids"]
        assert int(marks.argmax()) == len(theirs["prompt_ids"])


def test_a_call_for_llama(save: Callable[..., Path], tmp_path: Path) -> None:
    """The template asks whether a message has calls: the others must not have the key."""
    path, row = save("llama3_1"), PAIRS["call"]
    messages = row["prompt"] + row["chosen"]
    rows = [row | {"prompt": [ASKED[0] | {"tool_calls": None}]}]
    table = table_of(rows, "pairs", path, tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    wanted = tokenizer.apply_chat_template(messages, tools=row["tools"])["input_ids"]
    assert table.sequences(0)[0][0].tolist() == wanted


def test_tools_as_text_are_the_same(save: Callable[..., Path], tmp_path: Path) -> None:
    """JSON in a text, as TRL reads it too; an empty list is none; others are bad rows."""
    import json

    path = save("qwen2_5")
    with_tools, plain = PAIR | {"tools": [WEATHER]}, [PAIR]
    wanted = table_of([with_tools], "pairs", path, tmp_path).sequences(0)[0][0].tolist()
    text = PAIR | {"tools": json.dumps([WEATHER])}
    assert table_of([text], "pairs", path, tmp_path).sequences(0)[0][0].tolist() == wanted
    none = table_of([PAIR | {"tools": []}, *plain], "pairs", path, tmp_path)
    assert none.sequences(0)[0][0].tolist() == none.sequences(1)[0][0].tolist() != wanted
    for bad in ("{", [1], 3):
        with pytest.raises(InputError, match="row 1: tools: "):
            table_of([PAIR | {"tools": bad}], "pairs", path, tmp_path)
    with pytest.raises(InputError, match="allowed: a mapping without add_generation_prompt"):
        ours = {"chat_template_kwargs": {"tokenize": True}}
        table_of([PAIR | ours], "pairs", path, tmp_path)


def test_null_keys_are_not_there(save: Callable[..., Path], tmp_path: Path) -> None:
    """As Parquet gives them to every message: Llama 3.1's template asks whether the keys exist."""
    path = save("llama3_1")
    wanted = table_of([PAIR], "pairs", path, tmp_path).sequences(0)
    kind = pa.struct(
        [
            ("role", pa.string()),
            ("content", pa.string()),
            ("tool_calls", pa.list_(pa.string())),
            ("name", pa.string()),
        ]
    )
    columns = {name: pa.array([value], pa.list_(kind)) for name, value in PAIR.items()}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    settings = TokenSettings(str(path), "pairs", 2048, "error")
    table, _ = token_table(tmp_path / "rows.parquet", None, settings, tmp_path / "c")
    nulls = {"tool_calls": None, "name": None}
    lines = {name: [message | nulls for message in value] for name, value in PAIR.items()}
    lines["prompt"] = [ASKED[0] | {"tool_calls": []}]
    for found in (table, table_of([lines], "pairs", path, tmp_path)):
        for (ids, marks), (other, others) in zip(found.sequences(0), wanted, strict=True):
            assert ids.tolist() == other.tolist() and marks.tolist() == others.tolist()


def test_schemas_of_parquet_lose_their_null_keys(save: Callable[..., Path], tmp_path: Path) -> None:
    """At any depth: two schemas in one column give each other their keys."""
    other = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "int"}}}}
    rows = [PAIR | {"tools": [WEATHER]}, PAIR | {"tools": [other]}]
    path = save("qwen2_5")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    settings = TokenSettings(str(path), "pairs", 2048, "error")
    table, _ = token_table(tmp_path / "rows.parquet", None, settings, tmp_path / "c")
    wanted = table_of(rows, "pairs", path, tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    for row in (0, 1):  # Arrow orders the keys of a mapping anew
        texts = [tokenizer.decode(each.sequences(row)[0][0]) for each in (table, wanted)]
        assert sorted(texts[0]) == sorted(texts[1]) and "null" not in texts[0]


def test_share_gpt(save: Callable[..., Path], tmp_path: Path) -> None:
    """`from` and `value` by a table of roles, to which the user may add; calls of functions; and
    the prompt of a pair whose responses are single messages.
    """
    path = save("qwen3")
    turns = [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]
    wanted = table_of([{"messages": TWO[:2]}], "texts", path, tmp_path).sequences(0)[0][0].tolist()
    for name in ("conversations", "messages"):
        table = table_of([{name: turns}], "texts", path, tmp_path)
        assert table.sequences(0)[0][0].tolist() == wanted
    odd = [{"from": "Q", "value": "What is 2 + 2?"}, turns[1]]
    with pytest.raises(InputError, match=r"found the role 'Q'; allowed: .*roles: {Q: user} maps"):
        table_of([{"conversations": odd}], "texts", path, tmp_path)
    table = table_of([{"conversations": odd}], "texts", path, tmp_path, roles=(("Q", "user"),))
    assert table.sequences(0)[0][0].tolist() == wanted
    pair = {"conversations": turns[:1], "chosen": turns[1]} | {"rejected": PAIR["rejected"][0]}
    both = table_of([pair, PAIR], "pairs", path, tmp_path)
    assert both.sequences(0)[1][0].tolist() == both.sequences(1)[1][0].tolist()
    call = {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'}
    rows = [
        {"conversations": [turns[0], call]},
        {"messages": [*ASKED, said("assistant", None, tool_calls=[CALL])]},
    ]
    both = table_of(rows, "texts", path, tmp_path)
    assert both.sequences(0)[0][0].tolist() == both.sequences(1)[0][0].tolist()


def test_content_in_parts(save: Callable[..., Path], tmp_path: Path) -> None:
    """Texts are joined, as a template that takes parts itself does; others are refused by name."""
    path = save("gemma3")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "2 + 2?"}]
    rows = [PAIR | {"prompt": [said("user", parts)]}]
    theirs = tokenizer.apply_chat_template(rows[0]["prompt"], add_generation_prompt=True)
    ids, marks = table_of(rows, "pairs", path, tmp_path).sequences(0)[0]
    assert ids[marks == 0].tolist() == theirs["input_ids"]
    rows = [PAIR | {"prompt": [said("user", [*parts, {"type": "image"}])]}]
    with pytest.raises(InputError, match="prompt: found a part of type 'image'; allowed: text"):
        table_of(rows, "pairs", path, tmp_path)


# What the published template writes for a turn, and the same with marks of what is said.
MARKED = [
    (
        "{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + "
        "'\\n</think>\\n\\n' + content.lstrip('\\n') }}",
        "{{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{{- '<think>\\n' + "
        "reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
        "{{- '<|im_end|>\\n' }}{% endgeneration %}",
    ),
    (
        "{{- '<|im_start|>' + message.role + '\\n' + content }}",
        "{{- '<|im_start|>' + message.role + '\\n' }}{% generation %}{{- content }}"
        "{{- '<|im_end|>\\n' }}{% endgeneration %}",
    ),
]
CONVERSATIONS = {
    "two turns": TWO,
    "three turns": [*TWO, said("user", "4 + 4?"), said("assistant", "8")],
    "thoughts": [*ASKED, said("assistant", "<think>\nhm\n</think>\n\n4"), *TWO[2:]],
    "same answers": [*ASKED, said("assistant", "6"), *TWO[2:]],
    "question as answer": [*ASKED, said("assistant", "What is 2 + 2?"), *TWO[2:]],
    "system": [said("system", "Be brief."), *TWO],
    "one turn": TWO[:2],
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_turns_of_templates_that_rewrite(
    case: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    """Qwen3 writes its (empty) thoughts in the last turn alone. Learned is what the template itself
    would mark, were there marks in it.
    """
    path = save("qwen3")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    marked, messages = tokenizer.chat_template, CONVERSATIONS[case]
    tail = "{{- '<|im_end|>\\n' }}\n    {%- elif message.role == \"tool\" %}"
    assert marked.count(tail) == 1
    marked = marked.replace(tail, tail.removeprefix("{{- '<|im_end|>\\n' }}"))
    for plain, with_marks in MARKED:
        assert plain in marked
        marked = marked.replace(plain, with_marks)
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
    )
    ids, response = table_of([{"messages": messages}], "texts", path, tmp_path).sequences(0)[0]
    assert ids.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]
    assert ids.tolist() == theirs["input_ids"]
    assert response.tolist() == theirs["assistant_masks"]


def test_turns_of_deepseek(save: Callable[..., Path], tmp_path: Path) -> None:
    """The template asks with a thought, which a finished turn does not have."""
    path = save("deepseek_r1_distill")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    first = said("assistant", "<think>hm</think>4")
    table = table_of([{"messages": [*ASKED, first, *TWO[2:]]}], "texts", path, tmp_path)
    assert learned(table, tokenizer) == [f"4{SPECIAL[-1]}", f"6{SPECIAL[-1]}"]


def test_ambiguous_turns_are_refused(save: Callable[..., Path], tmp_path: Path) -> None:
    """A template that leaves earlier answers out, or writes them twice."""
    for content in ("'...'", "m.content + m.content"):
        template = (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last or m.role == 'user' "
            "%}{{ m.content }}{% else %}{{ " + content + " }}{% endif %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        )
        path = save("qwen3", template)
        with pytest.raises(InputError, match="the place of message 2 in the whole conv"):
            table_of([{"messages": TWO}], "texts", path, tmp_path)
        assert table_of([{"messages": TWO[:2]}], "texts", path, tmp_path).num_rows == 1
