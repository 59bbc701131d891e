"""Against mergekit 0.1.5: the same where definitions agree, right where mergekit is wrong.

Oracle: mergekit's own results, made by tests/golden/make.py; else closed forms.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from operators.merging import METHODS, merge_tensor
from operators.parameters import REQUIRED
from tests.operators.merging import brute

GOLDEN = Path(__file__).parents[2] / "golden"
CONFIGS = sorted(path.stem for path in (GOLDEN / "configs").glob("*.yaml"))


@pytest.mark.parametrize("fidelity", ["paper", "mergekit"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "passthrough"])
def test_float32_checkpoints_merge_as_by_mergekit(name: str, fidelity: str) -> None:
    """Without equal magnitudes, negative weights or cosines there is nothing to differ on."""
    config = yaml.safe_load((GOLDEN / "configs" / f"{name}.yaml").read_text())
    method, origin = config["merge_method"], config.get("base_model")
    entries = [entry for entry in config["models"] if entry["model"] != origin]
    models = [load_file(GOLDEN / "models" / e["model"] / "model.safetensors") for e in entries]
    base = None if origin is None else load_file(GOLDEN / "models" / origin / "model.safetensors")
    parameters = dict(config.get("parameters", {}))
    for key in entries[0].get("parameters", {}):
        parameters[key] = [entry["parameters"][key] for entry in entries]
    if "fidelity" in METHODS[method].parameters:
        parameters["fidelity"] = fidelity
    for tensor, wanted in load_file(GOLDEN / "merged" / f"{name}.safetensors").items():
        found = merge_tensor(
            method,
            [model[tensor] for model in models],
            None if base is None else base[tensor],
            name=tensor,
            **parameters,
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-6, err_msg=tensor)


@pytest.fixture(scope="module")
def answers():
    """mergekit's answers to the cases below."""
    return json.loads((GOLDEN / "defects.json").read_text())


def test_model_stock_of_models_that_disagree(answers) -> None:
    """cos = -0.4 between each two of three deltas: the base, not six times the mean backwards."""
    deltas = torch.linalg.cholesky(torch.full((3, 3), -0.4) + 1.4 * torch.eye(3))
    base = torch.tensor([1.0, 2.0, 3.0])
    models = [base + delta for delta in deltas]
    assert torch.equal(merge_tensor("model_stock", models, base, name="x"), base)
    theirs = torch.tensor(answers["model_stock_opposed"])
    torch.testing.assert_close(theirs, base - 6 * deltas.mean(dim=0), rtol=1e-4, atol=1e-4)
    found = merge_tensor("model_stock", models, base, name="x", fidelity="mergekit")
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)


def test_model_stock_of_tiny_deltas(answers) -> None:
    """(1, 0) and (1, 1): t = 2 cos / (1 + cos) whatever the scale; mergekit bends it below 1e-6."""
    cosine = 0.5**0.5
    t = 2 * cosine / (1 + cosine)
    models = [torch.tensor([1e-4, 0.0]), torch.tensor([1e-4, 1e-4])]
    found = merge_tensor("model_stock", models, torch.zeros(2), name="x")
    np.testing.assert_allclose(found, [t * 1e-4, t * 0.5e-4], rtol=1e-6)
    bent = 1e-8 / 1e-6
    t_bent = 2 * bent / (1 + bent)
    np.testing.assert_allclose(
        answers["model_stock_tiny"], [t_bent * 1e-4, t_bent * 0.5e-4], rtol=1e-4
    )


def test_ties_with_a_negative_weight(answers) -> None:
    """One model of weight -1, normalised: minus its delta. mergekit divides by -1 as well."""
    base, model = torch.zeros(2), torch.tensor([1.0, -2.0])
    own = {"name": "x", "weight": -1.0}
    found = merge_tensor("ties", [model], base, density=1.0, **own)
    assert found.tolist() == [-1.0, 2.0]
    assert answers["ties_negative_weight"] == [1.0, -2.0]
    found = merge_tensor("ties", [model], base, fidelity="mergekit", **own)
    assert found.tolist() == [1.0, -2.0]


def test_ties_of_deltas_that_cancel(answers) -> None:
    """+1 and -1 elect no sign: 0. mergekit elects plus."""
    models, base = [torch.tensor([1.0]), torch.tensor([-1.0])], torch.zeros(1)
    assert merge_tensor("ties", models, base, name="x", density=1.0).tolist() == [0.0]
    assert answers["ties_cancellation"] == [1.0]
    assert merge_tensor("ties", models, base, name="x", fidelity="mergekit").tolist() == [1.0]


def test_deltas_of_bf16_checkpoints(answers) -> None:
    """mergekit works in the checkpoint's bf16; the error of its merged delta is measured here."""
    case = answers["task_arithmetic_bf16"]
    base = torch.tensor(case["base"]).bfloat16()
    models = [torch.tensor(model).bfloat16() for model in case["models"]]
    exact = sum(0.3 * (model.double() - base.double()) for model in models)
    found = merge_tensor("task_arithmetic", models, base, name="x", weight=0.3)
    ours = (found.double() - base.double() - exact).norm() / exact.norm()
    theirs = (torch.tensor(case["merged"]).double() - base.double() - exact).norm() / exact.norm()
    rounded = (found.bfloat16().double() - base.double() - exact).norm() / exact.norm()
    assert ours < 1e-5
    # One rounding at the end is the least that a bf16 result can have; mergekit has more.
    assert rounded < theirs


def test_dare_rescaled_by_a_norm_is_biased(answers) -> None:
    """Delta (3, 1), density 0.5: over the four masks 1/p gives (3, 1), the L1 norm (7/4, 5/4)."""
    masks = [(1, 1), (1, 0), (0, 1), (0, 0)]
    by_density = np.mean([np.array(mask) * (3, 1) / 0.5 for mask in masks], axis=0)
    assert by_density.tolist() == [3.0, 1.0]
    assert answers["dare_l1_mean"] == [1.75, 1.25]


def test_della_tells_the_ranks_of_a_bf16_row_apart(answers) -> None:
    """4,096 ranks in bf16 are a few hundred different numbers, so that probabilities coincide."""
    row = torch.linspace(0.001, 1, 4096)[None]
    probabilities = brute.magprune_probabilities(row[0].double().numpy(), 0.5, 0.15)
    assert len(set(probabilities)) == 4096
    assert answers["della_bf16_probabilities"] < 1000


def test_mergekits_random_methods_by_distribution() -> None:
    """`fidelity: mergekit` of DARE and DELLA: what is kept has the L1 norm of the whole delta."""
    delta = torch.randn(64, 512, generator=torch.Generator().manual_seed(2)) * 0.01
    base = torch.zeros_like(delta)
    for method, own in (("dare_linear", {}), ("della_linear", {"epsilon": 0.1})):
        found = merge_tensor(
            method, [delta], base, name="x", density=0.4, fidelity="mergekit", **own
        )
        kept = (found != 0).double().mean().item()
        assert abs(kept - 0.4) < 5 * (0.24 / delta.numel()) ** 0.5
        assert found.abs().sum().item() == pytest.approx(delta.abs().sum().item(), rel=1e-5)


def test_every_default_that_fidelity_changes_is_one_of_the_documented() -> None:
    changed = {
        (key, parameter.mergekit)
        for entry in METHODS.values()
        for key, parameter in entry.parameters.items()
        if parameter.mergekit is not None and "fidelity" in entry.parameters
    }
    assert changed == {("density", 1.0), ("rescale", "l1"), ("ties", "index")}
    assert METHODS["ties"].parameters["density"].default == REQUIRED
