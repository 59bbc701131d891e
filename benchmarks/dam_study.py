"""DAM's objectives on the tiny world, beside merges without training, for docs/dam.md.

    poise demo --out runs/demo                               # the models and the data
    python benchmarks/dam_study.py runs/demo --out runs/dam-study [--plot FILE.png]

Merges the demo's three models of a single strength with coefficients that are learned on prompts
and chosen responses of each one's preferences: the objectives of the paper's Table 3, with three
seeds, in one pass in steps of several rows at a higher rate (`SETTINGS`). Beside them stand the
models themselves and the demo's linear, TIES, and task arithmetic with the lambda that its sweep
found best on the development split. Prints a Markdown table of the test split: the three H's and
their mean, with standard deviations over seeds (or, of one model, standard errors in brackets), and
what each merge took: evaluations, steps and tokens. What is finished is kept, so a run that was
stopped goes on.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pipelines.config import load_config
from pipelines.dam import DamConfig, dam_in_turn, plan_dam
from pipelines.evaluate import EvaluateConfig, evaluate
from pipelines.report.plots import empty_figure, saved
from ray_jobs.session import ray_session

STRENGTHS = ("helpful", "honest", "harmless")
SEEDS = (0, 1, 2)
COLUMNS = ("helpfulness", "honesty", "harmlessness", "average")
REG: dict[str, Any] = {"cosine": 0.0}  # without the others
COSINE: dict[str, Any] = {"l1": 0.0, "l2": 0.0}
SETTINGS = {"rows_per_set": 32, "learning_rate": 0.01}
PLAIN = REG | COSINE
OBJECTIVES: dict[str, dict[str, Any]] = {
    "KL": PLAIN,
    "KL + Reg": REG,
    "KL + Cosine": COSINE,
    "KL + Cosine + Reg": {},
    "MSE + Cosine": {"loss": "mse", **COSINE},
    "Entropy": {"loss": "entropy", **PLAIN},
    "Entropy + Cosine": {"loss": "entropy", **COSINE},
}


@dataclass(frozen=True)
class Row:
    """A line of the table: the models of an entry, one for each seed, and what one of them took."""

    name: str
    models: tuple[str, ...]
    evaluations: int = 0
    steps: int = 0
    tokens: int = 0


def config_of(demo: Path, objective: str, seed: int) -> DamConfig:
    """The training with an objective and a seed."""
    models = [
        {
            "model": demo / "models" / f"dpo-{name}",
            "data": {
                "path": demo / "world" / "data" / "preferences" / f"{name}.jsonl",
                "columns": {"completion": "chosen"},
            },
        }
        for name in STRENGTHS
    ]
    fields = {"base_model": demo / "models" / "sft", "models": models, "dtype": "float32"}
    return DamConfig.model_validate({**fields, **SETTINGS, **OBJECTIVES[objective], "seed": seed})


def learned(demo: Path, out: Path) -> tuple[list[Row], dict[str, Path]]:
    """Train all objectives and seeds; returns their rows and models."""
    runs, rows = {}, []
    for objective in OBJECTIVES:
        names = []
        for seed in SEEDS:
            name = objective.lower().replace(" + ", "-") + f"-{seed}"
            runs[name] = config_of(demo, objective, seed)
            names.append(name)
        plan = plan_dam(runs[names[0]], out / ".poise-cache")
        tokens = sum(int(table.lengths.sum()) for table in plan.tables.values())  # of one pass
        rows.append(Row(f"DAM, {objective}", tuple(names), 0, plan.num_steps, tokens))
    dam_in_turn([(config, out / name) for name, config in runs.items()])
    return rows, {name: out / name for name in runs}


def of_demo(demo: Path) -> tuple[list[Row], dict[str, Any]]:
    """The demo's own models: rows, and their numbers on the test split."""
    results = json.loads((demo / "results.json").read_text())["models"]
    sweep = json.loads((demo / "results" / "sweep-task_arithmetic" / "sweep.json").read_text())
    best = sweep["best"]["parameters"]["parameters.lambda"]
    rows = [Row(f"{each} model", (f"dpo-{each}",)) for each in STRENGTHS]
    rows += [Row("linear", ("linear",)), Row("TIES", ("ties",))]
    name = f"task arithmetic, lambda {best:g}: the sweep's best"
    rows.append(Row(name, ("task_arithmetic",), evaluations=len(sweep["trials"])))
    return rows, {name: {"groups": entry} for name, entry in results.items()}


def main() -> None:
    """Train, search, measure, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("demo", nargs="?", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("runs/dam-study"))
    parser.add_argument("--plot", type=Path, help="write a PNG")
    given = parser.parse_args()
    demo, out = given.demo.absolute(), given.out.absolute()
    if not (demo / "results.json").is_file():
        print(f"{given.demo}: no finished demo; make demo", file=sys.stderr)
        return
    with ray_session():
        rows, models = learned(demo, out)
        test = load_config(demo / "configs" / "evaluate-test.yaml", EvaluateConfig)
        found = evaluate(test.model_copy(update={"models": models}), out / "test")["models"]
    own, numbers = of_demo(demo)
    print_table([*own, *rows], found | numbers)
    if given.plot is not None:
        given.plot.write_bytes(plot([*own, *rows], found | numbers))


def print_table(rows: list[Row], found: dict[str, Any]) -> None:
    """The Markdown table."""
    print(f"| merge | {' | '.join(COLUMNS)} | evaluations | steps | tokens |")
    print("|---" * (len(COLUMNS) + 4) + "|")
    for row in rows:
        cells = []
        for column in COLUMNS:
            values = [found[name]["groups"][column]["value"] for name in row.models]
            error = f"({found[row.models[0]]['groups'][column]['stderr']:.1f})"
            spread = error if len(values) == 1 else f"± {stdev(values):.1f}"
            cells.append(f"{mean(values):.1f} {spread}")
        numbers = [f"{each:,}" for each in (row.evaluations, row.steps, row.tokens)]
        print(f"| {row.name} | {' | '.join([*cells, *numbers])} |")


def plot(rows: list[Row], found: dict[str, Any]) -> bytes:
    """The mean of the three H's of each model, by line of the table, as PNG."""
    figure = empty_figure(7.0, 0.6 + 0.26 * len(rows))
    axes = figure.add_subplot()
    for place, row in enumerate(rows):
        groups = [found[name]["groups"]["average"] for name in row.models]
        values = [each["value"] for each in groups]
        errors = [each["stderr"] for each in groups]
        colour = "#0072b2" if row.steps else "#d55e00" if row.evaluations else "#222222"
        axes.errorbar(
            values,
            [place] * len(values),
            xerr=errors,
            fmt="o",
            ms=4,
            lw=0.8,
            alpha=0.7,
            color=colour,
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("mean of the three H's on the test split, with standard errors", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    return saved(figure)["png"]


if __name__ == "__main__":
    main()
