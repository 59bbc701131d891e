"""Sentences that follow from the numbers, good or bad.

Oracle: sentences written by hand for the numbers of the made-up run.
"""

import pytest

from pipelines.report import findings, findings_over_runs, load_results


def shift(content, name: str, strength: str, points: float) -> None:
    """Move a strength, and the average with it."""
    content["models"][name][strength]["value"] += points
    content["models"][name]["average"]["value"] += points / 3


def test_every_sentence_of_a_good_run(make_run, content) -> None:
    """Standard errors: sqrt(18) = 4.2 for a strength, sqrt(6) = 2.4 for an average."""
    assert findings(load_results(make_run("a", content))) == [
        "Own strength: on helpfulness, dpo-helpful is above sft by 30.0 ±4.2 points.",
        "Own strength: on honesty, dpo-honest is above sft by 30.0 ±4.2 points.",
        "Own strength: on harmlessness, dpo-harmless is above sft by 50.0 ±4.2 points.",
        "Tax: dpo-helpful loses 30.0 ±4.2 points of honesty; dpo-helpful loses 30.0 ±4.2 points "
        "of harmlessness.",
        "Tax: no mixture model is below sft on any strength by more than two standard errors of "
        "the difference.",
        "Tax: no merge is below sft on any strength by more than two standard errors of the "
        "difference.",
        "Best merge: task_arithmetic, chosen on development, averages 80.0 ±1.7 on test, above "
        "every single-strength model: against the best of them, it is above dpo-harmless by "
        "15.0 ±2.4 points.",
        "Mixture: on average, task_arithmetic is above dpo-mixture-ondare by 9.0 ±2.4 points, the "
        "best of the models trained on the mixture.",
        "Optimizers: on average, dpo-mixture-ondare is above dpo-mixture by 1.0 ±2.4 points, "
        "within two standard errors of the difference, at deltas of norms 0.46 and 0.42.",
        "Choice: task_arithmetic is the best merge on test, too.",
    ]


def test_bad_news_is_said_plainly(make_run, content) -> None:
    shift(content, "dpo-honest", "honesty", -32.0)  # 58: below SFT's 60
    shift(content, "task_arithmetic", "harmlessness", -60.0)  # average 60, below dpo-harmless
    shift(content, "dpo-mixture", "helpfulness", 20.0)
    text = "\n".join(findings(load_results(make_run("a", content))))
    assert (
        "dpo-honest is below sft by 2.0 ±4.2 points, within two standard errors of the difference."
    ) in text
    assert "Tax: task_arithmetic loses 15.0 ±4.2 points of harmlessness." in text
    assert (
        "averages 60.0 ±1.7 on test, not above every single-strength model: against the best of "
        "them, it is below dpo-harmless by 5.0 ±2.4 points."
    ) in text
    assert "Mixture: on average, task_arithmetic is below dpo-mixture by 16.7" in text
    assert "Choice: on test another merge averages more: expo is above task_arithmetic by" in text


@pytest.mark.parametrize(
    ("norm", "said"),
    [
        (0.462, "on average, dpo-mixture-ondare is above"),  # by exactly a tenth
        (0.382, "on average, dpo-mixture-ondare is above"),
        (
            0.463,
            "dpo-mixture-ondare and dpo-mixture are not compared: the norms of their deltas, 0.46 "
            "and 0.42, differ by more than 10%.",
        ),
        (0.381, "dpo-mixture-ondare and dpo-mixture are not compared: the norms of their deltas, "),
        (
            None,
            "dpo-mixture-ondare and dpo-mixture are not compared: the norms of their deltas are "
            "not known.",
        ),
    ],
)
def test_optimizers_are_compared_at_one_length_of_update(
    make_run, content, norm: float | None, said: str
) -> None:
    content["models"]["dpo-mixture-ondare"]["delta_norm"] = norm
    (found,) = [
        sentence
        for sentence in findings(load_results(make_run("a", content)))
        if sentence.startswith("Optimizers: ")
    ]
    assert found.startswith(f"Optimizers: {said}")


def test_equal_numbers_are_level(make_run, content) -> None:
    shift(content, "dpo-honest", "honesty", -30.0)
    text = "\n".join(findings(load_results(make_run("a", content))))
    assert "on honesty, dpo-honest is level with sft." in text


def test_counts_over_runs(make_run, content) -> None:
    runs = [load_results(make_run("a", content))]
    shift(content, "dpo-honest", "honesty", -25.0)  # above by 5, within two standard errors
    shift(content, "dpo-helpful", "honesty", 30.0)
    shift(content, "dpo-helpful", "harmlessness", 30.0)  # no tax is left
    shift(content, "task_arithmetic", "honesty", -36.0)  # average 68, dpo-helpful has 60
    runs.append(load_results(make_run("b", content)))
    shift(content, "task_arithmetic", "honesty", -15.0)  # average 63, below dpo-harmless's 65
    runs.append(load_results(make_run("c", content)))
    found = findings_over_runs(runs)
    assert found[1] == (
        "Own strength: dpo-honest is above sft on honesty in 3 of 3 runs, by more than two "
        "standard errors in 1."
    )
    assert found[3] == "Tax: some single-strength model pays one in 1 of 3 runs."
    assert found[4].endswith(
        "in 2 of 3 runs, by more than two standard errors of the difference in 1."
    )
