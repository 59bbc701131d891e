"""A server on vLLM: two models that share two engines, and a reward model.

Oracle: transformers' greedy answers, log-probabilities and scores; jsonschema.
"""

import json
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx2
import jsonschema
import openai
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.digests import model_digest
from tests.generator import Generator
from tests.ray_jobs.server_process import assert_nothing_remains, free_port, pids_with, server
from tests.ray_jobs.serving_load import load
from tests.ray_jobs.test_serve_kills import kill
from tests.tiny_models import CHAT_TEMPLATE

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow
LONG = ["ab" * 70 + each for each in ("c", "de", "fgh", "q")]  # blocks of the cache have 128 tokens
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": ["x", "y"]}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


def save_bytes(path: Path, seed: int, make: type[PreTrainedModel] = LlamaForCausalLM) -> Path:
    """A tiny model whose tokens are bytes, with heads that vLLM has on a CPU."""
    specials = ["<pad>", "<s>", "</s>", "<user>", "<assistant>"]
    alphabet = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    roles = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT_TEMPLATE, **roles)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(seed)
    labels = {"num_labels": 1} if make is LlamaForSequenceClassification else {}
    config = LlamaConfig(
        vocab_size=len(alphabet), initializer_range=0.5, **sizes, **heads, **ids, **labels
    )
    make(config).save_pretrained(path)
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    found = {name: save_bytes(folder / name, seed) for seed, name in enumerate("xy")}
    found["reward"] = save_bytes(folder / "reward", 5, LlamaForSequenceClassification)
    return found


@pytest.fixture(scope="module")
def running(
    saved: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, project_root: Path
) -> Iterator[tuple[str, str, subprocess.Popen[str]]]:
    folder = tmp_path_factory.mktemp("server")
    models = {name: {"path": str(path)} for name, path in saved.items()}
    models["x"] |= {"replicas": 2}
    models["reward"] |= {"kind": "reward"}
    config = {"models": models, "engine": {"cache_gib": 0.25}, "limits": {"turn_s": 0.3}}
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config | {"state": str(folder / "state")}))
    port, mark = free_port(), uuid.uuid4().hex
    with server([file], port, project_root, mark) as process:
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}/v1" in line, process.stderr.read()
        yield f"http://127.0.0.1:{port}", mark, process
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    assert_nothing_remains(mark)


@pytest.fixture(scope="module")
def expected(saved: dict[str, Path]) -> dict[str, dict[str, str]]:
    found = {}
    for name in "xy":
        answers = Generator(saved[name]).complete(LONG, max_new_tokens=12, batch_size=1)
        found[name] = dict(zip(LONG, answers, strict=True))
    return found


def test_the_protocol_on_vllm(running: tuple, saved: dict) -> None:
    client = openai.OpenAI(base_url=f"{running[0]}/v1", api_key="none", max_retries=0)
    generator = Generator(saved["x"])
    question = [{"role": "user", "content": "hello"}]
    asked = {"model": "x", "messages": question, "temperature": 0, "max_tokens": 12}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    [choice] = answer.choices
    assert (
        choice.message.content == generator.complete([question], max_new_tokens=12, batch_size=1)[0]
    )
    assert answer.system_fingerprint == model_digest(Checkpoint.open(saved["x"])).weights
    tokens = torch.tensor([generator.encode(question)])
    with torch.inference_mode():
        values = generator.model(tokens).logits[0, -1].log_softmax(-1).topk(2).values.tolist()
    first = choice.logprobs.content[0]
    assert [each.logprob for each in first.top_logprobs] == pytest.approx(values, abs=1e-3)
    stream = client.chat.completions.create(**asked, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == choice.message.content
    drawn = {**asked, "temperature": 1.0, "n": 2, "seed": 5}
    texts = [
        [each.message.content for each in client.chat.completions.create(**drawn).choices]
        for _ in range(2)
    ]
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    # Blanks may stand between the tokens of JSON; a random model should not go on with them alone.
    loose = {**asked, "max_tokens": 300, "temperature": 2.0, "seed": 1}
    fitted = client.chat.completions.create(**loose, response_format=form)
    jsonschema.validate(json.loads(fitted.choices[0].message.content), SCHEMA)


def test_rewards_on_vllm(running: tuple, saved: dict) -> None:
    tokenizer = Generator(saved["x"]).tokenizer
    model = LlamaForSequenceClassification.from_pretrained(saved["reward"], dtype=torch.float32)
    both = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
        for text in ("yes", "c" * 200)
    ]
    body = {"model": "reward", "messages": both}
    found = httpx2.post(f"{running[0]}/v1/rewards", json=body, timeout=60).json()
    for turns, data in zip(both, found["data"], strict=True):
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            assert data["score"] == pytest.approx(model(tokens).logits.item(), abs=1e-4)


def test_answers_of_two_models_on_two_engines(running: tuple, expected: dict) -> None:
    with load(running[0], expected, 6) as outcome:
        outcome.wait_for(120, 120)
    assert set(outcome.counts) == {"right"}, outcome
    metrics = httpx2.get(f"{running[0]}/metrics").text
    swaps = [e for e in metrics.splitlines() if e.startswith("poise_engine_swaps{")]
    assert len(swaps) == 3 and sum(float(each.split()[-1]) for each in swaps) > 0


def test_an_engine_dies_under_load(running: tuple, expected: dict) -> None:
    url, mark, _ = running
    with load(url, expected, 4) as outcome:
        outcome.wait_for(10, 60)
        pid = kill(mark, "VLLM::EngineCore")
        took = outcome.wait_for(60, 180)
    print(f"\nan engine: 60 answers after {took:.1f} s; {outcome.counts}; {outcome.errors}")
    assert pid not in pids_with(mark)
    assert outcome.counts["hung"] == outcome.counts["wrong"] == 0, outcome


def test_work_that_nobody_wants_ends_in_the_engine(running: tuple) -> None:
    url, _, _ = running

    def engines(name: str) -> float:
        lines = httpx2.get(f"{url}/metrics", timeout=60).text.splitlines()
        found = [each for each in lines if each.startswith(f"poise_engine_{name}{{")]
        return sum(float(each.split()[-1]) for each in found)

    before = engines("cancelled")
    body = {"model": "x", "prompt": "a", "max_tokens": 400, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        next(response.iter_lines())
    for _ in range(100):
        if engines("cancelled") > before and engines("running") == 0:
            return
        time.sleep(0.1)
    raise AssertionError("the engine goes on")
