"""The engine on transformers.

Oracles: one prompt at a time in float64 by plain loops, lm-evaluation-harness's own windows and
pairs, transformers' classes called directly.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from pipelines.engines import (
    EngineConfig,
    Sampling,
    answer_seed,
    open_engine,
    rolling_log_likelihoods,
)
from pipelines.engines.config import cpu_has_bf16
from pipelines.engines.transformers_engine import TransformersEngine
from pipelines.errors import InputError
from tests.pipelines.checkpoints.digest_definition import weights_digest
from tests.pipelines.engines.references import Reference, long_prompts, save_chatty
from tests.tiny_models import save_tiny

END = 2  # </s>
CHATS = [[{"role": "user", "content": " ".join("abcdefghij"[:n])}] for n in range(1, 9)]


@pytest.fixture(scope="module")
def engine(models: dict[str, Path]) -> TransformersEngine:
    """An engine with model a, in batches of three."""
    return TransformersEngine(models["a"], EngineConfig(batch_size=3))


SAMPLINGS = [
    Sampling(max_tokens=10),
    Sampling(max_tokens=10, repetition_penalty=1.4, presence_penalty=0.5, frequency_penalty=0.7),
    Sampling(max_tokens=10, temperature=2.5),
    Sampling(max_tokens=10, temperature=3.0, top_k=6),
    Sampling(max_tokens=10, temperature=3.0, top_p=0.8),
    Sampling(max_tokens=10, temperature=2.0, top_p=0.9, top_k=9, repetition_penalty=1.2),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_answers_are_those_of_the_definitions(
    engine: TransformersEngine, models: dict[str, Path], sampling: Sampling
) -> None:
    reference = Reference(models["a"])
    seeds = [answer_seed(7, "task", number) for number in range(len(CHATS))]
    found = engine.generate(CHATS, sampling, seeds)
    for prompt, seed, each in zip(CHATS, seeds, found, strict=True):
        assert list(each.tokens) == reference.sample(engine.encode(prompt), sampling, seed, END)
        assert each.finish == ("stop" if each.tokens[-1] == END else "length")
        assert each.weights == weights_digest(models["a"])


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_neither_batches_nor_order_change_answers(
    engine: TransformersEngine, models: dict[str, Path], sampling: Sampling
) -> None:
    seeds = [answer_seed(7, "task", number) for number in range(len(CHATS))]
    whole = open_engine(models["a"], EngineConfig(batch_size=64))
    found = engine.generate(CHATS, sampling, seeds)
    assert whole.generate(CHATS[::-1], sampling, seeds[::-1])[::-1] == found
    assert whole.generate(CHATS[2:3], sampling, seeds[2:3]) == found[2:3]


def test_sampled_tokens_have_the_models_distribution(
    engine: TransformersEngine, models: dict[str, Path]
) -> None:
    prompt = engine.encode(CHATS[3])
    sampling = Sampling(temperature=3.0, max_tokens=1)
    draws = 3000
    many = TransformersEngine(models["a"], EngineConfig(batch_size=draws))
    seeds = [answer_seed(0, "task", "one", draw) for draw in range(draws)]
    found = Counter(each.tokens[0] for each in many.generate([prompt] * draws, sampling, seeds))
    shares = (Reference(models["a"]).logits(prompt)[-1] / 3.0).softmax(-1).tolist()
    squares = sum((found[t] - draws * p) ** 2 / (draws * p) for t, p in enumerate(shares))
    freedom = len(shares) - 1
    assert squares < freedom + 5 * (2 * freedom) ** 0.5  # chi-squared, five deviations
    assert len(found) > 15


def test_seeds_of_answers_differ_and_stay() -> None:
    seeds = {
        answer_seed(seed, task, sample, draw)
        for seed in (0, 1)
        for task in ("a", "b")
        for sample in ("x", 1, 11)
        for draw in (0, 1)
    }
    assert len(seeds) == 24 and all(0 <= seed < 1 << 63 for seed in seeds)
    assert answer_seed(0, "task", "row", 0) == 9123868320014829871


def test_log_probabilities_are_the_models_own(
    engine: TransformersEngine, models: dict[str, Path]
) -> None:
    reference = Reference(models["a"])
    sampling = Sampling(
        temperature=3.0, top_k=5, frequency_penalty=1.0, top_logprobs=4, max_tokens=6
    )
    for prompt, each in zip(CHATS, engine.generate(CHATS, sampling, range(8)), strict=True):
        tokens = engine.encode(prompt)
        values = reference.logits(tokens + list(each.tokens)).log_softmax(-1)
        for place, (token, found) in enumerate(zip(each.tokens, each.logprobs, strict=True)):
            row = values[len(tokens) + place - 1]
            assert set(found) == {*row.topk(4).indices.tolist(), token}
            assert found == pytest.approx({each: float(row[each]) for each in found}, abs=1e-4)


def test_stop_texts_cut_the_answer(engine: TransformersEngine) -> None:
    whole = engine.generate(CHATS, Sampling(max_tokens=30))
    words = [each.text.split() for each in whole]
    stops = (words[0][4], f"{words[1][2]} {words[1][3]}")  # one token, and one text of two tokens
    cut = engine.generate(CHATS, Sampling(max_tokens=30, stop=stops))
    for before, after in zip(whole, cut, strict=True):
        places = [before.text.find(stop) for stop in stops if stop in before.text]
        assert after.text == (before.text[: min(places)] if places else before.text)
        assert after.tokens == before.tokens[: len(after.tokens)]
        assert len(after.tokens) < len(before.tokens) or not places
        assert after.finish == ("stop" if places else before.finish)


def test_log_likelihoods(engine: TransformersEngine, models: dict[str, Path]) -> None:
    reference = Reference(models["a"])
    greedy = engine.generate(["a b c"], Sampling(max_tokens=3))[0].text
    contexts = ["a b", "", "a b ", "a b c", [6, 7, 8], "x", " "]
    lasts = ["c d", "a b c", "c d e f", f" {greedy}", [9, 10], " yes no hello", "a b"]
    found = engine.log_likelihoods(contexts, lasts)
    encoded = [
        ([6, 7], [8, 9]),
        ([1], [6, 7, 8]),
        ([6, 7], [8, 9, 10, 11]),
        (engine.encode("a b c"), engine.encode(greedy)),
        ([6, 7, 8], [9, 10]),
        (engine.encode("x"), engine.encode("yes no hello")),
        ([1], [6, 7]),
    ]
    contexts[0], lasts[0] = "a b", " c d"
    found[0] = engine.log_likelihoods(contexts[:1], lasts[:1])[0]
    for each, (first, last) in zip(found, encoded, strict=True):
        value, is_greedy = reference.log_likelihood(first, last)
        assert each.value == pytest.approx(value, abs=1e-4)
        assert (each.is_greedy, each.num_tokens) == (is_greedy, len(last))
    assert found[3].is_greedy and not found[1].is_greedy


@pytest.mark.parametrize("length", [0, 3, 12, 13, 24, 25, 40])
def test_rolling_log_likelihoods_have_the_harness_windows(
    models: dict[str, Path], length: int
) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    engine = TransformersEngine(models["a"], EngineConfig(max_length=12))
    tokens = [(5 * j * j + j) % 40 + 6 for j in range(length + 1)]
    text = engine.text.decode(tokens)
    assert engine.encode(text) == tokens
    windows = map(
        utils.make_disjoint_window,
        utils.get_rolling_token_windows(tokens, prefix_token=1, max_seq_len=12, context_len=1),
    )
    reference = Reference(models["a"])
    parts = [reference.log_likelihood(list(first), list(last)) for first, last in windows]
    [found] = rolling_log_likelihoods(engine, [text])
    assert found.value == pytest.approx(sum(value for value, _ in parts), abs=1e-3)
    assert found.num_tokens == len(tokens)


def test_rewards_are_those_of_the_class(models: dict[str, Path]) -> None:
    config = EngineConfig(kind="reward", batch_size=3)
    engine = open_engine(models["reward"], config)
    chats = [[*chat, {"role": "assistant", "content": "yes no"}] for chat in CHATS]
    model = AutoModelForSequenceClassification.from_pretrained(models["reward"])
    tokens = [engine.text.conversation(chat) for chat in chats]
    model.requires_grad_(False)
    expected = [float(model(torch.tensor([each])).logits[0, 0]) for each in tokens]
    assert engine.rewards(chats) == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1
    assert engine.rewards(["a b c"]) == pytest.approx(
        [float(model(torch.tensor([[6, 7, 8]])).logits[0, 0])], abs=1e-4
    )


def test_an_encoder_with_other_caches_and_positions(models: dict[str, Path]) -> None:
    engine = open_engine(models["gpt2"], EngineConfig(batch_size=8))
    prompts = long_prompts(40, 2) + long_prompts(60, 2)  # of 64 positions
    found = engine.generate(prompts, Sampling(max_tokens=10))
    reference = Reference(models["gpt2"])
    for prompt, each in zip(prompts, found, strict=True):
        room = Sampling(max_tokens=min(10, 64 - len(prompt)))
        assert list(each.tokens) == reference.sample(prompt, room, 0, END)


def test_models_of_another_kind(models: dict[str, Path], tmp_path: Path) -> None:
    two = save_tiny(
        LlamaForSequenceClassification,
        tmp_path / "two",
        0,
        dtype=torch.float32,
        num_labels=2,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    reward = EngineConfig(kind="reward")
    with pytest.raises(InputError, match="found LlamaForSequenceClassification; allowed: a causal"):
        open_engine(models["reward"])
    with pytest.raises(InputError, match="found LlamaForCausalLM; allowed: a sequence class"):
        open_engine(models["a"], reward)
    with pytest.raises(InputError, match=r"found 2 labels \(LABEL_0, LABEL_1\); allowed: 1"):
        open_engine(two, reward)
    with pytest.raises(InputError, match="found reward; allowed here: generate"):
        open_engine(models["reward"], reward).generate(["a"], Sampling())
    with pytest.raises(InputError, match="found generate; allowed here: reward"):
        open_engine(models["a"]).rewards(["a"])


def test_prompts_that_cannot_be_answered(engine: TransformersEngine, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 of 3 prompts are too long: number 0 has 512 tokens"):
        engine.generate([*long_prompts(511, 2), "a"], Sampling())
    with pytest.raises(InputError, match="1 of 1 contexts with their continuations are too long"):
        engine.log_likelihoods([long_prompts(510, 1)[0]], [[6, 7, 8]])
    with pytest.raises(InputError, match="seeds: required where the temperature is not 0"):
        engine.generate(["a"], Sampling(temperature=1.0))
    with pytest.raises(InputError, match="seeds: found 1; allowed: 2"):
        engine.generate(["a", "b"], Sampling(temperature=1.0), [1])
    with pytest.raises(InputError, match="prompts: number 1 has no token"):
        engine.generate(["a", ""], Sampling())
    bare = save_chatty(tmp_path / "bare", 0)
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="bare: its tokenizer has no chat template"):
        open_engine(bare).generate(CHATS, Sampling())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature: found -1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: found 0.0"),
        ({"temperature": 1.0, "top_k": -1}, "top_k: found -1"),
        ({"top_p": 0.5}, "top_p: has no effect at temperature 0"),
        ({"top_k": 5}, "top_k: has no effect at temperature 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: found 0.0"),
        ({"presence_penalty": 3.0}, "presence_penalty: found 3.0"),
        ({"max_tokens": 0}, "max_tokens: found 0"),
        ({"stop": ("",)}, "stop: found"),
        ({"top_logprobs": 21}, "top_logprobs: found 21"),
    ],
)
def test_samplings_out_of_range(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**fields)


def test_a_cpu_without_instructions_for_bf16(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    assert not cpu_has_bf16(file)
    for flags, expected in (
        ("flags\t\t: fpu avx512f avx512bw", False),
        ("flags\t\t: fpu avx512f avx512_bf16", True),
        ("flags\t\t: amx_bf16 amx_tile", True),
        ("Features\t: fp asimd bf16", True),
    ):
        file.write_text(f"processor\t: 0\n{flags}\n\nbugs\t: none\n")
        assert cpu_has_bf16(file) == expected


def test_bf16_becomes_float32_on_such_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_chatty(tmp_path / "half", 1, dtype=torch.bfloat16)
    digest = weights_digest(path)
    for has, expected in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr("pipelines.engines.config.cpu_has_bf16", lambda has=has: has)
        engine = TransformersEngine(path)
        assert engine._running.dtype == expected
        assert engine.weights == digest  # of what the files hold
