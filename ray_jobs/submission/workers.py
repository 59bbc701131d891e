"""Waiting for a cluster that grows: a command sees at its start which nodes there are, and would
run on CPUs where its GPUs are still to come.
"""

import json
import os
import time

from pipelines.errors import InputError
from ray_jobs.submission.head import tell

VARIABLE = "POISE_WORKERS"  # resources by name that the cluster shall have, as JSON
REMIND_S = 30.0


def await_workers() -> None:
    """Wait until the cluster that this process has joined has what `VARIABLE` asks for.

    Nodes come because of a placement group, which Ray removes with this process, and which is
    removed as soon as they are there: work that begins at once finds them.

    Raises:
        InputError: the variable is no JSON of whole numbers.
    """
    wanted = _wanted()
    if not wanted:
        return
    import ray
    from ray.util import placement_group, remove_placement_group

    bundles = [{name: 1.0} for name, amount in wanted.items() for _ in range(amount)]
    group = placement_group(bundles, strategy="PACK")
    began, pause = time.monotonic(), 1.0
    try:
        while not group.wait(pause):
            pause = REMIND_S
            has = ", ".join(f"{n} {ray.cluster_resources().get(n, 0):g}" for n in wanted)
            named = ", ".join(f"{name} {amount}" for name, amount in wanted.items())
            tell(f"waiting, {time.monotonic() - began:.0f} s now, for {named}; there is {has}")
    finally:
        remove_placement_group(group)


def _wanted() -> dict[str, int]:
    text = os.environ.get(VARIABLE, "")
    if not text:
        return {}
    try:
        wanted = json.loads(text)
        if all(type(amount) is int and amount > 0 for amount in wanted.values()):
            return dict(wanted)
    except (json.JSONDecodeError, AttributeError):
        pass
    raise InputError(f'{VARIABLE}: found {text!r}; allowed: whole numbers, as {{"GPU": 4}}')
