"""What a model's class says of its tensors: names, shapes, which of them are one, which are stored
turned, and which have a row for each token.

All is read from the model that a config.json builds on the meta device, without memory. A class
that transformers does not know says nothing. Answers are remembered, so that the same question
needs neither the model nor transformers again: see `remembered`.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipelines.checkpoints.remembered import remembered
from pipelines.checkpoints.source import TensorSpec
from pipelines.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VOCABULARY_SIZE = re.compile(r"(^|_)vocab_size$")
_TEXT_PARTS = ("text_config", "llm_config", "decoder")
NUM_ADDED = 8  # rows by which a vocabulary grows to see which tensors grow with it


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading a set of tensors into a model finds, as `from_pretrained` reports it.

    Attributes:
        missing: tensors of the model that the set does not give.
        unexpected: tensors of the set that the model does not have.
        ignored: the same, but the model's class says that it does not need them, such as masks that
            are not stored any more.
        mismatched: name, found shape and the model's shape.
    """

    missing: list[str]
    unexpected: list[str]
    ignored: list[str]
    mismatched: list[tuple[str, list[int], list[int]]]


class Architecture:
    """The model of a config.json, without memory; it is built when a question needs it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self._answers: dict[tuple[str, ...], Any] = {}

    @property
    def model(self) -> "PreTrainedModel":
        """The model on the meta device."""
        assert self._built is not None
        return self._built

    @property
    def name(self) -> str:
        """The class, such as LlamaForCausalLM; empty if transformers does not know it."""

        def ask() -> str:
            return "" if self._built is None else type(self._built).__name__

        found: str = self._answer(ask, "name")
        return found

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors that a checkpoint has, by their names in the model."""
        return {name: tuple(each.shape) for name, each in self.model.state_dict().items()}

    @property
    def tied_groups(self) -> list[list[str]]:
        """The names of each parameter that has several."""

        def ask() -> list[list[str]]:
            names: dict[nn.Parameter, list[str]] = {}
            for name, parameter in self.model.named_parameters(remove_duplicate=False):
                names.setdefault(parameter, []).append(name)
            return [group for group in names.values() if len(group) > 1]

        found: list[list[str]] = self._answer(ask, "tied groups")
        return found

    @property
    def conv1d_weights(self) -> list[str]:
        """The weights that are stored as (in, out), as transformers' Conv1D has them."""

        def ask() -> list[str]:
            from transformers.pytorch_utils import Conv1D

            modules = self.model.named_modules()
            return [f"{name}.weight" for name, each in modules if isinstance(each, Conv1D)]

        found: list[str] = self._answer(ask, "Conv1D")
        return found

    @property
    def parameter_kinds(self) -> dict[str, str]:
        """The kind of module that each parameter belongs to: `linear`, `embedding`, `transposed`
        (transformers' Conv1D) or `other`.
        """

        def ask() -> dict[str, str]:
            from transformers.pytorch_utils import Conv1D

            classes = {"linear": nn.Linear, "embedding": nn.Embedding, "transposed": Conv1D}
            found = {}
            for place, module in self.model.named_modules():
                fitting = (kind for kind, each in classes.items() if isinstance(module, each))
                kind = next(fitting, "other")
                for name, _ in module.named_parameters(place, recurse=False):
                    found[name] = kind
            return found

        kinds: dict[str, str] = self._answer(ask, "kinds of parameters")
        return kinds

    @property
    def token_dimensions(self) -> dict[str, int]:
        """The tensors that have an entry for each token, under any name, and the dimension of the
        tokens: embeddings, heads, heads' biases. They are those that grow with the vocabulary.
        """
        found: dict[str, int] = self._answer(self._token_dimensions, "token dimensions")
        return found

    def _token_dimensions(self) -> dict[str, int]:
        size = vocabulary_size(self.config)
        if size is None:  # the class's own default
            size = getattr(self.model.config.get_text_config(), "vocab_size", None)
        if size is None:
            return {}
        grown = {"vocab_size": size, **with_vocabulary(self.config, size + NUM_ADDED)}
        larger = architecture_of(grown)
        return {
            name: dimension
            for name, shape in self.shapes.items()
            for dimension, rows in enumerate(shape)
            if larger is not None and larger.shapes[name][dimension] == rows + NUM_ADDED
        }

    def names_in_model(self, stored: Iterable[str]) -> dict[str, str]:
        """Stored tensors -> the model's names, of those that are one of its tensors, be it under
        another name; without those that are only a part of one.
        """
        stored = tuple(stored)

        def ask() -> dict[str, str]:
            places = {name: self._renamed(name) for name in stored}
            return {
                name: own
                for name, (own, converter) in places.items()
                if converter is None and own in self.shapes
            }

        found: dict[str, str] = self._answer(ask, "names", *stored)
        return found

    def stored_names(self, stored: Iterable[str]) -> dict[str, str]:
        """The model's names of stored tensors -> the stored ones, of those that it has whole."""
        return {own: name for name, own in self.names_in_model(stored).items()}

    def unneeded(self, stored: Iterable[str]) -> list[str]:
        """Stored tensors that the class knows and its model has no place for, such as masks that
        are not stored any more.
        """
        stored = tuple(stored)

        def ask() -> list[str]:
            from transformers.utils.loading_report import LoadStateDictInfo

            places = {name: self._renamed(name)[0] for name in stored}
            report = LoadStateDictInfo(set(), {*places.values()}, set(), [], {}, set())
            self.model._adjust_missing_and_unexpected_keys(report)
            needed = {*self.shapes, *report.unexpected_keys}
            return [name for name, own in places.items() if own not in needed]

        found: list[str] = self._answer(ask, "unneeded", *stored)
        return found

    @cached_property
    def _built(self) -> "PreTrainedModel | None":
        return _build(self.config)

    def _answer(self, ask: Callable[[], Any], *question: str) -> Any:
        """The answer to a question about this config, as JSON gives it back."""
        if question not in self._answers:
            asked = [self.config, question]
            self._answers[question] = remembered(Path(__file__), asked, ask)
        return self._answers[question]

    def _renamed(self, stored: str) -> tuple[str, str | None]:
        """A stored tensor's place in the model, as loading finds it, and what converts it."""
        from transformers.core_model_loading import WeightConverter, rename_source_key

        renamings = [each for each in self._conversions if not isinstance(each, WeightConverter)]
        converters = [each for each in self._conversions if isinstance(each, WeightConverter)]
        prefix = self.model.base_model_prefix
        found: tuple[str, str | None] = rename_source_key(
            stored, renamings, converters, prefix, self.shapes
        )
        if found[0] not in self.shapes and stored in self.shapes:
            return stored, None
        return found

    @cached_property
    def _conversions(self) -> list[Any]:
        """How transformers renames and joins stored tensors for this model."""
        from transformers.conversion_mapping import get_model_conversion_mapping

        found: list[Any] = get_model_conversion_mapping(self.model)
        return found

    def try_loading(self, tensors: Mapping[str, TensorSpec]) -> LoadReport:
        """What transformers would find if it loaded these tensors, without their values."""
        specs = [f"{name} {each.dtype} {each.shape}" for name, each in tensors.items()]
        report = self._answer(lambda: asdict(self._load(tensors)), "loading", *specs)
        mismatched = [(name, found, needed) for name, found, needed in report["mismatched"]]
        return LoadReport(**report | {"mismatched": mismatched})

    def _load(self, tensors: Mapping[str, TensorSpec]) -> LoadReport:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        model = _build(self.config)
        assert model is not None
        settings = LoadStateDictConfig(
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            weight_mapping=self._conversions,
        )
        state = {name: _empty(each) for name, each in tensors.items()}
        with _quiet():
            report, _ = convert_and_load_state_dict_in_model(model, state, settings)
        unexpected = set(report.unexpected_keys)
        model.tie_weights(missing_keys=report.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(report)
        unconverted = [name for name in report.conversion_errors if name not in report.missing_keys]
        return LoadReport(
            missing=sorted([*report.missing_keys, *unconverted]),
            unexpected=sorted(report.unexpected_keys),
            ignored=sorted(unexpected - report.unexpected_keys),
            mismatched=sorted((n, list(one), list(two)) for n, one, two in report.mismatched_keys),
        )


def architecture_of(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture of a config.json; None if transformers does not know its class, or cannot
    build it.
    """
    try:
        return built_architecture(config)
    except InputError:
        return None


def built_architecture(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture of a config.json; None if transformers does not know its class.

    Raises:
        InputError: it cannot build a model from the config.
    """
    found = _architecture(json.dumps(config, sort_keys=True))
    if isinstance(found, str):
        raise InputError(found)
    return found


def model_of(config: Mapping[str, Any]) -> "PreTrainedModel | None":
    """The model of a config.json on the meta device, as `architecture_of`; it is shared, and not to
    be changed.
    """
    found = architecture_of(config)
    return None if found is None else found.model


def tied_names(config: Mapping[str, Any], name: str) -> list[str]:
    """The other names of a parameter, such as those of T5's one embedding."""
    found = architecture_of(config)
    groups = [] if found is None else found.tied_groups
    return next(([n for n in group if n != name] for group in groups if name in group), [])


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """Tokens of a config.json: the `vocab_size` of the part that describes text, or its own."""
    parts = [*(config.get(key) or {} for key in _TEXT_PARTS), config]
    sizes = [part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)]
    return sizes[0] if sizes else None


def with_vocabulary(config: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A config.json with another number of tokens, in all places that give it."""
    own = vocabulary_size(config)

    def changed(part: Mapping[str, Any]) -> dict[str, Any]:
        result = dict(part)
        for key, value in part.items():
            if isinstance(value, dict):
                result[key] = changed(value)
            elif _VOCABULARY_SIZE.search(key) and value == own:
                result[key] = size
        return result

    return changed(config) | ({"vocab_size": size} if "vocab_size" in config else {})


@lru_cache(maxsize=64)
def _architecture(text: str) -> Architecture | str | None:
    """The architecture of a config.json's text, or why it cannot be built."""
    found = Architecture(json.loads(text))
    try:
        return found if found.name else None
    except (ImportError, OSError):  # a library that is not installed: nothing is known
        return None
    except Exception as error:  # the classes' own errors have no common base class
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"config.json: cannot build a {found.config['architectures'][0]}: {reason}"


def _build(config: Mapping[str, Any]) -> "PreTrainedModel | None":
    """A new model of a config.json on the meta device; None if its class is not known."""
    import transformers
    from transformers import initialization

    [name, *_] = config.get("architectures") or [""]
    architecture: Any = getattr(transformers, name, None)
    kind = getattr(architecture, "config_class", None)
    if kind is None or not issubclass(architecture, transformers.PreTrainedModel):
        return None
    settings = kind.from_dict(kind._decode_special_floats(dict(config)))
    safe = initialization.meta_device_safe_creation_ops()
    with _quiet(), torch.device("meta"), safe:
        model: transformers.PreTrainedModel = architecture(settings)
    return model


def _empty(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and the warnings of transformers, which speak of a model that is used."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
