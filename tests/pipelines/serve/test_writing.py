"""Answers in pieces, as a client sees them.

Oracle: the engines' own text of a whole answer (`Text.answer`, and where it stops, `stopped_at`).
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipelines.engines import Piece
from pipelines.engines.sampling import stopped_at
from pipelines.engines.text import Text
from pipelines.engines.weights import CheckpointWeights
from pipelines.serve.writing import Delta, Writer
from tests.tiny_models import save_tiny_llama


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """A tokenizer whose tokens are words."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("words"))
    return Text(CheckpointWeights.open(folder), 128)


@pytest.fixture(scope="module")
def byte_text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    """A tokenizer whose tokens are bytes, so that characters come in parts."""
    folder = save_tiny_llama(tmp_path_factory.mktemp("bytes"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "</s>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.save_pretrained(folder)
    return Text(CheckpointWeights.open(folder), 128)


def written(text: Text, tokens: list[int], stop: tuple[str, ...], step: int) -> list[Delta]:
    """The deltas of an answer that comes `step` tokens at a time."""
    writer, found = Writer(3, text, stop, None), []
    for first in range(0, len(tokens), step):
        delta = writer.write(Piece(tuple(tokens[first : first + step])))
        found += [] if delta is None else [delta]
        if writer.is_ended:
            return found
    return [*found, writer.end()]


def check(text: Text, tokens: list[int], stop: tuple[str, ...], step: int) -> None:
    deltas = written(text, tokens, stop, step)
    end = next((n + 1 for n, token in enumerate(tokens) if token in text.ends), len(tokens))
    length = min(end, (stopped_at(text, tokens[:end], stop) if stop else None) or end)
    whole, finish = text.answer(tokens[:length], stop)
    assert "".join(each.text for each in deltas) == whole
    assert sum(each.tokens for each in deltas) == length
    assert [each.finish for each in deltas] == [None] * (len(deltas) - 1) + [finish]
    assert {each.index for each in deltas} == {3}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(2, 46), min_size=1, max_size=30),
    st.lists(st.sampled_from(["a b", "c", "d e f", " g", "yes no"]), max_size=2),
    st.integers(1, 4),
)
def test_pieces_of_words_are_the_whole_answer(
    words: Text, tokens: list[int], stop: list[str], step: int
) -> None:
    check(words, tokens, tuple(stop), step)


@settings(max_examples=60, deadline=None)
@given(st.text("aé漢😀 b", min_size=1, max_size=12), st.sampled_from([(), ("漢",), ("b b",)]))
def test_pieces_of_characters_are_the_whole_answer(
    byte_text: Text, said: str, stop: tuple[str, ...]
) -> None:
    tokens = byte_text.tokenizer(said)["input_ids"]
    check(byte_text, tokens, stop, 1)
    assert "\ufffd" not in "".join(each.text for each in written(byte_text, tokens, stop, 1))


def test_what_may_become_a_stop_text_is_held_back(words: Text) -> None:
    tokens = words.tokenizer("x a c a b y", add_special_tokens=False)["input_ids"]
    shown = [each.text for each in written(words, tokens, (" a b",), 1)]
    assert "".join(shown) == "x a c"
    assert " a" not in shown[:2]


def test_logprobs_are_those_of_each_token(words: Text) -> None:
    a, b = words.tokenizer("a b", add_special_tokens=False)["input_ids"]
    writer = Writer(0, words, (), 1)
    delta = writer.write(Piece((a, b), ({a: -0.5, b: -1.0}, {a: -0.1, b: -2.5})))
    assert delta is not None
    assert [(e.token, e.logprob, e.top) for e in delta.logprobs] == [
        ("a", -0.5, (("a", -0.5),)),
        ("b", -2.5, (("a", -0.1),)),
    ]
