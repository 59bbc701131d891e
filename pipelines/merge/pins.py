"""Models of the hub in a merge's config: each name gets the commit that it stands for now, so that
plan, record and repetition speak of the same model.
"""

from collections.abc import Mapping
from typing import Any

from pipelines.checkpoints import pinned_model
from pipelines.checkpoints.hub import hub_ids, hub_name, pinned
from pipelines.config import check
from pipelines.merge.config import MergeConfig
from pipelines.merge.forms import with_models

Pins = dict[str, str]  # a name as the user wrote it -> with its commit


def pins_of(config: MergeConfig, known: Mapping[str, str] | None = None) -> Pins:
    """The names in a config that change, with their commits; the models are fetched if need be.

    Args:
        known: some that were found before, which stay.

    Raises:
        InputError: a model of the hub that is neither in its cache nor can be fetched.
    """
    pins: Pins = dict(known or {})
    for each in (*config.merges.values(), config):
        base = each.base_model
        for name in (base, *each.merged_models):
            if name is not None and name not in config.merges and name not in pins:
                pins[name] = pinned_model(name, None if name == base else base)
        for name in (each.tokenizer_wanted, each.chat_template):
            if name is not None and hub_name(name) is not None and name not in pins:
                pins[name] = pinned(name, "tokenizer")
    return {name: pin for name, pin in pins.items() if pin != name}


def with_pins(config: MergeConfig, pins: Mapping[str, str] | None = None) -> MergeConfig:
    """A config whose models of the hub have their commits.

    Args:
        pins: known ones; the others are found.
    """
    found = pins_of(config, pins)
    if not found:
        return config
    values = config.model_dump(mode="json", exclude_unset=True)
    return check(renamed(values, found), MergeConfig, "merge")


def renamed(values: Mapping[str, Any], pins: Mapping[str, str]) -> dict[str, Any]:
    """A merge's fields with other names of models, those of its named merges too."""

    def change(value: Any, field: str) -> Any:
        return pins.get(value, value) if isinstance(value, str) else value

    result = with_models(dict(values), change)
    if isinstance(result.get("chat_template"), str):
        result["chat_template"] = change(result["chat_template"], "chat_template")
    named = result.get("merges")
    if isinstance(named, Mapping):
        result["merges"] = {name: renamed(each, pins) for name, each in named.items()}
    return result


def ids_of(names: list[str]) -> list[str]:
    """The models' names for a card: of the hub's their ids alone, without duplicates."""
    return list(dict.fromkeys(id for name in names for id in hub_ids(name)))
