"""What the pipeline of evaluation adds to an engine, and what changing models in it saves.

    python benchmarks/evaluate.py --engine vllm [--models 12] [--tasks 6] [--seconds 60]

Random models of one shape (`--hidden`, `--layers`) answer random prompts of a tasks.yaml. Parts,
each in one process, with the documents of a task such that answering takes `--seconds` or more:

- `overhead`: one model's tasks by `evaluate` beside the same prompts by the engine alone;
- `offline`: the engine beside vLLM's own `LLM.generate` on the same prompts (engine vllm);
- `swap`: from the last answer of one model to the first of the next, with a swap and with a new
  engine;
- `matrix`: all models on all tasks by `evaluate`, its one start included, beside an engine a model.

Each pair takes turns `--rounds` times; the best counts.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from pipelines.engines import EngineConfig, Sampling, open_engine
from pipelines.evaluate import EvaluateConfig, evaluate
from tests.tiny_models import save_tiny_llama

MAX_TOKENS = 16
WORDS = "abcdefghijklmnopqrstuvwxyz"


def main() -> None:
    """Run the parts and print a line for each."""
    arguments = parsed()
    parts: dict[str, Callable[[argparse.Namespace, Path], dict[str, Any]]] = {
        "overhead": overhead,
        "offline": offline,
        "swap": swap,
        "matrix": matrix,
    }
    with TemporaryDirectory() as folder:
        root = Path(folder)
        for seed in range(arguments.models):
            shape = {"hidden_size": arguments.hidden, "num_hidden_layers": arguments.layers}
            save_tiny_llama(root / f"m{seed}", seed, **shape)
        for name in arguments.only or parts:
            print(json.dumps({"part": name, **parts[name](arguments, root)}), flush=True)


def parsed() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="vllm")
    parser.add_argument("--models", type=int, default=12)
    parser.add_argument("--tasks", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="*", choices=["overhead", "offline", "swap", "matrix"])
    return parser.parse_args()


def prompts_of(seed: int, count: int) -> list[str]:
    """Random texts of 4 to 40 words."""
    random = Random(seed)
    return [
        " ".join(random.choice(WORDS) for _ in range(random.randint(4, 40))) for _ in range(count)
    ]


def enough(engine: Any, seconds: float) -> int:
    """How many prompts an engine answers in some seconds."""
    sample = prompts_of(0, 256)
    engine.generate(sample, Sampling(max_tokens=MAX_TOKENS))
    start = time.perf_counter()
    engine.generate(sample, Sampling(max_tokens=MAX_TOKENS))
    return max(256, round(seconds * 256 / (time.perf_counter() - start)))


def save_tasks(folder: Path, num_tasks: int, count: int) -> Path:
    """A tasks.yaml with tasks of `count` prompts in all."""
    folder.mkdir(exist_ok=True)
    tasks = []
    for number in range(num_tasks):
        texts = prompts_of(number + 1, count // num_tasks)
        rows = [{"id": str(i), "prompt": each, "cluster": str(i)} for i, each in enumerate(texts)]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        grader = {"name": "ends_with", "text": "a"}
        task = {"name": f"t{number}", "prompt": "text", "grader": grader}
        tasks.append(task | {"files": {"test": f"{number}.jsonl"}})
    (folder / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    return folder / "tasks.yaml"


def config_of(arguments: argparse.Namespace, root: Path, models: int, tasks: Path) -> Any:
    """The evaluation of the first models."""
    return EvaluateConfig(
        models={f"m{number}": root / f"m{number}" for number in range(models)},
        tasks=tasks,
        max_new_tokens=MAX_TOKENS,
        engine=EngineConfig(name=arguments.engine),
    )


def timed(work: Callable[[], Any]) -> float:
    """Seconds of some work."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def overhead(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """One model by `evaluate`, its engine's start taken off, beside the engine alone."""
    engine = open_engine(root / "m0", EngineConfig(name=arguments.engine))
    count = enough(engine, arguments.seconds)
    tasks = save_tasks(root / "overhead", arguments.tasks, count)
    texts = [prompts_of(n + 1, count // arguments.tasks) for n in range(arguments.tasks)]
    alone, whole = [], []
    for number in range(arguments.rounds):
        alone.append(
            timed(lambda: [engine.generate(t, Sampling(max_tokens=MAX_TOKENS)) for t in texts])
        )
        with engine_given(engine):
            out = root / f"overhead-{number}"
            config = config_of(arguments, root, 1, tasks)
            whole.append(timed(lambda: evaluate(config, out, executor="local")))  # noqa: B023
    engine.close()
    ratio = min(whole) / min(alone)
    return {"prompts": count, "engine_s": min(alone), "evaluate_s": min(whole), "ratio": ratio}


class engine_given:  # noqa: N801
    """In the block, workers use an engine that runs already."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __enter__(self) -> None:
        from pipelines.evaluate import workers

        self._open = workers.open_engine
        engine = self._engine

        class Kept:
            """The engine; closing it does nothing."""

            def __getattr__(self, name: str) -> Any:
                return getattr(engine, name)

            def close(self) -> None:
                """It goes on."""

        workers.open_engine = lambda *_: Kept()  # type: ignore[assignment,return-value]

    def __exit__(self, *error: object) -> None:
        from pipelines.evaluate import workers

        workers.open_engine = self._open


def offline(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """vLLM's own way beside the engine's, on one running vLLM."""
    if arguments.engine != "vllm":
        return {"skipped": "vllm alone"}
    from vllm import SamplingParams

    engine: Any = open_engine(root / "m0", EngineConfig(name="vllm"))
    count = enough(engine, arguments.seconds)
    texts = prompts_of(1, count)
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    own, ours = [], []
    for _ in range(arguments.rounds):
        own.append(timed(lambda: engine._llm.generate(texts, params, use_tqdm=False)))
        ours.append(timed(lambda: engine.generate(texts, Sampling(max_tokens=MAX_TOKENS))))
    engine.close()
    ratio = min(own) / min(ours)
    return {"prompts": count, "vllm_s": min(own), "engine_s": min(ours), "share_of_speed": ratio}


def swap(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """From one model's last answer to the next one's first: by a swap, and by a new engine."""
    config = EngineConfig(name=arguments.engine)
    first = Sampling(max_tokens=1)
    engine = open_engine(root / "m0", config)
    engine.generate(["a"], first)

    def swapped(number: int) -> None:
        engine.swap(root / f"m{number}")
        engine.generate(["a"], first)

    swaps = [timed(lambda n=number: swapped(n)) for number in range(1, arguments.models)]
    engine.close()

    def started() -> None:
        other = open_engine(root / "m1", config)
        other.generate(["a"], first)
        other.close()

    starts = [timed(started) for _ in range(max(2, arguments.rounds))]
    return {"swap_s": min(swaps), "start_s": min(starts), "ratio": min(starts) / min(swaps)}


def matrix(arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """All models on all tasks with one engine, and with an engine a model."""
    tasks = save_tasks(root / "matrix", arguments.tasks, 64 * arguments.tasks)
    config = config_of(arguments, root, arguments.models, tasks)
    together = timed(lambda: evaluate(config, root / "matrix-together", executor="local"))

    def apart() -> None:
        for name, path in config.models.items():
            alone = config.model_copy(update={"models": {name: path}})
            evaluate(alone, root / "matrix-apart", executor="local")

    separate = timed(apart)
    return {"one_engine_s": together, "an_engine_each_s": separate, "ratio": separate / together}


if __name__ == "__main__":
    main()
