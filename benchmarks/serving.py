"""A server beside the engines that it serves: throughput, waits of models that share, overload.

    python benchmarks/serving.py                # a few minutes on two cores; vLLM
    python benchmarks/serving.py --engine transformers --swaps 20 --seconds 5

Makes four random Llamas of one shape and a reward model, whose tokens are bytes. Then, each beside
the same work by the engine alone, on as many cores:

- tokens a second of one engine at saturation, beside `Engine.generate` on the same prompts;
- rewards a second, in requests of 64 conversations, beside `Engine.rewards`;
- seconds to an answer against the number of clients, and the cost of the hop for one token;
- four models that take turns on two engines until their weights were changed so many times: waits,
  failures, and answers that differ from the engine's own with the weights that they are signed by;
- clients for twice the room that there is: statuses, and latencies before and afterwards.

Prints Markdown.
"""

import argparse
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import torch
import yaml

from pipelines.engines import EngineConfig, Sampling, open_engine
from ray_jobs.session import quiet_environment

TOKENS, FEW = 64, 16  # of an answer
TIE = 1e-4


def save_models(folder: Path, width: int, layers: int) -> dict[str, Path]:
    """Random models: a, b, c, d and reward."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    specials = ["<pad>", "<s>", "</s>"]
    alphabet = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1}
    found = {}
    for seed, name in enumerate(("a", "b", "c", "d", "reward")):
        torch.manual_seed(seed)
        make = LlamaForSequenceClassification if name == "reward" else LlamaForCausalLM
        config = LlamaConfig(
            vocab_size=len(alphabet), max_position_embeddings=1024, **sizes, **heads, **ids
        )
        model = make(config)
        if name != "reward":  # answers that do not end by themselves are all of one length
            model.lm_head.weight.data[2] = 0.0
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
        found[name] = folder / name
    return found


def made_up(count: int, seed: int = 0) -> list[str]:
    """Texts of 140 to 200 tokens."""
    drawn = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz "
    return ["".join(drawn.choices(letters, k=drawn.randint(140, 200))) for _ in range(count)]


@contextmanager
def server(folder: Path, models: dict[str, Any], engine: dict[str, Any], **limits: Any) -> Any:
    """`poise serve` of these models; yields its address."""
    config = {"models": models, "engine": engine, "limits": limits, "state": str(folder / "state")}
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ray_jobs.cli", "serve", str(file), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        if not process.stdout.readline():
            raise RuntimeError("the server did not start")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)


@dataclass(slots=True)
class Done:
    """What a load gave.

    Attributes:
        answers: (model, prompt, text, digest) of each.
        seconds: of each answer.
    """

    answers: list[tuple[str, str, str, str]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    def at(self, share: float) -> float:
        """A quantile of the seconds."""
        return sorted(self.seconds)[min(len(self.seconds) - 1, int(share * len(self.seconds)))]


def drive(
    url: str, requests: Iterator[tuple[str, str]], clients: int, tokens: int = TOKENS
) -> tuple[Done, float]:
    """Ask until the requests are used up; returns what came, and in how many seconds."""
    done, lock = Done(), threading.Lock()

    def client() -> None:
        with httpx2.Client(timeout=300) as own:
            while True:
                with lock:
                    asked = next(requests, None)
                if asked is None:
                    return
                model, prompt = asked
                body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
                began = time.perf_counter()
                response = own.post(f"{url}/v1/completions", json=body)
                took = time.perf_counter() - began
                with lock:
                    done.statuses[response.status_code] += 1
                    if response.status_code == 200:
                        found = response.json()
                        text, digest = found["choices"][0]["text"], found["system_fingerprint"]
                        done.answers.append((model, prompt, text, digest))
                        done.seconds.append(took)
                if response.status_code == 429:
                    time.sleep(0.2)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return done, time.perf_counter() - began


def timed(work: Callable[[], Any]) -> float:
    """Seconds of a piece of work."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def on_one_core(path: Path, config: EngineConfig, what: str, rounds: int) -> dict[str, Any]:
    """The engine alone, in a process with one core, as an engine of the server has: seconds."""
    code = (
        "import os, sys, json; os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]})\n"
        "os.environ['OMP_NUM_THREADS'] = '1'\n"
        "import torch; torch.set_num_threads(1)\n"
        "from benchmarks.serving import alone\n"
        "print(json.dumps(alone(*sys.argv[1:])))"
    )
    command = [sys.executable, "-c", code, str(path), config.model_dump_json(), what, str(rounds)]
    core = str(min(os.sched_getaffinity(0)))
    variables = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": core}
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join([*sys.path[:1], "."])}
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if output.returncode:
        raise RuntimeError(output.stderr[-2000:])
    return yaml.safe_load(output.stdout.splitlines()[-1])


def alone(path: str, config: str, what: str, rounds: str) -> dict[str, Any]:
    """Called in that process."""
    quiet_environment()
    engine = open_engine(path, EngineConfig.model_validate_json(config))
    texts = made_up(int(rounds) * 64)
    greedy = Sampling(max_tokens=TOKENS)
    try:
        if what == "reward":
            engine.rewards(texts[:64])
            return {"seconds": timed(lambda: engine.rewards(texts))}
        if what == "hop":
            one = Sampling(max_tokens=1)
            engine.generate(texts[:2], one)
            times = [timed(lambda each=each: engine.generate([each], one)) for each in texts]
            return {"seconds": statistics.median(times)}
        engine.generate(texts[:64], greedy)
        return {"seconds": timed(lambda: engine.generate(texts, greedy))}
    finally:
        engine.close()


def replayed(done: Done, paths: dict[str, Path], config: EngineConfig, tokens: int) -> Counter[str]:
    """Each answer once more by an engine alone with the weights that it is signed by."""
    engine, counts = open_engine(paths["a"], config), Counter[str]()
    greedy = Sampling(max_tokens=tokens, top_logprobs=2)
    for name, path in paths.items():
        if name == "reward":
            continue
        digest = engine.swap(path)
        signed = [each for each in done.answers if each[3] == digest]
        counts["of another model"] += sum(model != name for model, *_ in signed)
        own = engine.generate([prompt for _, prompt, _, _ in signed], greedy) if signed else []
        for (_, _, text, _), found in zip(signed, own, strict=True):
            gaps = [abs(a - b) for a, b in (sorted(p.values())[-2:] for p in found.logprobs or ())]
            same = "same" if text == found.text else "tie" if min(gaps) < TIE else "different"
            counts[same] += 1
    engine.close()
    return counts


def throughput(folder: Path, paths: dict[str, Path], engine: dict[str, Any], rounds: int) -> None:
    """One engine and one reward engine, at saturation and below."""
    models = {
        "a": {"path": str(paths["a"]), "cpus": 1, "max_queued": 256},
        "reward": {"path": str(paths["reward"]), "kind": "reward", "cpus": 1},
    }
    config = EngineConfig(**engine)
    by_itself = {
        what: on_one_core(paths[name], config.model_copy(update=more), what, rounds)["seconds"]
        for what, name, more in (
            ("answers", "a", {}),
            ("hop", "a", {}),
            ("reward", "reward", {"kind": "reward", "dtype": "float32"}),
        )
    }
    texts = made_up(rounds * 64)
    with server(folder, models, engine) as url:
        drive(url, iter([("a", each) for each in texts[:64]]), 64)
        _, seconds = drive(url, iter([("a", each) for each in texts]), 64)
        ratio = by_itself["answers"] / seconds
        tokens = len(texts) * TOKENS
        print("| | server | engine alone | ratio |\n|---|---|---|---|")
        print(
            f"| tokens/s, 64 clients | {tokens / seconds:,.0f} | "
            f"{tokens / by_itself['answers']:,.0f} | {ratio:.2f} |"
        )
        with httpx2.Client(timeout=300) as client:

            def score(part: list[str]) -> None:
                body = {"model": "reward", "input": part, "use_activation": False}
                client.post(f"{url}/classify", json=body).raise_for_status()

            score(texts[:64])
            parts = [texts[first : first + 64] for first in range(0, len(texts), 64)]
            took = timed(lambda: [score(part) for part in parts])
        print(
            f"| rewards/s, 64 a request | {len(texts) / took:,.0f} | "
            f"{len(texts) / by_itself['reward']:,.0f} | {by_itself['reward'] / took:.2f} |"
        )
        hop, _ = drive(url, iter([("a", each) for each in texts]), 1, tokens=1)
        print(
            f"| one token, median ms | {hop.at(0.5) * 1e3:.1f} | {by_itself['hop'] * 1e3:.1f} | "
            f"+{(hop.at(0.5) - by_itself['hop']) * 1e3:.1f} ms |"
        )
        print("\n| clients | tokens/s | p50 s | p99 s |\n|---|---|---|---|")
        for clients in (1, 4, 16, 64):
            few = texts[: max(16, 2 * clients)]
            done, seconds = drive(url, iter([("a", each) for each in few]), clients)
            rate = len(few) * TOKENS / seconds
            print(f"| {clients} | {rate:,.0f} | {done.at(0.5):.2f} | {done.at(0.99):.2f} |")


def turns(
    folder: Path, paths: dict[str, Path], engine: dict[str, Any], swaps: int, seconds: float
) -> None:
    """Four models on two engines, then twice as many clients as there is room for."""
    models = {
        name: {"path": str(paths[name]), "cpus": 1, "replicas": 2, "max_queued": 8}
        for name in "abcd"
    }
    texts, bound = made_up(40, seed=1), 30.0
    limits = {"turn_s": 0.3, "max_wait_s": bound, "max_running": 16}

    def changed(url: str, name: str) -> list[float]:
        lines = httpx2.get(f"{url}/metrics", timeout=60).text.splitlines()
        found = [each for each in lines if each.startswith(f"poise_engine_{name}{{")]
        return [float(each.split()[-1]) for each in found]

    with server(folder, models, engine, **limits) as url:
        drawn, state = random.Random(2), {"swaps": 0.0, "looked": 0.0}

        def asked() -> Iterator[tuple[str, str]]:
            while state["swaps"] < swaps:
                if time.monotonic() > state["looked"] + 0.5:
                    state["swaps"] = sum(changed(url, "swaps"))
                    state["looked"] = time.monotonic()
                yield drawn.choice("abcd"), drawn.choice(texts)

        done, took = drive(url, asked(), 8, tokens=FEW)
        waits = max(changed(url, "longest_wait_s"))
        print(
            f"\n{state['swaps']:.0f} changes of weights in {took:.0f} s: {len(done.answers)} "
            f"answers, statuses {dict(done.statuses)}, the longest wait {waits:.2f} s (bound "
            f"{bound:g} s), p50 {done.at(0.5):.2f} s, p99 {done.at(0.99):.2f} s."
        )

        def for_a_while(length: float) -> Iterator[tuple[str, str]]:
            end = time.monotonic() + length
            while time.monotonic() < end:
                yield "a", drawn.choice(texts)

        before, _ = drive(url, for_a_while(5), 2)
        over, _ = drive(url, for_a_while(seconds), 2 * (2 * 16 + 8))
        after, _ = drive(url, for_a_while(5), 2)
        print(
            f"Twice the room for {seconds:g} s: statuses {dict(over.statuses)}; p50 with two "
            f"clients {before.at(0.5):.2f} s before, {after.at(0.5):.2f} s afterwards."
        )
    counts = replayed(done, paths, EngineConfig(**engine), FEW)
    print(f"Replayed by an engine alone on the weights that signed them: {dict(counts)}.")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4, help="of 64 prompts")
    parser.add_argument("--swaps", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--only", choices=("throughput", "turns"))
    options = parser.parse_args()
    quiet_environment()
    engine: dict[str, Any] = {"name": options.engine, "dtype": "float32"}
    if options.engine == "vllm":
        engine |= {"cache_gib": 0.5}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = save_models(folder, options.width, options.layers)
        if options.only != "turns":
            throughput(folder, paths, engine, options.rounds)
        if options.only != "throughput":
            turns(folder, paths, engine, options.swaps, options.seconds)


if __name__ == "__main__":
    main()
