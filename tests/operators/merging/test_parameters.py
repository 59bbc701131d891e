"""Parameters: one clear line for everything that is not allowed.

Oracle: messages and values written by hand.
"""

import re

import pytest
import torch

from operators.merging import METHODS, merge_tensor

BASE, ONE = torch.zeros(4), [torch.ones(4)]
TWO, THREE = ONE * 2, ONE * 3
DENSITY = "allowed: above 0 and at most 1"

CASES = [
    ("lineer", TWO, None, {}, f"method: found 'lineer'; allowed: {', '.join(METHODS)}"),
    ("linear", TWO, BASE, {}, "base_model: has no effect with this method"),
    ("ties", TWO, None, {"density": 0.5}, "base_model: required, not given"),
    ("ties", TWO, BASE, {}, f"density: required, not given; {DENSITY}"),
    ("ties", TWO, BASE, {"density": 0}, f"density: found 0; {DENSITY}"),
    ("ties", TWO, BASE, {"density": 1.1}, f"density: found 1.1; {DENSITY}"),
    ("ties", TWO, BASE, {"density": True}, f"density: found True; {DENSITY}"),
    (
        "ties",
        TWO,
        BASE,
        {"density": [0.5]},
        "density: found 1 values; allowed: one for each model",
    ),
    (
        "ties",
        TWO,
        BASE,
        {"density": [0.5, 0.4], "scope": "model"},
        "density: found [0.5, 0.4] with scope: model; allowed: one density for all models",
    ),
    (
        "ties",
        TWO,
        BASE,
        {"density": 0.5, "scope": "layer"},
        "scope: found 'layer'; allowed: tensor, row, model",
    ),
    (
        "ties",
        TWO,
        BASE,
        {"density": 0.5, "lambda": [1, 2]},
        "lambda: found a list; allowed: one value for all models",
    ),
    (
        "ties",
        TWO,
        BASE,
        {"density": 0.5, "weight": float("nan")},
        "weight: found nan; allowed: a finite number",
    ),
    (
        "ties",
        TWO,
        BASE,
        {"density": 0.5, "normalize": 1},
        "normalize: found 1; allowed: true, false",
    ),
    (
        "linear",
        TWO,
        None,
        {"density": 0.5},
        "density: unknown parameter; allowed: weight, normalize",
    ),
    (
        "linear",
        TWO,
        None,
        {"weight": [1, -1]},
        "weight: the weights sum to 0; cannot normalize by it",
    ),
    (
        "task_arithmetic",
        TWO,
        BASE,
        {"weight": [1, -1], "normalize": True},
        "weight: the weights sum to 0; cannot normalize by it",
    ),
    (
        "rewarded_soup",
        TWO,
        None,
        {"weight": [0.5, 0.6]},
        "weight: found weights that sum to 1.1; allowed: a sum of 1",
    ),
    (
        "rewarded_soup",
        TWO,
        None,
        {"weight": [1.5, -0.5]},
        "weight: found -0.5; allowed: at least 0",
    ),
    ("rewarded_soup", TWO, None, {}, "weight: required, not given; allowed: at least 0"),
    (
        "della",
        TWO,
        BASE,
        {"density": 0.1},
        "epsilon: found 0.15 with density 0.1; "
        "allowed: density - epsilon above 0 and density + epsilon below 1",
    ),
    (
        "della",
        TWO,
        BASE,
        {"density": [1.0, 0.9], "epsilon": 0.1},
        "epsilon: found 0.1 with density 0.9; "
        "allowed: density - epsilon above 0 and density + epsilon below 1",
    ),
    (
        "breadcrumbs",
        TWO,
        BASE,
        {"density": 0.5, "gamma": -0.1},
        "gamma: found -0.1; allowed: at least 0 and at most 1",
    ),
    ("model_stock", ONE, BASE, {}, "models: found 1; allowed: 2 or more"),
    (
        "model_stock",
        TWO,
        BASE,
        {"filter_wise": True, "scope": "tensor"},
        "filter_wise: found true with scope: tensor; allowed: scope: row",
    ),
    (
        "model_stock",
        TWO,
        BASE,
        {"scope": "model"},
        "scope: found 'model'; allowed: tensor, row",
    ),
    ("slerp", TWO, BASE, {"t": 0.5}, "models: found 2; allowed: 1"),
    ("slerp", ONE, BASE, {}, "t: required, not given; allowed: a finite number"),
    ("expo", ONE, BASE, {"alpha": 0}, "alpha: found 0; allowed: above 0"),
    ("nuslerp", THREE, BASE, {}, "models: found 3; allowed: 2"),
    (
        "nuslerp",
        TWO,
        None,
        {"weight": [1, -1]},
        "weight: the weights sum to 0; cannot normalize by it",
    ),
    (
        "nuslerp",
        TWO,
        None,
        {"nuslerp_flatten": 1},
        "nuslerp_flatten: found 1; allowed: true, false",
    ),
    (
        "multislerp",
        TWO,
        BASE,
        {"weight": 0},
        "weight: the weights sum to 0; cannot normalize by it",
    ),
    ("multislerp", TWO, None, {"eps": 0}, "eps: found 0; allowed: above 0"),
    ("karcher", TWO, BASE, {}, "base_model: has no effect with this method"),
    ("karcher", TWO, None, {"weight": [1, -1]}, "weight: found -1; allowed: at least 0"),
    ("karcher", TWO, None, {"weight": 0}, "weight: the weights sum to 0; cannot normalize by it"),
    ("karcher", TWO, None, {"max_iter": 0}, "max_iter: found 0; allowed: at least 1"),
    ("karcher", TWO, None, {"max_iter": 2.5}, "max_iter: found 2.5; allowed: a whole number"),
    ("karcher", TWO, None, {"tol": 0}, "tol: found 0; allowed: above 0"),
    ("nearswap", ONE, None, {"t": 1}, "base_model: required, not given"),
    ("nearswap", ONE, BASE, {}, "t: required, not given; allowed: above 0"),
    ("nearswap", TWO, BASE, {"t": 1}, "models: found 2; allowed: 1"),
    ("arcee_fusion", TWO, BASE, {}, "models: found 2; allowed: 1"),
    (
        "arcee_fusion",
        ONE,
        BASE,
        {"tukey_fence": -1},
        "tukey_fence: found -1; allowed: at least 0",
    ),
    ("sce", TWO, None, {}, "base_model: required, not given"),
    ("sce", TWO, BASE, {"select_topk": 0}, f"select_topk: found 0; {DENSITY}"),
    ("sce", TWO, BASE, {"weight": 1}, "weight: unknown parameter; allowed: select_topk"),
    ("m3_average", THREE, None, {"mixup_alpha": 1}, "models: found 3; allowed: 2"),
    (
        "m3_average",
        TWO,
        None,
        {},
        "mixup_alpha: required where mixup_lambda is not given; allowed: above 0",
    ),
    (
        "m3_average",
        TWO,
        None,
        {"mixup_alpha": 1, "mixup_lambda": 0.5},
        "mixup_alpha: has no effect where mixup_lambda is given",
    ),
    ("m3_average", TWO, None, {"mixup_alpha": 0}, "mixup_alpha: found 0; allowed: above 0"),
    (
        "m3_average",
        TWO,
        None,
        {"mixup_alpha": 1, "dare_density": 0.8},
        "base_model: required, not given",
    ),
    (
        "m3_average",
        TWO,
        BASE,
        {"mixup_alpha": 1},
        "base_model: has no effect with this method",
    ),
    (
        "m3_task_arithmetic",
        TWO,
        BASE,
        {"mixup_alpha": 1, "weight": [1, 2]},
        "weight: unknown parameter; allowed: lambda, mixup_alpha, mixup_lambda, dare_density",
    ),
    (
        "r_tsvm",
        TWO,
        BASE,
        {"outlier_weighting": "both"},
        "outlier_weighting: found 'both'; allowed: proportional, inverse, none",
    ),
    (
        "r_tsvm",
        TWO,
        BASE,
        {"rank_coupling": 2},
        "rank_coupling: found 2; allowed: at least 0 and at most 1",
    ),
    (
        "r_tsvm",
        TWO,
        BASE,
        {"rank_coupling": 0, "sparsity_epsilon": 0.2},
        "sparsity_epsilon: has no effect with rank_coupling: 0",
    ),
    (
        "m3_ties",
        TWO,
        BASE,
        {"mixup_alpha": 1, "density": [0.5, 0.4], "scope": "model"},
        "density: found [0.5, 0.4] with scope: model; allowed: one density for all models",
    ),
    (
        "linear",
        [torch.ones(4), torch.ones(5)],
        None,
        {},
        "x: found shapes (4,) and (5,); allowed: one",
    ),
]


@pytest.mark.parametrize(("method", "models", "base", "parameters", "message"), CASES)
def test_what_cannot_be_is_an_error_of_one_line(method, models, base, parameters, message) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        merge_tensor(method, models, base, name="x", **parameters)


def test_every_method_of_the_table_has_a_summary_and_parameters_with_meanings() -> None:
    for name, entry in METHODS.items():
        assert entry.summary and "\n" not in entry.summary, name
        for parameter in entry.parameters.values():
            assert parameter.meaning and parameter.allowed


def test_fidelity_mergekit_changes_defaults() -> None:
    values = METHODS["dare_ties"].complete({"fidelity": "mergekit"}, 2)
    assert values["rescale"] == "l1" and values["density"] == [1.0, 1.0]
    assert METHODS["ties"].complete({"fidelity": "mergekit"}, 2)["ties"] == "index"
    given = METHODS["ties"].complete({"fidelity": "mergekit", "ties": "hash"}, 2)
    assert given["ties"] == "hash"


def test_no_method_changes_its_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    own = {"density": 0.5, "t": 0.3, "alpha": 0.2, "mixup_alpha": 1.0, "weight": 0.5}
    pair = {"sparsifier": "magprune", "consensus": "sign", "density": 0.5}
    for name, entry in METHODS.items():
        count = entry.num_models[1] or 2
        models = [torch.randn(6, 8, generator=generator) for _ in range(count)]
        base = torch.randn(6, 8, generator=generator) if entry.needs_base is True else None
        copies = [x.clone() for x in [*models, *([] if base is None else [base])]]
        given = {key: value for key, value in own.items() if key in entry.parameters}
        given = pair if name == "composed" else given
        merge_tensor(name, models, base, name="x", **given)
        for x, copy in zip([*models, *([] if base is None else [base])], copies, strict=True):
            assert torch.equal(x, copy), name
