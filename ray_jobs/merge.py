"""`poise merge`: merge checkpoints without training."""

import os
import sys
from pathlib import Path

from pipelines.merge import MergeConfig, load_merge_config, merge, output_place, plan_merge
from ray_jobs.session import ray_session


def run_merge(
    config_path: Path, out: str | None, overrides: list[str], *, plan: bool, force: bool
) -> None:
    """Run the merge of a config, or show what it would do."""
    config = load_merge_config(config_path, overrides)
    if plan:
        planned = plan_merge(config)
        num_elements = sum(t.num_elements for t in planned.tensors.values())
        print(
            f"method          {config.merge_method}: {config.method.summary}\n"
            f"models          {len(planned.models)}"
            f"{' and a base' if config.uses_base else ''}\n"
            f"parameters      {num_elements:,}\n"
            f"tensors         {len(planned.layout.tensors)}\n"
            f"to be read      {planned.num_input_bytes:,} bytes\n"
            f"to be written   {planned.layout.num_bytes:,} bytes "
            f"in {len(planned.layout.headers)} file(s)\n"
            f"work items      {len(planned.items)}"
        )
        return
    assert out is not None
    place = output_place(out, config.storage)
    for notice in config.notices():
        print(notice, file=sys.stderr)
    if runs_on_ray(config):
        plan_merge(config)  # every input is looked at before Ray starts
        with ray_session():
            merge(config, place, force=force, executor="ray")
    else:
        merge(config, place, force=force, executor="local")
    print(f"merged model: {place}", file=sys.stderr)


def runs_on_ray(config: MergeConfig) -> bool:
    """Whether a merge goes to Ray: where it says so, or where a cluster is there anyway.

    On one machine a merge takes less time than a cluster's start.
    """
    if config.executor != "auto":
        return config.executor == "ray"
    ray = sys.modules.get("ray")
    return bool(os.environ.get("RAY_ADDRESS")) or (ray is not None and ray.is_initialized())
