"""Merging, and what is known of weights."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.errors import InputError
from ray_jobs.commands.options import AsJson, ConfigPath, Force, Overrides, Plan

app = typer.Typer()


@app.command(epilog="Example: `poise merge configs/demo/merge/ties.yaml runs/ties`")
def merge(
    config: ConfigPath,
    out: Annotated[str | None, typer.Argument(metavar="OUT", help="folder or s3://...")] = None,
    overrides: Overrides = None,
    out_option: Annotated[str | None, typer.Option("--out", help="instead of OUT")] = None,
    plan: Plan = False,
    force: Force = False,
) -> None:
    """Merge checkpoints without training (mergekit's YAML or our own)."""
    from ray_jobs.merge import run_merge

    given = list(overrides or [])
    if out is not None and "=" in out:
        given, out = [out, *given], None
    if (out is None) == (out_option is None) and not (plan and out is None):
        raise InputError("OUT: give it once, as the second argument or as --out")
    run_merge(config, out or out_option, given, plan=plan, force=force)


@app.command(epilog="Example: `poise extract-lora runs/sft runs/dpo --rank 16 --out runs/lora`")
def extract_lora(
    base: Annotated[str, typer.Argument(metavar="BASE", help="a checkpoint, or a name on the hub")],
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="a model that was made from it, also on the hub")
    ],
    out: Annotated[Path, typer.Option("--out", help="folder of the adapter")],
    rank: Annotated[
        int | None, typer.Option(help="of each module; with --energy, the largest")
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="use the smallest rank that keeps this share of the squared norm, (0, 1]"
        ),
    ] = None,
    whole: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE", help="save it unchanged, e.g. lm_head; may be repeated"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="of the factors: float32, bfloat16 or float16; default TUNED's"),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="refuse if the adapter would leave out a change")
    ] = False,
    force: Force = False,
) -> None:
    """Write the difference of two checkpoints as a LoRA adapter (truncated SVD)."""
    from ray_jobs.extract import run_extract

    settings = {"base": base, "tuned": tuned, "rank": rank, "energy": energy, "dtype": dtype}
    run_extract({**settings, "whole": whole or []}, out, force=force, strict=strict)


@app.command(epilog="Example: `poise methods ties`")
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="a merge method")] = None,
    as_json: AsJson = False,
) -> None:
    """The merge methods with their parameters."""
    from ray_jobs.methods import run_methods

    run_methods(name, as_json=as_json)


@app.command(epilog="Example: `poise diff runs/a runs/b --base runs/sft`")
def diff(
    a: Annotated[
        str | None, typer.Argument(metavar="A", help="a checkpoint or adapter, or ORG/NAME")
    ] = None,
    b: Annotated[str | None, typer.Argument(metavar="B", help="another one")] = None,
    base: Annotated[str | None, typer.Option("--base", help="their common ancestor")] = None,
    coefficients: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="instead of A and B: of `poise dam`; of several the mean"
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="with --coefficients: write a heat map (PNG)")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare two models tensor by tensor before merging: norms, cosine, sign conflicts."""
    if coefficients:
        if a is not None or base is not None:
            raise InputError("--coefficients: found with A, B or --base; allowed: alone")
        from ray_jobs.coefficients import run_coefficients

        run_coefficients(coefficients, plot, as_json=as_json)
        return
    if a is None or b is None:
        raise InputError("A, B: give two models, or --coefficients FILE")
    if plot is not None:
        raise InputError("--plot: has no effect without --coefficients")
    from ray_jobs.diff import run_diff

    run_diff(a, b, base, as_json=as_json)


@app.command(epilog="Example: `poise verify runs/ties --again`")
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a model that Poise made")],
    again: Annotated[bool, typer.Option("--again", help="make it again and compare")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a model, and the inputs of a merge or extraction, against the digests in its record."""
    from ray_jobs.verify import run_verify

    run_verify(folder, again=again, as_json=as_json)


@app.command(epilog="Example: `poise lineage runs/ties --in runs`")
def lineage(
    what: Annotated[
        str,
        typer.Argument(metavar="DIGEST", help="of weights, or its beginning; or a model's folder"),
    ],
    folder: Annotated[Path, typer.Option("--in", help="where records are looked for")] = Path(),
    as_json: AsJson = False,
) -> None:
    """Tell from records what weights are: merge, parents, training runs, data, evaluations."""
    from ray_jobs.lineage import run_lineage

    run_lineage(what, folder, as_json=as_json)
