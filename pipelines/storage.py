"""Where results live: a relative output path joined to the config's `storage`."""

import os
from pathlib import Path

from pipelines.errors import InputError

# Ray sets this in every process of a submitted job; the job's working copy vanishes with it.
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def resolve_output(output: str | Path, storage: str | Path | None) -> Path:
    """The absolute place of an output.

    An absolute `output` stands as it is. A relative one is below `storage`, or below the working
    directory when there is no storage and the working directory lasts.

    Raises:
        InputError: a relative output without storage inside a submitted Ray job.
    """
    output = Path(output).expanduser()
    if output.is_absolute():
        return output
    if storage is not None:
        return Path(storage).expanduser().absolute() / output
    if JOB_VARIABLE in os.environ:
        raise InputError(
            f"output {str(output)!r}: relative, inside a Ray job whose working copy vanishes; "
            "give an absolute path, or `storage:` in the config"
        )
    return output.absolute()
