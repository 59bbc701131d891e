"""The files beside the merged weights: which are copied, from which model, and which are made.

All but the tokenizer's files come from the model that the output takes its config from; the
tokenizer's, with generation_config.json, from the model whose tokenizer is written.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.checkpoints import Source
from pipelines.checkpoints.adapter import ADAPTER_CONFIG
from pipelines.checkpoints.companions import (
    check_links,
    companions_of,
    is_of_tokenizer,
    told,
)
from pipelines.checkpoints.reader import read_json
from pipelines.hub.cache import snapshot_of
from pipelines.merge.single_tokens import OutputTokenizer
from pipelines.merge.templates import (
    SETTINGS_FILES,
    TEMPLATE_FILE,
    Templates,
    is_template_file,
    template_files,
    without_template,
)
from pipelines.merge.token_ids import Carrier
from pipelines.merge.vocabulary import TOKENIZER_FILE, VocabularySource, num_rows, tokens_in

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
# What merges copied before everything else travelled, too.
_LONG_COPIED = {
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
    GENERATION_FILE,
}
# Plain lists of tokens, which cannot say what a new tokenizer.json has.
_OLD_VOCABULARY = re.compile(r".*vocab.*\.txt|.*\.(spm|tiktoken)")


@dataclass(frozen=True, slots=True)
class OutputFiles:
    """What stands beside the weights, apart from card and record.

    Attributes:
        config: the output's config.json.
        copied: the files that are copied, by their places in the output.
        written: the texts of those that are made.
        notices: a line for each thing that a user would not expect.
        meaning: what of it merges of earlier versions did otherwise; None: nothing. Their results
            do not pass for finished ones.
    """

    config: dict[str, Any]
    copied: dict[str, Path]
    written: dict[str, str]
    notices: list[str]
    meaning: Any


def output_files(
    config: Mapping[str, Any],
    reference: Source,
    tokenizer: OutputTokenizer,
    templates: Templates | None,
    template_file: bool = False,
) -> OutputFiles:
    """Decide on every file before any work.

    Args:
        config: the output's config.json, with the numbers that tokens have in the reference.
        templates: the chat templates that were asked for; None: the tokenizer's own stay.
        template_file: whether they stand in a file that belongs to none of the models.

    Raises:
        InputError: a link that leads out of a model's folder, a file that is no JSON, or a written
            tokenizer without the token that ends texts.
    """
    copied, notices = _copied(reference, tokenizer)
    written = {} if tokenizer.text is None else {TOKENIZER_FILE: tokenizer.text}
    generation = copied.get(GENERATION_FILE)
    carried, meant = dict(config), {}
    for carrier in _carriers(reference, tokenizer):
        carried = carrier.carry(config)
        meant = {key: value for key, value in carried.items() if value != config[key]}
        if generation is not None and generation.parent != tokenizer.folder:
            carrier.file = GENERATION_FILE
            written[GENERATION_FILE] = _text(carrier.carry(read_json(generation)))
        notices += dict.fromkeys(carrier.notices)
    if templates is not None:
        if not templates:
            notices.append("chat_template: auto: no model has one, and so the output has none")
        written |= _with_templates(copied, templates)
    notices += _missing_code(config, copied, reference.home)
    if generation is not None and generation.parent != reference.path:
        meant[GENERATION_FILE] = str(generation)
    new = [place for place in copied if place not in _LONG_COPIED]
    told_apart = {*SETTINGS_FILES, TEMPLATE_FILE} if template_file else set(SETTINGS_FILES)
    new += [f"{place}: {written[place]}" for place in written.keys() & told_apart]
    return OutputFiles(
        config=carried,
        copied={place: copied[place] for place in sorted(copied.keys() - written.keys())},
        written=written,
        notices=notices,
        meaning=[meant, sorted(new)] if meant or new else None,
    )


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, indent=2) + "\n"


def _copied(reference: Source, tokenizer: OutputTokenizer) -> tuple[dict[str, Path], list[str]]:
    """The files to copy by their places, and lines about them."""
    home, folder = reference.home, tokenizer.folder
    own = companions_of(home)
    if folder == home:
        check_links(home, own.foreign)
        files = dict(own.files)
    else:
        theirs = companions_of(folder)
        check_links(home, [place for place in own.foreign if not is_of_tokenizer(place)])
        check_links(folder, [place for place in theirs.foreign if is_of_tokenizer(place)])
        files = {place: file for place, file in own.files.items() if not is_of_tokenizer(place)}
        files |= {place: file for place, file in theirs.files.items() if is_of_tokenizer(place)}
        if GENERATION_FILE not in files and GENERATION_FILE in own.files:
            files[GENERATION_FILE] = own.files[GENERATION_FILE]
        if _has_code(folder / "tokenizer_config.json"):
            code = {place: file for place, file in theirs.files.items() if place.endswith(".py")}
            files = code | files
    for place in (CONFIG_FILE, ADAPTER_CONFIG):
        files.pop(place, None)
    if tokenizer.text is not None:
        files = {place: files[place] for place in files if not _OLD_VOCABULARY.fullmatch(place)}
    return files, told(home, own)


def _has_code(settings: Path) -> bool:
    """Whether a settings file names Python files of its folder."""
    return settings.is_file() and "auto_map" in read_json(settings)


def _carriers(reference: Source, tokenizer: OutputTokenizer) -> Iterator[Carrier]:
    """What carries the reference's numbers of tokens into the written tokenizer, where that is
    another one than the reference's; a union keeps the reference's numbers.
    """
    if tokenizer.folder == reference.path:
        return
    old, new = tokens_in(reference.path), tokens_in(tokenizer.folder)
    if old is None or new is None:
        return
    # Tokens that the config adds have numbers behind the tokenizer's own.
    new = new | tokenizer.added
    own = reference.rows.source if isinstance(reference, VocabularySource) else reference
    sizes = {num_rows(own), num_rows(reference), own.config.get("vocab_size")}
    yield Carrier(CONFIG_FILE, {row: token for token, row in old.items()}, new, sizes)


def _with_templates(copied: dict[str, Path], templates: Templates) -> dict[str, str]:
    """The templates' files; all that would say something else is left out of what is copied."""
    for place in [place for place in copied if is_template_file(place)]:
        del copied[place]
    written = template_files(templates)
    for place in SETTINGS_FILES:
        text = without_template(copied[place]) if place in copied else None
        if text is not None:
            written[place] = text
    return written


def _missing_code(
    config: Mapping[str, Any], copied: Mapping[str, Path], home: Path
) -> Iterator[str]:
    """A line for each Python file that config.json names and its folder has not."""
    named, found = config.get("auto_map"), snapshot_of(home)
    hint = f"; hf download {found[0].id} --include '*.py' brings it" if found else ""
    for value in named.values() if isinstance(named, Mapping) else ():
        for each in value if isinstance(value, list) else [value]:
            file = f"{str(each).partition('.')[0]}.py"
            if isinstance(each, str) and "--" not in each and file not in copied:
                yield f"{CONFIG_FILE}: auto_map names {file}, which its folder does not have{hint}"
