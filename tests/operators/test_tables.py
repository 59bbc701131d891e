"""A sparsifier from outside, in one function and one line: used offline and online.

Oracle: the same merges and steps, written out by hand in float64.
"""

import pytest
import torch
from torch import Tensor, nn

from operators.consensus import CONSENSUS
from operators.merging import merge_tensor
from operators.optim import OnlineMergingAdamW
from operators.parameters import Parameter
from operators.sparsify import SPARSIFIERS, Sparsifier


def clip(x: Tensor, at, parameters) -> Tensor:
    """Each element, but no larger than a bound."""
    return x.clamp(-parameters["bound"], parameters["bound"])


@pytest.fixture(autouse=True)
def clipped(monkeypatch) -> None:
    entry = Sparsifier(clip, {"bound": Parameter("largest magnitude", 0.5, 0)})
    monkeypatch.setitem(SPARSIFIERS, "clip", entry)


def test_it_merges_offline() -> None:
    base, models = torch.zeros(4, 5), [torch.randn(4, 5), torch.randn(4, 5)]
    for consensus, expected in (
        ("sum", sum(model.double().clamp(-0.2, 0.2) for model in models)),
        ("sign", None),
    ):
        found = merge_tensor(
            "composed", models, base, name="x", sparsifier="clip", consensus=consensus, bound=0.2
        )
        if expected is not None:
            torch.testing.assert_close(found.double(), expected)
        assert found.abs().max() <= 0.4 + 1e-6
    with pytest.raises(ValueError, match=r"^density: unknown parameter; allowed: weight, bound, "):
        merge_tensor(
            "composed", models, base, name="x", sparsifier="clip", consensus="sum", density=0.5
        )


def test_it_merges_online() -> None:
    parameter, tau = nn.Parameter(torch.zeros(6)), torch.linspace(-1, 1, 6).bfloat16().float()
    optimizer = OnlineMergingAdamW(
        [("w", parameter)], {"w": tau}, lr=1.0, eps=0.5, weight_decay=0.0, alpha=0.25,
        sparsifier="clip", consensus="sum", sparsifier_parameters={"bound": 0.3},
    )  # fmt: skip
    parameter.grad = torch.linspace(-2, 2, 6)
    optimizer.step()
    gradient = torch.linspace(-2, 2, 6).double()
    update = -gradient / (gradient.abs() + 0.5)
    expected = 0.75 * update.clamp(-0.3, 0.3) + 0.25 * tau.double().clamp(-0.3, 0.3)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert optimizer.path == "eager"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sparsifier": "clap", "consensus": "sum"},
            "sparsifier: found 'clap'; allowed: 'identity', 'top', 'bernoulli', 'magprune', "
            "'breadcrumbs', 'clip'",
        ),
        (
            {"sparsifier": "top", "consensus": "mixup"},
            "consensus: found 'mixup', which draws once a merge; allowed: 'sum', 'sign_elect', "
            "'sign'",
        ),
        ({"consensus": "sum"}, "consensus: found 'sum'; allowed: 'dare', 'ties'"),
        (
            {"sparsifier": "identity", "consensus": "sum", "density": 0.5},
            "density: has no effect with sparsifier 'identity'; allowed: 1",
        ),
        (
            {"sparsifier": "top", "consensus": "sum", "rescale": True},
            "rescale: has no effect with sparsifier 'top'; allowed: false",
        ),
        (
            {"sparsifier": "top", "consensus": "sum", "sparsifier_parameters": {"scope": "model"}},
            "scope: found 'model'; allowed in an optimizer: tensor, row",
        ),
        (
            {"sparsifier": "top", "consensus": "sum", "sparsifier_parameters": {"gamma": 0.1}},
            "gamma: unknown parameter; allowed: density, scope, ties, rescale",
        ),
        (
            {"sparsifier": "magprune", "consensus": "sum", "density": 0.95},
            "epsilon: found 0.15 with density 0.95; allowed: density - epsilon above 0 and "
            "density + epsilon below 1",
        ),
    ],
)
def test_what_no_table_has_is_an_error_of_one_line(options, message: str) -> None:
    with pytest.raises(ValueError) as error:
        OnlineMergingAdamW([("w", nn.Parameter(torch.zeros(4)))], None, alpha=0.0, **options)
    assert str(error.value) == message


def test_every_entry_says_what_it_needs() -> None:
    for name, entry in SPARSIFIERS.items():
        assert entry.needs in ("element", "threshold", "row"), name
        assert (entry.counts is not None) == (entry.needs == "threshold"), name
    assert {name for name, entry in CONSENSUS.items() if entry.needs == "merge"} == {"mixup"}


def test_the_first_of_equal_updates_stay_where_ties_go_by_index() -> None:
    parameter = nn.Parameter(torch.zeros(10))
    optimizer = OnlineMergingAdamW(
        [("w", parameter)], None, alpha=0.0, density=0.5, weight_decay=0.0,
        sparsifier="top", consensus="sum", sparsifier_parameters={"ties": "index"},
    )  # fmt: skip
    parameter.grad = torch.ones(10)
    optimizer.step()
    assert (parameter.detach() != 0).tolist() == [True] * 5 + [False] * 5
