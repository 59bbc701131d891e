"""Models whose vocabularies differ: padding rows, one model's tokens, all tokens, clear errors.

Oracle: rows put together by token, and tokenizers as transformers loads them.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge
from tests.pipelines.merge.conftest import Family, save_weights, set_config, weights_of
from tests.tiny_models import tiny_tokenizer

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BY_TOKEN = (EMBEDDING, HEAD)


def add_rows(path: Path, rows: torch.Tensor) -> None:
    """Put rows behind a model's embedding and head."""
    tensors = weights_of(path)
    for name in BY_TOKEN:
        tensors[name] = torch.cat([tensors[name], rows])
    save_weights(path, tensors)
    set_config(path, vocab_size=len(tensors[EMBEDDING]))


def add_token(path: Path, token: str, value: float) -> int:
    """Give a model one more token, whose rows are all `value`; returns its number."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([token])
    tokenizer.save_pretrained(path)
    add_rows(path, torch.full((1, 32), value))
    return len(tokenizer) - 1


def merged(family: Family, out: Path, **fields: object) -> Path:
    return merge(MergeConfig.model_validate(family.config(**fields)), out)


def test_padding_rows(own_family: Family, tmp_path: Path) -> None:
    size = len(weights_of(own_family.base)[EMBEDDING])
    add_rows(own_family.models[0], torch.full((3, 32), 2.0))
    add_rows(own_family.models[1], torch.full((5, 32), 4.0))
    plain = [weights_of(path)[EMBEDDING][:size] for path in own_family.models]
    out = merged(own_family, tmp_path / "out")
    result = weights_of(out)[EMBEDDING]
    assert result.shape == (size + 5, 32)
    torch.testing.assert_close(result[:size], sum(plain) / 3)
    # Rows that two have are their mean, for the third too; rows that one has are its own.
    torch.testing.assert_close(result[size : size + 3], torch.full((3, 32), 3.0))
    torch.testing.assert_close(result[size + 3 :], torch.full((2, 32), 4.0))
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == size + 5


def test_a_row_that_the_base_has_is_its_own(own_family: Family, tmp_path: Path) -> None:
    add_rows(own_family.base, torch.full((2, 32), 7.0))
    out = merged(own_family, tmp_path / "out", method="task_arithmetic")
    assert torch.equal(weights_of(out)[EMBEDDING][-2:], torch.full((2, 32), 7.0))


def test_union(own_family: Family, tmp_path: Path) -> None:
    one = add_token(own_family.models[0], "<one>", 1.0)
    assert add_token(own_family.models[1], "<two>", 2.0) == one
    out = merged(own_family, tmp_path / "out", tokenizer={"source": "union"})
    tokenizer = AutoTokenizer.from_pretrained(out)
    result = weights_of(out)
    for token, value in (("<one>", 1.0), ("<two>", 2.0)):
        [number] = tokenizer(token, add_special_tokens=False).input_ids
        for name in BY_TOKEN:
            torch.testing.assert_close(result[name][number], torch.full((32,), value))
    assert len(tokenizer) == len(result[EMBEDDING]) == one + 2
    assert AutoModelForCausalLM.from_pretrained(out).config.vocab_size == one + 2
    padded = merged(
        own_family,
        tmp_path / "padded",
        tokenizer={"source": "union", "pad_to_multiple_of": 64},
    )
    assert len(weights_of(padded)[EMBEDDING]) == 64


@pytest.mark.parametrize("field", ["tokenizer", "tokenizer_source"])
def test_rows_follow_tokens_and_not_numbers(own_family: Family, tmp_path: Path, field: str) -> None:
    """A model whose tokens have other numbers gives the same merge as before."""
    expected = weights_of(merged(own_family, tmp_path / "expected"))
    model = own_family.models[1]
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = vocabulary["a"], vocabulary["hello"]
    vocabulary["a"], vocabulary["hello"] = b, a
    file.write_text(json.dumps(tokenizer))
    tensors = weights_of(model)
    for name in BY_TOKEN:
        tensors[name][[a, b]] = tensors[name][[b, a]]
    save_weights(model, tensors)
    out = merged(own_family, tmp_path / "out", **{field: str(own_family.models[0])})
    for name, values in weights_of(out).items():
        assert torch.equal(values, expected[name]), name


def test_base_leaves_other_tokens_out(own_family: Family, tmp_path: Path) -> None:
    add_token(own_family.models[0], "<one>", 1.0)
    out = merged(own_family, tmp_path / "out", method="task_arithmetic", tokenizer="base")
    assert weights_of(out)[EMBEDDING].shape == weights_of(own_family.base)[EMBEDDING].shape
    assert len(AutoTokenizer.from_pretrained(out)) == len(tiny_tokenizer())


def test_vocabularies_that_differ_need_a_word(own_family: Family, tmp_path: Path) -> None:
    add_token(own_family.models[1], "<two>", 2.0)
    with pytest.raises(InputError) as caught:
        merged(own_family, tmp_path / "out")
    assert str(caught.value) == (
        "tokenizer: required, not given, as vocabularies differ: only "
        f"{own_family.models[1]} has '<two>'; allowed: union, base, or a model"
    )
    (own_family.models[2] / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"no tokenizer\.json, which `tokenizer` needs of every"):
        merged(own_family, tmp_path / "out", tokenizer="union")
    assert not (tmp_path / "out").exists()


def test_chat_template(family: Family, tmp_path: Path) -> None:
    out = merged(family, tmp_path / "out", chat_template="{{ messages[0].content }}!")
    tokenizer = AutoTokenizer.from_pretrained(out)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "hi!"
    with pytest.raises(InputError, match="found 'none', and there is no none; allowed: auto"):
        merged(family, tmp_path / "other", chat_template="none")


def test_a_token_without_a_row_is_a_missing_one(own_family: Family, tmp_path: Path) -> None:
    """Added to the tokenizer while the embedding stayed as it was: other models' row, or zeros."""
    tokenizer = AutoTokenizer.from_pretrained(own_family.models[0])
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(own_family.models[0])
    number = len(tokenizer) - 1
    out = merged(own_family, tmp_path / "alone", tokenizer="union")
    assert torch.equal(weights_of(out)[EMBEDDING][number], torch.zeros(32))
    add_token(own_family.models[1], "<extra>", 5.0)
    out = merged(own_family, tmp_path / "two", tokenizer="union")
    for name in BY_TOKEN:
        torch.testing.assert_close(weights_of(out)[name][number], torch.full((32,), 5.0))
