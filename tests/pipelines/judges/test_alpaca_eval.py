"""AlpacaEval 2's numbers. Oracle: a closed form, the model that preferences are drawn from, the
published numbers of 15 models (POISE_ALPACA_VERDICTS), and the package's own code.
"""

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.engines import answer_seed
from pipelines.errors import InputError
from pipelines.evaluate import evaluate
from pipelines.judges.alpaca import Gamed, choose_c, fit, length_controlled, read_gamed, win_rate
from tests.pipelines.judges.conftest import Judged
from tests.pipelines.judges.stub_endpoint import Said, stub_endpoint

pytest.importorskip("sklearn")


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def made_up(path: Path, n: int, seed: int = 0) -> Path:
    """A table in the form of the published one: n instructions, two versions of the baseline."""
    generator = np.random.default_rng(seed)
    hard = generator.normal(size=n)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = ["model", "index", "preference", "std_delta_len", "instruction_difficulty"]
        writer.writerow([*names, "not_gamed_baseline"])
        for model, sign in (("concise", 1), ("verbose", -1)):
            for i in range(n):
                length = sign * abs(generator.normal())
                preference = sigmoid(-0.8 * np.tanh(length) + generator.normal() / 3)
                writer.writerow([model, i, preference, length, hard[i], False])
    return path


def drawn(n: int, weights: tuple[float, float, float], gamed: Gamed) -> tuple[Any, ...]:
    """Lengths, and preferences that the model of these weights expects."""
    generator = np.random.default_rng(1)
    baseline, model = generator.integers(200, 3000, (2, n))
    delta = (baseline - model) / (baseline - model).std(ddof=1)
    hard = np.asarray([gamed.difficulty[i] for i in range(n)])
    expected = sigmoid(weights[0] * np.tanh(delta) + weights[1] * hard + weights[2])
    return expected, baseline, model, np.arange(n)


def test_win_rate_in_closed_form() -> None:
    value, error = win_rate(np.asarray([1.0, 0.0, 0.5, 0.5]))
    assert value == 50 and error == pytest.approx(100 * np.sqrt(0.5 / 3) / 2)


def test_preferences_of_the_model_give_back_its_weights(tmp_path: Path) -> None:
    weights, n = (-1.2, 0.7, 0.4), 400
    gamed = read_gamed(made_up(tmp_path / "gamed.csv", n))
    preferences, *rest = drawn(n, weights, gamed)
    alone = Gamed(gamed.design[:0], gamed.preference[:0], gamed.difficulty)
    found = length_controlled(preferences, *rest, alone)
    assert list(found.weights.values()) == pytest.approx(weights, abs=0.02)
    hard = np.asarray([gamed.difficulty[i] for i in range(n)])
    assert found.value == pytest.approx(100 * sigmoid(0.7 * hard + 0.4).mean(), abs=0.3)
    assert found.name == "length_controlled"
    pulled = length_controlled(preferences, *rest, gamed)  # towards the baseline's versions
    assert weights[0] < pulled.weights["length"] < -0.8


def test_equal_lengths_give_the_win_rate() -> None:
    preferences = np.random.default_rng(2).uniform(size=60)
    length = np.full(60, 900)
    found = length_controlled(preferences, length, length, np.arange(60), None)
    assert found.name == "length_controlled_minimal"
    assert (found.value, found.stderr) == win_rate(preferences)
    known = preferences.copy()
    known[3] = np.nan  # an unreadable verdict
    found = length_controlled(known, length, length, np.arange(60), None)
    assert found.value == pytest.approx(100 * np.delete(preferences, 3).mean())


def test_the_error_is_that_of_the_win_rate_where_length_plays_no_part() -> None:
    generator = np.random.default_rng(7)
    preferences, baseline = generator.uniform(0.3, 1, size=200), generator.integers(9, 99, 200)
    found = length_controlled(preferences, baseline, baseline[::-1], np.arange(200), None)
    value, error = win_rate(preferences)
    assert found.value == pytest.approx(value, abs=2)
    assert found.stderr == pytest.approx(error, rel=0.4)


@pytest.mark.parametrize("always", [0.0, 1.0])
def test_a_model_that_never_or_always_wins(always: float) -> None:
    lengths = np.arange(12)
    found = length_controlled(np.full(12, always), lengths, lengths[::-1], lengths, None)
    assert found.value == pytest.approx(100 * always, abs=1e-6)


def test_a_longer_answer_gains_less() -> None:
    generator = np.random.default_rng(3)
    baseline = np.full(300, 1000)
    model = baseline + generator.integers(0, 2000, 300)
    preferences = sigmoid((model - baseline - 500) / 300)
    found = length_controlled(preferences, baseline, model, np.arange(300), None)
    assert found.value < 100 * preferences.mean() - 10


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("index,preference\n0,1\n", "has no column 'std_delta_len'"),
        ("", "not the published table: it holds no rows"),
        (
            "index,preference,std_delta_len,instruction_difficulty,not_gamed_baseline\n0,x,1,1,False",
            "not the published table: could not convert string to float: 'x'",
        ),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read_gamed(path)
    assert str(error.value) == f"difficulty: {path}: {said}"


@pytest.mark.parametrize("with_table", [False, True])
def test_as_a_column_with_an_order_drawn_or_both(
    with_table: bool, tmp_path: Path, judged: Judged
) -> None:
    """The judge likes what is shown first (p 0.8) and the baseline's "good" answers (p 0.9)."""
    rows = [{"instruction": f"instruction {i}"} for i in range(8)]
    baseline = tmp_path / "baseline.json"
    outputs = [{**row, "output": "good" if i < 4 else "meh"} for i, row in enumerate(rows)]
    baseline.write_text(json.dumps(outputs))
    further = {"difficulty": made_up(tmp_path / "gamed.csv", 8)} if with_table else {}

    def answer(body: dict[str, Any]) -> Said:
        assert body["max_tokens"] == 1 and body["logprobs"] and body["top_logprobs"] == 20
        first, second = body["messages"][-1]["content"].split("### Answer of B")
        p = 0.8
        if "good" in first or "good" in second:
            p = 0.9 if "good" in first else 0.1
        return Said("A", top={"A": float(np.log(p)), "B": float(np.log(1 - p)), "C": -9.0})

    with stub_endpoint(answer) as stub:
        found = {}
        for order in ("drawn", "both"):
            config = judged(
                "alpaca_eval", rows, stub.url, baseline=baseline, order=order, **further
            )
            summary = evaluate(config, tmp_path / "out", executor="local")
            found[order] = summary["models"]["m"]["tasks"]["alpaca_eval"]
        assert len(stub.calls) == 16  # the drawn ones are half of both
    assert found["both"]["win_rate"]["value"] == pytest.approx(100 * (0.1 * 4 + 0.5 * 4) / 8)
    first = [answer_seed(1234, "order", str(i)) % 2 for i in range(4, 8)]  # the model's is shown
    drawn_rate = 100 * (0.1 * 4 + sum(0.8 if each else 0.2 for each in first)) / 8
    assert found["drawn"]["win_rate"]["value"] == pytest.approx(drawn_rate)
    name = "length_controlled" if with_table else "length_controlled_minimal"
    assert set(found["both"]) == {"win_rate", name, "length"}
    assert 0 < found["both"][name]["value"] < 100


def test_published_win_rates_and_errors() -> None:
    path = os.environ.get("POISE_ALPACA_VERDICTS")
    if not path:
        pytest.skip("POISE_ALPACA_VERDICTS is not set")
    with gzip.open(path) as file:
        models = json.load(file)
    assert len(models) == 15
    for name, model in models.items():
        stored = np.asarray(model["preference"], np.float64)
        value, error = win_rate(np.where(stored == 0, 1.5, stored) - 1)
        published = model["published"]
        assert value == pytest.approx(published["win_rate"], abs=1e-6), name
        assert error == pytest.approx(published["standard_error"], abs=1e-6), name


@pytest.mark.long
@pytest.mark.parametrize("with_table", [False, True])
def test_the_packages_own_code(
    with_table: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = pytest.importorskip("alpaca_eval.metrics.glm_winrate")
    n = 300
    path = made_up(tmp_path / "gamed.csv", n)
    monkeypatch.setattr(package, "hf_hub_download", lambda **unused: str(path))
    gamed = read_gamed(path)
    preferences, baseline, model, numbers = drawn(n, (-1.5, 0.5, -0.3), gamed)
    preferences = np.clip(preferences + np.random.default_rng(5).normal(size=n) / 4, 0, 1)
    rows = [
        {
            "preference": 1 + preferences[i],
            "index": i,
            "output_1": "a" * int(baseline[i]),
            "output_2": "a" * int(model[i]),
            "generator_1": "baseline",
            "generator_2": "model",
            "annotator": "made up",
        }
        for i in range(n)
    ]
    name = "length_controlled_v1" if with_table else "length_controlled_minimal"
    theirs = package.get_length_controlled_winrate(
        rows, glm_name=name, save_weights_dir=str(tmp_path / "weights")
    )
    ours = length_controlled(preferences, baseline, model, numbers, gamed if with_table else None)
    assert ours.value == pytest.approx(theirs["length_controlled_winrate"], abs=1e-6)
    assert win_rate(preferences)[0] == pytest.approx(theirs["win_rate"], abs=1e-6)
    with next((tmp_path / "weights" / name).glob("*.csv")).open() as file:
        [row] = csv.DictReader(file)
    del row[""]
    assert list(ours.weights.values()) == pytest.approx([float(v) for v in row.values()], abs=1e-9)


def test_the_strength_of_the_penalty_by_brute_force() -> None:
    generator = np.random.default_rng(6)
    X = np.stack([generator.normal(size=25), np.ones(25)], axis=1)
    y, weight = generator.uniform(size=25), np.ones(25)
    from sklearn.model_selection import GroupKFold

    scores = []
    for C in np.logspace(-4, 4, 10):
        folds = []
        for train, test in GroupKFold(5).split(np.arange(25), groups=np.arange(25)):
            p = sigmoid(X[test] @ fit(X[train], y[train], weight[train], C))
            folds.append(np.mean(y[test] * np.log(p) + (1 - y[test]) * np.log(1 - p)))
        scores.append(np.mean(folds))
    assert choose_c(X, y, weight) == np.logspace(-4, 4, 10)[int(np.argmax(scores))]
