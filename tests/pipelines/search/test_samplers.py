"""Samplers: what a suggestion depends on, what each can do, and that they find what is good.

Oracle: a sampler made anew for each suggestion; functions with known optima; the grid itself.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipelines.errors import InputError
from pipelines.search.samplers import Sampler, SamplerConfig, Told, make_sampler
from pipelines.search.space import Space
from tests.pipelines.search.test_space import space_of

pytest.importorskip("optuna")
Loss = Callable[[dict[str, Any]], tuple[float, ...]]
LINE = {"low": -1, "high": 1}


def sampler_of(space: Space, name: str, losses: int = 1, bounds: int = 0, **more: Any) -> Sampler:
    if name == "cma_es":
        pytest.importorskip("cmaes")
    return make_sampler(SamplerConfig(name=name, **more), space, 3, losses, bounds)


def run(space: Space, sampler: Sampler, loss: Loss, count: int) -> list[Told]:
    told: list[Told] = []
    for number in range(count):
        point = sampler.suggest(number, told)
        if point is None:
            break
        told.append(Told(number, point, loss(space.fields(point))))
    return told


@pytest.mark.parametrize("name", ["random", "tpe", "nsga2", "nsga3", "cma_es"])
def test_suggestions_follow_from_seed_number_and_results(name: str) -> None:
    entries: dict[str, Any] = {
        "w": {"simplex": ["a", "b", "c"], "step": 0.1},
        "x": {"low": 0.01, "high": 1, "log": True},
        "n": {"low": 1, "high": 9, "integer": True},
    }
    if name != "cma_es":
        entries["k"] = ["one", ["two"]]
    space, count = space_of(**entries), 1 if name == "cma_es" else 2
    more = {"population": 4} if name in ("nsga2", "nsga3", "cma_es") else {}
    more |= {"num_startup": 4} if name == "tpe" else {}
    kept, told = sampler_of(space, name, count, **more), []
    for number in range(14):
        point = kept.suggest(number, told)
        assert point == sampler_of(space, name, count, **more).suggest(number, told)
        assert point is not None
        fields = space.fields(point)
        assert 0.01 <= fields["x"] <= 1 and fields["n"] in range(1, 10)
        told.append(Told(number, point, (fields["x"], -fields["a"])[:count]))
    if name != "random":  # other results, another suggestion
        other = [Told(t.number, t.point, tuple(-x for x in t.losses)) for t in told]
        sampler = sampler_of(space, name, count, **more)
        assert sampler.suggest(14, other) != kept.suggest(14, told)


def test_cases_are_searched_by_tpe() -> None:
    space = space_of(m={"cases": {"a": {"x": LINE}, "b": {"y": LINE}}})

    def loss(fields: dict[str, Any]) -> tuple[float, ...]:
        return (1.0 if fields["m"] == "a" else (fields["y"] - 0.5) ** 2,)

    told = run(space, sampler_of(space, "tpe"), loss, 40)
    assert all(("m=b/y" in each.point) == (each.point["m"] == "b") for each in told)
    assert sum(each.point["m"] == "b" for each in told[20:]) > 15
    assert min(each.losses[0] for each in told) < 0.01


def test_what_violates_a_constraint_is_left_behind() -> None:
    space, told = space_of(x=LINE), []
    sampler = sampler_of(space, "tpe", bounds=1)
    for number in range(40):
        point = sampler.suggest(number, told)
        assert point is not None
        told.append(Told(number, point, (point["x"],), (0.2 - point["x"],)))  # x >= 0.2
    assert sum(each.point["x"] >= 0.15 for each in told[20:]) > 12  # 8.5 by chance


@pytest.mark.parametrize(("size", "count"), [(1, 60), (4, 400)])
def test_cma_es_finds_the_optimum(size: int, count: int) -> None:
    """Of a sphere; Rosenbrock's valley in four variables at 1."""
    space = space_of(**{str(i): {"low": -2, "high": 2} for i in range(size)})

    def loss(fields: dict[str, Any]) -> tuple[float, ...]:
        x = np.array(list(fields.values()))
        if size == 1:
            return (float((x[0] - 0.7) ** 2),)
        return (float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()),)

    sampler = sampler_of(space, "cma_es", patience=1000)
    assert sampler.population == 4 + math.floor(3 * math.log(size))  # type: ignore[attr-defined]
    told = run(space, sampler, loss, count)
    best = min(each.losses[0] for each in told)
    assert best < (1e-3 if size == 1 else 3.0)
    assert best < min(each.losses[0] for each in told[: len(told) // 4]) / (1 if size == 1 else 2)


def test_cma_es_ends_without_gain() -> None:
    space = space_of(x=LINE, y=LINE)
    sampler = sampler_of(space, "cma_es", patience=2, population=4)
    assert len(run(space, sampler, lambda fields: (1.0,), 100)) == 12


def test_a_grid_ends_and_draws_what_has_no_steps() -> None:
    space = space_of(c=[1, 2], x={"low": 0.5, "high": 0.6})
    points = run(space, sampler_of(space, "grid", draws=3), lambda fields: (0.0,), 99)
    assert [each.point["c"] for each in points] == [1, 2] * 3
    assert len({each.point["x"] for each in points}) == 6
    assert all(0.5 <= each.point["x"] <= 0.6 for each in points)


CASES = {"cases": {"a": {"y": LINE}, "b": {}}}


@pytest.mark.parametrize(
    ("name", "entries", "losses", "bounds", "more", "message"),
    [
        ("cma_es", {"x": [1, 2]}, 1, 0, {}, "cma_es: x is a choice; allowed: ranges"),
        ("cma_es", {"x": LINE}, 2, 0, {}, "cma_es: found 2 objectives; allowed: one"),
        ("cma_es", {"x": LINE}, 1, 1, {}, "cma_es: knows no constraints; allowed: tpe"),
        ("cma_es", {"x": LINE}, 1, 0, {"start": {"y": 0}}, "start: found 'y'; allowed: x"),
        ("nsga2", {"x": CASES}, 2, 0, {}, "nsga2: knows no cases; allowed: tpe, random, grid"),
        ("nsga3", {"x": LINE}, 1, 0, {}, "nsga3: found one objective; allowed: two or more"),
        ("grid", {"x": LINE}, 1, 0, {}, "grid: x has no steps; give it a step, or sampler.draws"),
        ("grid", {"x": [1]}, 1, 0, {"draws": 2}, "draws: has no effect where everything has steps"),
    ],
)
def test_what_a_sampler_cannot_do_is_an_error(
    name: str, entries: dict, losses: int, bounds: int, more: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        sampler_of(space_of(**entries), name, losses, bounds, **more)


def test_settings_of_another_sampler_and_a_library_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="sigma: has no effect with tpe; allowed with cma_es"):
        SamplerConfig(name="tpe", sigma=0.1)
    monkeypatch.setitem(__import__("sys").modules, "cmaes", None)
    with pytest.raises(InputError, match=r"needs the package cmaes; .*'poise\[search\]'"):
        make_sampler(SamplerConfig(name="cma_es"), space_of(x=LINE), 0, 1, 0)
