"""Spaces: points and the fields that they give. Oracle: written out by hand; the definition of a
uniform draw from a simplex; `MergeConfig`'s own meaning of filters.
"""

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import Config, check
from pipelines.errors import InputError
from pipelines.merge.parameters import value_for
from pipelines.search.entries import Entry, Simplex
from pipelines.search.space import Space


class Holder(Config):
    space: dict[str, Entry]


def space_of(**entries: Any) -> Space:
    return Space(check({"space": entries}, Holder, "study.yaml").space)


def all_fields(space: Space) -> list[dict[str, Any]]:
    return [space.fields(point) for point in space.grid(lambda variable: variable.low)]


def test_a_grid_has_every_combination_once_and_cases_their_own() -> None:
    space = space_of(
        method={
            "cases": {"ties": {"density": {"low": 0.1, "high": 0.3, "step": 0.1}}, "linear": {}}
        },
        seed=[0, 1],
    )
    ties = [{"method": "ties", "density": d, "seed": s} for d in (0.1, 0.2, 0.3) for s in (0, 1)]
    assert all_fields(space) == [*ties, *({"method": "linear", "seed": s} for s in (0, 1))]
    assert space.names == ("method", "density", "seed")
    assert space.is_countable and space.has_cases


def test_one_field_may_stand_in_several_cases_but_not_beside_itself() -> None:
    inner = {"a": {"x": [1]}, "b": {"x": {"low": 2, "high": 3, "integer": True}}}
    assert all_fields(space_of(m={"cases": inner})) == [
        {"m": "a", "x": 1},
        {"m": "b", "x": 2},
        {"m": "b", "x": 3},
    ]
    with pytest.raises(ValueError, match="x: two entries of the space decide it"):
        space_of(m={"cases": inner}, x=[1])


def test_shares_by_steps_are_all_that_add_up() -> None:
    space = space_of(w={"simplex": ["x", "y", "z"], "step": 0.25})
    shares = [i / 4 for i in range(5)]
    expected = {t for t in itertools.product(shares, repeat=3) if sum(t) == 1}
    found = [tuple(fields[name] for name in "xyz") for fields in all_fields(space)]
    assert len(found) == len(expected) == 15
    assert set(found) == expected


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.sampled_from([None, 0.05]))
def test_shares_add_up_whatever_is_drawn(numbers: list[float], step: float | None) -> None:
    names = [str(place) for place in range(len(numbers) + 1)]
    simplex = Simplex(simplex=names, step=step, least=0.05)
    shares = simplex.shares(numbers)
    assert math.isclose(sum(shares), 1)
    assert min(shares) >= 0.05 - 1e-12
    if step:
        counts = [share / step for share in shares]
        assert all(math.isclose(count, round(count), abs_tol=1e-6) for count in counts)


def test_even_numbers_give_even_shares() -> None:
    """Of a simplex of n, each share has the mean 1/n and the variance (n - 1)/(n^2 (n + 1))."""
    random, simplex = np.random.default_rng(0), Simplex(simplex=list("abcd"))
    drawn = np.array([simplex.shares(row) for row in random.random((20_000, 3))])
    assert np.allclose(drawn.mean(axis=0), 1 / 4, atol=0.005)
    assert np.allclose(drawn.var(axis=0), 3 / 80, rtol=0.05)


def test_values_by_parts_of_the_model() -> None:
    space = space_of(
        g={"low": 0, "high": 1, "step": 1, "gradient": 2},
        f={"values": [3], "filters": ["mlp", "*"]},
        n={"low": 0, "high": 2, "step": 1, "layers": [2, 1]},
    )
    names = [variable.name for variable in space.variables]
    assert names == ["g[0]", "g[1]", "f[mlp]", "f[*]", "n[0-1]", "n[2-2]", "n[rest]"]
    point = dict(zip(names, [0, 1, 3, 3, 0, 1, 2], strict=True))
    fields = space.fields(point)
    assert fields["g"] == [0, 1]
    assert fields["f"] == [{"filter": "mlp", "value": 3}, {"filter": "*", "value": 3}]
    tensors = [f"model.layers.{place}.mlp.weight" for place in (0, 1, 2, 12)]
    found = [value_for(fields["n"], name, 0.0) for name in (*tensors, "lm_head.weight")]
    assert found == [0, 0, 1, 2, 2]


def test_the_ends_are_each_value_once() -> None:
    space = space_of(m={"cases": {"a": {}, "b": {"x": {"low": 0, "high": 1}}}}, s=[1, 2])
    assert list(space.ends()) == [
        {"m": "a", "s": 1},
        {"m": "b", "x": 0.0, "s": 1},
        {"m": "b", "x": 1.0, "s": 1},
        {"m": "a", "s": 2},
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"low": 1, "high": 0}, "expected low < high"),
        ({"uniform": [1, 0]}, "expected low < high"),
        ({"low": 0, "high": 1, "log": True}, "low > 0 for log_uniform"),
        ({"low": 0, "high": 1, "log": True, "step": 0.5}, "log, step|low > 0"),
        ({"low": 0, "high": 1, "step": 2}, "step: found 2.0; allowed: at most high - low"),
        ({"low": 0, "high": 1.5, "integer": True}, "must be whole numbers"),
        ({"low": 0, "high": 1, "gradient": 2, "layers": [1]}, "gradient, layers: give one"),
        ({"simplex": ["x"]}, "found .'x'.; allowed: two or more fields, as one share is 1"),
        ({"simplex": ["x", "y"], "step": 0.3}, "step: found 0.3; allowed: what divides"),
        ({"simplex": ["x", "y"], "least": 0.6}, "least: found 0.6; .*or no shares add up to 1"),
        ({"values": [1, 1]}, "must differ"),
        ([], "at least 1 item"),
        ({"cases": {}}, "at least 1 item"),
        ({"low": 0, "hihg": 1}, "hihg: unknown field.*did you mean high"),
    ],
)
def test_entries_that_make_no_sense_are_refused(entry: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        space_of(x=entry)
