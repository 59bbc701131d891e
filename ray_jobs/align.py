"""`poise align`: preference training under Ray Train."""

import sys
from dataclasses import fields
from pathlib import Path

import numpy as np

from pipelines.config import load_config
from pipelines.provenance import read_record
from pipelines.rounding import rounding_lines
from pipelines.storage import resolve_output
from pipelines.train import AlignConfig, align, check_inputs, plan_alignment, remarks
from pipelines.train.data import TokenTable, prompts_of
from pipelines.train.memory import estimate_memory, shape_of
from pipelines.train.models import with_folders
from pipelines.train.run import Plan
from ray_jobs.session import ray_session


def run_align(
    config_path: Path, out: Path, overrides: list[str], *, plan: bool, force: bool
) -> None:
    """Run the training of a config, or show its plan."""
    config = load_config(config_path, AlignConfig, overrides)
    if plan:
        print(describe_plan(config))
        return
    out = resolve_output(out, config.storage)
    check_inputs(config)  # before Ray starts, which takes seconds
    with ray_session():
        align(config, out, force=force)
    for line in rounding_lines(read_record(out), "save.dtype: float32"):
        print(line, file=sys.stderr)
    print(f"aligned model: {out}", file=sys.stderr)


def describe_plan(config: AlignConfig) -> str:
    """The plan of a run and its memory, as lines with a name and a value."""
    planned = plan_alignment(config)
    config = planned.config
    counts = planned.table.counts
    shape = shape_of(config.model, config.head)
    memory = estimate_memory(shape, config, int(planned.table.lengths.max()))
    lines = {
        "objective": f"{config.objective.label}, optimizer {config.optimizer.name}",
        "strategy": f"{config.strategy} on {config.num_workers} worker(s), {config.precision}",
        "parameters": f"{shape.num_parameters:,}",
        "rows": f"{planned.table.num_rows:,} of {counts.rows:,} ({counts.bad} bad, "
        f"{counts.dropped} dropped, {counts.prompts_cut} prompts cut"
        f"{counts.left_out_in_words()})",
        **_lines_about_data(planned.table),
        **_line_about_held_out_rows(planned),
        "steps": f"{planned.num_steps:,} of {config.global_batch_size} rows",
        "tokens": f"about {planned.num_tokens:,}",
        "memory": f"about {_gigabytes(memory.total)} on each worker",
    }
    lines |= {f"  {f.name}": _gigabytes(getattr(memory, f.name)) for f in fields(memory)}
    found = [f"{name:<15} {value}" for name, value in lines.items()]
    told = [*planned.remarks(), *remarks(with_folders(config))]
    return "\n".join([*found, *(f"note: {line}" for line in told)])


def _lines_about_data(table: TokenTable) -> dict[str, str]:
    """What is remarkable about the rows, and the part of each of several sets."""
    lines = {}
    for each in table.sets:
        dimension = f", {each.dimension}" if each.dimension else ""
        lines[f"  {each.name}"] = f"{each.rows:,} from {each.available:,} rows{dimension}"
    counts = table.counts
    told = {
        "prompts": f"{counts.repeated_prompts:,} rows have the prompt of an earlier row"
        if counts.repeated_prompts
        else "",
        "  shared": f"{counts.shared_prompts:,} prompts are in more than one set"
        if counts.shared_prompts
        else "",
        "responses": f"{counts.prompts_in_responses:,} rows repeat the prompt in a response"
        if counts.prompts_in_responses
        else "",
    }
    lines |= {name: text for name, text in told.items() if text}
    if (weights := table.weights) is not None:
        lines["weights"] = (
            f"{weights.min():.4g} to {weights.max():.4g}, {weights.mean():.4g} on average"
        )
    named, metadata = counts.unused_columns()
    if named or metadata:
        parts = [", ".join(named) or "none but metadata"]
        parts += [f"metadata: {', '.join(metadata)}"] if metadata else []
        lines["columns unused"] = "; ".join(parts)
    return lines


def _line_about_held_out_rows(planned: Plan) -> dict[str, str]:
    """How many there are, and what becomes of them."""
    if planned.held_out is None or planned.config.evaluation is None:
        return {}
    count, num_prompts = planned.held_out.num_rows, len(np.unique(prompts_of(planned.held_out)))
    rows = f"{count:,} rows of {num_prompts:,} prompts"
    return {"held out": f"{rows}, {planned.config.evaluation.in_words}"}


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
