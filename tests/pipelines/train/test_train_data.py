"""Data: formats, what is learned, what is refused, tokens in the cache, batches by index.

Oracle: rows' texts and lines written by hand, and what one process makes of the same rows.
"""

import gc
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_files import align_config, preference_rows, write_rows
from transformers import AutoTokenizer

from pipelines.errors import InputError
from pipelines.train import plan_alignment
from pipelines.train.data import TokenSettings, TokenTable, deal, global_batch, token_table
from pipelines.train.data.batches import pad_together
from pipelines.train.data.rows import parts_of, source_files
from tests.tiny_models import save_tiny_llama, tiny_tokenizer

USER = {"role": "user", "content": "a b"}
YES, NO = {"role": "assistant", "content": "yes c"}, {"role": "assistant", "content": "no"}


def table_of(
    rows: list[Any], kind: str, model: Path, folder: Path, max_length: int = 32, **options: Any
) -> TokenTable:
    """Rows as tokens."""
    data = write_rows(folder / "rows.jsonl", rows)
    too_long = options.pop("too_long", "error")
    settings_ = TokenSettings(str(model), kind, max_length, too_long)
    return token_table(data, None, settings_, folder / "cache", **options)[0]


def texts(table: TokenTable, row: int) -> list[tuple[str, str]]:
    """What each of a row's sequences begins with, and what of it is learned, as text."""
    tokenizer = tiny_tokenizer()
    return [
        (tokenizer.decode(ids[marks == 0]), tokenizer.decode(ids[marks == 1]))
        for ids, marks in table.sequences(row)
    ]


CHAT = "<s> <user> a b <assistant>"
PAIR_FORMATS = {
    "messages": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "implicit messages": {"chosen": [USER, YES], "rejected": [USER, NO]},
    "prompt repeated": {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
    "UltraFeedback-binarized": {
        "prompt": "a b",
        "prompt_id": "x",
        "chosen": [USER, YES],
        "rejected": [USER, NO],
        "messages": [USER, YES],
        "score_chosen": 8.0,
        "score_rejected": 2.0,
    },
}


@pytest.mark.parametrize("name", PAIR_FORMATS)
def test_conversational_pairs(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Every way to write the same pair of conversations gives the same tokens."""
    table = table_of([PAIR_FORMATS[name]], "pairs", tiny_llama, tmp_path)
    assert texts(table, 0) == [(CHAT, "yes c </s>"), (CHAT, "no </s>")]


def test_pairs_of_texts(tiny_llama: Path, tmp_path: Path) -> None:
    """Explicit prompt, and the prompt as the common beginning, which ends where an answer is opened
    (whatever words the answers have in common); an end token closes responses.
    """
    start = "\n\nHuman: a b\n\nAssistant:"
    rows = [
        {"prompt": "a b", "chosen": " yes c", "rejected": " no"},
        {"chosen": f"{start} yes c", "rejected": f"{start} no"},
        {"chosen": f"{start} yes c", "rejected": f"{start} yes d"},
    ]
    table = table_of(rows, "pairs", tiny_llama, tmp_path)
    assert texts(table, 0) == [("a b", "yes c </s>"), ("a b", "no </s>")]
    opened = "<unk> a b <unk>"  # the tokenizer knows neither speaker
    assert texts(table, 1) == [(opened, "yes c </s>"), (opened, "no </s>")]
    assert texts(table, 2) == [(opened, "yes c </s>"), (opened, "yes d </s>")]


def test_labelled_rows(tiny_llama: Path, tmp_path: Path) -> None:
    """KTO's columns; a pair becomes a desirable and an undesirable response."""
    rows = [
        {"prompt": [USER], "completion": [YES], "label": True},
        {"prompt": "a b", "completion": " no", "label": False},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    ]
    table = table_of(rows, "labelled", tiny_llama, tmp_path)
    assert table.labels.tolist() == [True, False, True, False]
    assert texts(table, 3) == [(CHAT, "no </s>")]


def test_mismatched_responses_answer_other_prompts(tiny_llama: Path, tmp_path: Path) -> None:
    """KTO's z0 takes each prompt with a response to another one; one prompt alone is an error."""
    rows = [
        {"prompt": letter, "completion": f" {letter} yes", "label": True} for letter in "aabbccd"
    ]
    table = table_of(rows, "labelled", tiny_llama, tmp_path)
    for row in range(table.num_rows):
        ids, marks = table.mismatched(row)
        prompt, answer = (tiny_tokenizer().decode(ids[marks == m]).split() for m in (0, 1))
        assert prompt == [rows[row]["prompt"]] and answer[0] != prompt[0]
        assert answer[1:] == ["yes", "</s>"]
    (tmp_path / "same").mkdir()
    alone = table_of(rows[:2], "labelled", tiny_llama, tmp_path / "same")
    with pytest.raises(InputError, match="at least two different prompts"):
        alone.mismatched(0)


def test_texts_learn_what_the_assistant_says(tiny_llama: Path, tmp_path: Path) -> None:
    """All turns of the assistant in a conversation, completions, and plain text."""
    rows = [
        {"messages": [USER, YES, {"role": "user", "content": "d"}, NO]},
        {"prompt": "a b", "completion": " yes"},
        {"text": "a b c"},
    ]
    table = table_of(rows, "texts", tiny_llama, tmp_path)
    assert texts(table, 0) == [(f"{CHAT} <user> d <assistant>", "yes c </s> no </s>")]
    assert texts(table, 1) == [("a b", "yes </s>")]
    assert texts(table, 2) == [("a", "b c </s>")]  # nothing predicts the first token
    assert table.response_lengths.tolist() == [[5], [2], [3]]


BAD_ROWS = {
    "columns": (
        {"prompt": "a", "good": "b"},
        "has no column 'chosen'; found: prompt, good; needed",
    ),
    "types": (
        {"prompt": "a", "chosen": [YES], "rejected": "b"},
        "must be all texts or all messages; found: prompt str, chosen list, rejected str",
    ),
    "empty": ({"prompt": "a", "chosen": "", "rejected": "b"}, "chosen: is empty"),
    "not an object": ([1, 2], "expected an object with columns, found list"),
    "content": (
        {"prompt": [USER], "chosen": [{"role": "assistant"}], "rejected": [NO]},
        "chosen: a message needs role and content, both texts",
    ),
    "another start": ({"chosen": [USER, YES], "rejected": [NO]}, "begin with the same prompt"),
    "no turn ends": ({"chosen": "a yes", "rejected": "a no"}, "up to where a turn ends"),
    "null": ({"prompt": "a", "chosen": None, "rejected": "b"}, "chosen: is null"),
    "blank": ({"prompt": "a", "chosen": " \n", "rejected": "b"}, "chosen: is empty"),
    "blank message": (
        {"prompt": [USER], "chosen": [YES], "rejected": [{"role": "assistant", "content": ""}]},
        "rejected: is empty",
    ),
    "user's turn": (
        {"prompt": [USER], "chosen": [YES, USER], "rejected": [NO]},
        "chosen: the last turn is the user's",
    ),
    "part": (
        {
            "prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "chosen": [YES],
            "rejected": [NO],
        },
        "prompt: found a part of type 'image_url'; allowed: text",
    ),
    "images": (
        {"images": ["a.png"], "prompt": [USER], "chosen": [YES], "rejected": [NO]},
        "holds images, which are not supported (ignored_columns: [images]",
    ),
    "long": (
        {"prompt": "a " * 30, "chosen": " b", "rejected": " c"},
        "found 32 tokens; allowed: max_length 20",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    """File, row, what was found and what is needed, in one line."""
    row, message = BAD_ROWS[name]
    rows = [*preference_rows(2), row]
    with pytest.raises(InputError) as error:
        table_of(rows, "pairs", tiny_llama, tmp_path, max_length=20)
    assert str(error.value).startswith(f"data: {tmp_path / 'rows.jsonl'} row 3: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_some_bad_rows_may_be_allowed(tiny_llama: Path, tmp_path: Path) -> None:
    """They are counted and left out, up to a share; then they are an error."""
    good = preference_rows(8)
    rows = [*good[:4], {"x": 1}, *good[4:], [3]]
    table = table_of(rows, "pairs", tiny_llama, tmp_path, max_bad_share=0.2)
    assert (table.num_rows, table.counts.rows, table.counts.bad) == (8, 10, 2)
    told = table.counts.remarks()
    assert told.startswith("of 10 rows: 2 bad and left out; the first: data: ")
    assert "row 5: has no column 'chosen'" in told
    assert table_of(good, "pairs", tiny_llama, tmp_path).counts.remarks() == ""
    with pytest.raises(InputError, match=r"2 of 10 rows are bad; allowed: a share of 0.1"):
        table_of(rows, "pairs", tiny_llama, tmp_path, max_bad_share=0.1)


def test_what_is_too_long_may_lose_of_its_prompt(tiny_llama: Path, tmp_path: Path) -> None:
    """The prompt's beginning goes, the response never; or the row is left out. Both counted."""
    rows = [
        {"prompt": "a b c d e f g", "chosen": " yes h", "rejected": " no"},
        {"prompt": "a", "chosen": " yes b c d e f g h", "rejected": " no"},
        {"prompt": "a", "chosen": " yes", "rejected": " no"},
    ]
    with pytest.raises(InputError, match=r"row 2: found 10 tokens"):
        table_of(rows, "pairs", tiny_llama, tmp_path, 6, too_long="cut_prompt")
    fits = [rows[0], rows[2]]
    table = table_of(fits, "pairs", tiny_llama, tmp_path, 6, too_long="cut_prompt")
    assert texts(table, 0) == [("e f g", "yes h </s>"), ("e f g", "no </s>")]
    assert table.counts.prompts_cut == 1
    table = table_of(rows, "pairs", tiny_llama, tmp_path, 6, too_long="drop")
    assert (table.num_rows, table.counts.dropped) == (1, 2)


def test_nothing_to_train_on(tiny_llama: Path, tmp_path: Path) -> None:
    """An empty file, a missing one, another kind of file, a folder without data, bad JSON."""
    with pytest.raises(InputError, match=r"rows\.jsonl: holds no rows"):
        table_of([], "pairs", tiny_llama, tmp_path)
    with pytest.raises(InputError, match=r"missing\.jsonl: no such file"):
        source_files(tmp_path / "missing.jsonl")
    (tmp_path / "x.csv").touch()
    with pytest.raises(InputError, match=r"expected a file that ends in \.jsonl, \.json,"):
        source_files(tmp_path / "x.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no file of split 'train' that ends in \.jsonl,"):
        source_files(tmp_path / "empty", "train")
    (tmp_path / "rows.jsonl").write_text('{"prompt": \n')
    with pytest.raises(InputError, match="row 1: not JSON"):
        token_table(
            tmp_path / "rows.jsonl",
            None,
            TokenSettings(str(tiny_llama), "pairs", 20, "error"),
            tmp_path / "other",
        )


def test_messages_need_a_chat_template(tmp_path: Path) -> None:
    """A tokenizer without one is named as the reason."""
    path = save_tiny_llama(tmp_path / "plain")
    (path / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="holds messages, but the tokenizer has no chat template"):
        table_of(preference_rows(1), "pairs", path, tmp_path)


def test_text_that_cannot_be_encoded_is_a_bad_row(tiny_llama: Path, tmp_path: Path) -> None:
    """Half of a surrogate pair, a number that Python will not read: counted like any other."""
    lines = [json.dumps(row) for row in preference_rows(8)]
    lines += [r'{"prompt": "a", "chosen": " \ud83d yes", "rejected": " no"}', "9" * 5000]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    settings_ = TokenSettings(str(tiny_llama), "pairs", 64, "error")
    arguments = (tmp_path / "rows.jsonl", None, settings_, tmp_path / "cache")
    table, _ = token_table(*arguments, max_bad_share=0.2)
    assert (table.num_rows, table.counts.rows, table.counts.bad) == (8, 10, 2)
    with pytest.raises(InputError, match=r"rows\.jsonl row 9: holds text that cannot be encoded"):
        token_table(*arguments)


def test_a_pair_counts_as_two_labelled_rows(tiny_llama: Path, tmp_path: Path) -> None:
    """Read, kept and dropped are counted in one unit."""
    rows = preference_rows(6)
    rows[0]["chosen"][0]["content"] += " a" * 40
    table = table_of(rows, "labelled", tiny_llama, tmp_path, too_long="drop")
    assert (table.num_rows, table.counts.rows, table.counts.dropped) == (11, 12, 1)


def test_a_folder_of_parquet_files(tiny_llama: Path, tmp_path: Path) -> None:
    """As a hub data set's local copy: files of a split, in the order of their names."""
    rows = [{k: json.loads(json.dumps(v)) for k, v in row.items()} for row in preference_rows(6)]
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for number in range(2):
        part = pa.Table.from_pylist(rows[3 * number : 3 * number + 3])
        pq.write_table(part, folder / f"train_prefs-0000{number}-of-00002.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:1]), folder / "test_prefs-00000-of-00001.parquet")
    settings_ = TokenSettings(str(tiny_llama), "pairs", 64, "error")
    cache = tmp_path / "cache"
    table, _ = token_table(tmp_path / "set", "train_prefs", settings_, cache)
    alike = table_of(rows, "pairs", tiny_llama, tmp_path, 64)
    assert table.num_rows == 6
    for row in range(6):
        assert texts(table, row) == texts(alike, row)


def test_a_saved_data_set(tiny_llama: Path, tmp_path: Path) -> None:
    """As the `datasets` library saves it: Arrow beside descriptions, a folder for each split."""
    from datasets import Dataset, DatasetDict, disable_progress_bars

    disable_progress_bars()
    rows = preference_rows(6)
    parts = {"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:2])}
    DatasetDict(parts).save_to_disk(tmp_path / "set")
    settings_ = TokenSettings(str(tiny_llama), "pairs", 64, "error")
    message = f"data: {tmp_path / 'set'}: holds test, train; choose by split"
    with pytest.raises(InputError, match=message):
        token_table(tmp_path / "set", None, settings_, tmp_path / "cache")
    table, _ = token_table(tmp_path / "set", "train", settings_, tmp_path / "cache")
    alike = table_of(rows, "pairs", tiny_llama, tmp_path, 64)
    assert [texts(table, row) for row in range(6)] == [texts(alike, row) for row in range(6)]
    assert table.num_rows == 6


def test_tokens_are_made_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time they come from the cache; other data or another length make new ones."""
    table_of(preference_rows(4), "pairs", tiny_llama, tmp_path)
    (made,) = (tmp_path / "cache").glob("tokens-*[!k]")
    before = (made / "tokens.arrow").stat().st_mtime_ns
    table_of(preference_rows(4), "pairs", tiny_llama, tmp_path)
    assert (made / "tokens.arrow").stat().st_mtime_ns == before
    table_of(preference_rows(5), "pairs", tiny_llama, tmp_path)
    table_of(preference_rows(5), "pairs", tiny_llama, tmp_path, 30)
    assert len([p for p in (tmp_path / "cache").iterdir() if p.is_dir()]) == 3


@pytest.mark.slow
@pytest.mark.ray
def test_ray_data_makes_the_same_tokens(
    ray_cluster: None, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Actors over parts, whatever their order of work, write what one process writes."""
    from pipelines.train.data import cache

    data = write_rows(tmp_path / "rows.jsonl", preference_rows(60))
    settings_ = TokenSettings(str(tiny_llama), "pairs", 64, "error")
    alone, _ = token_table(data, None, settings_, tmp_path / "alone")
    monkeypatch.setattr(cache, "parts_of", lambda files: parts_of(files, 2000))
    spread, _ = token_table(data, None, settings_, tmp_path / "spread", ray_bytes=0)
    assert spread.num_rows == alone.num_rows == 60
    for row in range(60):
        assert texts(spread, row) == texts(alone, row)


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(0, 5), st.integers(1, 4))
def test_global_batches(num_rows: int, size: int, seed: int, world: int) -> None:
    """A function of seed and number; each row once an epoch; the ranks share each batch out."""
    batches = [global_batch(num_rows, size, number, seed) for number in range(num_rows)]
    assert batches[-1] == global_batch(num_rows, size, num_rows - 1, seed)
    flat = [row for batch in batches for row in batch]
    for epoch in range(size):
        assert sorted(flat[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))
    lengths = np.random.default_rng(seed).integers(1, 9, (num_rows, 2))
    shares = [deal(batches[0], lengths, rank, world) for rank in range(world)]
    assert sorted(row for share in shares for row in share) == sorted(batches[0])


def test_padding_is_on_the_right_and_never_learned() -> None:
    """Shapes, and no mark wherever there is no token; scored from before the first mark on."""
    one = (np.array([5, 6, 7], np.int32), np.array([0, 1, 1], np.uint8))
    two = (np.array([8], np.int32), np.array([0], np.uint8))
    batch = pad_together([one, two], 9, "cpu")
    assert batch.ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.first_scored == 0
    assert batch.response.tolist() == [[0, 1, 1], [0, 0, 0]]
    late = (np.array([5, 6, 7], np.int32), np.array([0, 0, 1], np.uint8))
    assert pad_together([late, two], 9, "cpu").scored_ids.tolist() == [[6, 7], [9, 9]]


def test_a_mismatched_prompt_is_cut_to_the_longest_row(tiny_llama: Path, tmp_path: Path) -> None:
    """A long prompt with a long response of another row would be longer than any row."""
    rows = [
        {"prompt": "a " * 15 + "b", "completion": " yes", "label": True},
        {"prompt": "c", "completion": " no" * 15, "label": False},
    ]
    table = table_of(rows, "labelled", tiny_llama, tmp_path)
    ids, marks = table.mismatched(0)
    assert len(ids) == table.longest < len(table.sequences(0)[0][0]) + 15
    assert tiny_tokenizer().decode(ids[marks == 0]).split() == ["a", "b"]
    assert marks.sum() == 16


def test_a_tokenizer_without_a_padding_token_will_do(tiny_llama: Path, tmp_path: Path) -> None:
    """Padding is masked, so no token has to be set aside for it."""
    plain = save_tiny_llama(tmp_path / "plain")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = plain / name
        if path.is_file():
            settings = json.loads(path.read_text())
            settings.pop("pad_token", None)
            path.write_text(json.dumps(settings))
    assert AutoTokenizer.from_pretrained(plain).pad_token is None
    folders = [tmp_path / name for name in ("one", "two")]
    tables = []
    for folder, model in zip(folders, (plain, tiny_llama), strict=True):
        folder.mkdir()
        tables.append(table_of(preference_rows(3), "pairs", model, folder))
    for row in range(3):
        for one, two in zip(*(table.sequences(row) for table in tables), strict=True):
            assert one[0].tolist() == two[0].tolist()


def test_a_plan_without_a_cache_keeps_its_table(
    tiny_llama: Path, preferences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files are there as long as it is, and not longer; nor are they after an error."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    plan = plan_alignment(align_config(tiny_llama, preferences))
    folder = plan.table.folder
    again = TokenTable(folder, 2)
    assert again.sequences(3)[0][0].tolist() == plan.table.sequences(3)[0][0].tolist()
    del plan
    gc.collect()
    assert not folder.exists()
    with pytest.raises(InputError):
        plan_alignment(align_config(tiny_llama, preferences, max_length=2))
    assert not list(tmp_path.iterdir())
