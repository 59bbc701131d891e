"""The same masks, signs and weights under every sharding, with real processes over gloo.

Gradients are injected, so only the optimizers are tested: rows over 2, 3 and 4 ranks (FSDP2's
DTensors), and flat partitions over the same ranks (as ZeRO cuts them).

Oracle: the same steps in one process.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from operators.consensus import CONSENSUS
from operators.kernels.optimizer import CompiledOptimizer
from operators.optim import (
    ExponentialMovingAverage,
    OnlineMerging,
    OnlineMergingAdamW,
    ShardLayout,
)
from operators.optim.ema import take_average
from operators.optim.fast import FastPath
from operators.sparsify import SPARSIFIERS

SHAPES = {"weight": (7, 5), "norm": (11,), "embed": (33, 3), "few_rows": (2, 3), "scalar": (1,)}
NUM_STEPS = 4
ULP = 2.0**-23

CASES = {
    "dare": {"density": 0.4, "alpha": 0.1},
    "dare step-K": {"density": 0.4, "alpha": 0.1, "merge_every": 3},
    "dare stochastic": {"density": 0.4, "alpha": 1e-6, "rounding": "stochastic"},
    "ties": {"density": 0.3, "alpha": 0.1, "consensus": "ties"},
    "ties step-K": {"density": 0.3, "alpha": 0.1, "consensus": "ties", "merge_every": 3},
    "gradient dropout": {"density": 1.0, "alpha": 0.0, "gradient_density": 0.5},
    "average": {"density": 0.4, "alpha": 0.1, "average": "export"},
    "average pull": {"density": 0.4, "alpha": 0.1, "average": "pull"},
    "fast dare": {"density": 0.4, "alpha": 0.1, "fast": True},
    "fast ties": {"density": 0.3, "alpha": 0.1, "consensus": "ties", "fast": True},
}
WRAPPED = {"dare": CASES["dare"], "ties step-K": CASES["ties step-K"]}
OFFERED = [name for name, entry in CONSENSUS.items() if entry.needs == "element"]
PAIRS = {
    f"{sparsifier} {consensus}": {
        "sparsifier": sparsifier,
        "consensus": consensus,
        "density": 0.4 if "density" in entry.parameters else 1.0,
        "alpha": 0.1,
    }
    for sparsifier, entry in SPARSIFIERS.items()
    for consensus in OFFERED
}
ROW_PAIRS = {name for name in PAIRS if SPARSIFIERS[name.split()[0]].needs == "row"}
VECTORS = ("norm", "scalar")  # one row each, which a sharding cuts


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in SHAPES.items()}


def tau() -> dict[str, Tensor]:
    """Few distinct magnitudes, so that ties have to be decided alike."""
    return {name: (4 * tensor).round() / 4 for name, tensor in values(99).items()}


def make(parameters: dict[str, nn.Parameter], options, *, wrap: bool = False):
    if wrap:
        base = torch.optim.AdamW(parameters.items(), lr=1e-2, eps=0.5, foreach=False)
        return OnlineMerging(base, tau(), **options)
    options = dict(options)
    fast, average = options.pop("fast", False), options.pop("average", None)
    groups = [{"params": list(parameters.items())}]
    if options in PAIRS.values() and SPARSIFIERS[options["sparsifier"]].needs == "row":
        groups = [
            {"params": [(n, p) for n, p in parameters.items() if n not in VECTORS]},
            {"params": [(n, p) for n, p in parameters.items() if n in VECTORS], "merge": False},
        ]
    optimizer = OnlineMergingAdamW(
        groups, tau(), lr=1e-2, eps=0.5, implementation="reference", **options
    )
    if fast:
        optimizer._path, optimizer._fast = "test", FastPath(CompiledOptimizer(), optimizer._merger)
    if average is not None:
        ExponentialMovingAverage(optimizer, 0.1, average)
    return optimizer


def whole_run(options, *, wrap: bool = False) -> dict[str, Tensor]:
    """One process that has everything."""
    parameters = {name: nn.Parameter(tensor) for name, tensor in values(0).items()}
    optimizer = make(parameters, options, wrap=wrap)
    for step in range(NUM_STEPS):
        for name, gradient in values(1000 + step).items():
            parameters[name].grad = gradient
        optimizer.step()
    optimizer.merge_pending()
    take_average(optimizer)
    return {name: parameter.detach() for name, parameter in parameters.items()}


def sharded_run(mesh: DeviceMesh, options, *, wrap: bool = False) -> dict[str, Tensor]:
    """Parameters as DTensors, cut by rows; two ranks may own what a third has nothing of."""

    def cut(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0)])

    parameters = {name: nn.Parameter(cut(tensor)) for name, tensor in values(0).items()}
    optimizer = make(parameters, options, wrap=wrap)
    for step in range(NUM_STEPS):
        for name, gradient in values(1000 + step).items():
            parameters[name].grad = cut(gradient)
        optimizer.step()
    optimizer.merge_pending()
    take_average(optimizer)
    return {name: parameter.detach().full_tensor() for name, parameter in parameters.items()}


def flat_layouts(mesh: DeviceMesh) -> tuple[list[ShardLayout], int]:
    """This rank's part of one flat tensor that all ranks share, cut anywhere: its ranges, size."""
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    share = -(-total // mesh.size())
    low, layouts, offset = share * mesh.get_local_rank(), [], 0
    for name, shape in SHAPES.items():
        count = torch.Size(shape).numel()
        first, last = max(offset, low), min(offset + count, low + share)
        start = min(max(first - offset, 0), count)
        layout = ShardLayout(
            name, shape, start, max(0, last - first), mesh.get_group(), max(0, first - low)
        )
        layouts.append(layout if layout.count else ShardLayout(name, shape, 0, 0, mesh.get_group()))
        offset += count
    return layouts, share


def flat_run(mesh: DeviceMesh, options) -> dict[str, Tensor]:
    """One flat partition a rank, padded with what must never be looked at."""
    layouts, size = flat_layouts(mesh)

    def cut(tensors: dict[str, Tensor]) -> Tensor:
        flat = torch.full((size,), torch.nan)
        for layout in layouts:
            part = tensors[layout.name].view(-1)[layout.start : layout.start + layout.count]
            flat[layout.offset : layout.offset + layout.count] = part
        return flat

    optimizer = make({n: nn.Parameter(t) for n, t in values(0).items()}, options)
    flat = nn.Parameter(cut(values(0)))
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.bind({flat: layouts})
    for step in range(NUM_STEPS):
        flat.grad = cut(values(1000 + step))
        optimizer.step()
    optimizer.merge_pending()
    take_average(optimizer)
    result = {name: torch.zeros(shape).view(-1) for name, shape in SHAPES.items()}
    for layout in layouts:
        part = flat.detach()[layout.offset : layout.offset + layout.count]
        result[layout.name][layout.start : layout.start + layout.count] = part
    for name, shape in SHAPES.items():
        dist.all_reduce(result[name], group=mesh.get_group())
        result[name] = result[name].view(shape)
    return result


def skipped_on_all(mesh: DeviceMesh) -> bool:
    """Whether a NaN in the last row, which one rank owns, leaves every rank's weights alone."""
    parameters = {"embed": nn.Parameter(distribute_tensor(values(0)["embed"], mesh, [Shard(0)]))}
    before = parameters["embed"].detach().full_tensor().clone()
    gradient = values(1)["embed"]
    gradient[-1] = torch.nan
    parameters["embed"].grad = distribute_tensor(gradient, mesh, [Shard(0)])
    make(parameters, {**CASES["ties"], "nonfinite": "skip"}).step()
    optimizer = make(parameters, CASES["dare"])
    try:
        optimizer.step()
    except ValueError as error:
        own = bool(parameters["embed"].grad.to_local().isnan().any())
        right = "of parameter 'embed'" if own else "on another rank"
        return right in str(error) and torch.equal(parameters["embed"].full_tensor(), before)
    return False


def refusals(mesh: DeviceMesh) -> list[str]:
    """Messages for what sharding forbids."""
    messages = []
    rows = nn.Parameter(distribute_tensor(values(0)["weight"], mesh, [Shard(0)]))
    columns = nn.Parameter(distribute_tensor(values(0)["weight"], mesh, [Shard(1)]))
    vector = nn.Parameter(distribute_tensor(values(0)["norm"], mesh, [Shard(0)]))
    for attempt in (
        lambda: OnlineMerging(torch.optim.Muon([("weight", rows)]), tau()),
        lambda: OnlineMergingAdamW([("weight", columns)], tau()),
        lambda: OnlineMergingAdamW([("norm", vector)], tau(), **PAIRS["magprune sum"]),
    ):
        try:
            attempt()
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


def hybrid_run(options) -> dict[str, Tensor]:
    """Rows over two ranks, replicated over two such pairs (hybrid FSDP)."""
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("replicate", "shard"))
    parameters = {
        name: nn.Parameter(distribute_tensor(tensor, mesh, [Replicate(), Shard(0)]))
        for name, tensor in values(0).items()
    }
    optimizer = make(parameters, options)
    for step in range(NUM_STEPS):
        for name, gradient in values(1000 + step).items():
            parameters[name].grad = distribute_tensor(gradient, mesh, [Replicate(), Shard(0)])
        optimizer.step()
    return {
        name: parameter.detach().full_tensor()
        for name, parameter in parameters.items()
        if isinstance(parameter.data, DTensor)
    }


def work(rank: int, folder: str) -> None:
    """Everything that one of four ranks does; rank 0 writes the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    results = {"hybrid": hybrid_run(CASES["ties"])}
    for num_ranks in (1, 2, 3, 4):
        mesh = DeviceMesh("cpu", list(range(num_ranks)))
        if rank >= num_ranks:
            continue
        for name, options in CASES.items():
            results[f"rows/{num_ranks}/{name}"] = sharded_run(mesh, options)
            results[f"flat/{num_ranks}/{name}"] = flat_run(mesh, options)
        for name, options in PAIRS.items():
            results[f"rows/{num_ranks}/{name}"] = sharded_run(mesh, options)
            if name not in ROW_PAIRS:
                results[f"flat/{num_ranks}/{name}"] = flat_run(mesh, options)
        for name, options in WRAPPED.items():
            results[f"wrapped/{num_ranks}/{name}"] = sharded_run(mesh, options, wrap=True)
        assert skipped_on_all(mesh), f"rank {rank} of {num_ranks}"
        if num_ranks == 2:
            muon, columns, rows = refusals(mesh)
            assert muon.startswith("base_optimizer: found Muon on the sharded parameter 'weight'")
            assert columns.startswith("parameter 'weight': found placement (Shard(dim=1),)")
            assert rows.startswith("sparsifier: found 'magprune', which needs whole rows, on par")
            assert "'norm', of which this rank has the elements [" in rows
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, Tensor]]:
    """What four real processes found, started once."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=4)
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", CASES)
def test_shardings_give_what_one_process_gives(results, num_ranks: int, name: str) -> None:
    expected = whole_run(CASES[name])
    for kind in ("rows", "flat"):
        assert_equal_to_an_ulp(results[f"{kind}/{num_ranks}/{name}"], expected)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("name", PAIRS)
def test_so_does_every_pair_of_the_tables(results, num_ranks: int, name: str) -> None:
    expected = whole_run(PAIRS[name])
    kinds = ("rows",) if name in ROW_PAIRS else ("rows", "flat")
    for kind in kinds:
        assert_equal_to_an_ulp(results[f"{kind}/{num_ranks}/{name}"], expected)


def test_a_flat_partition_that_cuts_a_row_is_refused_where_rows_are_needed() -> None:
    parameter, flat = nn.Parameter(torch.zeros(7, 5)), nn.Parameter(torch.zeros(12))
    optimizer = OnlineMergingAdamW([("weight", parameter)], tau(), **PAIRS["magprune sum"])
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.bind({flat: [ShardLayout("weight", (7, 5), 0, 12)]})
    flat.grad = torch.ones(12)
    with pytest.raises(ValueError, match=r"^sparsifier: found 'magprune', which needs whole rows"):
        optimizer.step()


def test_the_named_pairs_are_pairs_of_the_tables() -> None:
    """To the bit: bernoulli with sum is OnDARE, top with sign is OnTIES."""
    for name, pair in (("dare", "bernoulli sum"), ("ties", "top sign")):
        options = {"density": 0.4, "alpha": 0.1, "consensus": name}
        found = whole_run(PAIRS[pair])
        for parameter, tensor in whole_run(options).items():
            assert torch.equal(found[parameter], tensor)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("name", WRAPPED)
def test_so_does_the_wrapper(results, num_ranks: int, name: str) -> None:
    expected = whole_run(WRAPPED[name], wrap=True)
    assert_equal_to_an_ulp(results[f"wrapped/{num_ranks}/{name}"], expected)


def test_so_does_hybrid_sharding(results) -> None:
    assert_equal_to_an_ulp(results["hybrid"], whole_run(CASES["ties"]))


def assert_equal_to_an_ulp(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert ((found[name] - tensor).abs() <= 2 * ULP * tensor.abs() + 1e-12).all(), name
