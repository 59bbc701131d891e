"""Time and memory of a step: fused AdamW, the papers' plain recipe, OnDARE and OnTIES.

    python benchmarks/optimizers.py --size 68M --threads 2 [--rows NAME ...] [--json FILE]
    python benchmarks/optimizers.py --first [--gradient-rows 64] [--alpha 1e-7]

All rows step the same shapes (a Llama's) with the same gradients in one process. Each row takes
turns with fused AdamW, so that other load on the machine slows both; the best round counts. First
come `--warm` steps, because the first steps, where OnTIES' cuts move far, take longer. `plain` is
a simple implementation: a fresh torch mask for each tensor, or a sort of each tensor.

`--first` shows OnTIES' first ten steps instead, on twelve tensors of 2,048 x 2,048: the ratio of
each step to a fused AdamW step. Adam's first updates are all plus or minus the learning rate, or 0
in rows without gradients, so nearly all magnitudes are equal.
"""

import argparse
import itertools
import json
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from operators.consensus import sign_consensus
from operators.optim import OnlineMergingAdamW

SIZES = {  # (hidden, intermediate, layers, vocabulary)
    "4M": (256, 688, 4, 2048),
    "10M": (384, 1024, 4, 4096),
    "68M": (768, 2048, 6, 16384),
    "500M": (1536, 4096, 14, 32768),
}


def shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of a Llama."""
    hidden, inner, layers, vocabulary = SIZES[size]
    found: dict[str, tuple[int, ...]] = {
        "embed": (vocabulary, hidden),
        "head": (vocabulary, hidden),
    }
    for i in range(layers):
        for name in "qkvo":
            found[f"layers.{i}.{name}"] = (hidden, hidden)
        found[f"layers.{i}.gate"] = found[f"layers.{i}.up"] = (inner, hidden)
        found[f"layers.{i}.down"] = (hidden, inner)
        found[f"layers.{i}.norm"] = (hidden,)
    return found


class PlainRecipe(Optimizer):
    """A simple implementation of online merging: torch's AdamW, then random masks or a sort, out of
    place, on whole tensors.
    """

    def __init__(
        self, named: list[tuple[str, nn.Parameter]], tau: dict[str, Tensor], **options: object
    ) -> None:
        super().__init__([parameter for _, parameter in named], {})
        self._named, self._tau, self._options = named, tau, options
        self._base = torch.optim.AdamW([p for _, p in named], lr=1e-6, foreach=False)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One merged step."""
        p, a = float(self._options["density"]), 1e-7
        before = [parameter.clone() for _, parameter in self._named]
        self._base.step()
        for (name, parameter), start in zip(self._named, before, strict=True):
            delta, tau = parameter - start, self._tau[name].float()
            if self._options["consensus"] == "dare":
                mask = torch.bernoulli(torch.full_like(delta, p))
                change = (1 - a) * delta * mask + a * tau * torch.bernoulli(torch.full_like(tau, p))
            else:
                change = sign_consensus((1 - a) * _sorted_top(delta, p), a * _sorted_top(tau, p))
            parameter.copy_(start + change)


def _sorted_top(x: Tensor, p: float) -> Tensor:
    """top_p by an argsort of the whole tensor."""
    order = x.abs().flatten().argsort(descending=True)
    mask = torch.zeros(x.numel())
    mask[order[: max(1, int(p * x.numel()))]] = 1
    return x * mask.view_as(x)


def rows(named: list[tuple[str, nn.Parameter]], tau: dict[str, Tensor]) -> dict[str, Callable]:
    """The constructor of each row's optimizer."""

    def online(**options: object) -> Callable[[], Optimizer]:
        return lambda: OnlineMergingAdamW(named, tau, lr=1e-6, alpha=1e-7, **options)  # type: ignore[arg-type]

    def plain(**options: object) -> Callable[[], Optimizer]:
        return lambda: PlainRecipe(named, tau, **options)

    parameters = [parameter for _, parameter in named]
    found: dict[str, Callable] = {
        "AdamW fused": lambda: torch.optim.AdamW(parameters, lr=1e-6, fused=True),
        "AdamW foreach": lambda: torch.optim.AdamW(parameters, lr=1e-6, foreach=True),
    }
    for p in (0.01, 0.5):
        for consensus in ("dare", "ties"):
            options = {"consensus": consensus, "density": p}
            found[f"plain {consensus} p={p}"] = plain(**options)
            for path in ("eager", "compiled"):
                found[f"{path} {consensus} p={p}"] = online(**options, implementation=path)
    found["compiled dare p=0.5 K=10"] = online(
        consensus="dare", density=0.5, merge_every=10, implementation="compiled"
    )
    return found


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of an optimizer's state, with tau."""
    base = getattr(optimizer, "_base", optimizer)
    tensors = [t for state in base.state.values() for t in state.values()]
    total = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    return total + (optimizer.reference_bytes() if hasattr(optimizer, "reference_bytes") else 0)


def peak_bytes() -> int:
    """The highest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def copy_bandwidth() -> float:
    """Bytes per second that a large copy reads and writes."""
    source, target = torch.ones(2, 1 << 26)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - begin)
    return 2 * source.numel() * 4 / min(times)


def measure(
    make: Callable,
    fused: Callable,
    num_warm: int,
    num_rounds: int,
    new_gradients: Callable[[], None],
) -> dict[str, float]:
    """A row: its best step, fused AdamW's best in the same rounds, state, first step."""
    optimizer, other = make(), fused()
    begin = time.perf_counter()
    optimizer.step()
    first = time.perf_counter() - begin
    for _ in range(num_warm):
        new_gradients()
        optimizer.step()
        other.step()
    own, beside, own_cpu, beside_cpu = [], [], [], []
    before = peak_bytes()
    for _ in range(num_rounds):
        new_gradients()
        for times, cpu, one in ((beside, beside_cpu, other), (own, own_cpu, optimizer)):
            begin, begin_cpu = time.perf_counter(), time.process_time()
            one.step()
            times.append(time.perf_counter() - begin)
            cpu.append(time.process_time() - begin_cpu)
    return {
        "seconds": min(own),
        "fused_seconds": min(beside),
        "cpu_ratio": min(own_cpu) / min(beside_cpu),
        "first_seconds": first,
        "state_bytes": state_bytes(optimizer),
        "peak_growth": peak_bytes() - before,
    }


def first_steps(gradient_rows: int, density: float, alpha: float) -> list[float]:
    """The ratios of OnTIES' first ten steps to fused AdamW's step (the faster of one before and one
    after each).

    Moments are allocated before; the first step includes the search for tau's cut.
    """
    generator = torch.Generator().manual_seed(0)
    shape, names = (2048, 2048), [f"layers.{i}" for i in range(12)]
    named = [(name, nn.Parameter(0.02 * torch.randn(shape, generator=generator))) for name in names]
    tau = {name: (1e-3 * torch.randn(shape, generator=generator)).bfloat16() for name in names}
    parameters = [parameter for _, parameter in named]
    fused = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    own = OnlineMergingAdamW(
        named,
        tau if alpha else None,
        lr=1e-6,
        alpha=alpha,
        consensus="ties",
        density=density,
        implementation="compiled",
    )
    for parameter in parameters:  # a step that only creates the state
        parameter.grad = torch.zeros(shape)
    own.param_groups[0]["lr"] = 0.0
    own.step()
    own.param_groups[0]["lr"] = 1e-6
    ratios = []
    for step in range(11):
        for parameter in parameters:
            parameter.grad = torch.zeros(shape)
            parameter.grad[:gradient_rows] = 1e-3 * torch.randn(
                gradient_rows, shape[1], generator=generator
            )
        seconds = []
        for one in (fused, own, fused) if step else (fused,):
            begin = time.perf_counter()
            one.step()
            seconds.append(time.perf_counter() - begin)
        if step:  # step 0 only creates fused AdamW's state
            ratios.append(seconds[1] / min(seconds[0], seconds[2]))
    return ratios


def show_first_steps(gradient_rows: int, alpha: float) -> None:
    """Print the ratios of the first ten steps as a Markdown table."""
    warm = nn.Parameter(torch.zeros(1 << 20))
    warm.grad = torch.randn(1 << 20)
    options = {"consensus": "ties", "density": 0.5, "implementation": "compiled"}
    OnlineMergingAdamW([("w", warm)], {"w": torch.randn(1 << 20)}, **options).step()
    print(f"| OnTIES, gradients in {gradient_rows} rows | first | second | third to tenth |")
    print("|---|---|---|---|")
    for density in (0.5, 0.1):
        first, second, *others = first_steps(gradient_rows, density, alpha)
        print(
            f"| p = {density}, alpha {alpha:g} | {first:.1f} | {second:.1f} | "
            f"{min(others):.1f} to {max(others):.1f} |",
            flush=True,
        )


def main() -> None:
    """Measure the selected rows and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="68M")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--warm", type=int, default=20, help="steps before the measured ones")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", nargs="*", help="only rows whose name begins with one of these")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--first", action="store_true", help="OnTIES' first ten steps")
    parser.add_argument("--gradient-rows", type=int, default=2048)
    parser.add_argument("--alpha", type=float, default=1e-7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.first:
        show_first_steps(arguments.gradient_rows, arguments.alpha)
        return
    generator = torch.Generator().manual_seed(0)
    named = []
    for name, shape in shapes(arguments.size).items():
        parameter = nn.Parameter(0.02 * torch.randn(shape, generator=generator))
        named.append((name, parameter))
    sets = [[1e-3 * torch.randn(p.shape, generator=generator) for _, p in named] for _ in range(3)]
    turn = itertools.cycle(sets)

    def new_gradients() -> None:
        for (_, parameter), gradient in zip(named, next(turn), strict=True):
            parameter.grad = gradient

    new_gradients()
    tau = {n: (1e-3 * torch.randn(p.shape, generator=generator)).bfloat16() for n, p in named}
    num_elements = sum(parameter.numel() for _, parameter in named)
    bandwidth = copy_bandwidth()
    print(
        f"{num_elements / 1e6:.1f}M float32 parameters, {arguments.threads} threads, torch "
        f"{torch.__version__}, {platform.machine()}, copy {bandwidth / 1e9:.1f} GB/s"
    )
    print("| row | ms a step | x fused AdamW | x its CPU time | state, bytes | first step, s |")
    print("|---|---|---|---|---|---|")
    makers = rows(named, tau)
    results = {}
    for name, make in makers.items():
        if arguments.rows and not any(name.startswith(row) for row in arguments.rows):
            continue
        counts = (arguments.warm, arguments.rounds)
        found = measure(make, makers["AdamW fused"], *counts, new_gradients)
        results[name] = found
        ratio = found["seconds"] / found["fused_seconds"]
        print(
            f"| {name} | {1e3 * found['seconds']:.0f} | {ratio:.2f} | {found['cpu_ratio']:.2f} | "
            f"{found['state_bytes'] / num_elements:.2f} | {found['first_seconds']:.1f} |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
