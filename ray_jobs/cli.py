"""The command `poise`: parse arguments, call one entry point, turn errors into exit statuses."""

import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pipelines.errors import InputError
from ray_jobs.session import log_directory, quiet_environment

app = typer.Typer(
    name="poise",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Align, merge, evaluate and serve language models on Ray, to improve one strength without "
    "losing another. Start with `poise demo`.",
)


def _no_address(out: Path | None) -> Path | None:
    """Raise InputError for an address, which would be taken for the name of a folder here."""
    from pipelines.storage import is_address

    if out is not None and is_address(out):
        raise InputError(
            f"--out: found the address {out}; allowed: a folder (`poise merge` and "
            "`poise evaluate` alone write to addresses)"
        )
    return out


ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="a YAML file; see configs/")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="override fields of the config")
]
INTERRUPTED = 130
Out = Annotated[Path, typer.Option("--out", callback=_no_address, help="where the result goes")]
Force = Annotated[
    bool, typer.Option("--force", help="replace an existing result when the new one is complete")
]
Plan = Annotated[bool, typer.Option("--plan", help="only show the plan and its cost")]
AsJson = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]
Address = Annotated[
    str | None, typer.Argument(metavar="[ADDRESS]", help="of the head, as http://HOST:8265")
]
AFTER_DASHES = "poise.after_dashes"


class CommandAfterDashes(TyperCommand):
    """A command that leaves what follows `--` as it is, in `context.meta[AFTER_DASHES]`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse what stands before `--`."""
        at = args.index("--") if "--" in args else len(args)
        ctx.meta[AFTER_DASHES] = args[at + 1 :]
        return super().parse_args(ctx, args[:at])


@app.command(epilog="Example: `poise demo --smoke --out runs/first --seed 1`")
def demo(
    out: Annotated[
        Path, typer.Option("--out", callback=_no_address, help="folder of the run")
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
        Path, typer.Option("--out", callback=_no_address, help="folder of the run")
    ] = Path("runs/real"),
    force: Force = False,
) -> None:
    """A real small model from packages: aligned twice, merged, measured (`make real`)."""
    from ray_jobs.real import run_real

    run_real(out, overrides or [], force=force)


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
            "--out", callback=_no_address, help="a file of its end's form: .parquet, .jsonl"
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


@app.command(epilog="Example: `poise report runs/demo`, `poise report runs/test --out page.html`")
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="folders of `poise demo`, or of `poise evaluate`"),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", callback=_no_address, help="folder, or NAME.html; default the run's own"
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


@app.command(epilog="Example: `poise serve serve.yaml`, `poise serve runs/demo/models/linear`")
def serve(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG|MODEL... [KEY=VALUE]...",
            help="a YAML file; or checkpoints, also on the hub; then fields of the config",
        ),
    ],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=1, max=65535)] = 8000,
) -> None:
    """Serve answers and rewards over HTTP (OpenAI's API), each signed by its weights."""
    from ray_jobs.serve import run_serve

    paths = [Path(word) for word in words if "=" not in word]
    run_serve(paths, [word for word in words if "=" in word], host=host, port=port)


@app.command(
    epilog="Example: `poise deploy linear runs/ties --url http://127.0.0.1:8000 --canary 10`"
)
def deploy(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="of a served model")] = None,
    path: Annotated[
        Path | None, typer.Argument(metavar="PATH", help="the checkpoint that it is to mean")
    ] = None,
    url: Annotated[
        str, typer.Option(help="of the server, as http://HOST:PORT")
    ] = "http://127.0.0.1:8000",
    canary: Annotated[
        int | None, typer.Option(help="percent of the requests; all", min=1, max=99)
    ] = None,
    promote: Annotated[
        str | None, typer.Option(metavar="NAME", help="let it mean its canary")
    ] = None,
    rollback: Annotated[
        str | None, typer.Option(metavar="NAME", help="end its canary, or its last change")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="with the server's key; default POISE_DEPLOY_KEY")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Change what a name means on a running server, which goes on answering."""
    from ray_jobs.deploy import Asked, run_deploy

    asked = Asked(name, path, canary, promote, rollback)
    if not run_deploy(asked, url, key_file=key_file, as_json=as_json):
        raise typer.Exit(1)


@app.command(epilog="Example: `echo 'reverse a b c' | poise chat runs/demo/models/linear`")
def chat(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="a checkpoint, or a name on the hub or the server"),
    ],
    compare: Annotated[
        str | None, typer.Option(metavar="OTHER", help="show the answers of another, too")
    ] = None,
    url: Annotated[str | None, typer.Option(help="of a server, as http://HOST:PORT")] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="with the server's key; default POISE_API_KEY")
    ] = None,
    conversation: Annotated[
        bool, typer.Option("--conversation", help="a line follows on those before it")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(help="of an answer; default 256, or the server's own", min=1)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a model in the terminal, here or on a server, or to two side by side."""
    from ray_jobs.chat import run_chat

    if not run_chat(
        [model] if compare is None else [model, compare],
        url=url,
        key_file=key_file,
        conversation=conversation,
        max_tokens=max_tokens,
        as_json=as_json,
    ):
        raise typer.Exit(1)


@app.command(
    cls=CommandAfterDashes,
    epilog="Example: `poise submit http://head:8265 -- poise merge /shared/ties.yaml ties "
    "storage=/shared/runs`",
)
def submit(
    context: typer.Context,
    address: Address = None,
    attach: Annotated[
        str | None, typer.Option(metavar="ID", help="follow this job instead of submitting one")
    ] = None,
    cpus: Annotated[float, typer.Option(min=0, help="that the command itself needs")] = 0,
    gpus: Annotated[float, typer.Option(min=0, help="that the command itself needs")] = 0,
    memory: Annotated[float, typer.Option(min=0, help="GB that the command itself needs")] = 0,
    resource: Annotated[
        list[str] | None, typer.Option(metavar="NAME=N", help="of your own; repeatable")
    ] = None,
    workers: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=N", help="to await for its workers, as GPU=8; repeatable"),
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="submit although no node could run it now")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="do not follow the job")] = False,
    working_dir: Annotated[Path, typer.Option(help="what the job takes along")] = Path(),
    limit_mb: Annotated[int, typer.Option(min=1, max=500, help="of what it takes along")] = 100,
) -> None:
    """Run a command, after `--`, on a cluster as a Ray job; ends with the command's own status."""
    from ray_jobs.submission.look import Asked
    from ray_jobs.submit import Manner, amounts, run_attach, run_submit, whole_amounts

    command = context.meta[AFTER_DASHES]
    if (attach is None) == (not command):
        raise InputError("submit: give either -- COMMAND... or --attach ID")
    if attach is not None:
        sys.exit(run_attach(address, attach))  # typer would take 130 for a Ctrl-C of its own
    asked = Asked(cpus, gpus, memory, amounts("--resource", resource or []))
    needed = whole_amounts("--workers", workers or [])
    manner = Manner(working_dir, limit_mb, needed, wait=wait, detach=detach)
    sys.exit(run_submit(address, command, asked, manner))


@app.command(epilog="Example: `poise jobs` or `poise jobs stop poise-12ab`")
def jobs(
    action: Annotated[str | None, typer.Argument(metavar="[stop]")] = None,
    job: Annotated[str | None, typer.Argument(metavar="[ID]")] = None,
    address: Annotated[str | None, typer.Option(help="of the head, as http://HOST:8265")] = None,
    as_json: AsJson = False,
) -> None:
    """The jobs of a cluster; `stop ID` ends one."""
    from ray_jobs.jobs import run_jobs

    run_jobs(action, job, address, as_json=as_json)


def main() -> None:
    """Run the command line and exit: 0 for success, 2 for bad input, 130 after Ctrl-C, else 1."""
    quiet_environment()
    try:
        status = app(standalone_mode=False)
        if status == INTERRUPTED:  # typer returns this after Ctrl-C
            raise KeyboardInterrupt
        if status:  # of a command that did a part of its work
            sys.exit(status)
    except InputError as error:
        _stop(f"poise: {error}", 2)
    except (KeyboardInterrupt, typer.Abort):
        _stop("poise: interrupted; run the same command again to go on", INTERRUPTED)
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # click's own usage errors
            error.show()
            sys.exit(error.exit_code)
        place = _write_log(error)
        first = (str(error).strip().splitlines() or [""])[0]
        _stop(f"poise: {type(error).__name__}: {first[:300]}\npoise: log: {place}", 1)


def _stop(message: str, status: int) -> None:
    """Print a message and exit with `status`."""
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def _write_log(error: Exception) -> str:
    """Write the traceback to a file; returns its path, and the folder of Ray's logs if known."""
    ray_logs = log_directory()
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"poise-{os.getpid()}-", suffix=".log", delete=False
    ) as file:
        file.writelines(traceback.format_exception(error))
    return f"{file.name}, Ray's: {ray_logs}" if ray_logs else file.name


if __name__ == "__main__":
    main()
