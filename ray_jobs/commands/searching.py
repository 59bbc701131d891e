"""Searches: `sweep` and `expo`."""

from pathlib import Path
from typing import Annotated

import typer

from ray_jobs.commands.options import AsJson, ConfigPath, Force, Out, Overrides, Plan

app = typer.Typer()


@app.command(epilog="Example: `poise sweep configs/demo/sweep/expo.yaml --out runs/sweep`")
def sweep(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Out = Path("runs/sweep"),
    plan: Annotated[bool, typer.Option("--plan", help="only show the space and the plan")] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="few trials, prompts and steps, to try a config")
    ] = False,
    more: Annotated[
        int | None,
        typer.Option("--continue", metavar="N", min=1, help="add N trials to a finished study"),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Search a space of merges, measured in memory, or of trainings; the best is written."""
    from ray_jobs.sweep import run_sweep

    run_sweep(
        config,
        out,
        overrides or [],
        only_plan=plan,
        smoke=smoke,
        more=more or 0,
        force=force,
        as_json=as_json,
    )


@app.command(epilog="Example: `poise expo configs/studies/expo.yaml --out runs/expo`")
def expo(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Out = Path("runs/expo"),
    plan: Plan = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="8 prompts, to try a config")] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Choose ExPO's alpha, or another number of a merge, by a reward model; write the winner."""
    from ray_jobs.expo import run_expo

    run_expo(
        config, out, overrides or [], only_plan=plan, smoke=smoke, force=force, as_json=as_json
    )
