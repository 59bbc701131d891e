"""Training: `align`, `export`, `dam`."""

from pathlib import Path
from typing import Annotated

import typer

from ray_jobs.commands.options import ConfigPath, Force, Out, Overrides, Plan

app = typer.Typer()


@app.command(epilog="Example: `poise align configs/demo/align/dpo-helpful.yaml --out runs/helpful`")
def align(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Out = Path("runs/align"),
    plan: Plan = False,
    force: Force = False,
) -> None:
    """Align a model under Ray Train: SFT, DPO, IPO, KTO, SimPO, ORPO and hinge."""
    from ray_jobs.align import run_align

    run_align(config, out, overrides or [], plan=plan, force=force)


@app.command(epilog="Example: `poise export runs/helpful --out runs/early --step 50`")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="OUT of the unfinished run")],
    out: Out = Path("runs/export"),
    step: Annotated[int | None, typer.Option(help="of the checkpoint; default newest")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="source, float32 or bfloat16; default the run's save.dtype")
    ] = None,
    force: Force = False,
) -> None:
    """Write a checkpoint of an unfinished run as a Hugging Face model."""
    from ray_jobs.export import run_export

    run_export(run, out, step=step, dtype=dtype, force=force)


@app.command(epilog="Example: `poise dam configs/dam.yaml --out runs/dam`")
def dam(
    config: ConfigPath,
    overrides: Overrides = None,
    out: Out = Path("runs/dam"),
    plan: Plan = False,
    force: Force = False,
) -> None:
    """Merge models by coefficients that are learned on a little of each model's data."""
    from ray_jobs.dam import run_dam

    run_dam(config, out, overrides or [], plan=plan, force=force)
