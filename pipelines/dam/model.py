"""One model on the frozen weights of several experts: it is the merged model of the coefficients,
or for a while one of the experts, from the same weights.

Layers with coefficients are replaced (`MergedLinear`, `MergedEmbedding`); of all other parameters
each expert's values are kept beside the base's, and put in their place while it is that expert.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from operators.dam import Materialise, dam_embedding, dam_linear, merged_weight
from pipelines.checkpoints import Checkpoint, ModuleView
from pipelines.checkpoints.architecture import Architecture, architecture_of
from pipelines.checkpoints.hub import described
from pipelines.dam.config import DamConfig
from pipelines.errors import InputError
from pipelines.merge.coefficients import Role, Settings, roles_of
from pipelines.train.strategies.loading import (
    check_names,
    empty_model,
    places_of_parameters,
    set_buffers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class Turn:
    """Which expert the model is; None: the merged model."""

    expert: int | None = None


class MergedLinear(nn.Module):
    """A linear layer of T experts; weights and biases are frozen and no parameters."""

    def __init__(
        self,
        turn: Turn,
        weights: Sequence[Tensor],
        coefficients: nn.Parameter,
        materialise: Materialise,
    ) -> None:
        super().__init__()
        self._turn, self._weights, self._materialise = turn, weights, materialise
        self._biases: Sequence[Tensor] = ()
        self.coefficients = coefficients
        self.bias_coefficients: nn.Parameter | None = None

    def set_biases(self, biases: Sequence[Tensor], coefficients: nn.Parameter) -> None:
        """Give the layer its experts' biases, and one number for each."""
        self._biases, self.bias_coefficients = biases, coefficients

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        expert = self._turn.expert
        if expert is not None:
            return F.linear(
                x, self._weights[expert], self._biases[expert] if self._biases else None
            )
        return dam_linear(
            x,
            self._weights,
            self.coefficients,
            self._biases,
            self.bias_coefficients,
            materialise=self._materialise,
        )


class MergedEmbedding(nn.Module):
    """An embedding of T experts, frozen and no parameters."""

    def __init__(self, turn: Turn, weights: Sequence[Tensor], coefficients: nn.Parameter) -> None:
        super().__init__()
        self._turn, self._weights = turn, weights
        self.coefficients = coefficients

    def forward(self, ids: Tensor) -> Tensor:
        """(...,) int64 -> (..., hidden)."""
        if self._turn.expert is not None:
            return F.embedding(ids, self._weights[self._turn.expert])
        return dam_embedding(ids, self._weights, self.coefficients)


@dataclass(slots=True)
class Switched:
    """A parameter without a layer of its own: each expert's values, and the merged model's: the
    base's, or with coefficients (of norms) the experts' sum.
    """

    places: list[tuple[nn.Module, str]]
    experts: list[Tensor]
    base: Tensor
    coefficients: Tensor | None = None

    def put(self, expert: int | None) -> None:
        """Put an expert's values, or the merged model's, into the model."""
        values = self.base
        if expert is not None:
            values = self.experts[expert]
        elif self.coefficients is not None:
            values = merged_weight(self.experts, self.coefficients).to(self.base.dtype)
        for module, name in self.places:
            # No parameter: it may be a result with a gradient, which setattr refuses.
            module._parameters[name] = values  # type: ignore[assignment]


@dataclass(slots=True)
class ExpertsModel:
    """The model, and its coefficients by the names of the stored tensors, in their order."""

    model: "PreTrainedModel"
    settings: Settings
    coefficients: dict[str, nn.Parameter] = field(default_factory=dict)
    _turn: Turn = field(default_factory=Turn)
    _switched: list[Switched] = field(default_factory=list)

    @contextmanager
    def acting_as(self, expert: int) -> Iterator[None]:
        """In the block, the model is an expert, without gradients."""
        self._take(expert)
        try:
            with torch.no_grad():
                yield
        finally:
            self._take(None)

    def logits(self, ids: Tensor) -> Tensor:
        """(rows, length) int64 -> (rows, length, vocabulary), of whichever model it is."""
        if self._turn.expert is None:
            self._take(None)  # merged norms belong to the graph of one pass
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def _take(self, expert: int | None) -> None:
        self._turn.expert = expert
        for each in self._switched:
            each.put(expert)


def settings_of(config: DamConfig) -> Settings:
    """What of a model is merged, and of which experts, as the file of coefficients says it."""

    def name(path: Path) -> str:
        """The hub's name and commit, or a folder's own name, wherever the folder is."""
        return path.name if described(path) == str(path) else described(path)

    return Settings(
        models=[name(each.model) for each in config.models],
        base_model=name(config.base_model),
        include_base=config.include_base,
        embeddings=config.embeddings,
        norms=config.norms,
        lm_head=config.lm_head,
    )


def merged_parameters(model: "PreTrainedModel", base: ModuleView) -> dict[str, tuple[str, Role]]:
    """The parameters of a model that has roles: by their names in the model, the stored tensor and
    its role.

    Raises:
        InputError: as `roles_of`, or a layer whose class computes something else than torch's.
    """
    specs = {name: base.source.find(name) for name in base.source.names()}
    shapes = {n: s.shape for n, s in specs.items() if s is not None and s.dtype.is_floating_point}
    roles, known = roles_of(shapes, base.source), architecture_of(base.source.config)
    assert isinstance(known, Architecture)  # or `roles_of` would have refused it
    found = {
        own: (stored, roles[stored])
        for stored, own in known.names_in_model(shapes).items()
        if stored in roles
    }
    for name, (_, role) in found.items():
        module = model.get_submodule(name.rpartition(".")[0])
        classes: dict[str, type[nn.Linear] | type[nn.Embedding]] = {
            "linear": nn.Linear,
            "head": nn.Linear,
            "embedding": nn.Embedding,
        }
        plain = classes.get(role.kind)
        if plain is not None and type(module).forward is not plain.forward:
            raise InputError(
                f"model {base.source.path}: {name}: is of {type(module).__name__}; allowed with "
                f"coefficients: torch's {plain.__name__}"
            )
    return found


def build(config: DamConfig, device: torch.device) -> ExpertsModel:
    """The experts' model with equal coefficients, on a device.

    Raises:
        InputError: experts that do not have the base's tensors.
    """
    model, base = empty_model(config.base_model, attention=config.attention)
    views = [ModuleView.of(Checkpoint.open(each.model), model) for each in config.experts]
    for view in views:
        check_names(view)
    roles = merged_parameters(model, base)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
    set_buffers(model, base)
    experts = ExpertsModel(model, settings_of(config))
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    _Builder(experts, base, views, roles, config.materialise, device, dtype).fill()
    experts.coefficients = dict(sorted(experts.coefficients.items()))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return experts


@dataclass(slots=True)
class _Builder:
    """Puts the experts' tensors into a model on the meta device."""

    experts: ExpertsModel
    base: ModuleView
    views: Sequence[ModuleView]
    roles: Mapping[str, tuple[str, Role]]
    materialise: Materialise
    device: torch.device
    dtype: torch.dtype

    def fill(self) -> None:
        """Replace layers with coefficients, and give all other parameters their values."""
        model = self.experts.model
        paths = {module: path for path, module in model.named_modules()}
        biases: list[tuple[nn.Module, str, Role]] = []
        layers: dict[nn.Module, MergedLinear] = {}
        for parameter, places in places_of_parameters(model).items():
            names = [".".join(filter(None, (paths[module], name))) for module, name in places]
            own = next((name for name in names if name in self.roles), names[0])
            stored, role = self.roles.get(own, (own, None))
            if role is None or role.kind not in self.experts.settings.merged_kinds:
                self._switch(own, parameter, places)
            elif role.kind == "norm":
                self._switch(own, parameter, places, self._new(stored, role))
            elif role.columns is None:
                biases.append((places[0][0], own, role))
            else:
                weights = self._read(own, parameter)
                coefficients = self._new(stored, role)
                for module, _ in places:
                    layer = self._layer(module, weights, coefficients)
                    if isinstance(layer, MergedLinear):
                        layers[module] = layer
                    model.set_submodule(paths[module], layer)
        for module, own, role in biases:
            values = self._read(own, module.get_parameter(own.rpartition(".")[2]))
            layers[module].set_biases(values, self._new(self.roles[own][0], role))

    def _layer(
        self, module: nn.Module, weights: list[Tensor], coefficients: nn.Parameter
    ) -> MergedLinear | MergedEmbedding:
        """What stands for a module."""
        turn = self.experts._turn
        if isinstance(module, nn.Embedding):
            return MergedEmbedding(turn, weights, coefficients)
        return MergedLinear(turn, weights, coefficients, self.materialise)

    def _new(self, stored: str, role: Role) -> nn.Parameter:
        """Equal coefficients of a tensor: 1 / T each."""
        count = self.experts.settings.num_experts
        values = torch.full(role.shape(count), 1 / count, device=self.device)
        self.experts.coefficients[stored] = nn.Parameter(values)
        return self.experts.coefficients[stored]

    def _switch(
        self,
        own: str,
        parameter: Tensor,
        places: list[tuple[nn.Module, str]],
        coefficients: Tensor | None = None,
    ) -> None:
        base = self._values(self.base, own, parameter)
        switched = Switched(places, self._read(own, parameter), base, coefficients)
        self.experts._switched.append(switched)
        switched.put(None)

    def _read(self, own: str, parameter: Tensor) -> list[Tensor]:
        """A parameter of each expert."""
        return [self._values(view, own, parameter) for view in self.views]

    def _values(self, view: ModuleView, own: str, parameter: Tensor) -> Tensor:
        return view.read(own).view(parameter.shape).to(self.device, self.dtype)
