"""What a candidate in memory costs, and what racing and warm engines save.

    python benchmarks/search.py [--demo runs/demo] [--candidates 50] [--only parts race]

Candidates are random weights of four parents by two methods, on the tasks of the tiny world. The
parents are those that `poise demo` has trained in the folder `--demo`; without it they are random
models of their size near each other, whose answers are longer and all wrong, so that racing has
nothing to tell apart. Parts:

- `parts`: the seconds of a candidate by part, and all but answering as a share;
- `race`: the same candidates with racing and without, and the bare answering time of the latter;
- `fresh`: `--fresh` candidates by an engine that is started for each, beside a swap and the same
  answering;
- `large`: at `--millions` random parameters: a swap against writing the merge, and loading it into
  an engine that starts.

Numbers are of one process; a thousand candidates on two cores take half of a thousand times
`seconds_each`.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pipelines.engines import EngineConfig, open_engine
from pipelines.engines.weights import MergeWeights
from pipelines.evaluate import EvaluateConfig
from pipelines.merge import MergeConfig, merge, plan_merge
from pipelines.merge.kept import Kept
from pipelines.merge.plan import Opened
from pipelines.search import Measurement, Measurer, Objective, Race
from pipelines.tiny_world.world import build_world
from tests.tiny_models import save_tiny_llama

HS = ("helpfulness", "honesty", "harmlessness")
PARENTS = ("sft", "dpo-helpful", "dpo-honest", "dpo-harmless", "dpo-mixture")  # the base first


def main() -> None:
    """Run the parts and print a line for each."""
    torch.set_num_threads(1)
    arguments = parsed()
    with TemporaryDirectory() as folder:
        if arguments.demo is None:
            arguments.tasks, arguments.models = made(Path(folder))
        else:
            arguments.tasks = arguments.demo / "world" / "tasks" / "tasks.yaml"
            arguments.models = [arguments.demo / "models" / name for name in PARENTS]
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Run the parts."""
    parts: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "parts": parts_of_a_candidate,
        "race": race,
        "fresh": fresh,
        "large": large,
    }
    for name in arguments.only or parts:
        print(json.dumps({"part": name, **parts[name](arguments)}), flush=True)


def parsed() -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path)
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--fresh", type=int, default=3)
    parser.add_argument("--millions", type=int, default=135)
    parser.add_argument("--only", nargs="*", choices=["parts", "race", "fresh", "large"])
    return parser.parse_args()


def made(folder: Path) -> tuple[Path, list[Path]]:
    """The tasks of a tiny world, and random models near each other."""
    world = build_world(folder / "world", 0, "smoke")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(world / "model"))
    paths = [folder / name for name in PARENTS]
    for path in paths:
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    return world / "tasks" / "tasks.yaml", paths


def candidates(arguments: argparse.Namespace, count: int) -> Iterator[dict[str, Any]]:
    """Random merges of the parents."""
    random = np.random.default_rng(0)
    base, *parents = map(str, arguments.models)
    for place in range(count):
        weights = random.dirichlet(np.ones(len(parents))) * random.uniform(0.3, 2)
        method = ("task_arithmetic", "ties")[place % 2]
        yield {
            "merge_method": method,
            "base_model": base,
            "models": [
                {"model": parent, "parameters": {"weight": float(weight)}}
                for parent, weight in zip(parents, weights, strict=True)
            ],
            "parameters": {"density": 0.5} if method == "ties" else {},
        }


def measurer_of(arguments: argparse.Namespace) -> Measurer:
    """A measurer that has measured a candidate."""
    found = Measurer(
        EvaluateConfig(
            models={"base": arguments.models[0]}, tasks=arguments.tasks, split="development"
        )
    )
    for each in candidates(arguments, 2):
        found.measure(each)
    return found


def summed(found: list[Measurement]) -> dict[str, float]:
    """Seconds a candidate by part, and all but answering as a share."""
    seconds = {
        part: sum(each.seconds[part] for each in found) / len(found) for part in found[0].seconds
    }
    total = sum(seconds.values())
    return seconds | {"share_not_answering": 1 - seconds["answering"] / total}


def parts_of_a_candidate(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part `parts`."""
    measurer = measurer_of(arguments)
    return summed([measurer.measure(each) for each in candidates(arguments, arguments.candidates)])


def race(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part `race`."""
    measurer, count = measurer_of(arguments), arguments.candidates
    start = time.perf_counter()
    whole = [measurer.measure(each) for each in candidates(arguments, count)]
    without = time.perf_counter() - start
    series = {name: (name.split(".")[0], len(of)) for name, of in whole[0].samples.items()}
    compared = Race(series, objectives_of(arguments, series))
    start, raced = time.perf_counter(), []
    for place, each in enumerate(candidates(arguments, count)):
        raced.append(measurer.measure(each, race=compared))
        if not raced[-1].stopped:
            compared = compared.finished(str(place), raced[-1].samples)
    seconds = time.perf_counter() - start
    answered = sum(len(of) for each in raced for of in each.samples.values())
    asked = sum(len(of) for each in whole for of in each.samples.values())
    return {
        "candidates": count,
        "without_over_answering": without / sum(each.seconds["answering"] for each in whole),
        "seconds_each_without": without / count,
        "seconds_each": seconds / count,
        "answers_saved": 1 - answered / asked,
        "front": 0 if compared.front is None else len(compared.front.names),
        **summed(raced),
    }


def objectives_of(
    arguments: argparse.Namespace, series: dict[str, tuple[str, int]]
) -> tuple[Objective, ...]:
    """The three H's as weighted sums of the tasks' means."""
    from pipelines.evaluate.tasks import load_tasks

    found = []
    for dimension in HS:
        own = {task.name for task in load_tasks(arguments.tasks) if task.dimension == dimension}
        chosen = [name for name, (task, _) in series.items() if task in own]
        found.append(Objective(dimension, dict.fromkeys(chosen, 100 / len(chosen))))
    return tuple(found)


def fresh(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part `fresh`: each candidate is written, and measured by an engine of its own."""
    measurer = measurer_of(arguments)
    warm, cold = 0.0, 0.0
    for each in candidates(arguments, arguments.fresh):
        start = time.perf_counter()
        one = measurer.measure(each)
        warm += time.perf_counter() - start
        with TemporaryDirectory() as folder:
            start = time.perf_counter()
            written = merge(MergeConfig.model_validate(each), Path(folder) / "merged")
            other = Measurer(
                EvaluateConfig(
                    models={"merged": Path(written)}, tasks=arguments.tasks, split="development"
                )
            )
            alone = {"merge_method": "passthrough", "models": [{"model": str(written)}]}
            two = other.measure(alone)
            other.close()
            cold += time.perf_counter() - start
        assert one.digest == two.digest and one.samples == two.samples
    return {"seconds_warm": warm, "seconds_fresh": cold, "ratio": cold / warm}


def large(arguments: argparse.Namespace) -> dict[str, Any]:
    """The part `large`: three random models of about so many parameters, in bfloat16."""
    layers = max(1, round(arguments.millions * 1e6 / (4 * 576**2 + 3 * 576 * 1536)))
    shape = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 9,
    }
    with TemporaryDirectory() as folder:
        root = Path(folder)
        paths = [
            save_tiny_llama(root / str(seed), seed, dtype=torch.bfloat16, **shape)
            for seed in range(3)
        ]
        opened, kept, config = Opened(), Kept(4 << 30), EngineConfig()
        engine, swaps, writes = open_engine(paths[0], config), [], []
        for weight in (0.3, 0.4, 0.5, 0.6):
            candidate = MergeConfig.model_validate(
                {
                    "merge_method": "task_arithmetic",
                    "base_model": str(paths[0]),
                    "models": [
                        {"model": str(path), "parameters": {"weight": weight}} for path in paths[1:]
                    ],
                }
            )
            start = time.perf_counter()
            digest = engine.swap(MergeWeights(plan_merge(candidate, opened), kept))
            swaps.append(time.perf_counter() - start)
            start = time.perf_counter()
            written = merge(candidate, root / f"merged-{weight}")
            other = open_engine(str(written), config)
            writes.append(time.perf_counter() - start)
            assert other.weights == digest
            other.close()
    return {"swap": swaps, "written": writes, "ratio": min(writes) / min(swaps)}


if __name__ == "__main__":
    main()
