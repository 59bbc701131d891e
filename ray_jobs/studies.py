"""`poise results` on several models at once: which are undominated, what a merge adds to its
baselines, which goals go together.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from pipelines.errors import InputError
from pipelines.evaluate.results import Evaluation
from pipelines.evaluate.statistics import Contrast, Estimates
from pipelines.evaluate.studies import (
    Effect,
    Relation,
    beside_baselines,
    effects,
    rank_correlations,
    relations,
)
from ray_jobs.tables import known, print_table


@dataclass(frozen=True, slots=True)
class Asked:
    """What is asked of an evaluation; one of the three.

    Attributes:
        undominated: groups, as `a,b`.
        baselines: a merge and what it was made of, as `merge=a,b`.
        others: further models beside the merge, as `average,task_arithmetic`.
        relations: the model that the trainings started from.
        trained: `model=group` for each training.
    """

    undominated: str | None = None
    baselines: str | None = None
    others: str | None = None
    relations: str | None = None
    trained: Sequence[str] = ()

    def check(self) -> None:
        """Raise InputError for options that do not go together."""
        if self.others and self.baselines is None:
            raise InputError("--others: has no effect without --baselines")
        if self.trained and self.relations is None:
            raise InputError("--trained: has no effect without --relations")
        if self.relations is not None and not self.trained:
            raise InputError("--relations: needs --trained MODEL=GROUP for each training")

    @property
    def options(self) -> list[str]:
        """The options that are given."""
        found = {
            "--undominated": self.undominated,
            "--baselines": self.baselines,
            "--relations": self.relations,
        }
        return [name for name, value in found.items() if value is not None]


def run_study(evaluation: Evaluation, asked: Asked, models: Sequence[str], *, form: str) -> None:
    """Print what is asked, on stdout.

    Args:
        models: of the evaluation; empty for all.
        form: table or json.

    Raises:
        InputError: unknown models or groups, or another form.
    """
    if form not in ("table", "json"):
        raise InputError(f"--form: found {form}; allowed with {asked.options[0]}: table, json")
    if asked.undominated is not None:
        groups = _names("--undominated", asked.undominated)
        found = _undominated(evaluation, groups, models)
    elif asked.baselines is not None:
        found = _baselines(evaluation, asked.baselines, asked.others)
    else:
        assert asked.relations is not None
        found = _relations(evaluation, asked.relations, asked.trained, models)
    values, tables = found
    if form == "json":
        print(json.dumps(values, indent=2))
        return
    for table in tables:
        print_table(table)


Found = tuple[Any, list[Table]]  # as JSON can hold it, and for the terminal


def _undominated(evaluation: Evaluation, groups: list[str], models: Sequence[str]) -> Found:
    """Each model's groups, and whether and how surely no other model beats it."""
    own = _with_all(evaluation, groups, models)
    columns, support = evaluation.undominated(own, groups)
    title = "undominated: no other model is at least as good in all and better in one"
    table = Table("model", *groups, "undominated", "support", title=title)
    values: list[dict[str, Any]] = []
    for model in own:
        is_best, share = support[model]
        numbers = {name: columns[name].value(model) for name in groups}
        shown = [_shown(number) for number in numbers.values()]
        table.add_row(model, *shown, "yes" if is_best else "no", f"{share:.3f}")
        values.append(
            {
                "model": model,
                "groups": {name: _plain(number) for name, number in numbers.items()},
                "undominated": is_best,
                "support": share,
            }
        )
    return values, [table]


def _baselines(evaluation: Evaluation, text: str, others: str | None) -> Found:
    """A merge beside the best of its models, their mean, and others, group by group."""
    merge, equals, rest = text.partition("=")
    if not equals or not merge or not rest:
        raise InputError(f"--baselines: found {text!r}; allowed: MERGE=MODEL,MODEL")
    singles = _names("--baselines", rest)
    further = _names("--others", others) if others is not None else []
    columns = evaluation.columns(list(dict.fromkeys([merge, *singles, *further])))
    if not columns:
        raise InputError(f"{evaluation.place.address}: has no group that all these models have")
    table = Table("group", "baseline", "model", "value", f"{merge} - baseline", "clear")
    values = []
    for each in beside_baselines(columns, merge, singles, further):
        clear = "yes" if each.gain.is_clear else "no"
        value = f"{each.value:.4g}"
        table.add_row(each.column, each.name, each.model or "-", value, _shown(each.gain), clear)
        gain = _plain(each.gain) | {"clear": each.gain.is_clear}
        values.append(
            {
                "group": each.column,
                "baseline": each.name,
                "model": each.model,
                "value": each.value,
                "gain": gain,
            }
        )
    return values, [table]


def _relations(
    evaluation: Evaluation, start: str, trained: Sequence[str], models: Sequence[str]
) -> Found:
    """What each training did to each goal, and how the goals go together."""
    goals_of = dict(_trained(each) for each in trained)
    goals = list(dict.fromkeys(goals_of.values()))
    if len(goals) < 2:
        raise InputError(f"--trained: found the group {goals[0]} alone; allowed: two or more")
    needed = [start, *goals_of]
    columns = evaluation.columns(list(dict.fromkeys(needed)), goals)
    found = effects(columns, goals_of, start)
    pairs = relations(found)
    everybody = _with_all(evaluation, goals, models)
    ranks = _ranks(evaluation.columns(everybody, goals), everybody)
    values = {
        "start": start,
        "effects": [_effect(each) for each in found],
        "relations": [
            {
                "goals": [pair.first, pair.second],
                "verdict": pair.verdict,
                "rank_correlation": known(ranks[pair.first][pair.second]),
            }
            for pair in pairs
        ],
        "models": everybody,
    }
    return values, [_effects_table(found, goals, start), _pairs_table(pairs, ranks, everybody)]


def _effects_table(found: Sequence[Effect], goals: Sequence[str], start: str) -> Table:
    table = Table("model", "trained for", *goals, title=f"changes against {start}")
    for model in dict.fromkeys(each.model for each in found):
        own = {each.measured: each for each in found if each.model == model}
        shown = [_shown(own[goal].change) for goal in goals]
        table.add_row(model, own[goals[0]].trained_for, *shown)
    return table


def _pairs_table(
    pairs: Sequence[Relation], ranks: dict[str, dict[str, float]], models: Sequence[str]
) -> Table:
    table = Table("goals", "verdict", f"rank correlation over {len(models)} models")
    for pair in pairs:
        rank = ranks[pair.first][pair.second]
        shown = "-" if math.isnan(rank) else f"{rank:.2f}"
        table.add_row(f"{pair.first}, {pair.second}", pair.verdict, shown)
    return table


def _ranks(columns: dict[str, Estimates], models: Sequence[str]) -> dict[str, dict[str, float]]:
    """Spearman's correlations of goals over models."""
    return rank_correlations(
        {name: [each.value(model).value for model in models] for name, each in columns.items()}
    )


def _with_all(evaluation: Evaluation, groups: Sequence[str], models: Sequence[str]) -> list[str]:
    """The models that have all the groups; a line names those that have not."""
    evaluation.check_names(models, groups)
    wanted = list(models) or evaluation.models
    lacking = [
        model
        for model in wanted
        if any(
            evaluation.summary["models"][model]["groups"][group]["value"] is None
            for group in groups
        )
    ]
    if lacking:
        print(f"left out, as a group lacks a member: {', '.join(lacking)}", file=sys.stderr)
    own = [model for model in wanted if model not in lacking]
    if len(own) < 2:
        raise InputError(f"{evaluation.place.address}: found {len(own)} models; allowed: 2 or more")
    return own


def _names(option: str, text: str) -> list[str]:
    """The names in an option's value."""
    found = [name.strip() for name in text.split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise InputError(f"{option}: found {text!r}; allowed: different names, as a,b")
    return found


def _trained(text: str) -> tuple[str, str]:
    """The model and the goal of one `--trained`."""
    model, equals, goal = text.partition("=")
    if not equals or not model or not goal:
        raise InputError(f"--trained: found {text!r}; allowed: MODEL=GROUP")
    return model, goal


def _effect(effect: Effect) -> dict[str, Any]:
    return {
        "model": effect.model,
        "trained_for": effect.trained_for,
        "measured": effect.measured,
        **_plain(effect.change),
        "clear": effect.change.is_clear,
    }


def _plain(contrast: Contrast) -> dict[str, float | None]:
    """A number for JSON, which has no NaN."""
    return {"value": contrast.value, "stderr": known(contrast.stderr)}


def _shown(contrast: Contrast) -> str:
    """A number with its error, where it has one."""
    value = f"{contrast.value:.4g}"
    return value if math.isnan(contrast.stderr) else f"{value} ±{contrast.stderr:.2g}"
