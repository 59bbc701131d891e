"""The page of a study. Oracle: made-up trials whose values follow one parameter alone, and a parser
of HTML.
"""

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from pipelines.search.page import importances, render

VOID = {"meta"}


class Reader(HTMLParser):
    """Checks that tags close in order, and collects headings and cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {"h2": [], "td": []}
        self.rows: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append(dict(attrs)["class"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.texts:
            self.texts[self.open[-1]].append(data)


def result_of(count: int) -> dict[str, Any]:
    """Good is what x is near 0.7; y and the method have no effect; z is there for one method."""
    random = np.random.default_rng(0)
    trials = []
    for number in range(count):
        x, y = random.random(2)
        method = ["ties", "<b>"][number % 2]
        parameters = {"x": float(x), "y": float(y), "method": method}
        values = {"good": float(1 - (x - 0.7) ** 2), "cheap": float(y)}
        trials.append(
            {
                "number": number,
                "parameters": parameters | ({"z": number} if method == "ties" else {}),
                "values": values,
                "stderr": {"good": 0.01, "cheap": None},
                "state": "complete",
                "seconds": 1.0,
            }
        )
    failed = {"number": count, "parameters": {"x": 0.1}, "values": {}, "stderr": {}}
    trials.append({**failed, "state": "failed", "seconds": 0.0})
    best = trials[2]
    return {
        "split": "development",
        "objectives": [{"name": "good", "mode": "max"}, {"name": "cheap", "mode": "min"}],
        "trials": trials,
        "best": best,
        "front": [1, 2],
        "baselines": {"average": {"values": best["values"], "stderr": best["stderr"]}},
        "test": {"values": best["values"], "stderr": best["stderr"]},
        "evaluations": count,
        "expected_best_of_equals": {"good": 0.9, "cheap": None},
    }


def test_a_page_has_its_parts_and_names_are_texts() -> None:
    result = result_of(24)
    page = render(result)
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    headings = ["Best so far", "Front, with standard errors", "Parameters together"]
    if importances(result["trials"][:-1], "good", "max") is not None:
        headings.append("Importance (PED-ANOVA)")
    assert reader.texts["h2"] == [*headings, "Each parameter", "Trials"]
    assert "<b>" in reader.texts["td"] and "<b>" not in page  # a name is a text
    assert reader.rows[1:5] == ["", "front", "best", ""] and len(reader.rows) == 1 + 25
    assert render(result) == page


def test_what_decides_is_important() -> None:
    pytest.importorskip("optuna")
    trials = result_of(60)["trials"][:-1]
    good = importances(trials, "good", "max")
    cheap = importances(trials, "cheap", "min")
    assert good is not None and cheap is not None
    assert good.keys() == {"x", "y", "method"}  # z is not in all trials
    assert good["x"] > 0.8 and cheap["y"] > 0.8
    assert importances(trials[:5], "good", "max") is None


def test_a_study_without_a_winner_or_a_choice_has_a_page() -> None:
    result = result_of(3)
    for trial in result["trials"]:
        trial["parameters"] = {"x": 1}
    page = render({**result, "best": None, "test": None, "front": []})
    assert "No trial meets the constraints." in page
    assert "Each parameter" not in page
