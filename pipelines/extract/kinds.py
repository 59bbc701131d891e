"""The kind of each tensor of a model, by the class of its module: transformers builds the modules
from the config, on the meta device.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import nn

from pipelines.checkpoints import ModuleView, Source
from pipelines.checkpoints.named_like import NamedLike

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["embeddings", "head", "norms", "biases", "other tensors"]
# Of models with fused experts PEFT takes layers with these names for the experts.
_NAMES_OF_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


@dataclass(frozen=True, slots=True)
class TensorKinds:
    """The modules and tensors of a causal language model.

    Attributes:
        model: on the meta device, shared.
        modules: the names of all modules, as PEFT finds them.
        leaves: the modules with tensors and without submodules.
        linear: the linear layers except the head, and whether the weight is stored as (in, out).
        parameters: matrices, one by one or for each expert, that are no layer's weight or that PEFT
            finds by their own name only; and whether they are stored as (in, out).
        tensors: each tensor of a checkpoint, and its kind.
        tied: each tensor that is tied to another, and the name of that one.
    """

    model: "PreTrainedModel"
    modules: list[str]
    leaves: list[str]
    linear: dict[str, bool]
    parameters: dict[str, bool]
    tensors: dict[str, Kind]
    tied: dict[str, str]

    @property
    def name(self) -> str:
        """The class, such as LlamaForCausalLM."""
        return type(self.model).__name__

    def by_parameters(self, source: Source) -> Source:
        """A source that has what is stored in parts as the model has it: experts as one tensor.

        Raises:
            InputError: stored tensors that cannot be put together.
        """
        parameters = ModuleView.of(source, self.model).naming.parameters
        made = {name: name for name, each in parameters.items() if each.whole is None}
        if not made:
            return source
        used = {stored for name in made for stored in parameters[name].names}
        rest = tuple(name for name in source.names() if name not in used)
        return NamedLike(ModuleView.of(source, self.model), made, {}, rest)

    def names(self, source: Source) -> dict[str, str]:
        """The tensors of a source by the model's names, without tied ones."""
        found = ModuleView.of(source, self.model).naming.parameters
        own = {stored: name for name, each in found.items() if (stored := each.whole) is not None}
        named = {own.get(name, name): name for name in source.names()}
        return {name: stored for name, stored in named.items() if name not in self.tied}

    def wrappers(self, module: str, wrapped: Iterable[str]) -> list[str]:
        """Those of some parameters that a module has itself, in its order, in which PEFT wraps the
        module once for each: the last one is outside.
        """
        chosen = set(wrapped)
        inside = self.model.get_submodule(module).named_parameters(recurse=False)
        return [name for name, _ in inside if f"{module}.{name}" in chosen]


def kinds_of(path: Path) -> TensorKinds:
    """The kinds of a checkpoint's tensors, from its config alone.

    Raises:
        InputError: it is not a causal language model that transformers knows.
    """
    from transformers.pytorch_utils import Conv1D

    from pipelines.train.architecture import meta_model, tied_names

    model = meta_model(path)
    modules = dict(model.named_modules(remove_duplicate=False))
    head = model.get_output_embeddings()
    tied = {other: first for first, others in tied_names(model).items() for other in others}
    tensors = {n: _kind(n, modules, head) for n in model.state_dict() if n not in tied}
    shared = {*tied, *tied.values()}
    linear = {
        name: isinstance(module, Conv1D)
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
        if f"{name}.weight" not in shared
    }
    parameters = _parameters(model, tensors)
    if any(parameter.dim() == 3 for parameter in map(model.get_parameter, parameters)):
        for name in [n for n in linear if n.rpartition(".")[2] in _NAMES_OF_EXPERTS]:
            parameters[f"{name}.weight"] = linear.pop(name)
    return TensorKinds(
        model=model,
        modules=list(modules),
        leaves=[n for n, m in modules.items() if m.state_dict() and not list(m.children())],
        linear=linear,
        parameters=parameters,
        tensors=tensors,
        tied=tied,
    )


def _parameters(model: "PreTrainedModel", tensors: dict[str, Kind]) -> dict[str, bool]:
    """The matrices of modules that have all their tensors themselves and are no layers of torch:
    experts and routers; and whether they are stored as (in, out).
    """
    from transformers.pytorch_utils import Conv1D

    layers = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, layers) or any("." in name for name in module.state_dict()):
            continue
        transposed = bool(getattr(module, "is_transposed", False))
        for name, parameter in module.named_parameters(recurse=False):
            own = f"{prefix}.{name}"
            if tensors.get(own) != "other tensors" or parameter.dim() not in (2, 3):
                continue
            if parameter.dim() == 3 and transposed and len(parameter) == 1:
                continue  # to which PEFT adds its product untransposed
            found[own] = transposed and parameter.dim() == 3
    return found


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
