"""The engines on vLLM, one of each kind for all tests.

Oracles: the engine on transformers, transformers' own logits, and freshly started engines: a swap
back and forth must lead to what the start gave.
"""

import asyncio
import functools
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaForSequenceClassification

from pipelines.engines import EngineConfig, Sampling, answer_seed, open_engine
from pipelines.engines.weights import MergeWeights
from pipelines.errors import InputError
from pipelines.evaluate import workers
from pipelines.evaluate.results import Evaluation
from pipelines.merge import load_merge_config, plan_merge
from pipelines.merge.kept import Kept
from pipelines.rewards import ScoreConfig
from pipelines.rewards.rows import read_rows
from pipelines.rewards.scoring import scored as scored_rows
from ray_jobs import evaluate as command
from tests.pipelines.checkpoints.digest_definition import weights_digest
from tests.pipelines.engines.references import Reference, damage, long_prompts, save_chatty
from tests.pipelines.evaluate.made_up_tasks import save_tasks
from tests.pipelines.rewards.reward_models import bench_rows, write_rows
from tests.ray_jobs.command_line import poise
from tests.tiny_models import save_tiny, save_tiny_llama

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

CHATS = [[{"role": "user", "content": " ".join("abcdefghij"[:n])}] for n in range(1, 9)]
PROMPTS = [*CHATS, *long_prompts(150, 4), *long_prompts(300, 4)]  # blocks of the cache have 128
VLLM = EngineConfig(name="vllm", cache_gib=0.25)
GREEDY = Sampling(max_tokens=12, top_logprobs=2)
TIE = 1e-4


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of the same shapes, tied, so that the head is the embedding; reward models with three
    labels.
    """
    root = tmp_path_factory.mktemp("vllm")
    reward = {"num_labels": 3, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.2}
    causal = {name: save_chatty(root / name, n, tied=True) for n, name in enumerate("abc")}
    bad = save_chatty(root / "bad", 5, tied=True)
    causal["bad"] = damage(bad, "model.layers.1.mlp.up_proj.weight")
    return causal | {
        name: save_tiny(
            LlamaForSequenceClassification, root / name, n, dtype=torch.float32, **reward, **heads
        )
        for n, name in enumerate(("reward", "reward2"))
    }


@pytest.fixture(scope="session")
def vllm_engine(models: dict[str, Path]) -> Iterator[object]:
    """An engine started with model a."""
    engine = open_engine(models["a"], VLLM)
    yield engine
    engine.close()


@pytest.fixture
def engine(vllm_engine, models: dict[str, Path]) -> object:
    """The same with model a in it, whatever the test before left."""
    vllm_engine.swap(models["a"])
    return vllm_engine


def assert_same_answers(found: list, expected: list) -> None:
    """Equal tokens up to the first tie: the two best tokens less than 1e-4 apart."""
    compared = ties = 0
    for one, other in zip(found, expected, strict=True):
        for place, logprobs in enumerate(other.logprobs):
            first, second = sorted(logprobs.values(), reverse=True)[:2]
            if first - second < TIE:
                ties += 1
                break
            assert one.tokens[place] == other.tokens[place]
            compared += 1
        else:
            assert (one.tokens, one.text, one.finish) == (other.tokens, other.text, other.finish)
    assert compared > 100 and ties * 1000 <= compared


def answers(engine, prompts=PROMPTS) -> list:
    return engine.generate(prompts, GREEDY)


def test_both_engines_give_the_same_greedy_answers(engine, models: dict[str, Path]) -> None:
    other = open_engine(models["a"])
    found, expected = answers(engine), answers(other)
    assert_same_answers(found, expected)
    assert len({each.tokens for each in found}) > len(PROMPTS) // 2
    for one, two in zip(found, expected, strict=True):
        for mine, theirs in zip(one.logprobs, two.logprobs, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
    stop = (found[0].text.split()[5],)
    cut = Sampling(max_tokens=12, stop=stop, top_logprobs=2)
    one, two = engine.generate(PROMPTS, cut), other.generate(PROMPTS, cut)
    assert [(e.text, e.tokens, e.finish) for e in one] == [
        (e.text, e.tokens, e.finish) for e in two
    ]
    assert engine.weights == other.weights == weights_digest(models["a"]) == one[0].weights
    punished = Sampling(
        max_tokens=12, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.6
    )
    assert [e.tokens for e in engine.generate(CHATS, punished)] == [
        e.tokens for e in other.generate(CHATS, punished)
    ]


def test_a_stop_text_that_begins_with_a_space(engine, models: dict[str, Path]) -> None:
    """It is not found before the first word, whose space is no part of an answer."""
    other = open_engine(models["a"])
    words = [each.text.split() for each in answers(engine)]
    later = {word for own in words for word in own[1:]}
    first = next(own[0] for own in words if own[0] in later and own[0] not in own[1:])
    for stop in ((f" {first}",), (f" {first}", words[0][4])):
        sampling = Sampling(max_tokens=12, stop=stop, top_logprobs=2)
        found, expected = (each.generate(PROMPTS, sampling) for each in (engine, other))
        assert [(e.text, e.tokens, e.finish) for e in found] == [
            (e.text, e.tokens, e.finish) for e in expected
        ]
        assert all(len(each.logprobs) == len(each.tokens) for each in found)
        assert {each.finish for each in found} == {"stop", "length"}
        assert any(each.text.split()[:1] == [first] for each in found)


def test_both_engines_score_alike(engine, models: dict[str, Path]) -> None:
    contexts = ["a b", "", "a b ", "hello", [6, 7, 8], PROMPTS[-1]]
    lasts = [" c d", "a b c", "c d e f", " yes no hello", [9, 10], PROMPTS[-2][100:200]]
    contexts.append("a b c")
    lasts.append(" " + engine.generate(["a b c"], Sampling(max_tokens=4))[0].text)
    contexts[-2] = engine.encode(PROMPTS[-1])
    found = engine.log_likelihoods(contexts, lasts)
    expected = open_engine(models["a"]).log_likelihoods(contexts, lasts)
    for one, two in zip(found, expected, strict=True):
        assert one.value == pytest.approx(two.value, rel=1e-6, abs=1e-4)
        assert (one.is_greedy, one.num_tokens) == (two.is_greedy, two.num_tokens)
    assert found[-1].is_greedy
    assert open_engine(models["a"]).log_likelihoods(["a"], [" b"])[0].value == pytest.approx(
        Reference(models["a"]).log_likelihood([6], [7])[0], abs=1e-4
    )


def test_neither_batches_nor_order_change_sampled_answers(engine) -> None:
    sampling = Sampling(temperature=2.0, top_p=0.9, top_k=20, max_tokens=10)
    seeds = [answer_seed(3, "task", number) for number in range(len(PROMPTS))]
    found = [each.tokens for each in engine.generate(PROMPTS, sampling, seeds)]
    back = engine.generate(PROMPTS[::-1], sampling, seeds[::-1])[::-1]
    assert [each.tokens for each in back] == found
    for place in (0, 9):
        [alone] = engine.generate(PROMPTS[place : place + 1], sampling, seeds[place : place + 1])
        assert alone.tokens == found[place]
    others = engine.generate(PROMPTS, sampling, [seed + 1 for seed in seeds])
    assert [each.tokens for each in others] != found


def test_a_swap_leaves_nothing_of_the_old_weights(
    engine, models: dict[str, Path], tmp_path: Path
) -> None:
    first = answers(engine)  # fills the prefix cache with a's
    for source in ("b", "c", "a"):
        digest = engine.swap(models[source])
        assert digest == weights_digest(models[source]) == engine.weights
        found = answers(engine)
        assert_same_answers(found, answers(open_engine(models[source])))
    assert [each.tokens for each in found] == [each.tokens for each in first]
    file = tmp_path / "merge.yaml"
    entries = "\n".join(f"- {{model: {models[n]}, parameters: {{weight: 0.5}}}}" for n in "bc")
    file.write_text(f"merge_method: linear\nmodels:\n{entries}\n")
    plan = plan_merge(load_merge_config(file))
    merged = open_engine(models["a"])
    digest = merged.swap(plan)
    for weights in (plan, *[MergeWeights(plan, Kept(1 << 26))] * 2):  # kept in vLLM's process
        engine.swap(models["a"])
        assert engine.swap(weights) == digest
        assert_same_answers(answers(engine), answers(merged))


def test_a_failed_swap_refuses_to_answer_until_one_succeeds(
    engine, models: dict[str, Path], tmp_path: Path
) -> None:
    before = answers(engine)
    with pytest.raises(InputError, match=r"found shape \[64, 128\]"):
        engine.swap(save_chatty(tmp_path / "wide", 1, tied=True, intermediate_size=128))
    assert answers(engine) == before
    for name in ("model.layers.0.self_attn.k_proj.weight", "model.norm.weight"):
        bad = damage(save_chatty(tmp_path / name, 2, tied=True), name)
        with pytest.raises(InputError, match="holds NaN or Inf"):
            engine.swap(bad)
        with pytest.raises(InputError, match="does not answer, as a swap failed"):
            answers(engine)
        with pytest.raises(InputError, match="does not answer, as a swap failed"):
            engine.log_likelihoods(["a"], [" b"])
        engine.swap(models["b"])
        assert_same_answers(answers(engine), answers(open_engine(models["b"])))


def test_inputs_that_vllm_cannot_take(engine, models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 of 1 prompts are too long: number 0 has 512 tokens"):
        engine.generate(long_prompts(511, 1), Sampling())
    with pytest.raises(InputError, match="seeds: required"):
        engine.generate(["a"], Sampling(temperature=1.0))
    for model, config, message in (
        (models["reward"], VLLM, "allowed: a causal language model"),
        (save_tiny_llama(tmp_path / "heads"), VLLM, "attention heads of 16; vLLM on the CPU has"),
        (damage(save_chatty(tmp_path / "nan", 0), "model.norm.weight"), VLLM, "NaN or Inf"),
        (models["a"], EngineConfig(name="vllm", device="cuda"), "found cuda; allowed: cpu"),
    ):
        with pytest.raises(InputError, match=message):
            open_engine(model, config)


def test_rewards_and_their_swap(models: dict[str, Path], tmp_path: Path) -> None:
    config = EngineConfig(name="vllm", kind="reward", head=1, cache_gib=0.25)
    words = [" ".join("abcdefghij"[:n] * (20 if n > 5 else 1)) for n in range(1, 9)]
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        for text in words
    ]
    engine = open_engine(models["reward"], config)
    try:
        for name in ("reward", "reward2", "reward"):
            assert engine.swap(models[name]) == weights_digest(models[name])
            other = open_engine(
                models[name], EngineConfig(kind="reward", head="LABEL_1", batch_size=3)
            )
            expected = other.rewards(chats)
            assert engine.rewards(chats) == pytest.approx(expected, abs=1e-4)
            assert max(expected) - min(expected) > 0.1
        data = write_rows(tmp_path / "rows.jsonl", bench_rows(per_subset=1))
        score_config = ScoreConfig(model=models[name], data=data, head=1)
        rows = read_rows(score_config, [data], engine.text).rows
        for one, two in zip(scored_rows(rows, engine), scored_rows(rows, other), strict=True):
            assert one.pop("reward") == pytest.approx(two.pop("reward"), abs=1e-4)
            assert one == two
    finally:
        engine.close()


def test_after_a_swap_as_freshly_started_and_no_answer_of_two_models(
    engine, models: dict[str, Path]
) -> None:
    answers(engine)
    engine.swap(models["b"])
    asyncio.run(assert_whole_under_load(models, answers(engine)))


async def assert_whole_under_load(models: dict[str, Path], swapped: list) -> None:
    """A new engine with model b gives what one gave into which b was swapped. Then requests run all
    the time; each answer must be that of the weights it names.
    """
    from pipelines.engines.vllm_engine import AsyncVllmEngine

    expected = {}
    for name in "ab":
        other = open_engine(models[name])
        expected[other.weights] = [each.tokens for each in answers(other)]
    engine = AsyncVllmEngine(models["b"], VLLM)
    seen: list[tuple[int, object]] = []

    async def client(number: int) -> None:
        while True:
            place = (number + len(seen)) % len(PROMPTS)
            [found] = await engine.generate([PROMPTS[place]], GREEDY)
            seen.append((place, found))

    try:
        fresh = await engine.generate(PROMPTS, GREEDY)
        assert [each.tokens for each in fresh] == [each.tokens for each in swapped]
        for one, two in zip(fresh, swapped, strict=True):
            for mine, theirs in zip(one.logprobs, two.logprobs, strict=True):
                assert mine == pytest.approx(theirs, abs=1e-5)
        clients = [asyncio.create_task(client(number)) for number in range(4)]
        for name in "abababa":
            await asyncio.sleep(0.3)
            await engine.swap(models[name])
        await asyncio.sleep(0.3)
        bad = models["bad"]
        with pytest.raises(InputError, match="holds NaN or Inf"):
            await engine.swap(bad)
        for ended in await asyncio.gather(*clients, return_exceptions=True):
            assert "does not answer, as a swap failed" in str(ended)
        await engine.swap(models["a"])
        for place, found in seen:
            assert found.tokens == expected[found.weights][place]
        assert len({found.weights for _, found in seen}) == 2 and len(seen) > 30
        [score] = await engine.log_likelihoods(["a b"], [" c d"])
        [same] = open_engine(models["a"]).log_likelihoods(["a b"], [" c d"])
        assert score.value == pytest.approx(same.value, abs=1e-4)
    finally:
        engine.close()


def test_poise_evaluate_gives_what_transformers_gives(
    engine, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Choices, greedy answers and whole texts of two models, from the command to its files; the
    worker gets the engine that runs here, and swaps.
    """
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    save_tasks(tmp_path / "tasks")
    swaps: list[str] = []

    class Running:
        """The engine of these tests, which an evaluation does not close."""

        def __getattr__(self, name: str) -> object:
            return getattr(engine, name)

        def swap(self, path: str) -> str:
            swaps.append(Path(path).name)
            return engine.swap(path)

        def close(self) -> None:
            pass

    def started(path: str, config: EngineConfig) -> object:
        opened = Running() if config.name == "vllm" else open_engine(path, config)
        if config.name == "vllm":
            opened.swap(path)
        return opened

    monkeypatch.setattr(workers, "open_engine", started)
    monkeypatch.setattr(command, "ray_session", nullcontext)
    local = functools.partial(command.evaluate_planned, executor="local")
    monkeypatch.setattr(command, "evaluate_planned", local)
    names, folder = ["choice", "rolling", "generation"], str(tmp_path / "tasks")
    found = {}
    for name in ("vllm", "transformers"):
        config = {
            "models": {model: str(models[model]) for model in "ab"},
            "tasks": [{"include_path": folder, "names": names}],
            "engine": {"name": name, **({"cache_gib": 0.25} if name == "vllm" else {})},
        }
        (tmp_path / "matrix.yaml").write_text(yaml.safe_dump(config))
        out = tmp_path / name
        assert poise(monkeypatch, "evaluate", tmp_path / "matrix.yaml", "--out", out) == 0
        found[name] = Evaluation(out)
    assert sorted(swaps) == ["a", "b"]
    for one, two in zip(found["vllm"].rows(), found["transformers"].rows(), strict=True):
        assert (one.model, one.task, one.metric, one.n) == (two.model, two.task, two.metric, two.n)
        assert one.value == pytest.approx(two.value, rel=1e-4, abs=1e-4)
    for model in "ab":
        for task in names:
            samples = [each.samples(model, task) for each in found.values()]
            for one, two in zip(*samples, strict=True):
                assert one.requests == two.requests
                for mine, theirs in zip(one.answers, two.answers, strict=True):
                    value = mine.pop("value"), theirs.pop("value")
                    assert mine == theirs  # texts, what is greedy, counts
                    if value[0] is not None:
                        assert value[0] == pytest.approx(value[1], rel=1e-5, abs=1e-3)
