"""Whole runs: the demo, a real model, pipelines and what they leave."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.errors import InputError
from ray_jobs.commands.options import AsJson, ConfigPath, Force, Overrides, no_address

app = typer.Typer()


@app.command(epilog="Example: `poise demo --smoke --out runs/first --seed 1`")
def demo(
    out: Annotated[
        Path, typer.Option("--out", callback=no_address, help="folder of the run")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="of world, training and merges")] = 0,
    smoke: Annotated[bool, typer.Option("--smoke", help="a smaller world, about 3 min")] = False,
    force: Force = False,
) -> None:
    """The whole workflow on a tiny world: train, align, merge, evaluate, choose, report."""
    from ray_jobs.demo import run_demo

    run_demo(out, seed=seed, size="smoke" if smoke else "default", force=force)


@app.command(epilog="Example: `poise real pairs=hh/harmless.jsonl.gz gsm8k=test.jsonl`")
def real(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="over configs/real/real.yaml; limit= is all"),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", callback=no_address, help="folder of the run")
    ] = Path("runs/real"),
    force: Force = False,
) -> None:
    """A real small model from packages: aligned twice, merged, measured (`make real`)."""
    from ray_jobs.real import run_real

    run_real(out, overrides or [], force=force)


@app.command(epilog="Example: `poise pipeline configs/demo/pipeline.yaml --plan`")
def pipeline(
    config: ConfigPath,
    overrides: Overrides = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="only show the stages and which of them stand")
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="replace results of another config or of other inputs"),
    ] = False,
) -> None:
    """Run stages (align, merge, evaluate, ...) that need each other, from one file."""
    from ray_jobs.pipeline import run_pipeline_file

    if not run_pipeline_file(config, overrides or [], only_plan=plan, force=force):
        raise typer.Exit(1)


@app.command(epilog="Example: `poise status runs/demo` or `poise status runs --prune`")
def status(
    storage: Annotated[
        str, typer.Argument(metavar="STORAGE", help="a folder of results, or its address")
    ],
    prune: Annotated[
        bool, typer.Option("--prune", help="show which unfinished runs are old; --yes removes")
    ] = False,
    days: Annotated[float, typer.Option(help="with --prune: not changed for so long", min=0)] = 7,
    yes: Annotated[bool, typer.Option("--yes", help="with --prune: remove them")] = False,
    as_json: AsJson = False,
) -> None:
    """What runs, what stands, what failed and why, and what it takes on the disk."""
    from ray_jobs.status import run_status

    if yes and not prune:
        raise InputError("--yes: has no effect without --prune")
    run_status(storage, prune=prune, days=days, yes=yes, as_json=as_json)
