"""Single tokens that a config speaks of (`tokenizer: {tokens: ...}`): the output has them whatever
its tokenizer, and their rows may come from a model, from another token, or be zeros.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pipelines.checkpoints import Source
from pipelines.errors import InputError
from pipelines.merge.config import TokenSetting
from pipelines.merge.vocabulary import TOKENIZER_FILE, Tokens, num_rows


@dataclass(frozen=True, slots=True)
class OutputTokenizer:
    """Where the output's tokenizer files come from; `text` is tokenizer.json where it is new, and
    `added` has the numbers of single tokens that were put behind the others.
    """

    folder: Path
    text: str | None = None
    added: Tokens = field(default_factory=dict)


def with_tokens(
    tokens: Tokens, tokenizer: OutputTokenizer, settings: Mapping[str, TokenSetting]
) -> tuple[Tokens, OutputTokenizer]:
    """The output's tokens and tokenizer with those that the config speaks of."""
    missing = [token for token in settings if token not in tokens]
    if not missing:
        return tokens, tokenizer
    first = max(tokens.values()) + 1
    added = {token: first + place for place, token in enumerate(missing)}
    text = tokenizer.text or (tokenizer.folder / TOKENIZER_FILE).read_text(encoding="utf-8")
    content = json.loads(text)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content["added_tokens"] = content.get("added_tokens") or []
    for token, number in added.items():
        entry = {"id": number, "content": token, **flags, "special": False}
        content["added_tokens"].append(entry)
    text = json.dumps(content, ensure_ascii=False, indent=2)
    return tokens | added, replace(tokenizer, text=text, added=added)


def chosen_rows(
    settings: Mapping[str, TokenSetting],
    sources: Mapping[str, Source],
    known: Mapping[str, Tokens],
    tokens: Tokens,
) -> dict[int, tuple[Source, int] | None]:
    """For rows of the output whose source the config gives: a model and its row; None: zeros.

    Raises:
        InputError: a model that is not merged, or has no such row.
    """
    found: dict[int, tuple[Source, int] | None] = {}
    for token, setting in settings.items():
        source = setting.source
        if source is None:
            continue
        if not isinstance(source, str) and source.kind == "zero":
            found[tokens[token]] = None
            continue
        model, name, row = source, token, None
        if not isinstance(source, str):
            model, name, row = str(source.model), source.token or "", source.token_id
        place = f"tokenizer.tokens.{token}.source"
        if not isinstance(model, str) or model not in sources:
            raise InputError(f"{place}: found {model!r}; allowed: {', '.join(sources)}")
        row = known[model].get(name, -1) if row is None else row
        if not 0 <= row < num_rows(sources[model]):
            raise InputError(f"{place}: model {model} has no row for {name or row!r}")
        found[tokens[token]] = (sources[model], row)
    return found
