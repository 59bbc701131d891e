"""The kind of each tensor of a model, by the class of its module: transformers builds the modules
from the config, on the meta device.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from pipelines.checkpoints import Source

Kind = Literal["embeddings", "head", "norms", "biases", "other tensors"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """The modules and tensors of a causal language model.

    Attributes:
        name: of the class.
        prefix: of all names but the head's; some checkpoints omit it.
        modules: the names of all modules, as PEFT finds them.
        leaves: the modules with tensors and without submodules.
        linear: the linear layers except the head, and whether the weight is stored as (in, out).
        tensors: each tensor of a checkpoint, and its kind.
        tied: each tensor that is tied to another, and the name of that one.
    """

    name: str
    prefix: str
    modules: list[str]
    leaves: list[str]
    linear: dict[str, bool]
    tensors: dict[str, Kind]
    tied: dict[str, str]

    def names(self, source: Source) -> dict[str, str]:
        """The tensors of a source by the architecture's names, without tied ones."""
        found = {}
        for name in source.names():
            whole = f"{self.prefix}.{name}"
            own = whole if name not in self.tensors and whole in self.tensors else name
            if own not in self.tied:
                found[own] = name
        return found

    def tensors_in(self, module: str) -> list[str]:
        """The tensors that a module has itself."""
        return [name for name in self.tensors if name.rpartition(".")[0] == module]


def architecture_of(path: Path) -> Architecture:
    """The architecture of a checkpoint, from its config alone.

    Raises:
        InputError: it is not a causal language model that transformers knows.
    """
    from transformers.pytorch_utils import Conv1D

    from pipelines.train.architecture import meta_model, tied_names

    model = meta_model(path)
    modules = dict(model.named_modules(remove_duplicate=False))
    head = model.get_output_embeddings()
    tied = {other: first for first, others in tied_names(model).items() for other in others}
    tensors = [name for name in model.state_dict() if name not in tied]
    shared = {*tied, *tied.values()}
    linear = {
        name: isinstance(module, Conv1D)
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
        if f"{name}.weight" not in shared
    }
    return Architecture(
        name=type(model).__name__,
        prefix=model.base_model_prefix,
        modules=list(modules),
        leaves=[n for n, m in modules.items() if m.state_dict() and not list(m.children())],
        linear=linear,
        tensors={name: _kind(name, modules, head) for name in tensors},
        tied=tied,
    )


def _kind(name: str, modules: dict[str, nn.Module], head: nn.Module | None) -> Kind:
    """What a tensor is, by the module that has it."""
    place, _, leaf = name.rpartition(".")
    module = modules[place]
    if isinstance(module, nn.Embedding):
        return "embeddings"
    if module is head:
        return "head"
    if leaf.endswith("bias"):
        return "biases"
    return "norms" if "norm" in type(module).__name__.lower() else "other tensors"
