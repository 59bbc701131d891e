"""`poise dam`: a merge whose coefficients are learned under Ray Train."""

import os
import sys
from dataclasses import fields
from pathlib import Path

from pipelines.config import load_config
from pipelines.dam import DamConfig, check_dam, dam, estimate_memory, plan_dam
from pipelines.provenance import read_record
from pipelines.rounding import rounding_lines
from pipelines.storage import resolve_output
from ray_jobs.session import ray_session


def run_dam(config_path: Path, out: Path, overrides: list[str], *, plan: bool, force: bool) -> None:
    """Run the training and the merge of a config, or show the plan."""
    config = load_config(config_path, DamConfig, overrides)
    if plan:
        print(describe_plan(config))
        return
    out = resolve_output(out, config.storage)
    check_dam(config)  # before Ray starts, which takes seconds
    with ray_session():
        dam(config, out, force=force)
    for line in rounding_lines(read_record(out), "dtype: float32"):
        print(line, file=sys.stderr)
    print(f"merged model: {out}", file=sys.stderr)


def describe_plan(config: DamConfig) -> str:
    """The plan of a run and its memory, as lines with a name and a value."""
    planned = plan_dam(config)
    config = planned.config
    longest = max(int(table.lengths.max()) for table in planned.tables.values())
    memory = estimate_memory(config, planned.roles, longest)
    tokens = [float(table.lengths.mean()) for table in planned.tables.values()]
    total = sum(tokens) * config.rows_per_set * planned.num_steps
    lines = {
        "loss": f"{config.loss}, cosine {config.cosine_weight:g} a pair, l1 {config.l1:g}, "
        f"l2 {config.l2:g}",
        "experts": f"{len(config.experts)} in {config.precision}",
        "coefficients": f"{memory.coefficients // 16:,}",
        **{
            f"  {config.sets[place].title}": f"{table.num_rows:,} rows"
            for place, table in planned.tables.items()
        },
        "steps": f"{planned.num_steps:,} of {config.rows_per_set} row(s) of each set",
        "tokens": f"about {round(total):,}",
        "memory": f"about {_gigabytes(memory.total)}",
    }
    lines |= {f"  {f.name}": _gigabytes(getattr(memory, f.name)) for f in fields(memory)}
    found = [f"{name:<15} {value}" for name, value in lines.items()]
    here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if memory.total > here:
        found.append(f"note: this machine has {_gigabytes(here)}; fewer experts or bf16 need less")
    return "\n".join(found)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
