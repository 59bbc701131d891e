"""One model on the frozen weights of several experts: it is the merged model of the coefficients,
or for a while one of the experts, from the same weights.

Linear layers and embeddings are replaced by those of `pipelines.dam.layers`, whose weights are
whole on the device, sharded by rows over the workers (FSDP2), or brought there block by block. Of
all other parameters, which are small, each expert's values are on the device beside the base's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pipelines.checkpoints import ModuleView
from pipelines.checkpoints.architecture import Architecture, architecture_of
from pipelines.checkpoints.hub import described
from pipelines.dam.config import DamConfig
from pipelines.dam.layers import Switched, Turn
from pipelines.errors import InputError
from pipelines.merge.coefficients import Role, Settings, roles_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class ExpertsModel:
    """The model, and its coefficients by the names of the stored tensors, in their order."""

    model: "PreTrainedModel"
    settings: Settings
    coefficients: dict[str, nn.Parameter] = field(default_factory=dict)
    turn: Turn = field(default_factory=Turn)
    switched: list[Switched] = field(default_factory=list)

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
        if self.turn.expert is None:
            self._take(None)  # merged norms belong to the graph of one pass
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def _take(self, expert: int | None) -> None:
        self.turn.expert = expert
        for each in self.switched:
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
            "tied": nn.Linear,
            "embedding": nn.Embedding,
        }
        plain = classes.get(role.kind)
        if plain is not None and type(module).forward is not plain.forward:
            raise InputError(
                f"model {base.source.path}: {name}: is of {type(module).__name__}; allowed with "
                f"coefficients: torch's {plain.__name__}"
            )
    return found
