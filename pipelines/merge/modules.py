"""Modules by name: the parts of a model that a config may merge each in its own way.

They are found in the names of the tensors. Where a model has several stacks of layers, their names
differ from one place on (`model.vision_tower.encoder.layers.`, `model.language_model.layers.`), and
what stands there names the modules. mergekit's names for them are understood, and the model's own:
`text_decoder` for the language model, `vision_tower`, `audio_tower`, `multi_modal_projector`,
`encoder` and `decoder`, `shared` for what belongs to none of them, and `default` for the whole of a
model with one stack.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile

from pipelines.checkpoints import Source
from pipelines.checkpoints.reader import is_embedding
from pipelines.errors import InputError
from pipelines.merge.config import MergeConfig
from pipelines.merge.layers import Stacks
from pipelines.merge.recipe import Recipe

WHOLE, TEXT, SHARED, PROJECTOR = "default", "text_decoder", "shared", "multi_modal_projector"
_PROJECTOR = re.compile(r"project|merger|connector|aligner")
_TOWERS = {
    "vision_tower": re.compile(r"vision|visual|image|vit"),
    "audio_tower": re.compile(r"audio|speech|sound"),
}
# What an encoder or a tower does before its layers, by the usual names.
_BEFORE_LAYERS = re.compile(r"embed|wte|wpe|patch|conv\d?\.|layernorm_pre|\bln_pre|\.pre_")


@dataclass(frozen=True, slots=True)
class Modules:
    """The modules of a model.

    Attributes:
        owners: the module of each tensor.
        aliases: the model's own names of modules.
        stacks: the model's stacks of layers.
    """

    owners: Mapping[str, str]
    aliases: Mapping[str, str]
    stacks: Stacks

    @classmethod
    def of(cls, names: Iterable[str]) -> "Modules":
        """The modules in the names of a model's tensors."""
        names = list(names)
        stacks = Stacks.of(names)
        if len(stacks.counts) < 2:
            return cls(dict.fromkeys(names, WHOLE), {}, stacks)
        ways = [stack.rstrip(".").split(".") for stack in stacks.counts]
        depth = len(list(takewhile(lambda level: len({*level}) == 1, zip(*ways, strict=False))))
        prefix = ways[0][:depth]
        homes = dict(zip(stacks.counts, ((way[depth:] or way)[0] for way in ways), strict=True))
        text = None if stacks.text is None else homes[stacks.text]
        titles = _titles(homes.values(), text)
        owners, aliases = {}, {}
        for name in names:
            parts = name.split(".")
            parts = parts[depth:] if parts[:depth] == prefix and len(parts) > depth else parts
            owner, own = _owner(name, parts, titles, text)
            owners[name] = owner
            if own is not None:
                aliases[own] = owner
        return cls(owners, aliases, stacks)

    @property
    def names(self) -> list[str]:
        """The modules' names."""
        return sorted({*self.owners.values()})

    def find(self, name: str) -> str | None:
        """A module by mergekit's name or the model's own; None if there is none."""
        return name if name in self.names else self.aliases.get(name)

    def stacks_of(self, module: str) -> list[str]:
        """The stacks of layers in a module."""
        layers = ((self.stacks.layer_of(n), owner) for n, owner in self.owners.items())
        return list(dict.fromkeys(p[0] for p, owner in layers if p and owner == module))


def _titles(homes: Iterable[str], text: str | None) -> dict[str, str]:
    """mergekit's names of the parts that have layers; their own names, where it has none."""
    titles: dict[str, str] = {}
    for home in dict.fromkeys(homes):
        fitting = [title for title, words in _TOWERS.items() if words.search(home)]
        if home == text:
            fitting = [] if home == "decoder" else [TEXT]
        title = fitting[0] if fitting else home
        titles[home] = home if title in titles.values() else title
    return titles


def _owner(
    name: str, parts: list[str], titles: Mapping[str, str], text: str | None
) -> tuple[str, str | None]:
    """A tensor's module, and the model's own name of it, if there is one.

    Args:
        parts: of its name, from where the modules part.
    """
    first, *rest = parts
    if text is not None:
        if _PROJECTOR.search(first):
            return PROJECTOR, first
        if first != text and len(rest) > 1 and _PROJECTOR.search(rest[0]):
            return PROJECTOR, None
    common = SHARED if text is None else titles[text]
    if first in titles:
        # Copies of an embedding that an encoder and a decoder share.
        is_copy = text is None and {"encoder", "decoder"} <= titles.keys() and is_embedding(name)
        return (common, None) if is_copy else (titles[first], first)
    return (first, first) if len(rest) > 1 else (common, None)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """A part of the output with a recipe of its own: a module, or the whole model.

    Attributes:
        recipe: how it is made; None takes it from the base or first model as it is.
        module: its name; None of the whole.
        tensors: the names of its tensors in the models; None of the whole.
        stack: the stack of layers that slices put together, if it is clear which one.
    """

    recipe: Recipe | None
    module: str | None = None
    tensors: frozenset[str] | None = None
    stack: str | None = None

    def holds(self, name: str) -> bool:
        """Whether a tensor belongs to the part."""
        return self.tensors is None or name in self.tensors

    def comes_first(self, name: str, stacks: Stacks) -> bool:
        """Whether a tensor of the part outside its stack goes with the first slice."""
        if self.module is None:
            return stacks.comes_first(name)
        return self.stack is None or _BEFORE_LAYERS.search(name) is not None


def parts_of(config: MergeConfig, models: Mapping[str, Source], reference: Source) -> list[Part]:
    """The parts of the output: one, or the config's modules and the module that it does not name.

    Raises:
        InputError: a name that is no module of the models, or two of the same module.
    """
    names = dict.fromkeys(n for each in (reference, *models.values()) for n in each.names())
    modules = Modules.of(names)
    if not config.modules or list(config.modules) == modules.names == [WHOLE]:
        return [Part(recipe, stack=modules.stacks.text) for recipe in config.recipes.values()]
    parts: list[Part] = []
    for name, recipe in config.modules.items():
        module = modules.find(name)
        if module is None:
            raise InputError(
                f"modules: found {name!r}; allowed: {', '.join(modules.names)}, which "
                f"{reference.path} has"
            )
        if module in {part.module for part in parts}:
            raise InputError(f"modules: found {name!r}, which is {module}, a second time")
        parts.append(_part(modules, module, recipe))
    left = [name for name in modules.names if name not in {part.module for part in parts}]
    return [*parts, *(_part(modules, name, None) for name in left)]


def _part(modules: Modules, module: str, recipe: Recipe | None) -> Part:
    """A module as a part of the output.

    Raises:
        InputError: slices of a module without layers, or with several stacks of them.
    """
    stacks = modules.stacks_of(module)
    if recipe is not None and recipe.slices and len(stacks) != 1:
        found = ", ".join(f"{stack}N" for stack in stacks) or "none"
        raise InputError(
            f"modules.{module}.slices: found layers: {found}; allowed: models, or slices of a "
            "module with one stack of layers"
        )
    own = frozenset(name for name, owner in modules.owners.items() if owner == module)
    return Part(recipe, module, own, stacks[0] if len(stacks) == 1 else None)


def taken_line(parts: list[Part], reference: Source) -> list[str]:
    """A line about the modules that no recipe names, if there are any."""
    taken = [part.module for part in parts if part.recipe is None and part.module is not None]
    if not taken:
        return []
    return [
        f"modules: taken from {reference.path} as they are, as no recipe names them: "
        f"{', '.join(taken)}"
    ]
