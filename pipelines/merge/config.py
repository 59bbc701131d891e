"""The config of `poise merge`: mergekit's YAML for the methods that both have."""

from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, field_validator, model_validator

from operators.merging import METHODS, Method
from pipelines.config import (
    Config,
    apply_overrides,
    check,
    load_yaml,
    parse_documents,
    tell_once,
)
from pipelines.errors import InputError
from pipelines.merge.forms import plain_forms
from pipelines.merge.parameters import has_filters, resolve, value_for
from pipelines.merge.recipe import ModelEntry, Parameters, Recipe, Slice

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DtypeName = Literal["float32", "bfloat16", "float16"]
# Fields of mergekit's files that change nothing here, and why.
WITHOUT_EFFECT = {"int8_mask": "masks are never stored"}
GIB = 1 << 30
OF_THE_FILE = {"memory_budget", "executor", "num_workers", "storage"}
_UNITS = {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}


class TokenRow(Config):
    """Where a token's row comes from, in mergekit's longer form: zeros, or a token of a model."""

    kind: Literal["zero", "model_token"]
    model: str | None = Field(None, description="one of the merge's models")
    token: str | None = Field(None, description="a token of that model")
    token_id: int | None = Field(None, ge=0, description="or its number")

    @model_validator(mode="after")
    def _one_of_them(self) -> "TokenRow":
        given = [self.model is not None, (self.token is None) != (self.token_id is None)]
        if given != [self.kind == "model_token"] * 2:
            raise ValueError("allowed: kind zero alone, or model_token with model and one token")
        return self


class TokenSetting(Config):
    """A token that the output has whatever its tokenizer, and where its row comes from."""

    source: str | TokenRow | None = Field(
        None, description="the model whose row is taken; default as for all tokens"
    )
    force: bool = Field(False, description="take it for models that have the token, too")

    @model_validator(mode="after")
    def _forces_something(self) -> "TokenSetting":
        if self.force and self.source is None:
            raise ValueError("force: has no effect without source")
        return self


class TokenizerSettings(Config):
    """mergekit's longer form of `tokenizer`."""

    source: str = Field("union", description="union, base or a model")
    tokens: dict[str, TokenSetting] = Field({}, description="what is to be done with single tokens")
    pad_to_multiple_of: int | None = Field(None, ge=1, description="of the embeddings' rows")


class MergeConfig(Config):
    """An offline merge."""

    merge_method: str = Field(description="a name of `operators.merging.METHODS`")
    models: list[ModelEntry] = Field([], description="what is merged, layer by layer")
    slices: list[Slice] = Field([], description="instead of models: the output's layers in order")
    modules: dict[str, Recipe] = Field(
        {}, description="instead of models: a recipe for each part of the model, by its name"
    )
    base_model: str | None = Field(None, description="W0, the models' common ancestor")
    parameters: Parameters = Field({}, description="of the method, for all models")
    coefficients: str | list[str] | None = Field(
        None, description="of dam: a file of learned coefficients, or several, whose mean counts"
    )
    dtype: DtypeName | None = Field(None, description="the output's, if out_dtype is not given")
    out_dtype: DtypeName | None = Field(None, description="the output's; default the base's own")
    tokenizer_source: str | None = Field(None, description="union, base or a model; mergekit's")
    tokenizer: str | TokenizerSettings | None = Field(
        None, description="whose tokens the output has: union, base or a model"
    )
    chat_template: str | None = Field(None, description="a Jinja template, its file, or a model")
    allow_missing: list[str] = Field(
        [],
        description="patterns of tensors that some models lack; the others merge them",
    )
    merges: dict[str, "MergeConfig"] = Field(
        {}, description="named merges, which models and later named merges refer to"
    )
    out: str | None = Field(None, description="of a named merge: also write it here")
    seed: int = Field(0, description="of random masks")
    allow_nonfinite: bool = Field(False, description="merge NaN and Inf instead of stopping")
    max_shard_bytes: int = Field(5_000_000_000, ge=1, description="of one file of the output")
    memory_budget: int = Field(
        GIB, ge=1 << 24, description="bytes of all workers together, without the program's own"
    )
    executor: Literal["auto", "local", "ray"] = Field(
        "auto", description="threads of one process, or Ray Data actors; auto: ray in a cluster"
    )
    num_workers: int = Field(2, ge=1, description="threads, or Ray Data actors")
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="the device of methods on whole matrices (tsvm, r_tsvm)"
    )
    storage: str | None = Field(None, description="where relative outputs live: folder or address")

    @model_validator(mode="before")
    @classmethod
    def _mergekits_forms(cls, values: Any) -> Any:
        return plain_forms(values) if isinstance(values, Mapping) else values

    @field_validator("memory_budget", "max_shard_bytes", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        """Sizes may be texts such as `512MiB` or `5GB`."""
        if isinstance(value, str):
            text = value.upper().replace(" ", "")
            for unit, factor in _UNITS.items():
                number = text.removesuffix(unit)
                if number != text and number.replace(".", "", 1).isdigit():
                    return int(float(number) * factor)
        return value

    @model_validator(mode="after")
    def _what_the_method_takes(self) -> "MergeConfig":
        if self.merge_method not in METHODS:
            raise ValueError(
                f"merge_method: found {self.merge_method!r}; allowed: {', '.join(METHODS)}"
            )
        if self.tokenizer_source is not None and self.tokenizer is not None:
            raise ValueError("tokenizer, tokenizer_source: give one of them")
        if sum(map(bool, (self.models, self.slices, self.modules))) != 1:
            raise ValueError("models, slices, modules: give exactly one of them")
        used = {self.base_model, *self.merged_models}
        for each in self.merges.values():
            used |= {each.base_model, *each.merged_models}
        for name, each in self.merges.items():
            if name not in used and each.out is None:
                raise ValueError(f"merges: {name}: has no effect: no model refers to it, no out")
            for field in sorted(OF_THE_FILE & each.model_fields_set):
                raise ValueError(f"merges: {name}: {field}: is one for the whole file")
        if self.device != "cpu" and self.method.streamed_unit != "tensor":
            takes = [name for name, each in METHODS.items() if each.streamed_unit == "tensor"]
            raise ValueError(
                f"device: has no effect with {self.merge_method}; allowed with {', '.join(takes)}"
            )
        self._check_coefficients()
        for module, recipe in self.recipes.items():
            for group in recipe.groups():
                if not module or not self._is_base_alone(module, recipe, group):
                    self._check_group(recipe, group)
        if not self.merged_models:
            raise ValueError(f"modules: have no effect: found {self.base_model} alone")
        return self

    @property
    def method(self) -> Method:
        """The method's entry in the table."""
        return METHODS[self.merge_method]

    @property
    def uses_base(self) -> bool:
        """Whether the method merges the base; for some, a parameter or a given base decides."""
        needed = self.method.needs_base
        if needed is None:
            return self.base_model is not None
        if isinstance(needed, str):
            return self.parameters.get(needed) is not None
        return needed

    def is_base(self, entry: ModelEntry) -> bool:
        """Whether an entry is the base, which mergekit's files may list among the models."""
        return self.uses_base and entry.model == self.base_model

    @property
    def recipes(self) -> dict[str, Recipe]:
        """What is merged into what: for each module by its name, or for the whole under ""."""
        if self.modules:
            return self.modules
        whole = Recipe.model_construct(models=self.models, slices=self.slices, parameters={})
        return {"": whole}

    @property
    def has_slices(self) -> bool:
        """Whether the output's layers are put together, in the whole or in a module."""
        return any(recipe.slices for recipe in self.recipes.values())

    def groups(self) -> Iterator[list[ModelEntry]]:
        """The groups that are merged together: the models, or each slice's sources; no base."""
        for recipe in self.recipes.values():
            for group in recipe.groups():
                yield [entry for entry in group if not self.is_base(entry)]

    def merges_before(self, name: str) -> dict[str, "MergeConfig"]:
        """The named merges before this one, which it can refer to."""
        return dict(takewhile(lambda item: item[0] != name, self.merges.items()))

    @property
    def merged_models(self) -> list[str]:
        """The models without the base, in their order, without duplicates."""
        entries = [entry for group in self.groups() for entry in group]
        return list(dict.fromkeys(entry.model for entry in entries))

    @property
    def output_dtype(self) -> torch.dtype | None:
        """The dtype of the output's floating tensors; None keeps the input's dtype."""
        name = self.out_dtype or self.dtype
        return None if name is None else DTYPES[name]

    @property
    def tokenizer_wanted(self) -> str | None:
        """The source of the output's tokens; None: all models must have the same tokens."""
        if isinstance(self.tokenizer, TokenizerSettings):
            return self.tokenizer.source
        return self.tokenizer or self.tokenizer_source

    @property
    def token_settings(self) -> dict[str, TokenSetting]:
        """What is to be done with single tokens."""
        return self.tokenizer.tokens if isinstance(self.tokenizer, TokenizerSettings) else {}

    @property
    def pad_rows_to(self) -> int | None:
        """The embeddings' rows are padded to a multiple of this number."""
        own = self.tokenizer
        return own.pad_to_multiple_of if isinstance(own, TokenizerSettings) else None

    def notices(self) -> list[str]:
        """A line for each field that is accepted but has no effect."""
        lines = []
        recipes = self.recipes.values()
        entries = [entry for each in recipes for group in each.groups() for entry in group]
        scopes = [self.parameters, *(scope for each in recipes for scope in each.scopes)]
        for name, reason in WITHOUT_EFFECT.items():
            if any(name in scope for scope in [*scopes, *(e.parameters for e in entries)]):
                lines.append(f"{name}: has no effect: {reason}")
        if any(self.is_base(entry) and entry.parameters for entry in entries):
            lines.append(f"parameters of {self.base_model}: have no effect: it is the base")
        return lines

    def _is_base_alone(self, module: str, recipe: Recipe, group: list[ModelEntry]) -> bool:
        """Whether a module, or a slice of it, is only the base's, which is then taken as it is.

        Raises:
            ValueError: parameters, which would have no effect.
        """
        taken = [all(map(self.is_base, each)) for each in recipe.groups()]
        if all(taken) and any(recipe.scopes):
            raise ValueError(
                f"modules.{module}: parameters: have no effect: found {self.base_model} alone, "
                "which is base_model"
            )
        return all(map(self.is_base, group))

    def _check_group(self, recipe: Recipe, group: list[ModelEntry]) -> None:
        """Raise ValueError unless the method can merge these models with these parameters."""
        entries = [entry for entry in group if not self.is_base(entry)]
        self._check_parameters(entries, [*recipe.scopes, self.parameters])
        has_base = self.base_model is not None and self.uses_base
        self.method.check_models(len(entries), has_base=has_base, parameters=None)
        if self.uses_base and not has_base:
            raise ValueError("base_model: required, not given")

    def _check_coefficients(self) -> None:
        """Raise ValueError unless the method and the other fields go with `coefficients`."""
        if not self.method.has_coefficients:
            if self.coefficients is not None:
                takes = [name for name, each in METHODS.items() if each.has_coefficients]
                raise ValueError(
                    f"coefficients: has no effect with {self.merge_method}; allowed with "
                    f"{', '.join(takes)}"
                )
            return
        if not self.coefficients:
            raise ValueError(
                "coefficients: required, not given; allowed: a file, or a list of them"
            )
        for field in ("slices", "modules", "allow_missing"):
            if getattr(self, field):
                raise ValueError(
                    f"{field}: cannot be used with {self.merge_method}; allowed: models, whole"
                )

    @property
    def coefficient_files(self) -> list[str]:
        """The files of coefficients."""
        given = self.coefficients or []
        return [given] if isinstance(given, str) else given

    def _check_parameters(self, entries: list[ModelEntry], common: list[Mapping[str, Any]]) -> None:
        """Raise ValueError for an unknown name, a value out of range or a missing value."""
        for scope in common:
            self._check_values(scope)
        for entry in entries:
            self._check_values(entry.parameters)
            for name in entry.parameters:
                if name in self.method.parameters and not self.method.parameters[name].per_model:
                    raise ValueError(
                        f"models: {entry.model}: {name}: is one value for all models; "
                        "give it under parameters"
                    )
        own = [entry.parameters for entry in entries]
        if not has_filters([*own, *common]):  # with filters, missing values are found per tensor
            resolve(self.method, own, common, "", 0.0)

    def _check_values(self, scope: Mapping[str, Any]) -> None:
        """Check names and ranges of one scope, including the values of gradients and filters."""
        for name, setting in scope.items():
            if name in WITHOUT_EFFECT:
                continue
            if name not in self.method.parameters:
                allowed = ", ".join(self.method.parameters) or "none"
                near = get_close_matches(name, self.method.parameters, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"{name}: unknown parameter; allowed: {allowed}{hint}")
            parameter = self.method.parameters[name]
            try:
                value_for(setting, "", 0.0)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            for value in leaves(setting):
                if name == "rescale" and isinstance(value, bool):
                    continue  # mergekit's switch
                if not parameter.accepts(value):
                    raise ValueError(f"{name}: found {value!r}; allowed: {parameter.allowed}")


def leaves(setting: Any) -> Iterator[Any]:
    """The single values in a setting: a gradient, entries with filters, or one value."""
    if isinstance(setting, list) and setting:
        for entry in setting:
            yield from leaves(entry)
    elif (
        isinstance(setting, Mapping) and "value" in setting and set(setting) <= {"filter", "value"}
    ):
        yield from leaves(setting["value"])
    else:
        yield setting


def load_merge_config(path: str | Path, overrides: Iterable[str] = ()) -> MergeConfig:
    """Read a merge's YAML, as `read_merge` does, apply overrides and check it.

    Raises:
        InputError: the first mistake, with file and field.
    """
    values = read_merge(path)
    if isinstance(values, dict):
        values = apply_overrides(values, overrides)
    return check(values, MergeConfig, str(path))


def read_merge(path: str | Path) -> Any:
    """The content of a merge's YAML, unchecked.

    In a file with several documents, the last one is the merge, and the others, which need a
    `name`, are its `merges`. The merge's own `name` has no effect; a line on stderr says so.

    Raises:
        InputError: the file cannot be read, is not YAML, or its documents do not fit together.
    """
    path = Path(path)
    try:
        documents = [each for each in parse_documents(path.read_text("utf-8")) if each]
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        documents = []  # load_yaml reports the error
    if len(documents) < 2:
        if documents and isinstance(documents[0], dict) and "name" in documents[0]:
            return _unnamed(documents[0])
        return load_yaml(path)
    *named, last = documents
    merges = {}
    for number, document in enumerate(named, start=1):
        if not isinstance(document, dict) or not isinstance(document.get("name"), str):
            raise InputError(f"{path}: document {number}: name: required, not given")
        name = document.pop("name")
        if name in merges:
            raise InputError(f"{path}: document {number}: name: found {name!r} a second time")
        merges[name] = document
    if not isinstance(last, dict):
        raise InputError(f"{path}: the last document: expected a mapping of fields")
    return _unnamed(last | {"merges": merges})


def _unnamed(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a file's last merge without its name."""
    if "name" in fields:
        tell_once("name: has no effect: no later merge of the file can use this one as a model")
    return {field: value for field, value in fields.items() if field != "name"}
