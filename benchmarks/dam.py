"""Time and memory of DAM's layers beside the authors' way: merged weights formed by autograd.

    python benchmarks/dam.py [--width 1024] [--layers 8] [--device cpu]

A stack of square linear layers with T = 3 experts, float32; one pass of an expert for its logits,
one of the merged model, and its backward pass to the coefficients. Time is processor time on a CPU,
with one thread, so that other work does not count. Each setting runs in a process of its own.
`memory` is the peak of tensors beyond the frozen weights of the experts, once; the authors hold a
second copy of them for the experts' passes, which counts. `activations` is the same of a plain
model of the same layers that is trained below them. `auto` takes the way of one of the two others,
by tokens against width.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

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


def plain(x: Tensor, weights: list[Tensor], coefficients: Tensor) -> Tensor:
    """One model's layer; its input alone has a gradient."""
    return F.linear(x, weights[0])


WAYS: dict[str, Layer] = {each.__name__: each for each in (plain, authors, never, always)}


def measure(way: str, width: int, layers: int, tokens: int, device: str) -> dict[str, float]:
    """Seconds of a step (the least) and the peak of its memory beyond the frozen weights."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    clock = time.perf_counter if device == "cuda" else time.process_time
    frozen = [
        [torch.randn(width, width, device=device) / width**0.5 for _ in range(NUM_EXPERTS)]
        for _ in range(layers)
    ]
    own = [[w.clone() for w in each] for each in frozen] if way == "authors" else frozen
    shape = (NUM_EXPERTS, width)
    coefficients = [
        torch.full(shape, 1 / NUM_EXPERTS, device=device).requires_grad_() for _ in range(layers)
    ]
    x = torch.randn(tokens, width, device=device).requires_grad_(way == "plain")

    def step() -> float:
        begin = clock()
        with torch.no_grad():
            target = x.detach()
            for each in own:
                target = torch.tanh(F.linear(target, each[0]))
        y = x
        for each, c in zip(frozen, coefficients, strict=True):
            y = torch.tanh(WAYS[way](y, each, c))
        (y - target).square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return clock() - begin

    seconds = min(step() for _ in range(REPEATS))
    copies = NUM_EXPERTS * layers * width**2 * 4 if way == "authors" else 0
    return {"seconds": seconds, "bytes": peak_of(step, device) + copies}


def peak_of(step: Callable[[], float], device: str) -> int:
    """The bytes of tensors at their most, beyond those before the step."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        found.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [each for each in events if each["name"] == "[memory]"]
    now = peak = 0
    for each in sorted(changes, key=lambda each: each["ts"]):
        now += each["args"]["Bytes"]
        peak = max(peak, now)
    return peak


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
    print("| tokens / width | way | step | ratio | memory | memory / activations | total, ratio |")
    print("|---|---|---|---|---|---|---|")
    for share in (64, 32, 16, 8, 2):
        tokens = given.width // share
        found = {way: in_process(given, way, tokens) for way in WAYS}
        activations = found.pop("plain")["bytes"]
        first = found["authors"]
        formed = forms_weight(tokens, given.width, "auto")
        for way, each in found.items():
            name = way if (way == "authors") or (way == "always") != formed else f"{way} = auto"
            print(
                f"| 1/{share} | {name} | {each['seconds'] * 1e3:.1f} ms "
                f"| {each['seconds'] / first['seconds']:.2f} | {each['bytes'] / 1e6:,.0f} MB "
                f"| {each['bytes'] / activations:.2f} "
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
