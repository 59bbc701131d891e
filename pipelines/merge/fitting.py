"""What is written must be what its config builds: the planned tensors beside the model's class."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.checkpoints import TensorSpec
from pipelines.checkpoints.architecture import built_architecture
from pipelines.errors import InputError
from pipelines.merge.tensor import TensorMerge

NUM_LISTED = 4


def check_fitting(
    tensors: Mapping[str, TensorMerge], settings: Mapping[str, Any], home: Path
) -> list[str]:
    """Compare the planned tensors with the model that the output's config.json builds.

    Args:
        settings: the output's config.json.
        home: the folder whose config.json it began with, for messages.

    Returns:
        a line about tensors that are carried over though the model does not need them, if any.

    Raises:
        InputError: the config cannot build a model, or a tensor is missing, unexpected or wrongly
            shaped.
    """
    try:
        architecture = built_architecture(settings)
    except InputError as error:
        raise InputError(f"{home}: {error}") from None
    if architecture is None:
        return []
    specs = {name: TensorSpec(name, each.dtype, each.shape, home) for name, each in tensors.items()}
    report = architecture.try_loading(specs)
    where = f"{home / 'config.json'}: architectures: found {architecture.name}"
    if report.mismatched:
        name, found, needed = report.mismatched[0]
        raise InputError(
            f"{where}, whose {name} has shape {needed} with this config; the result would have "
            f"{found}"
        )
    if report.missing:
        raise InputError(
            f"{where}, which needs {_listed(report.missing)}; the models do not have "
            f"{'it' if len(report.missing) == 1 else 'them'}"
        )
    if report.unexpected:
        raise InputError(f"{where}, which has no tensor {_listed(report.unexpected)}")
    if not report.ignored:
        return []
    return [
        f"carried over, though a {architecture.name} does not use it: {_listed(report.ignored)}"
    ]


def integer_lines(tensors: Mapping[str, TensorMerge]) -> list[str]:
    """A line about counters and other integers, which are not merged, if there are any."""
    found = [each for each in tensors.values() if not each.dtype.is_floating_point]
    if not found:
        return []
    owner = found[0].operands[0 if found[0].base is None else -1].source.path
    return [f"integers are those of {owner}: {_listed([each.name for each in found])}"]


def _listed(names: Sequence[str]) -> str:
    """The first names, and how many there are more."""
    more = f" and {len(names) - NUM_LISTED} more" if len(names) > NUM_LISTED else ""
    return ", ".join(names[:NUM_LISTED]) + more
