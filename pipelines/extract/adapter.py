"""The adapter's files: factors and whole modules in one safetensors file, PEFT's description of
them, the tokenizer, and what record and card say.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from operators.low_rank import Fit
from pipelines.checkpoints import Checkpoint
from pipelines.checkpoints.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PREFIX,
    target_modules,
)
from pipelines.checkpoints.companions import companions_of, copy_files, is_of_tokenizer
from pipelines.checkpoints.digests import DigestMemory, model_digest
from pipelines.checkpoints.hub import described, hub_ids, hub_name, recorded
from pipelines.checkpoints.reader import read_range
from pipelines.checkpoints.safetensors_header import build_header, read_header
from pipelines.commit import write_atomically
from pipelines.extract.plan import SAVED, STEP_ELEMENTS, ExtractPlan, Item
from pipelines.extract.worker import factors_file
from pipelines.merge.journal import digests_of
from pipelines.merge.output_files import GENERATION_FILE
from pipelines.provenance import Provenance


@dataclass(frozen=True, slots=True)
class Outcome:
    """The results of all finished items of a plan, in the plan's order."""

    plan: ExtractPlan
    ranks: list[int]
    fits: list[Fit]
    results: Sequence[dict[str, Any]]

    @classmethod
    def of(cls, plan: ExtractPlan, results: Sequence[dict[str, Any]]) -> "Outcome":
        """From the results of the worker, in any order."""
        by_item = {result["item"]: result for result in results}
        ordered = [by_item[number] for number in range(len(plan.items)) if number in by_item]
        fits = [Fit(**result["fit"]) for result in ordered]
        return cls(plan, [result["rank"] for result in ordered], fits, ordered)

    @property
    def modules(self) -> dict[str, tuple[int, Fit]]:
        """The linear layers and other parameters that have factors: rank and fit."""
        found = zip(self.plan.items, self.ranks, self.fits, strict=False)
        return {item.target: (rank, fit) for item, rank, fit in found if rank}

    @property
    def layers(self) -> list[str]:
        """The modules that have factors."""
        found = zip(self.plan.items, self.ranks, strict=False)
        return [item.target for item, rank in found if rank and item.layer]

    @property
    def parameters(self) -> list[str]:
        """The parameters that have factors of their own."""
        found = zip(self.plan.items, self.ranks, strict=False)
        return [item.name for item, rank in found if rank and not item.layer]

    @property
    def biases(self) -> list[Item]:
        """The changed biases, which are saved as they are."""
        found = zip(self.plan.items, self.fits, strict=False)
        return [item for item, fit in found if item.role == "biases" and fit.delta]

    def inside(self, item: Item) -> str:
        """A tensor's name in PEFT's model, where what has factors is wrapped: a layer once, another
        module once for each parameter. Of several wrappers the parameter's own one has its factors.
        """
        if item.module in self.layers:
            wrappers = [item.module]
        else:
            wrappers = self.plan.kinds.wrappers(item.module, self.parameters)
        _, _, leaf = item.name.rpartition(".")
        if item.role == "factors":
            depth = 0 if item.layer else len(wrappers) - 1 - wrappers.index(leaf)
            return item.module + ".base_layer" * depth
        return f"{item.module}{'.base_layer' * len(wrappers)}.{leaf}"

    @property
    def whole(self) -> list[str]:
        """The changed modules that are saved whole."""
        found = zip(self.plan.items, self.fits, strict=False)
        return sorted({i.module for i, fit in found if i.role == "whole" and fit.delta})

    @property
    def left_out(self) -> dict[str, dict[str, Any]]:
        """The changes that are not in the adapter, by kind: number of tensors, modules, and share
        of the norm of the whole delta.
        """
        total = self.total.delta
        found: dict[str, list[tuple[Item, float]]] = {}
        for item, fit in zip(self.plan.items, self.fits, strict=False):
            if item.role not in ("factors", *SAVED) and fit.delta:
                found.setdefault(item.role, []).append((item, fit.delta))
        return {
            kind: {
                "tensors": len(tensors),
                "modules": sorted({item.module.rpartition(".")[2] for item, _ in tensors}),
                "share": (sum(squares for _, squares in tensors) / total) ** 0.5,
            }
            for kind, tensors in found.items()
        }

    @property
    def total(self) -> Fit:
        """Of all tensors."""
        return sum(self.fits, Fit())

    @property
    def details(self) -> dict[str, Any]:
        """For the record: what is kept, in total and for each module, and what is left out."""
        modules = {
            name: {"rank": rank, "delta": fit.delta**0.5, **_told(fit)}
            for name, (rank, fit) in self.modules.items()
        }
        extracted = sum((fit for _, fit in self.modules.values()), Fit())
        return {
            "dtype": str(self.plan.dtype).removeprefix("torch."),
            "extracted": _told(extracted),
            "all_tensors": _told(self.total),
            "whole": self.whole,
            "biases": [item.name for item in self.biases],
            "left_out": self.left_out,
            "unmatched": self.plan.unmatched,
            "modules": modules,
            "settings": self.plan.settings_key,
        }


def _told(fit: Fit) -> dict[str, float]:
    return {"kept": fit.kept, "error": fit.error, "cosine": fit.cosine}


def write_adapter(outcome: Outcome, folder: Path, memory: DigestMemory) -> None:
    """Write all files of the adapter; the factors are read from the worker's files."""
    plan = outcome.plan
    _write_weights(outcome, folder)
    settings = json.dumps(adapter_config(outcome), indent=2)
    write_atomically(folder / ADAPTER_CONFIG, f"{settings}\n")
    files = companions_of(plan.tuned.path).files
    of_tokenizer = {k: f for k, f in files.items() if is_of_tokenizer(k) and k != GENERATION_FILE}
    copy_files(of_tokenizer, folder)
    known = digests_of(outcome.results)
    inputs = {
        described(found.path): memory.digest(found, known.get(path), plan.identities[path])
        for path, found in plan.checkpoints.items()
    }
    Provenance(
        kind="extracted",
        digest=model_digest(Checkpoint.at(folder)),
        fingerprint=plan.key,
        config=plan.settings,
        inputs=inputs,
        seed=None,
        details=outcome.details | recorded(each.path for each in plan.checkpoints.values()),
        title="Low-rank adapter of a difference",
        base_models=hub_ids(plan.config.base),
        tags=["lora"],
        library="peft",
        summary=summary(outcome),
    ).write(folder)


def adapter_config(outcome: Outcome) -> dict[str, Any]:
    """PEFT's config of the adapter. `lora_alpha` is the rank, so that the scale is 1."""
    plan, modules = outcome.plan, outcome.modules
    rank = max(rank for rank, _ in modules.values())
    patterns = {name: found for name, (found, _) in modules.items() if found != rank}
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": hub_ids(plan.config.base)[0],
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": target_modules(outcome.layers, plan.kinds.modules),
        "modules_to_save": outcome.whole or None,
        "fan_in_fan_out": any(i.transposed for i in plan.items if i.role == "factors" and i.layer),
        "bias": "all" if outcome.biases else "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    if outcome.parameters:
        found = target_modules(outcome.parameters, list(plan.kinds.tensors))
        settings["target_parameters"] = found if isinstance(found, list) else outcome.parameters
    if (base := hub_name(plan.config.base)) is not None:
        settings["revision"] = base.revision
    if _tied_copies(outcome):
        settings["ensure_weight_tying"] = True
    return settings


def summary(outcome: Outcome) -> str:
    """The card's text: the inputs, what is kept, and what is left out."""
    plan, details = outcome.plan, outcome.details
    kept = {"linear layers": details["extracted"], "all tensors": details["all_tensors"]}
    lines = [
        f"- of the delta's norm in {name}: {found['kept']:.2%} kept, cosine {found['cosine']:.4f}"
        for name, found in kept.items()
    ]
    if outcome.biases:
        lines.append(f"- biases as they are: {len(outcome.biases)}")
    if outcome.whole:
        lines.append(f"- saved whole: {', '.join(outcome.whole)}")
    for kind, left in outcome.left_out.items():
        lines.append(f"- left out: {kind}, {left['share']:.2%} of the delta's norm")
    config = adapter_config(outcome)
    return (
        f"Made with Poise: a LoRA adapter for `{plan.config.base}` that approximates "
        f"`{plan.config.tuned}`, by truncated SVD of the difference of each linear "
        f"layer.\n\n- {len(outcome.modules)} modules, rank up to {config['r']}, "
        f"{details['dtype']}\n" + "\n".join(lines)
    )


def _tied_copies(outcome: Outcome) -> dict[str, str]:
    """Tensors that are tied to a saved one, and its name: PEFT needs both names in the file."""
    return {
        other: first
        for other, first in outcome.plan.kinds.tied.items()
        if first.rpartition(".")[0] in outcome.whole
    }


Reader = Callable[[int, int], Tensor]


@dataclass(frozen=True, slots=True)
class _Written:
    """A tensor of the adapter, and how its elements are read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Reader


def _write_weights(outcome: Outcome, folder: Path) -> None:
    """Write the weights in steps; wide dtypes come first, so that all tensors are aligned."""
    tensors = {**_factors(outcome, folder), **_whole_tensors(outcome)}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    with (folder / ADAPTER_WEIGHTS).open("wb") as file:
        file.write(build_header({n: (tensors[n].dtype, tensors[n].shape) for n in order}))
        for name in order:
            tensor = tensors[name]
            count = torch.Size(tensor.shape).numel()
            for start in range(0, count, STEP_ELEMENTS):
                values = tensor.read(start, min(start + STEP_ELEMENTS, count)).to(tensor.dtype)
                file.write(values.contiguous().view(torch.uint8).numpy().data)


def _factors(outcome: Outcome, folder: Path) -> dict[str, _Written]:
    """The factors of all modules, from the worker's files."""
    found = {}
    for number, (item, rank) in enumerate(zip(outcome.plan.items, outcome.ranks, strict=True)):
        if not rank:
            continue
        stored = read_header(factors_file(folder, number))
        for part, end in (("a", "lora_A"), ("b", "lora_B")):
            tensor = stored[part]

            def read(start: int, stop: int, tensor: Any = tensor) -> Tensor:
                return read_range(tensor, start, stop)

            name = f"{PREFIX}{outcome.inside(item)}.{end}.weight"
            found[name] = _Written(tensor.dtype, tensor.shape, read)
    return found


def _whole_tensors(outcome: Outcome) -> dict[str, _Written]:
    """Biases, and the tensors of modules that are saved whole, in the tuned model's dtype."""
    plan, found, biases = outcome.plan, {}, outcome.biases
    for item in plan.items:
        if item.module not in outcome.whole and item not in biases:
            continue
        spec = plan.tuned.find(item.tuned)
        assert spec is not None

        def read(start: int, stop: int, name: str = item.tuned) -> Tensor:
            return plan.tuned.read(name, start, stop)

        name = outcome.inside(item) if item in biases else item.name
        found[name] = _Written(spec.dtype, spec.shape, read)
    for other, first in _tied_copies(outcome).items():
        found[other] = found[first]
    return {f"{PREFIX}{name}": written for name, written in found.items()}
