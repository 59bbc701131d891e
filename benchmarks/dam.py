"""Time and memory of DAM's layers beside the authors' way: merged weights formed by autograd.

    python benchmarks/dam.py [--width 1024] [--layers 8] [--device cpu]

A stack of square linear layers with T = 3 experts, float32; one pass of an expert for its logits,
one of the merged model, and its backward pass to the coefficients. Each setting runs in a process
of its own. `memory` is the peak beyond the frozen weights of the experts, once; the authors hold a
second copy of them for the experts' passes, which counts. `activations` are the layers' inputs and
outputs. `auto` takes the way of one of the two others, by tokens against width.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from operators.dam import dam_linear, forms_weight

NUM_EXPERTS, REPEATS = 3, 5
Layer = Callable[[Tensor, list[Tensor], Tensor], Tensor]


def authors(x: Tensor, weights: list[Tensor], coefficients: Tensor) -> Tensor:
    """The merged weight under autograd, as the paper writes it."""
    weight = sum(w * c for w, c in zip(weights, coefficients, strict=True))
    assert isinstance(weight, Tensor)
    return F.linear(x, weight)


def never(x: Tensor, weights: list[Tensor], coefficients: Tensor) -> Tensor:
    """T products, no merged weight."""
    return dam_linear(x, weights, coefficients, materialise="never")


def always(x: Tensor, weights: list[Tensor], coefficients: Tensor) -> Tensor:
    """One layer's weight at a time."""
    return dam_linear(x, weights, coefficients, materialise="always")


WAYS: dict[str, Layer] = {each.__name__: each for each in (authors, never, always)}


def measure(way: str, width: int, layers: int, tokens: int, device: str) -> dict[str, float]:
    """Seconds of a step (the median) and the peak of its memory beyond the frozen weights."""
    torch.manual_seed(0)
    frozen = [
        [torch.randn(width, width, device=device) / width**0.5 for _ in range(NUM_EXPERTS)]
        for _ in range(layers)
    ]
    before = peak(device)
    own = [[w.clone() for w in each] for each in frozen] if way == "authors" else frozen
    shape = (NUM_EXPERTS, width)
    coefficients = [
        torch.full(shape, 1 / NUM_EXPERTS, device=device).requires_grad_() for _ in range(layers)
    ]
    x, seconds = torch.randn(tokens, width, device=device), []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        with torch.no_grad():
            target = x
            for each in own:
                target = torch.tanh(F.linear(target, each[0]))
        y = x
        for each, c in zip(frozen, coefficients, strict=True):
            y = torch.tanh(WAYS[way](y, each, c))
        (y - target).square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {"seconds": sorted(seconds)[REPEATS // 2], "bytes": peak(device) - before}


def peak(device: str) -> int:
    """The peak of memory so far in bytes: on a GPU what torch has, else of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "TOKENS"), help="in this process")
    given = parser.parse_args()
    if given.one is not None:
        found = measure(given.one[0], given.width, given.layers, int(given.one[1]), given.device)
        print(json.dumps(found))
        return
    frozen = NUM_EXPERTS * given.layers * given.width**2 * 4
    print(f"frozen weights: {frozen / 1e6:,.0f} MB")
    print("| tokens / width | way | step | ratio | memory | activations | total, ratio |")
    print("|---|---|---|---|---|---|---|")
    for share in (64, 32, 16, 8, 4, 2, 1):
        tokens = given.width // share
        activations = 2 * given.layers * tokens * given.width * 4
        found = {way: in_process(given, way, tokens) for way in WAYS}
        first = found["authors"]
        formed = forms_weight(tokens, given.width, "auto")
        for way, each in found.items():
            name = way if (way == "authors") or (way == "always") != formed else f"{way} = auto"
            print(
                f"| 1/{share} | {name} | {each['seconds'] * 1e3:.1f} ms "
                f"| {each['seconds'] / first['seconds']:.2f} | {each['bytes'] / 1e6:,.0f} MB "
                f"| {activations / 1e6:,.1f} MB "
                f"| {(frozen + each['bytes']) / (frozen + first['bytes']):.2f} |",
                flush=True,
            )


def in_process(given: argparse.Namespace, way: str, tokens: int) -> dict[str, float]:
    """One setting in a process of its own."""
    command = [sys.executable, __file__, "--one", way, str(tokens), "--device", given.device]
    command += ["--width", str(given.width), "--layers", str(given.layers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
