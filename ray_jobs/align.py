"""`poise align`: preference training under Ray Train."""

import sys
from pathlib import Path

from pipelines.config import load_config
from pipelines.storage import resolve_output
from pipelines.train import AlignConfig, align, plan_alignment
from ray_jobs.session import ray_session


def run_align(
    config_path: Path, out: Path, overrides: list[str], *, plan: bool, force: bool
) -> None:
    """Run the training of a config, or show what it would do."""
    config = load_config(config_path, AlignConfig, overrides)
    if plan:
        planned = plan_alignment(config)
        print(
            f"objective       {config.objective.name}, optimizer {config.optimizer.name}\n"
            f"strategy        {config.strategy} on {config.num_workers} worker(s)\n"
            f"parameters      {planned.num_parameters:,}\n"
            f"rows            {planned.table.num_rows:,}\n"
            f"steps           {planned.num_steps:,} of {config.global_batch_size} rows\n"
            f"tokens          about {planned.num_tokens:,}"
        )
        return
    out = resolve_output(out, config.storage)
    with ray_session():
        align(config, out, force=force)
    print(f"aligned model: {out}", file=sys.stderr)
