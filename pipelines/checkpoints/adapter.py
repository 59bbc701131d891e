"""What the files of a PEFT adapter say: which weights it changes, and how.

A weight W (out, in) becomes `W + s B A` with A (r, in), B (out, r), `s = alpha / r`, or
`alpha / sqrt(r)` with rank-stabilised scaling (Hu et al. 2021; Kalajdzievski 2023). DoRA scales the
rows of the sum to stored magnitudes (Liu et al. 2024). PiSSA (Meng et al. 2024) and OLoRA
(Büyükakyüz 2024) begin with factors of W itself. Their product is subtracted from W before the
trained one is added. Parameters that are no layer's weight (`target_parameters`), such as a
mixture's experts in one tensor, change in the same way.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipelines.checkpoints.architecture import Architecture
from pipelines.checkpoints.reader import Checkpoint, is_embedding
from pipelines.errors import InputError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_BIAS = ".lora_B.bias"
_WRAPPER = re.compile(r"\.base_layer(?=\.)")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_MAGNITUDES = (".lora_magnitude_vector", ".lora_magnitude_vector.weight")
_TOKENS = ".token_adapter.trainable_tokens_delta"
# Fields of PEFT's LoraConfig that change no weight beside what is read here.
_KNOWN_FIELDS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
# Beginnings of training that leave the base's weights as they are.
_PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
Beginning = Literal["pissa", "olora"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """The change of one weight: its factors by their names in the file.

    Attributes:
        scale: of the product.
        rank: r; of a parameter with experts for each of them.
        of_embedding: A is (r, rows), and the weight's change is the transposed product.
        magnitude: DoRA's norms of the rows of W, (out,).
        beginning: whose first factors are taken from the base.
    """

    a: str
    b: str
    scale: float
    rank: int
    of_embedding: bool
    magnitude: str | None = None
    beginning: Beginning | None = None


@dataclass(frozen=True, slots=True)
class TrainedTokens:
    """Rows of an embedding that the adapter stores: their indices, and the tensor's name."""

    rows: tuple[int, ...]
    name: str


@dataclass(frozen=True, slots=True)
class AddedBias:
    """What a layer's bias grows by: the name in the file, and a factor."""

    name: str
    scale: float


@dataclass(frozen=True, slots=True)
class AdapterParts:
    """All that an adapter changes, by the names of the base's tensors.

    Attributes:
        products: weights that a low-rank product is added to.
        replaced: weights that are stored whole, by their names in the file.
        tokens: embeddings of which some rows are stored.
        biases: biases that one is added to.
    """

    products: dict[str, Adapter] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, TrainedTokens] = field(default_factory=dict)
    biases: dict[str, AddedBias] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The changed tensors."""
        return list(dict.fromkeys([*self.products, *self.replaced, *self.tokens, *self.biases]))

    def __contains__(self, name: str) -> bool:
        """Whether a tensor is changed."""
        parts = (self.products, self.replaced, self.tokens, self.biases)
        return any(name in part for part in parts)

    def as_in(self, base: Iterable[str], stored: Mapping[str, str]) -> "AdapterParts":
        """The same by the base's names, which may have one component less or more at their
        beginning: on the hub, GPT-2's layers are `h.0`, in the model `transformer.h.0`.

        Args:
            base: the base's names.
            stored: the model's names of the base's tensors -> the base's, where its class is known.
        """
        known = set(base)
        prefixes = sorted({name.partition(".")[0] for name in known})

        def found(name: str) -> str:
            if name not in known and name in stored:
                return stored[name]
            longer = (f"{prefix}.{name}" for prefix in prefixes)
            return next((n for n in (name, name.partition(".")[2], *longer) if n in known), name)

        return AdapterParts(
            {found(name): adapter for name, adapter in self.products.items()},
            {found(name): stored for name, stored in self.replaced.items()},
            {found(name): tokens for name, tokens in self.tokens.items()},
            {found(name): bias for name, bias in self.biases.items()},
        )


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (path / ADAPTER_CONFIG).is_file()


def check_kind(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise InputError for adapters that change weights in a way that is not known here."""
    file = path / ADAPTER_CONFIG
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{file}: peft_type: found {kind!r}; allowed: 'LORA'")
    beginning = settings.get("init_lora_weights", True)
    if beginning not in (*_PLAIN_BEGINNINGS, "pissa", "olora"):
        raise InputError(
            f"{file}: init_lora_weights: found {beginning!r}, which changes the base's weights in "
            "a way that its files do not tell; allowed: true, false, gaussian, eva, orthogonal, "
            "pissa, olora, or an adapter that PEFT has saved with "
            "path_initial_model_for_weight_conversion"
        )
    if settings.get("lora_bias") and (settings.get("use_dora") or isinstance(beginning, str)):
        other = "use_dora" if settings.get("use_dora") else f"init_lora_weights {beginning!r}"
        raise InputError(
            f"{file}: lora_bias: found true beside {other}, which PEFT does not train together; "
            "allowed: one of the two"
        )
    for name, value in settings.items():
        if name not in _KNOWN_FIELDS and value:
            found = str(value).lower() if isinstance(value, bool) else repr(value)
            raise InputError(
                f"{file}: {name}: found {found}, which is not known here; allowed: an adapter "
                "without it"
            )


def parts_of(store: Checkpoint, known: Architecture | None) -> AdapterParts:
    """What an adapter's tensors are for, by the names of the model's modules.

    Args:
        known: of the base; only `target_parameters` need it.

    Raises:
        InputError: a tensor that is no part of a LoRA adapter as PEFT writes it.
    """
    parts, wrapped = AdapterParts(), _wrapped_parameters(store, known)
    for name in store.tensors:
        inner = name.removeprefix(PREFIX)
        own, depth = _WRAPPER.subn("", inner)
        if own.endswith(_TOKENS):
            module = own.removesuffix(_TOKENS)
            parts.tokens[f"{module}.weight"] = TrainedTokens(_token_rows(store, module), name)
        elif ".lora_" not in own:
            parts.replaced[own.replace(".modules_to_save.", ".")] = name
        elif own.endswith((_LINEAR[0], _EMBEDDING[0])):
            module = own.removesuffix(_LINEAR[0]).removesuffix(_EMBEDDING[0])
            inside = wrapped.get(module, ["weight"])
            if depth >= len(inside):
                raise InputError(f"adapter {store.path}: {name!r} is no part of target_parameters")
            changed = f"{module}.{inside[-1 - depth]}"
            key = changed if module in wrapped else module
            experts = _num_experts(changed, known) if module in wrapped else 1
            parts.products[changed] = _product(store, name, key, experts)
        elif own.endswith(_BIAS):
            module = own.removesuffix(_BIAS)
            rank = store.tensors[name.removesuffix(_BIAS) + _LINEAR[1]].shape[1]
            parts.biases[f"{module}.bias"] = AddedBias(name, _scale(store.config, module, rank))
        elif not own.endswith((_LINEAR[1], _EMBEDDING[1], *_MAGNITUDES)):
            raise InputError(f"adapter {store.path}: {name!r} is no part of a plain LoRA adapter")
    return parts


def _wrapped_parameters(store: Checkpoint, known: Architecture | None) -> dict[str, list[str]]:
    """The parameters that `target_parameters` names, by their modules. PEFT wraps the module once
    for each, in the order of its class: the last one is outside, `.base_layer` leads inwards.

    Raises:
        InputError: a class that transformers does not know.
    """
    targets = store.config.get("target_parameters")
    if not targets:
        return {}
    if known is None:
        raise InputError(
            f"{store.path / ADAPTER_CONFIG}: target_parameters: found {targets!r} for a class that "
            "transformers does not know; allowed: an adapter without it"
        )
    found: dict[str, list[str]] = {}
    for module, each in known.model.named_modules():
        for name, _ in each.named_parameters(recurse=False):
            if any(_ends_with(f"{module}.{name}", target) for target in targets):
                found.setdefault(module, []).append(name)
    return found


def _num_experts(parameter: str, known: Architecture | None) -> int:
    """The experts that one parameter of the model holds: 1 for a matrix."""
    shape = known.shapes[parameter] if known is not None else ()
    return shape[0] if len(shape) == 3 else 1


def target_modules(meant: list[str], modules: list[str]) -> list[str] | str:
    """Names with which PEFT finds exactly these modules of the model: the last parts of their
    names, else the full names, else a regular expression.
    """
    for candidates in ({name.rpartition(".")[2] for name in meant}, set(meant)):
        hit = {
            name for name in modules if any(f".{name}".endswith(f".{end}") for end in candidates)
        }
        if hit == set(meant):
            return sorted(candidates)
    return "|".join(re.escape(name) for name in sorted(meant))


def _product(store: Checkpoint, name: str, key: str, num_experts: int) -> Adapter:
    """The change whose factor A has this name.

    Args:
        key: of the module, or of the parameter, in the patterns.
    """
    settings = store.config
    end_a, end_b = _EMBEDDING if name.endswith(_EMBEDDING[0]) else _LINEAR
    stem = name.removesuffix(end_a)
    if stem + end_b not in store.tensors:
        raise InputError(f"adapter {store.path}: has {name!r} without {stem + end_b!r}")
    magnitudes = [stem + end for end in _MAGNITUDES if stem + end in store.tensors]
    _check_told(store, "use_dora", bool(magnitudes), "magnitudes", key)
    _check_told(store, "lora_bias", stem + _BIAS in store.tensors, "biases of factors", key)
    rank = store.tensors[name].shape[0] // num_experts
    beginning = settings.get("init_lora_weights")
    return Adapter(
        a=name,
        b=stem + end_b,
        scale=_scale(settings, key, rank),
        rank=rank,
        of_embedding=end_a == _EMBEDDING[0],
        magnitude=magnitudes[0] if magnitudes else None,
        # PEFT begins embeddings with zeros, whatever is asked for.
        beginning=beginning if beginning in ("pissa", "olora") and end_a == _LINEAR[0] else None,
    )


def _check_told(store: Checkpoint, setting: str, has: bool, what: str, module: str) -> None:
    """Raise InputError unless the config says what the file has."""
    told = bool(store.config.get(setting))
    if told != has:
        raise InputError(
            f"{store.path / ADAPTER_CONFIG}: {setting}: found {str(told).lower()}; allowed: "
            f"{str(has).lower()}, as {ADAPTER_WEIGHTS} has {'' if has else 'no '}{what} of {module}"
        )


def _token_rows(store: Checkpoint, module: str) -> tuple[int, ...]:
    """Which rows of a module's weight are stored: a list is for the input embedding.

    Raises:
        InputError: the config does not say it.
    """
    found = store.config.get("trainable_token_indices")
    if isinstance(found, Mapping):
        found = next((rows for key, rows in found.items() if _ends_with(module, key)), None)
    elif found is not None and not is_embedding(f"{module}.weight"):
        found = None
    if not found:
        raise InputError(
            f"{store.path / ADAPTER_CONFIG}: trainable_token_indices: found none of {module}, of "
            f"which {ADAPTER_WEIGHTS} has rows"
        )
    return tuple(found)


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """The product's factor for a module; patterns name modules by the end of their path."""
    alpha: float = settings["lora_alpha"]
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _ends_with(module: str, key: str) -> bool:
    return module == key or module.endswith(f".{key}")


def transposed_squares(
    parts: AdapterParts,
    store: Checkpoint,
    known: Architecture | None,
    stored: Mapping[str, str],
) -> frozenset[str]:
    """The square weights that are stored as (in, out), which their shape does not tell."""
    squares = [
        name
        for name, adapter in parts.products.items()
        if not adapter.of_embedding
        and store.tensors[adapter.b].shape[0] == store.tensors[adapter.a].shape[1]
    ]
    if not squares or known is None:
        return frozenset()
    transposed = AdapterParts(replaced=dict.fromkeys(known.conv1d_weights, ""))
    return frozenset(transposed.as_in(squares, stored).replaced)
