"""Racing on made-up tables of scores.

Oracle: brute force over all scores: in how many paired resamplings of the prompts no candidate
dominates another one.
"""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.errors import InputError
from pipelines.search.racing import LOOKS, Bound, Objective, Race

Array = NDArray[np.float64]
TASKS = {"a": 240, "b": 240, "c": 300, "d": 630, "e": 220, "f": 220}
SERIES = {f"{task}.right": (task, count) for task, count in TASKS.items()}
OBJECTIVES = tuple(
    Objective(f"H{place}", dict.fromkeys(pair, 50.0))
    for place, pair in enumerate(
        (("a.right", "b.right"), ("c.right", "d.right"), ("e.right", "f.right"))
    )
)


def table(seed: int, count: int) -> dict[str, Array]:
    """Right or wrong, by series: (candidates, prompts). Candidates are weights of three parents,
    each of which is good at one thing; like candidates give like answers; most lose some of what
    their weights could give.
    """
    random = np.random.default_rng(seed)
    weights = random.dirichlet(np.full(3, 0.7), count) * random.uniform(0.3, 1.6, (count, 1))
    gains = np.array([[1.6, -0.3, -0.7], [-0.5, 1.4, 0.3], [-0.6, 0.2, 1.5]])
    too_much = np.maximum(weights.sum(1, keepdims=True) - 1.1, 0)
    ability = weights @ gains.T - 2.4 * too_much**2 - random.exponential(0.6, (count, 1))
    scores = {}
    for place, (name, (_, size)) in enumerate(SERIES.items()):
        taste = np.tanh(weights @ random.normal(0, 3, (3, 8))) @ random.normal(0, 0.5, (8, size))
        noise = taste + random.logistic(0, 0.12, (count, size))
        difficulty = random.normal(0, 1.3, size)
        scores[name] = (1.2 * ability[:, [place // 2]] + noise > difficulty).astype(float)
    return scores


def shares_undominated(scores: dict[str, Array], num: int) -> Array:
    """In which share of paired resamplings no other candidate dominates each one, (C,)."""
    random = np.random.default_rng(0)
    values = []
    for each in OBJECTIVES:
        parts = []
        for name, weight in each.weights.items():
            size = scores[name].shape[1]
            drawn = random.multinomial(size, np.full(size, 1 / size), num) / size
            parts.append(weight * scores[name] @ drawn.T)
        values.append(sum(parts))
    stacked = np.stack(values, axis=-1)  # (C, num, J)
    count = np.zeros(len(stacked))
    for draw in range(num):
        order = np.lexsort(-stacked[:, draw].T)
        front = np.zeros((0, len(OBJECTIVES)))
        for place in order:
            own = stacked[place, draw]
            if not ((front >= own).all(1) & (front > own).any(1)).any():
                front = np.vstack([front, own])
                count[place] += 1
    return count / num


@dataclass
class Raced:
    """What became of a table's candidates."""

    stopped: list[int]
    saved: float  # share of all answers
    race: Race


def raced(race: Race, scores: dict[str, Array]) -> Raced:
    """Race all candidates of a table, in its order."""
    total, num_answers, stopped = sum(TASKS.values()), 0, []
    count = len(next(iter(scores.values())))
    places = [race.answered(look) for look in range(len(race.looks) + 1)]
    for one in range(count):
        for look in range(len(race.looks)):
            part = {n: scores[n][one][places[look][task]] for n, (task, _) in race.series.items()}
            if race.is_hopeless(part, look):
                stopped.append(one)
                num_answers += sum(map(len, places[look].values()))
                break
        else:
            num_answers += total
            race = race.finished(str(one), {name: of[one] for name, of in scores.items()})
    return Raced(stopped, 1 - num_answers / (count * total), race)


def assert_none_of_the_clear_ones_stops(seed: int, count: int, least_saved: float) -> None:
    scores = table(seed, count)
    shares = shares_undominated(scores, 200 if count > 500 else 100)
    found = raced(Race(SERIES, OBJECTIVES, seed=seed), scores)
    print(
        f"seed {seed}: {count} candidates, {found.saved:.2f} saved, {(shares >= 0.95).sum()} clear"
    )
    assert (shares >= 0.95).sum() >= 5
    assert not [one for one in found.stopped if shares[one] >= 0.95]
    assert found.saved >= least_saved
    clear = {str(one) for one in np.flatnonzero(shares >= 0.95)}
    assert found.race.front is not None
    assert clear <= set(found.race.front.names)


def test_no_clear_member_of_the_front_stops() -> None:
    assert_none_of_the_clear_ones_stops(seed=5, count=150, least_saved=0.4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_of_a_thousand_candidates_half_of_the_answers_are_saved(seed: int) -> None:
    assert_none_of_the_clear_ones_stops(seed, count=1000, least_saved=0.5)


def test_prompts_come_in_one_order_and_each_once() -> None:
    race = Race(SERIES, OBJECTIVES, seed=3)
    asked: dict[str, list[int]] = {task: [] for task in TASKS}
    for look in range(len(LOOKS) + 1):
        for task, places in race.documents(look).items():
            assert not set(places) & set(asked[task])
            asked[task] += places
        assert {t: sorted(p) for t, p in asked.items()} == race.answered(look)
        for task, size in TASKS.items():  # every task at about the same share
            share = LOOKS[look] if look < len(LOOKS) else 1.0
            assert len(asked[task]) == max(16, round(share * size))
    assert {t: sorted(p) for t, p in asked.items()} == {t: [*range(n)] for t, n in TASKS.items()}
    assert race.documents(0) == Race(SERIES, OBJECTIVES, seed=3).documents(0)
    assert race.documents(0) != Race(SERIES, OBJECTIVES, seed=4).documents(0)


def test_the_front_is_brute_forces_and_keeps_the_bounds() -> None:
    scores = table(1, 40)
    bound = Bound(OBJECTIVES[2], 45.0)
    race = Race(SERIES, OBJECTIVES, (bound,))
    for one in range(40):
        race = race.finished(str(one), {name: of[one] for name, of in scores.items()})
    values = np.array(
        [
            [sum(w * scores[s][c].mean() for s, w in o.weights.items()) for o in OBJECTIVES]
            for c in range(40)
        ]
    )
    feasible = [c for c in range(40) if values[c, 2] >= 45]
    assert 0 < len(feasible) < 40
    expected = {
        str(c)
        for c in feasible
        if not any(
            (values[o] >= values[c]).all() and (values[o] > values[c]).any() for o in feasible
        )
    }
    assert race.front is not None
    assert set(race.front.names) == expected
    again = pickle.loads(pickle.dumps(race))
    places = race.answered(2)
    for one in range(40):  # a copy decides the same
        part = {n: scores[n][one][places[task]] for n, (task, _) in SERIES.items()}
        assert again.is_hopeless(part, 2) == race.is_hopeless(part, 2)


def test_a_candidate_far_below_a_bound_stops_and_one_above_it_does_not() -> None:
    race = Race(SERIES, OBJECTIVES, (Bound(OBJECTIVES[0], 60.0),))
    places = race.answered(0)
    random = np.random.default_rng(0)
    for share, stops in ((0.1, True), (0.55, False), (0.9, False)):
        part = {
            n: (random.random(len(places[t])) < share).astype(float) for n, (t, _) in SERIES.items()
        }
        assert race.is_hopeless(part, 0) == stops
    assert not Race(SERIES, OBJECTIVES).is_hopeless(part, 0)  # nothing to compare with


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"objectives": ()}, "objectives: found none"),
        ({"objectives": (Objective("x", {"a.f1": 1.0}),)}, "found 'a.f1', which is no mean of sc"),
        ({"looks": (0.5, 0.2)}, r"looks: found \[0.5, 0.2\]; allowed: rising, between 0 and 1"),
        ({"looks": (0.5, 1.0)}, "looks: found"),
    ],
)
def test_bad_races_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Race(**({"series": SERIES, "objectives": OBJECTIVES} | fields))
