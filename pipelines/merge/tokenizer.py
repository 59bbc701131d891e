"""The output's tokens: of one model, the union, or the common ones if the config does not say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.checkpoints import Source, open_model
from pipelines.checkpoints.hub import folder_of, hub_name
from pipelines.errors import InputError
from pipelines.merge.config import MergeConfig
from pipelines.merge.single_tokens import OutputTokenizer, chosen_rows, with_tokens
from pipelines.merge.vocabulary import (
    TOKENIZER_FILE,
    Tokens,
    describe_difference,
    num_rows,
    tokens_in,
    tokens_of,
    with_rows,
)


def align_vocabularies(
    config: MergeConfig, sources: Mapping[str, Source], reference: str
) -> tuple[dict[str, Source], OutputTokenizer]:
    """The sources with the output's rows, and the output's tokenizer.

    Without `tokenizer` in the config, vocabularies may differ only in rows that no token uses.

    Args:
        sources: all models, by name.
        reference: the name of the base, or of the first model.

    Raises:
        InputError: vocabularies that differ while `tokenizer` is not given, or a tokenizer
            that cannot be read.
    """
    wanted = config.tokenizer_wanted
    vocabularies = {name: tokens_of(source) for name, source in sources.items()}
    base = reference if config.base_model is not None else None
    plain = OutputTokenizer(sources[reference].path)
    if wanted is None:
        _check_same(sources, vocabularies)
        rows = {name: num_rows(source) for name, source in sources.items()}
        if len(set(rows.values())) == 1 or None in vocabularies.values():
            return dict(sources), plain
        owns = {name: _padded(range(count), max(rows.values())) for name, count in rows.items()}
        return with_rows(sources, base, owns), plain
    known = _required(sources, vocabularies)
    target, tokenizer = _target(config, wanted, sources, known, reference)
    target, tokenizer = with_tokens(target, tokenizer, config.token_settings)
    chosen = chosen_rows(config.token_settings, sources, known, target)
    forced = {token for token, each in config.token_settings.items() if each.force}
    size = max(target.values()) + 1
    if all(own == target for own in known.values()) and not config.pad_rows_to:
        size = max(size, *(num_rows(source) for source in sources.values()))
    if config.pad_rows_to:
        size = -(-size // config.pad_rows_to) * config.pad_rows_to
    owns = {}
    for name, own in known.items():
        places, num_own = [-1] * size, num_rows(sources[name])
        for token, row in target.items():
            place = -1 if token in forced else own.get(token, -1)
            # A token that was added without resizing the embedding has no row in it.
            places[row] = place if place < num_own else -1
        owns[name] = places
    return with_rows(sources, base, owns, chosen), tokenizer


def _padded(rows: range, size: int) -> list[int]:
    return [*rows, *[-1] * (size - len(rows))]


def _check_same(sources: Mapping[str, Source], vocabularies: Mapping[str, Tokens | None]) -> None:
    """Raise InputError if two vocabularies differ."""
    known = {name: tokens for name, tokens in vocabularies.items() if tokens is not None}
    if not known:
        return
    first = next(iter(known))
    for name, tokens in known.items():
        if tokens != known[first]:
            one, two = sources[first].path, sources[name].path
            raise InputError(
                f"tokenizer: required, not given, as vocabularies differ: "
                f"{describe_difference(one, known[first], two, tokens)}; allowed: union, base, "
                "or a model"
            )


def _required(
    sources: Mapping[str, Source], vocabularies: Mapping[str, Tokens | None]
) -> dict[str, Tokens]:
    """All vocabularies.

    Raises:
        InputError: a model without tokenizer.json.
    """
    known = {}
    for name, tokens in vocabularies.items():
        if tokens is None:
            raise InputError(
                f"model {sources[name].path}: no {TOKENIZER_FILE}, which `tokenizer` needs of "
                "every model"
            )
        known[name] = tokens
    return known


def _target(
    config: MergeConfig,
    wanted: str,
    sources: Mapping[str, Source],
    known: Mapping[str, Tokens],
    reference: str,
) -> tuple[Tokens, OutputTokenizer]:
    """The output's tokens with their rows, and its tokenizer files."""
    if wanted == "union":
        folder = sources[reference].path
        ordered = [reference, *(name for name in known if name != reference)]
        text = _union(folder, [(sources[name].path, known[name]) for name in ordered])
        if text is None:
            return known[reference], OutputTokenizer(folder)
        tokens = json.loads(text)
        rows = dict(_vocabulary(tokens, folder))
        rows |= {entry["content"]: entry["id"] for entry in tokens["added_tokens"]}
        return rows, OutputTokenizer(folder, text)
    if wanted == "base":
        if config.base_model is None:
            raise InputError(
                "tokenizer: found 'base' without base_model; allowed: union, or a model"
            )
        return known[reference], OutputTokenizer(sources[reference].path)
    if wanted in known:
        return known[wanted], OutputTokenizer(sources[wanted].path)
    if hub_name(wanted) is not None:  # of which only the tokenizer is needed
        folder = folder_of(wanted, "tokenizer")
        tokens = tokens_in(folder)
    else:
        other = open_model(wanted)
        folder, tokens = other.path, tokens_of(other)
    if tokens is None:
        raise InputError(f"tokenizer: {folder}: no {TOKENIZER_FILE}")
    return tokens, OutputTokenizer(folder)


def _union(folder: Path, models: list[tuple[Path, Tokens]]) -> str | None:
    """The reference's tokenizer.json, with the other models' tokens after its own.

    Added tokens stay added tokens; the others join the vocabulary.

    Returns:
        the file's text; None if the reference has all tokens already.
    """
    result = json.loads((folder / TOKENIZER_FILE).read_text(encoding="utf-8"))
    vocabulary = _vocabulary(result, folder)
    known = dict(models[0][1])
    number = max(known.values()) + 1
    for path, tokens in models[1:]:
        own = json.loads((path / TOKENIZER_FILE).read_text(encoding="utf-8"))
        added = {entry["content"]: entry for entry in own.get("added_tokens", [])}
        for token in sorted(tokens.keys() - known.keys(), key=tokens.__getitem__):
            if token in added:
                result["added_tokens"].append(added[token] | {"id": number})
            else:
                vocabulary[token] = number
            known[token] = number
            number += 1
    if len(known) == len(models[0][1]):
        return None
    return json.dumps(result, ensure_ascii=False, indent=2)


def _vocabulary(tokenizer: dict[str, Any], folder: Path) -> dict[str, int]:
    """The vocabulary inside a tokenizer.json, to be extended in place.

    Raises:
        InputError: a kind of tokenizer whose vocabulary is not a mapping.
    """
    found = tokenizer["model"].get("vocab")
    if not isinstance(found, dict):
        raise InputError(
            f"{folder / TOKENIZER_FILE}: model type {tokenizer['model'].get('type')!r}: cannot be "
            "extended; allowed for union: BPE, WordPiece, WordLevel"
        )
    return found
