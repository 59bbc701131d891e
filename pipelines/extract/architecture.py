"""What each tensor of a model is: read from the modules that transformers makes of its config, on
the meta device, not from names.
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
        prefix: of the names without the head, which some checkpoints leave out.
        modules: all names, as PEFT sees them.
        leaves: those that have tensors and no module below them.
        linear: the linear layers but the head, and whether their weight is stored as (in, out).
        tensors: the kind of each one that a checkpoint has, were it not carried by a linear layer.
        tied: tensors that are another one: its name.
    """

    name: str
    prefix: str
    modules: list[str]
    leaves: list[str]
    linear: dict[str, bool]
    tensors: dict[str, Kind]
    tied: dict[str, str]

    def names(self, source: Source) -> dict[str, str]:
        """The tensors of a source by the architecture's names; without those that are tied."""
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
        InputError: it is none of a causal language model that transformers knows.
    """
    from transformers.pytorch_utils import Conv1D

    from pipelines.train.strategies.loading import meta_model, tied_names

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
