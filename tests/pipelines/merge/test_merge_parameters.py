"""A parameter's value for one tensor, as users of mergekit's files know it.

Oracle: values written by hand from mergekit's rules.
"""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from operators.merging import METHODS
from pipelines.merge.parameters import resolve, value_for

MLP, ATTENTION = "model.layers.3.mlp.up_proj.weight", "model.layers.3.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("setting", "t", "expected"),
    [
        (0.3, 0.7, 0.3),
        ([0.0, 1.0], 0.25, 0.25),
        ([0.0, 0.4, 1.0], 0.0, 0.0),
        ([0.0, 0.4, 1.0], 0.5, 0.4),
        ([0.0, 0.4, 1.0], 0.75, 0.7),
        ([0.0, 0.4, 1.0], 1.0, 1.0),
        ([0.5], 0.3, 0.5),
        ([True, False], 0.4, True),
        ([True, False], 1.0, False),
        ({"value": 0.2}, 0.0, 0.2),
        ([{"filter": "mlp", "value": 0.5}, {"value": 0.1}], 0.0, 0.5),
        ([{"filter": "self_attn", "value": 0.5}, {"value": 0.1}], 0.0, 0.1),
        ([{"filter": "self_attn", "value": 0.5}, {"filter": "*", "value": 0.2}], 0.0, 0.2),
        ([{"filter": "self_attn", "value": 0.5}], 0.0, None),
        ([{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 7}], 0.5, 0.5),
        ([{"filter": "layers.3", "value": 1}, {"filter": "mlp", "value": 2}], 0.0, 1),
    ],
)
def test_forms(setting: Any, t: float, expected: Any) -> None:
    assert value_for(setting, MLP, t) == pytest.approx(expected)


@pytest.mark.parametrize("setting", [[], [0.1, {"value": 1}], [[0.1]], [{"valeu": 1}], {"a": 1}])
def test_other_forms_are_errors(setting: Any) -> None:
    with pytest.raises(ValueError, match=r"found .*; allowed: "):
        value_for(setting, MLP, 0.5)


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=6),
    st.floats(0, 1),
)
def test_a_gradient_stays_between_its_points(points: list[float], t: float) -> None:
    value = value_for(points, MLP, t)
    assert min(points) - 1e-9 <= value <= max(points) + 1e-9
    assert value_for(points, MLP, 0.0) == points[0]
    assert value_for(points, MLP, 1.0) == points[-1]


def test_precedence_is_model_slice_merge_default() -> None:
    own = [{"weight": 0.1}, {}, {"weight": [{"filter": "self_attn", "value": 0.3}]}]
    slice_, merge = {"normalize": False}, {"weight": 0.5, "normalize": True}
    method = METHODS["linear"]
    assert resolve(method, own, [slice_, merge], MLP, 0.0) == {
        "weight": [0.1, 0.5, 0.5],
        "normalize": False,
    }
    assert resolve(method, own, [{}, merge], ATTENTION, 0.0)["weight"] == [0.1, 0.5, 0.3]
    assert resolve(method, own, [{}, {}], ATTENTION, 0.0)["weight"] == [0.1, 1.0, 0.3]


def test_a_required_one_without_a_fitting_filter() -> None:
    own = [{"density": [{"filter": "self_attn", "value": 0.3}]}, {"density": 0.5}]
    assert resolve(METHODS["ties"], own, [], ATTENTION, 0.0)["density"] == [0.3, 0.5]
    with pytest.raises(ValueError, match=r"^density: required, not given; allowed: above 0"):
        resolve(METHODS["ties"], own, [], MLP, 0.0)
