"""Run a choice: answer and score, choose, measure the winner on test, write it.

The output is an evaluation (`poise report OUT`, `poise results OUT`) with a few files more. What is
answered and scored lies in its store and is never made again: not after a kill, and not with other
values in the same output.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from pipelines.checkpoints.companions import RECORD_FILE
from pipelines.checkpoints.digests import DigestMemory
from pipelines.commit import lock, make_folder, write_atomically
from pipelines.errors import InputError
from pipelines.evaluate.interface import Sample
from pipelines.evaluate.places import open_place
from pipelines.evaluate.plan import EvaluationPlan
from pipelines.evaluate.store import RESULT_FILE, STORE_FILE, Store
from pipelines.evaluate.summary import write_summary
from pipelines.evaluate.workers import Model
from pipelines.expo.bracket import peak_of
from pipelines.expo.measuring import DIGESTS_FILE, Measuring
from pipelines.expo.numbers import Scored, Values, best_of, histograms, summary, warnings
from pipelines.expo.plan import ExpoPlan
from pipelines.expo.plots import plot_curve, plot_histograms
from pipelines.merge import merge_planned, plan_merge
from pipelines.merge.run import is_finished, refuse_inputs
from pipelines.provenance import read_record

EXPO_FILE, BEST, MERGE_FILE = "expo.json", "best", "merge.yaml"
CURVE, HISTOGRAMS = "reward", "histograms"  # pictures
OnValue = Callable[[float, Values], None]


def expo(
    plan: ExpoPlan,
    out: str | Path,
    *,
    force: bool = False,
    on_value: OnValue = lambda value, numbers: None,
) -> dict[str, Any]:
    """Choose a parameter in `out`, or go on with it; a finished choice is only read.

    Args:
        force: replace the result of another choice; answers and rewards that it shares stay.
        on_value: is told each value with its numbers when it is measured.

    Returns:
        the content of `expo.json`.

    Raises:
        InputError: `out` holds something else or is an input; a candidate that cannot be measured.
    """
    out = Path(out).absolute()
    refuse_inputs(out, plan.inputs, "choice")
    found = {each.name for each in out.iterdir()} if out.is_dir() else set()
    names = {name for name in found if not name.startswith(".")}  # a kill may leave hidden ones
    if DIGESTS_FILE not in names and names - {STORE_FILE}:
        raise InputError(f"{out}: holds other files; choose a new or empty folder")
    result = finished(plan, out)
    if result is not None:
        return result
    if (out / EXPO_FILE).is_file() and not force:
        raise InputError(
            f"{out}: holds another choice: config or models differ; choose another output, or "
            "--force to replace its result (what both have is not made again)"
        )
    make_folder(out)
    with lock(out):
        Store(out).begin()
        with closing(Measuring(plan, out, plan.evaluation, plan.task)) as measuring:
            result = _chosen(plan, measuring, on_value)
        if plan.test is not None:
            assert plan.test_task is not None
            with closing(Measuring(plan, out, plan.test, plan.test_task)) as on_test:
                result["test"] = _on_test(plan, on_test, result["best"]["value"])
        for name in (EXPO_FILE, RESULT_FILE):  # never beside another winner
            (out / name).unlink(missing_ok=True)
        _write_best(plan, out, result)
        _write(plan, out, result, measuring)
    return result


def finished(plan: ExpoPlan, out: Path) -> dict[str, Any] | None:
    """The result of a choice that is complete; None where it is not, or is another one's."""
    try:
        result: dict[str, Any] = json.loads((out / EXPO_FILE).read_text(encoding="utf-8"))
        is_same = result["key"] == plan.key
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_there = is_same and is_finished(plan_merge(plan.merges[result["best"]["value"]]), out / BEST)
    return result if is_there else None


def _chosen(plan: ExpoPlan, measuring: Measuring, on_value: OnValue) -> dict[str, Any]:
    """Measure, choose, and say what is known."""
    scored: dict[float, Scored] = {}

    def read(value: float) -> None:
        scored[value] = Scored.of(measuring.samples(value))
        on_value(value, summary(scored[value], None))

    if plan.config.search == "grid":
        measuring.answer(plan.values)
        measuring.free()  # so that the reward model has the room
        measuring.score(plan.values, read)
    else:

        def reward(place: int) -> float:
            value = plan.values[place]
            measuring.answer([value])
            measuring.score([value], read)
            return float(scored[value].rewards.mean())

        peak_of(len(plan.values), reward, plan.values.index(plan.reference))
    return result_of(plan, measuring, dict(sorted(scored.items())))


def result_of(
    plan: ExpoPlan, measuring: Measuring, scored: Mapping[float, Scored]
) -> dict[str, Any]:
    """The content of `expo.json`, without the test split."""
    reference = scored[plan.reference]
    numbers = {
        value: summary(own, None if value == plan.reference else reference)
        for value, own in scored.items()
    }
    best = best_of({value: each["reward"]["value"] for value, each in numbers.items()})
    trials = [
        {
            "number": plan.values.index(value),
            "parameters": {plan.config.parameter: value},
            "label": plan.label(value),
            "value": value,
            **numbers[value],
            "digest": measuring.digest(value).weights,
            "seconds": round(measuring.seconds.get(value, 0.0), 3),
        }
        for value in scored
    ]
    accepts = plan.parameter.accepts
    return {
        "schema": 1,
        "key": plan.key,
        "name": plan.name,
        "parameter": plan.config.parameter,
        "reference": plan.reference,
        "search": plan.config.search,
        "values": list(plan.values),
        "split": plan.config.choose_on,
        **({"chosen_on_test": True} if plan.config.choose_on == "test" else {}),
        "reward_model": plan.task.scorer.described["reward"],
        "decoding": plan.config.decoding.model_dump()
        | {"max_new_tokens": plan.config.max_new_tokens, "seed": plan.config.seed},
        "trials": trials,
        "best": next(trial for trial in trials if trial["value"] == best),
        "warnings": warnings(plan.name, numbers, best, plan.values, accepts),
        "histograms": histograms({plan.label(value): own for value, own in scored.items()}),
        "evaluations": len(scored),
        "test": None,
    }


def _on_test(plan: ExpoPlan, measuring: Measuring, best: float) -> dict[str, Any]:
    """The winner and the reference on the test split, which no choice depends on."""
    values = list(dict.fromkeys([plan.reference, best]))
    measuring.answer(values)
    measuring.free()
    measuring.score(values, lambda value: None)
    scored = {value: Scored.of(measuring.samples(value)) for value in values}
    reference = scored[plan.reference]
    return {
        "value": best,
        **summary(scored[best], None if best == plan.reference else reference),
        "reference": summary(reference, None),
    }


def _write_best(plan: ExpoPlan, out: Path, result: Mapping[str, Any]) -> None:
    """The winner by the ordinary merge, with the choice in its record."""
    best = result["best"]
    merged = plan_merge(plan.merges[best["value"]])
    names = ("parameter", "value", "reference", "search", "split", "reward_model", "decoding")
    chosen = {name: best[name] if name == "value" else result[name] for name in names}
    chosen |= {name: best[name] for name in ("reward", "tokens", "difference") if name in best}
    chosen |= {"values": [trial["value"] for trial in result["trials"]], "test": result["test"]}
    chosen["warnings"] = result["warnings"]
    place = out / BEST
    record = read_record(place)
    if record is not None and is_finished(merged, place):  # of a choice among other values, perhaps
        write_atomically(
            place / RECORD_FILE, json.dumps(record | {"chosen": chosen}, indent=2) + "\n"
        )
    else:
        merge_planned(merged, place, force=place.exists(), details={"chosen": chosen})
    _write_merge(plan, out, best["value"])


def _write_merge(plan: ExpoPlan, out: Path, best: float) -> None:
    """The winner's config, which `poise merge` takes."""
    import yaml

    mark = "# chosen on the test split\n" if plan.config.choose_on == "test" else ""
    values = plan.merges[best].model_dump(mode="json", exclude_unset=True)
    write_atomically(out / MERGE_FILE, mark + yaml.safe_dump(values, sort_keys=False))


def _write(plan: ExpoPlan, out: Path, result: Mapping[str, Any], measuring: Measuring) -> None:
    """The evaluation of what was measured, the pictures, and last the result."""
    _write_evaluation(plan, out, result, measuring)
    for name, pictures in ((CURVE, plot_curve(result)), (HISTOGRAMS, plot_histograms(result))):
        for form, content in pictures.items():
            write_atomically(out / f"{name}.{form}", content)
    write_atomically(out / EXPO_FILE, json.dumps(result, indent=2) + "\n")


def _write_evaluation(
    plan: ExpoPlan, out: Path, result: Mapping[str, Any], measuring: Measuring
) -> None:
    """`evaluation.json` of the measured candidates, by which reports and comparisons know them. The
    winner has its folder; the others were in memory alone, which their paths say.
    """
    models, cells, answers = {}, {}, {}
    samples: dict[tuple[str, str], list[Sample]] = {}
    for trial in result["trials"]:
        value, name = trial["value"], trial["label"]
        is_best = value == result["best"]["value"]
        path = out / BEST if is_best else Path(f"{name} in memory")
        models[name] = Model(name, str(path), trial["digest"])
        answers[name, plan.task.name], cells[name, plan.task.name] = measuring.cells(value)
        samples[name, plan.task.name] = measuring.samples(value)
    paths = {name: Path(model.path) for name, model in models.items()}
    write_summary(
        EvaluationPlan(
            config=plan.evaluation.model_copy(update={"models": paths}),
            out=open_place(out),
            tasks=[plan.task],
            models=models,
            headers={},
            groups={},
            cells=cells,
            answers=answers,
            memory=DigestMemory(),
        ),
        samples,
        [],
    )
