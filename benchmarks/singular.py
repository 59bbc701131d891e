"""TSVM beside the plain recipe, and two workers beside one.

    python benchmarks/singular.py

The recipe is the paper's, with `torch.linalg.svd` of each delta and of the stacked vectors, in
float32 with the same number of threads as Poise; errors are relative to the recipe in float64.
Workers are measured with `poise merge` on a small Llama, as wall time with start-up.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from merge import POISE, make_checkpoints, measure
from torch import Tensor

from operators.merging import merge_tensor

NUM_MODELS = 3
SCALED = {"tsvm": {}, "della": {"density": 0.5, "epsilon": 0.15}}


def recipe(deltas: list[Tensor]) -> Tensor:
    """A simple TSVM, in the deltas' dtype."""
    rank = min(deltas[0].shape) // len(deltas)
    found = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    u = _orthogonal(torch.cat([u[:, :rank] for u, _, _ in found], dim=1))
    v = _orthogonal(torch.cat([v[:rank] for _, _, v in found], dim=0))
    return (u * torch.cat([s[:rank] for _, s, _ in found])) @ v


def _orthogonal(stacked: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(stacked, full_matrices=False)
    return u @ v


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds and result."""
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def compare(shape: tuple[int, int], num_rounds: int) -> str:
    """One line of the table: both in turn, the best of the rounds."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(shape, generator=generator)
    models = [base + 0.002 * torch.randn(shape, generator=generator) for _ in range(NUM_MODELS)]
    deltas, ours, theirs = [model - base for model in models], [], []
    for _ in range(num_rounds):
        seconds, merged = timed(lambda: merge_tensor("tsvm", models, base, name="x"))
        ours.append(seconds)
        seconds, plain = timed(lambda: recipe(deltas))
        theirs.append(seconds)
    exact = recipe([delta.double() for delta in deltas])
    errors = [
        float((found.double() - exact).norm() / exact.norm()) for found in (merged - base, plain)
    ]
    return (
        f"| {shape[0]} x {shape[1]} | {min(ours):.1f} s | {min(theirs):.1f} s | "
        f"{min(theirs) / min(ours):.1f}x | {errors[0]:.1e} | {errors[1]:.1e} |"
    )


def scale(method: str, paths: list[Path], folder: Path) -> str:
    """One line of the table: the same merge with one worker and with two."""
    base, *models = map(str, paths)
    config = {
        "merge_method": method,
        "base_model": base,
        "models": [{"model": model} for model in models],
        "parameters": SCALED[method],
        "memory_budget": "6GiB",  # two embeddings as whole matrices
    }
    file = folder / f"{method}.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [*POISE, str(file), str(folder / "out")]
    seconds = [
        measure([*command, f"num_workers={count}"], folder / "out").seconds for count in (1, 2)
    ]
    return (
        f"| {method} | {seconds[0]:.1f} s | {seconds[1]:.1f} s | {seconds[0] / seconds[1]:.2f}x |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--size", type=float, default=0.15, help="billions of parameters to scale")
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmark-merge"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print("| matrix | poise | recipe | ratio | error of poise | error of the recipe |")
    print("|---|---|---|---|---|---|", flush=True)
    for shape in ((1024, 2816), (2048, 5632)):
        print(compare(shape, arguments.rounds), flush=True)
    paths = make_checkpoints(arguments.folder / f"{arguments.size}B", arguments.size)
    print("\n| method | one worker | two | ratio |\n|---|---|---|---|", flush=True)
    for method in SCALED:
        print(scale(method, paths, arguments.folder), flush=True)


if __name__ == "__main__":
    main()
