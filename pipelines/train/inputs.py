"""What a run reads, checked before it begins."""

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from operators.optim import ShardLayout, Tau
from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.architecture import vocabulary_size
from pipelines.checkpoints.companions import check_links, companions_of
from pipelines.errors import InputError
from pipelines.train.architecture import (
    check_class,
    fused_layers,
    meta_model,
    outside_language,
)
from pipelines.train.config import ATTENTION, AlignConfig
from pipelines.train.data import TokenTable, source_files
from pipelines.train.models import with_folders
from pipelines.train.optimizer import delta_of
from pipelines.train.packing import check_packing
from pipelines.train.random_start import planned_start
from pipelines.train.reward_start import what_changes
from pipelines.train.router import asks_for_router_loss, router_coefficient
from pipelines.train.strategies.loading import check_tied, empty_model
from pipelines.train.strategies.lora import add_adapters, layers_read_past
from pipelines.train.trackers import check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_inputs(config: AlignConfig) -> Checkpoint:
    """Check everything that needs no rows and no weights (except a tied parameter that is stored
    twice); returns the model.

    Raises:
        InputError: packages, models or files that are missing or do not match.
    """
    _check_packages(config)
    check_trackers(config.trackers)
    config = with_folders(config)
    is_random = config.init == "random"
    checkpoint = planned_start(config.model) if is_random else Checkpoint.open(config.model)
    check_links(checkpoint.path, companions_of(checkpoint.path).foreign)
    for data in [*config.sets, *config.held_out_sets]:
        source_files(data.path, data.split)
    if is_random:
        model = meta_model(config.model)
    else:
        model, weights = empty_model(config.model, config.head)
        check_tied(model, weights)
    check_class(model, config.model)
    _check_attention(model, config)
    router_coefficient(config)
    if config.traits.zero_stage and outside_language(model):
        raise InputError(
            f"strategy: found {config.strategy} with a {type(model).__name__}, whose parts beside "
            "its language model are not trained; allowed: single, ddp, fsdp2"
        )
    if config.packing:
        check_packing(model)
    if config.lora is not None:
        add_adapters(model, config.lora)
    if config.reference_model is not None:
        _check_reference(checkpoint, Checkpoint.open(config.reference_model))
    if config.optimizer.tau is not None:
        _check_delta(model, config)
    return checkpoint


def remarks(config: AlignConfig) -> Iterator[str]:
    """A line for each thing that a user might not expect of a run on this model."""
    if config.head is not None and asks_for_router_loss(config.model):
        yield (
            f"{config.model}: its config asks for the router's loss (output_router_logits), which "
            f"is not in the loss of objective {config.objective.label}"
        )
    if config.head is not None:
        yield from what_changes(config.model, config.head)
    model = meta_model(config.model, config.head)
    outside = outside_language(model)
    if outside:
        yield (
            f"{config.model}: rows are text, so {len(outside)} tensors beside its language model "
            f"({outside[0]}, ...) stay as they are"
        )
    if config.lora is not None and config.lora.target_modules == "all-linear":
        chosen = tuple(f".{name}" for name in config.lora.target_parameters)
        fused = [name for name in fused_layers(model) if not f".{name}".endswith(chosen)]
        if fused:
            yield (
                f"lora: all-linear leaves out {len(fused)} tensors of experts that are fused "
                f"({fused[0]}, ...), which stay as they are"
            )
        taken = list(layers_read_past(model))
        if taken:
            yield (
                f"lora: all-linear leaves out {len(taken)} layers whose weights are taken past an "
                f"adapter ({taken[0]}, ...), which stay as they are"
            )


def _check_packages(config: AlignConfig) -> None:
    """Raise InputError if a setting needs a package that is not installed."""
    needs = []  # (package, the extra that installs it, the setting that needs it)
    if config.traits.package is not None:
        needs += [
            (config.traits.package, config.traits.package, f"strategy: found {config.strategy}")
        ]
    if config.lora is not None:
        needs += [("peft", "lora", "lora: found adapters")]
    for package, extra, found in needs:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"{found}, for which {package} is not installed: pip install 'poise[{extra}]'"
            )


def _check_attention(model: "PreTrainedModel", config: AlignConfig) -> None:
    """Raise InputError unless the model has this attention, and its package is installed. GPUs are
    the workers' concern.
    """
    name = config.attention
    if name is None:
        return
    found = f"attention: found {name} with model {config.model}"
    if getattr(model.config.get_text_config(), "num_attention_heads", None) is None:
        raise InputError(f"{found}, which has no attention")
    needs_gpu, package = ATTENTION[name]
    if not needs_gpu:
        meta_model(config.model, config.head, name)
        return
    kind = "flex" if name.startswith("flex") else "flash"
    if not getattr(model, f"_supports_{kind}_attn", False):
        raise InputError(f"{found}, for which transformers has no {kind} attention")
    if package is not None and importlib.util.find_spec(package) is None:
        raise InputError(f"attention: found {name}, for which {package} is not installed")


def check_vocabulary(model: Checkpoint, table: TokenTable) -> None:
    """Raise InputError if the tokenizer has tokens that the model does not have."""
    size = vocabulary_size(model.config)
    if size is not None and table.largest_id() >= size:
        raise InputError(
            f"model {model.path}: its tokenizer gives token {table.largest_id()}; its vocabulary "
            f"has {size} tokens"
        )


def _check_reference(model: Checkpoint, reference: Checkpoint) -> None:
    """Raise InputError if the reference model has another vocabulary size than the model."""
    needed, found = (vocabulary_size(each.config) for each in (model, reference))
    if needed != found:
        raise InputError(
            f"reference_model: {reference.path}: found a vocabulary of {found} tokens; the model's "
            f"has {needed}"
        )


def _check_delta(model: nn.Module, config: AlignConfig) -> None:
    """Raise InputError unless the reference delta fits the model's parameters."""
    delta = Tau(delta_of(config), config.optimizer.missing_delta)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        try:
            delta.covers(ShardLayout(name, tuple(parameter.shape), 0, 0))
        except ValueError as error:
            found = str(error).removeprefix("reference_delta: ")
            raise InputError(f"optimizer.tau: {found}; or choose optimizer.missing_delta") from None
