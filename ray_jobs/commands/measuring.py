"""Evaluations, scores and reports."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.errors import InputError
from ray_jobs.commands.options import AsJson, ConfigPath, Force, Overrides, Plan, no_address

app = typer.Typer()


@app.command(epilog="Example: `poise tasks arc_easy` or `poise tasks --include-path my_tasks`")
def tasks(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="tasks, groups or tags")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(help="a folder of YAML files; default the library's own tasks")
    ] = None,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="run functions that the files name")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tasks of lm-evaluation-harness: their documents, splits, requests and metrics."""
    from ray_jobs.tasks import run_tasks

    run_tasks(names or [], include_path, allow_code=allow_code, as_json=as_json)


@app.command(epilog="Example: `poise evaluate configs/demo/evaluate-test.yaml --out runs/test`")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Annotated[str, typer.Option("--out", help="folder or s3://...")] = "runs/evaluation",
    plan: Plan = False,
    force: Annotated[bool, typer.Option("--force", help="measure all again")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure models on tasks; print the matrix with standard errors."""
    from ray_jobs.evaluate import run_evaluate

    if not run_evaluate(config, out, overrides or [], only_plan=plan, force=force, as_json=as_json):
        raise typer.Exit(1)


@app.command(epilog="Example: `poise results runs/test --compare ties,sft`")
def results(
    places: Annotated[
        list[str], typer.Argument(metavar="OUT...", help="of `poise evaluate`: folders, s3://...")
    ],
    model: Annotated[list[str] | None, typer.Option(help="only this model; repeatable")] = None,
    task: Annotated[list[str] | None, typer.Option(help="only this task or group")] = None,
    compare: Annotated[
        str | None, typer.Option(metavar="A,B", help="the differences of two models, by document")
    ] = None,
    undominated: Annotated[
        str | None,
        typer.Option(metavar="GROUP,GROUP", help="which models no other beats in these groups"),
    ] = None,
    baselines: Annotated[
        str | None,
        typer.Option(metavar="MERGE=A,B", help="a merge beside the best and the mean of A, B"),
    ] = None,
    others: Annotated[
        str | None, typer.Option(metavar="C,D", help="with --baselines: and beside these")
    ] = None,
    relations: Annotated[
        str | None,
        typer.Option(metavar="START", help="which groups collaborate or conflict, by --trained"),
    ] = None,
    trained: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL=GROUP", help="trained from START for a group; repeatable"),
    ] = None,
    form: Annotated[str, typer.Option(help="table, csv, latex or json, on stdout")] = "table",
    harness: Annotated[
        Path | None, typer.Option(help="write lm-evaluation-harness's files into this folder")
    ] = None,
) -> None:
    """List, compare and export finished evaluations."""
    from ray_jobs.results import run_results
    from ray_jobs.studies import Asked

    run_results(
        places,
        models=model or [],
        tasks=task or [],
        compare=compare,
        form=form,
        harness=harness,
        asked=Asked(undominated, baselines, others, relations, trained or []),
    )


@app.command(epilog="Example: `poise score runs/reward pairs.jsonl --out runs/scores.parquet`")
def score(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="a sequence classification model, also on the hub"),
    ],
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="pairs, responses or conversations, also on the hub"),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="how both are read: reader, split, columns, subset, cluster, too_long, "
            "max_bad_share, limit, engine.name, engine.dtype, ... (docs/rewards.md)",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", callback=no_address, help="a file of its end's form: .parquet, .jsonl"
        ),
    ] = Path("runs/scores.parquet"),
    head: Annotated[
        str | None, typer.Option(help="name or number of the label that is the reward")
    ] = None,
    plan: Plan = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Score responses or pairs by a reward model: raw rewards, accuracy by subset, length."""
    from ray_jobs.score import run_score

    values = {"model": str(model), "data": str(data)} | ({} if head is None else {"head": head})
    run_score(values, out, overrides or [], only_plan=plan, force=force, as_json=as_json)


@app.command(epilog="Example: `poise judges runs/judged --labels labels.jsonl`")
def judges(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="folder of `poise evaluate`")],
    labels: Annotated[
        Path | None, typer.Option(help="JSONL of id and label, to compare verdicts with")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """How judges judged: effect of order and repeats, agreement with each other and with labels."""
    from ray_jobs.judges import run_judges

    run_judges(folder, labels, as_json=as_json)


@app.command(epilog="Example: `poise report runs/demo`, `poise report runs/test --out page.html`")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="folders of `poise demo`, or of `poise evaluate`"),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", callback=no_address, help="folder, or NAME.html; default the run's own"
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="documents of each task on the page, disagreements first", min=0)
    ] = 50,
    axes: Annotated[
        str | None, typer.Option(metavar="X,Y", help="columns that the trade-off shows at first")
    ] = None,
    lower: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="less of this column or metric is better; repeatable"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the bootstrap, and among equal samples")] = 0,
    force: Force = False,
) -> None:
    """Table, plots and HTML page of finished demos; one page of evaluations."""
    from pipelines.report import Settings
    from ray_jobs.report import run_report

    pair = None if axes is None else tuple(name.strip() for name in axes.split(","))
    if pair is not None and (len(pair) != 2 or not all(pair)):
        raise InputError(f"--axes: found {axes!r}; allowed: two columns, as helpfulness,honesty")
    settings = Settings(samples=samples, seed=seed, lower=tuple(lower or ()), axes=pair)
    run_report(runs, out, force=force, settings=settings)
