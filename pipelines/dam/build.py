"""Build the model of several experts: replace its layers, shard them over the workers or lend them
block by block, and give everything its values. Each rank reads only what it owns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from operators.optim.layout import layout_of, local
from pipelines.checkpoints import Checkpoint, ModuleView
from pipelines.dam.config import DamConfig
from pipelines.dam.layers import ExpertsEmbedding, ExpertsLayer, ExpertsLinear, Switched, Weights
from pipelines.dam.model import ExpertsModel, merged_parameters, settings_of
from pipelines.dam.stream import Read, Stream
from pipelines.merge.coefficients import Role
from pipelines.train.architecture import blocks_of
from pipelines.train.strategies.loading import (
    check_names,
    empty_model,
    places_of_parameters,
    set_buffers,
)

CPU = torch.device("cpu")


def build(config: DamConfig, device: torch.device) -> ExpertsModel:
    """The experts' model with equal coefficients, on a device. All ranks call together.

    Raises:
        InputError: experts that do not have the base's tensors.
    """
    model, base = empty_model(config.base_model, attention=config.attention)
    views = [ModuleView.of(Checkpoint.open(each.model), model) for each in config.merged_models]
    for view in views:
        check_names(view)
    roles = merged_parameters(model, base)
    experts = ExpertsModel(model, settings_of(config))
    _Builder(experts, config, base, views, roles, device).build()
    experts.coefficients = dict(sorted(experts.coefficients.items()))
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return experts


@dataclass(frozen=True, slots=True, eq=False)
class _Parameter:
    """A parameter of the model: its name there, its places, and its stored tensor with its role, if
    it has one.
    """

    own: str
    shape: torch.Size
    places: list[tuple[nn.Module, str]]
    stored: str = ""
    role: Role | None = None

    @property
    def is_matrix(self) -> bool:
        """Whether it is the weight of a linear layer or of an embedding."""
        return self.role is not None and self.role.kind != "norm" and self.role.columns is not None


@dataclass(slots=True)
class _Builder:
    """Puts the experts' tensors into a model on the meta device."""

    experts: ExpertsModel
    config: DamConfig
    base: ModuleView
    views: Sequence[ModuleView]
    roles: Mapping[str, tuple[str, Role]]
    device: torch.device
    _layers: dict[nn.Module, ExpertsLayer] = field(default_factory=dict)

    def build(self) -> None:
        """All of it."""
        model = self.experts.model
        paths = {module: path for path, module in model.named_modules()}
        parameters = [
            self._parameter(parameter.shape, places, paths)
            for parameter, places in places_of_parameters(model).items()
        ]
        matrices = [each for each in parameters if each.is_matrix]
        stream = self._stream()
        for each in matrices:
            self._replace(each, paths, stream)
        if self.config.strategy == "fsdp2":
            self._shard()
        self._allocate()
        for each in matrices:
            self._fill(each)
        for each in parameters:
            if not each.is_matrix:
                self._put(each)

    def _parameter(
        self,
        shape: torch.Size,
        places: list[tuple[nn.Module, str]],
        paths: Mapping[nn.Module, str],
    ) -> _Parameter:
        """What is known of a parameter; a tied one goes by the name that has a role."""
        names = [".".join(filter(None, (paths[module], name))) for module, name in places]
        own = next((name for name in names if name in self.roles), names[0])
        return _Parameter(own, shape, places, *self.roles.get(own, ()))

    def _is_merged(self, parameter: _Parameter) -> bool:
        """Whether a parameter has coefficients."""
        kinds = self.experts.settings.merged_kinds
        return parameter.role is not None and parameter.role.kind in kinds

    def _views_of(self, parameter: _Parameter) -> list[ModuleView]:
        """The checkpoints whose values a parameter needs: the base's comes last where the merged
        model has it.
        """
        return [*self.views] if self._is_merged(parameter) else [*self.views, self.base]

    def _stream(self) -> Stream | None:
        """What brings the weights block by block, if they are not on the device."""
        if self.config.strategy == "fsdp2" or self.config.experts == "device":
            return None
        num_blocks = len(blocks_of(self.experts.model))
        return Stream(self.experts.turn, num_blocks + 2, self.device)  # what is before and after

    def _replace(
        self, parameter: _Parameter, paths: Mapping[nn.Module, str], stream: Stream | None
    ) -> None:
        """Put layers of several experts, yet without values, in the places of a parameter's."""
        model, weights, reads = self.experts.model, None, list[Read]()
        if stream is None:
            dtype = self._dtype
            empty = [
                nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="meta"), False)
                for _ in self._views_of(parameter)
            ]
            weights = nn.ParameterList(empty)
        else:
            reads = self._reads(parameter)
        blocks = [paths.get(block, "") for block in blocks_of(model)]
        for module, _ in parameter.places:
            of_module: Weights | None = weights
            if stream is not None:
                block = _block_of(paths[module], blocks, isinstance(module, nn.Embedding))
                of_module = stream.lend(block, reads, merged=self._is_merged(parameter))
            assert of_module is not None
            turn = self.experts.turn
            layer = (
                ExpertsEmbedding(turn, of_module)
                if isinstance(module, nn.Embedding)
                else ExpertsLinear(turn, of_module, self.config.materialise)
            )
            self._layers[module] = layer
            model.set_submodule(paths[module], layer)

    def _reads(self, parameter: _Parameter) -> list[Read]:
        """How the weights of a parameter are read each time: from files, or from memory."""
        reads: list[Read] = [
            partial(self._values, view, parameter, CPU) for view in self._views_of(parameter)
        ]
        if self.config.experts == "source":
            return reads
        kept = [read() for read in reads]
        if self.device.type == "cuda":
            kept = [each.pin_memory() for each in kept]
        return [partial(torch.Tensor.detach, each) for each in kept]

    def _shard(self) -> None:
        """Shard the weights by rows over all workers: those of each block, and then the rest."""
        model = self.experts.model
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        offload = OffloadPolicy()
        if self.config.experts == "host":
            offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        weights = {each for layer in self._layers.values() for each in layer.parameters()}
        others = {each for each in model.parameters() if each not in weights}
        for module in [*blocks_of(model), model]:
            fully_shard(
                module,
                mesh=mesh,
                offload_policy=offload,
                ignored_params=others,
                reshard_after_forward=True,
            )

    def _allocate(self) -> None:
        """Allocate memory for weights, and set buffers."""
        model = self.experts.model
        is_offloaded = self.config.strategy == "fsdp2" and self.config.experts == "host"
        model.to_empty(device=CPU if is_offloaded else self.device)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty_like(buffer, device=self.device)
        set_buffers(model, self.base)

    @torch.no_grad()
    def _fill(self, parameter: _Parameter) -> None:
        """Read this rank's part of a matrix of all experts, and give it coefficients."""
        layers = [self._layers[module] for module, _ in parameter.places]
        if isinstance(weights := layers[0].weights, nn.ParameterList):
            for weight, view in zip(weights, self._views_of(parameter), strict=True):
                layout = layout_of(parameter.own, weight)
                stop = layout.start + layout.count
                local(weight).copy_(view.read(parameter.own, layout.start, stop))
        if self._is_merged(parameter):
            coefficients = self._new(parameter)
            for layer in layers:
                layer.coefficients = coefficients

    def _put(self, parameter: _Parameter) -> None:
        """Give a bias or another small parameter its values."""
        [(module, _), *_] = parameter.places
        coefficients = self._new(parameter) if self._is_merged(parameter) else None
        values = [self._values(view, parameter, self.device) for view in self.views]
        base = self._values(self.base, parameter, self.device)
        layer = self._layers.get(module)
        if isinstance(layer, ExpertsLinear):
            layer.biases = values if coefficients is not None else [*values, base]
            layer.bias_coefficients = coefficients
            return
        switched = Switched(parameter.places, values, base, coefficients)
        self.experts.switched.append(switched)
        switched.put(None)

    def _new(self, parameter: _Parameter) -> nn.Parameter:
        """Equal coefficients of a stored tensor: 1 / T each."""
        assert parameter.role is not None  # or it would not be merged
        count = self.experts.settings.num_experts
        values = torch.full(parameter.role.shape(count), 1 / count, device=self.device)
        self.experts.coefficients[parameter.stored] = nn.Parameter(values)
        return self.experts.coefficients[parameter.stored]

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.precision == "bf16" else torch.float32

    def _values(self, view: ModuleView, parameter: _Parameter, device: torch.device) -> Tensor:
        return view.read(parameter.own).view(parameter.shape).to(device, self._dtype)


def _block_of(path: str, blocks: Sequence[str], is_embedding: bool) -> int:
    """The place of a module in the order of a pass: a block's number, from 1 on; before it
    embeddings, after it all else.
    """
    for number, block in enumerate(blocks):
        if path.startswith(f"{block}."):
            return number + 1
    return 0 if is_embedding else len(blocks) + 1
