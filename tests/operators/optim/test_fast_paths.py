"""The compiled and the Triton path.

Oracle: the eager path: equal masks and cuts, and weights up to rounding.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from operators.counter_random import counter_key, counter_words, keep_mask
from operators.kernels import CHUNK
from operators.kernels import optimizer as optimizer_passes
from operators.kernels.compiler import CompilerError, built_once
from operators.kernels.optimizer import (
    Asked,
    CompiledOptimizer,
    Draws,
    StepRange,
)
from operators.optim import OnlineMergingAdamW
from operators.optim.fast import FastPath
from operators.selection import begin_search
from tests.operators.optim.helpers import make_parameters, make_tau, merging, set_gradients

CASES = {
    "dare": {"density": 0.4, "alpha": 0.1},
    "dropout": {"density": 0.4, "alpha": 0.0},
    "dare, all kept": {"density": 1.0, "alpha": 0.1},
    "dare step-K": {"density": 0.4, "alpha": 0.1, "merge_every": 3},
    "ties": {"density": 0.3, "alpha": 0.1, "consensus": "ties"},
    "ties, dense tau": {"density": 0.7, "alpha": 0.1, "consensus": "ties"},
    "ties without tau": {"density": 0.3, "alpha": 0.0, "consensus": "ties"},
    "ties step-K": {"density": 0.3, "alpha": 0.1, "consensus": "ties", "merge_every": 3},
}


def steps(kernels, options, num_steps: int = 6, shapes=None):
    """Parameters after steps on a path; None for the reference."""
    parameters = make_parameters()
    optimizer = merging(eps=0.5, implementation="eager", **options)(parameters)
    if kernels is not None:
        optimizer._path, optimizer._fast = "test", FastPath(kernels, optimizer._merger)
    for step in range(num_steps):
        set_gradients(parameters, step)
        optimizer.step()
    return parameters, optimizer


def assert_close(found, expected, *, apart: int = 0) -> None:
    """Equal up to rounding, but for so many elements of a parameter: paths round differently, so
    two magnitudes at a cut can change places.
    """
    for name, parameter in expected.items():
        off = ~torch.isclose(found[name], parameter, rtol=1e-6, atol=1e-7)
        assert int(off.sum()) <= apart, name


@pytest.fixture(scope="module")
def by_triton(tmp_path_factory) -> dict:
    """What Triton's kernels give in its interpreter, which has to be chosen before the import."""
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    subprocess.run(
        [sys.executable, "-m", "tests.operators.optim.triton_cases", str(path)],
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).resolve().parents[3],
    )
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_the_fused_passes_move_weights_as_the_reference_does(by_triton, name: str) -> None:
    expected, reference = steps(None, CASES[name])
    found, fast = steps(CompiledOptimizer(), CASES[name])
    assert_close(found, expected)
    assert fast.reference_bytes() == reference.reference_bytes()
    assert_close(by_triton[name], expected, apart=2 if name.startswith("ties") else 0)


def test_moments_have_the_reference_paths_bits() -> None:
    moments = []
    for implementation in ("eager", "compiled"):
        generator = torch.Generator().manual_seed(5)
        parameter = nn.Parameter(torch.randn(10_001, generator=generator))
        optimizer = OnlineMergingAdamW(
            [("w", parameter)], None, alpha=0.0, density=0.5, implementation=implementation
        )
        for _ in range(20):
            parameter.grad = torch.randn(10_001, generator=generator)
            optimizer.step()
        moments.append(optimizer.state[parameter])
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(moments[0][name], moments[1][name])


def test_the_reference_is_followed_over_many_steps_in_float64() -> None:
    """Without masks, 200 steps of each path stay within 1e-6 of float64."""
    options = {"density": 1.0, "alpha": 1e-4, "weight_decay": 0.0}
    doubles = {n: nn.Parameter(p.detach().double()) for n, p in make_parameters().items()}
    optimizer = OnlineMergingAdamW(doubles.items(), make_tau(), lr=1e-2, eps=0.5, **options)
    for step in range(200):
        set_gradients(doubles, step)
        optimizer.step()
    for kernels in (None, CompiledOptimizer()):
        found, _ = steps(kernels, options, 200)
        for name, parameter in found.items():
            error = (parameter.double() - doubles[name]).norm() / doubles[name].norm()
            assert error < 1e-6


def masks(kernels) -> list[torch.Tensor]:
    """Where a tau of 1 arrives, from global indices around multiples of 2^16, 2^31 and 2^32."""
    found = []
    for start, key in MASKS:
        count = min(1000, (1 << 32) - start % (1 << 32))
        theta, gradient, mean, square = torch.zeros(4, count)
        numbers = torch.tensor([0.1, 0.999, 0.001, 1.0, -1e-3, 1.0, 1.0, 0.0, 1.0, 0.0])
        kernels.dare_step(
            StepRange(start, theta, gradient, mean, square, numbers),
            torch.ones(count, dtype=torch.bfloat16),
            Draws((0, 0), key, 0.3),
            counting=False,
        )
        found.append(theta)
    return found


MASKS = [
    (start, counter_key(7, "w", 1, 3))
    for start in (0, (1 << 16) - 5, (1 << 31) - 3, (1 << 32) - 7, 5 * (1 << 32) + 11)
]


def test_masks_are_the_pinned_ones_at_any_index(by_triton) -> None:
    for found in (masks(CompiledOptimizer()), by_triton["masks"]):
        for (start, key), theta in zip(MASKS, found, strict=True):
            assert torch.equal(theta, keep_mask(key, 0.3, start, theta.numel()).float())


@pytest.fixture
def num_threads_kept():
    """torch's number of threads as it was, after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("num_threads_kept")
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_bits_do_not_depend_on_chunks_and_threads(density: float, monkeypatch) -> None:
    """tau is kept sparse, and dense."""
    size, results = 3 * CHUNK + 12_345, []
    for num_threads, chunk in ((1, 4 * CHUNK), (2, CHUNK), (3, CHUNK), (2, 2 * CHUNK)):
        torch.set_num_threads(num_threads)
        monkeypatch.setattr(CompiledOptimizer, "chunk", chunk)
        generator = torch.Generator().manual_seed(3)
        parameter = nn.Parameter(torch.randn(size, generator=generator))
        tau = {"w": torch.randn(size, generator=generator)}
        optimizer = OnlineMergingAdamW(
            [("w", parameter)], tau, density=density, alpha=0.1, implementation="compiled"
        )
        other = OnlineMergingAdamW(
            [("w", parameter)],
            tau,
            consensus="ties",
            density=density,
            alpha=0.1,
            implementation="compiled",
        )
        for _ in range(4):
            parameter.grad = torch.randn(size, generator=generator)
            optimizer.step()
            other.step()
        results.append(parameter.detach().clone())
    for result in results[1:]:
        assert torch.equal(results[0], result)


def updates(kernels) -> list[torch.Tensor]:
    """The update as the first pass sees it, and as it is made again of its moments."""
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(5000, generator=generator)
    mean, square = torch.zeros(2, 5000)
    numbers = torch.tensor([0.1, 0.999, 0.001, 1e-8, -3e-4, 0.0316, 1.0, 1.0, 0.0, 0.0])
    part = StepRange(0, torch.zeros(5000), gradient, mean, square, numbers)
    asked = Asked(begin_search(2500, 5000), (1, 2), 5000)
    first = kernels.advance(part, asked)
    again = kernels.look(part, asked)
    assert torch.equal(torch.from_numpy(again.kept), torch.from_numpy(first.kept))
    assert first.inside.tolist() == again.inside.tolist()
    assert (first.above, first.inside.sum()) == (0, 5000)
    return [mean, square, torch.from_numpy(first.kept), kernels.updates(part)]


def test_an_update_has_the_same_bits_in_every_pass(by_triton) -> None:
    """A cut that one pass finds is applied by another: keys hold magnitudes above words."""
    for mean, square, keys, second in (updates(CompiledOptimizer()), by_triton["updates"]):
        keys = keys + (1 << 32)  # the bracket began at the magnitude 1
        assert torch.equal(keys >> 32, second.abs().view(torch.int32).long())
        words = counter_words((1, 2), 0, 5000)
        assert torch.equal(keys & 0xFFFFFFFF, 0xFFFFFFFF - words)
        by_hand = mean.double() * -3e-4 / (square.double().sqrt() / 0.0316 + 1e-8)
        assert torch.allclose(second.double(), by_hand, rtol=1e-6)


def test_a_guess_that_misses_is_made_good() -> None:
    """Gradients that grow and shrink a thousandfold move the cut out of every bracket."""
    results = []
    for kernels in (None, CompiledOptimizer()):
        parameter = nn.Parameter(torch.zeros(5000))
        optimizer = OnlineMergingAdamW(
            [("w", parameter)],
            {"w": torch.zeros(5000)},
            lr=1.0,
            eps=1.0,
            weight_decay=0.0,
            consensus="ties",
            density=0.1,
            alpha=0.0,
            implementation="eager",
        )
        if kernels is not None:
            optimizer._path, optimizer._fast = "test", FastPath(kernels, optimizer._merger)
        for step, scale in enumerate([1.0, 1e3, 1e-3, 1.0, 1.0, 1.0]):
            generator = torch.Generator().manual_seed(step)
            before = parameter.detach().clone()
            parameter.grad = scale * torch.randn(5000, generator=generator)
            optimizer.step()
            assert int((parameter.detach() != before).sum()) == 500
        results.append(parameter.detach())
    # Square roots round differently, so two magnitudes at a cut can change places.
    assert int((~torch.isclose(*results, rtol=1e-5, atol=1e-6)).sum()) <= 2


def test_equal_magnitudes_are_decided_as_on_the_reference_path() -> None:
    tau = {"w": torch.ones(1000)}
    results = []
    for kernels in (None, CompiledOptimizer()):
        parameter = nn.Parameter(torch.zeros(1000))
        optimizer = OnlineMergingAdamW(
            [("w", parameter)],
            tau,
            weight_decay=0.0,
            consensus="ties",
            density=0.3,
            alpha=0.5,
            implementation="eager",
        )
        if kernels is not None:
            optimizer._path, optimizer._fast = "test", FastPath(kernels, optimizer._merger)
        for _ in range(3):
            parameter.grad = torch.ones(1000)
            optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


def test_groups_and_excluded_parameters_go_fast_too() -> None:
    tau = make_tau()
    del tau["embed"]
    results = []
    for kernels in (None, CompiledOptimizer()):
        parameters = make_parameters()
        named = list(parameters.items())
        optimizer = OnlineMergingAdamW(
            [
                {"params": named[:1], "consensus": "ties", "density": 0.2, "alpha": 0.1},
                {"params": named[1:2], "merge": False},
                {"params": named[2:], "density": 0.5, "alpha": 0.1},
            ],
            tau,
            eps=0.5,
            missing_delta="exclude",
            implementation="eager",
        )
        if kernels is not None:
            optimizer._path, optimizer._fast = "test", FastPath(kernels, optimizer._merger)
        for step in range(4):
            set_gradients(parameters, step)
            optimizer.step()
        results.append(parameters)
    assert_close(results[1], results[0])


TINY = {"density": 0.4, "alpha": 1e-8, "lr": 1e-7}


def test_merges_without_effect_are_counted_on_every_path(by_triton) -> None:
    shares = [steps(k, TINY, 1)[1].unchanged_share() for k in (None, CompiledOptimizer())]
    assert 0 < shares[0] < 1
    assert [*shares, by_triton["unchanged"]] == pytest.approx([shares[0]] * 3, abs=0.03)


def test_the_path_is_chosen_by_size_said_once_and_kept(monkeypatch, caplog) -> None:
    parameters = make_parameters()
    optimizer = merging(alpha=0.1)(parameters)
    assert optimizer.path is None
    with caplog.at_level("INFO"):
        for step in range(2):
            set_gradients(parameters, step)
            optimizer.step()
    assert [r.message for r in caplog.records] == [
        "online merging: eager path, 145 float32 elements are too few to compile for"
    ]
    assert optimizer.path == "eager"
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["path"] == "eager"
    # A resumed run keeps its path, whatever `auto` would take there.
    monkeypatch.setattr("operators.kernels.choice.WORTH_COMPILING", 1)
    resumed = merging(alpha=0.1)(parameters)
    resumed.load_state_dict(saved)
    set_gradients(parameters, 2)
    resumed.step()
    assert resumed.path == "eager"


def test_a_state_from_a_machine_with_another_path_goes_on() -> None:
    parameters = make_parameters()
    optimizer = merging(alpha=0.1)(parameters)
    set_gradients(parameters, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["path"] = "triton"
    resumed = merging(alpha=0.1)(parameters)
    resumed.load_state_dict(saved)
    set_gradients(parameters, 1)
    resumed.step()
    assert resumed.path == "eager"


def build_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the library that was built."""
    build = optimizer_passes._library.__wrapped__
    monkeypatch.setattr(optimizer_passes, "_library", built_once(build))


def test_auto_does_without_a_compiler_and_compiled_says_what_is_missing(monkeypatch) -> None:
    monkeypatch.setattr("operators.kernels.choice.WORTH_COMPILING", 1)
    monkeypatch.setattr("operators.kernels.compiler.COMPILERS", ("no-such-compiler",))
    monkeypatch.setattr(
        optimizer_passes, "_library", built_once(optimizer_passes._library.__wrapped__)
    )
    parameters = make_parameters()
    set_gradients(parameters, 0)
    optimizer = merging(alpha=0.1)(parameters)
    optimizer.step()
    assert optimizer.path == "eager"
    optimizer = merging(alpha=0.1, implementation="compiled")(parameters)
    with pytest.raises(ValueError, match=r"'compiled' does not work here \(no C compiler found"):
        optimizer.step()
    with pytest.raises(ValueError, match="implementation: found 'fused'; allowed: 'auto', 'eag"):
        merging(implementation="fused")(parameters)


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'cannot find math.h' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr("operators.kernels.compiler.COMPILERS", (str(compiler),))
    monkeypatch.setattr(
        optimizer_passes, "_library", built_once(optimizer_passes._library.__wrapped__)
    )
    with pytest.raises(CompilerError, match=r"^cannot find math\.h$"):
        CompiledOptimizer()


def test_triton_needs_a_gpu() -> None:
    parameters = make_parameters()
    set_gradients(parameters, 0)
    with pytest.raises(ValueError, match="'triton' needs a GPU, found parameters on cpu"):
        merging(implementation="triton")(parameters).step()


@pytest.mark.parametrize("consensus", ["dare", "ties"])
@pytest.mark.parametrize("placement", ["device", "source"])
def test_strided_gradients_and_taus_are_read_as_they_are(consensus: str, placement: str) -> None:
    """Beside the same numbers in a row."""
    generator = torch.Generator().manual_seed(5)
    gradient, tau = torch.randn(2, 6000, generator=generator)
    wide = torch.randn(1, generator=generator).expand(3000)
    for own in (tau[::2], wide):
        results = []
        for strided in (True, False):
            parameter = nn.Parameter(torch.zeros(3000))
            optimizer = OnlineMergingAdamW(
                [("w", parameter)],
                {"w": own if strided else own.clone()},
                consensus=consensus,
                density=0.3,
                alpha=0.1,
                delta_placement=placement,
                delta_dtype=torch.float32,
                implementation="compiled",
            )
            parameter.grad = gradient[::2] if strided else gradient[::2].clone()
            optimizer.step()
            results.append(parameter.detach())
        assert torch.equal(*results)
