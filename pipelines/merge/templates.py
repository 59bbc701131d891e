"""Chat templates: read from wherever transformers reads them, written as transformers writes them.

A model may have several, each with a name; "default" is the one of a plain conversation.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipelines.checkpoints import Source
from pipelines.checkpoints.companions import TEMPLATES_FOLDER
from pipelines.checkpoints.hub import folder_of
from pipelines.checkpoints.reader import read_json
from pipelines.errors import InputError

TEMPLATE_FILE = "chat_template.jinja"
OLD_FILE = "chat_template.json"  # of processors, before TEMPLATE_FILE
SETTINGS_FILES = ("tokenizer_config.json", "processor_config.json")
DEFAULT = "default"

Templates = dict[str, str]  # name -> Jinja

CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
BUILT_IN = {"chatml": CHATML}


def templates_of(folder: Path) -> Templates:
    """A model's chat templates; none where it has none.

    Files of their own go before tokenizer_config.json's field, that before a processor's.

    Raises:
        InputError: a file that is no text, no JSON, or has another form.
    """
    own = [(DEFAULT, folder / TEMPLATE_FILE)]
    own += [(file.stem, file) for file in sorted((folder / TEMPLATES_FOLDER).glob("*.jinja"))]
    found = {name: _text(file) for name, file in own if file.is_file()}
    for name in (SETTINGS_FILES[0], OLD_FILE, SETTINGS_FILES[1]):
        if not found and (folder / name).is_file():
            found = _named(read_json(folder / name).get("chat_template"), folder / name)
    return found


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{file}: is no text in UTF-8; allowed: a Jinja template") from None


def _named(value: Any, file: Path) -> Templates:
    """The field `chat_template` of a settings file: a text, a list of named ones, or names."""
    if isinstance(value, list):
        pairs = [(e.get("name"), e.get("template")) for e in value if isinstance(e, dict)]
        value = dict(pairs) if len(pairs) == len(value) else value
    if not value:
        return {}
    named = value if isinstance(value, dict) else {DEFAULT: value}
    if not all(isinstance(part, str) for pair in named.items() for part in pair):
        raise InputError(
            f"{file}: chat_template: found {str(value)[:60]!r}; allowed: a Jinja template, or a "
            "list of them with name and template"
        )
    return dict(named)


def wanted_templates(
    wanted: str | None, models: Mapping[str, Source], reference: Source
) -> Templates | None:
    """The chat templates that a config asks for; None: it does not ask, and the tokenizer's own
    stay. Empty: `auto`, and no model has one.

    Args:
        reference: the base, or the first of the models; of equally common ones, it has the word.

    Raises:
        InputError: a name that is none, or a model without a template.
    """
    if wanted is None:
        return None
    if "{" in wanted:
        return {DEFAULT: wanted}
    if wanted == "auto":
        return _most_common(dict.fromkeys(each.path for each in (reference, *models.values())))
    path = models[wanted].path if wanted in models else _place(wanted)
    if is_file(str(path)):
        return {DEFAULT: _text(path)}
    is_model = os.path.isdir(path)  # noqa: PTH112
    found = templates_of(path) if is_model else {}
    if found:
        return found
    if wanted in BUILT_IN:
        return {DEFAULT: BUILT_IN[wanted]}
    reason = f"{path} has no chat template" if is_model else f"there is no {path}"
    raise InputError(
        f"chat_template: found {wanted!r}, and {reason}; allowed: auto, a Jinja template, its "
        f"file, a model that has one, {', '.join(BUILT_IN)}"
    )


def _place(wanted: str) -> Path:
    """The file or folder that a config asks for; of a model on the hub its tokenizer's folder."""
    return Path(wanted) if os.path.exists(wanted) else folder_of(wanted, "tokenizer")  # noqa: PTH110


def is_file(wanted: str | None) -> bool:
    """Whether a config asks for the template in a file of its own."""
    # Unlike pathlib's, this one takes a text that is too long for a name.
    return wanted is not None and os.path.isfile(wanted)  # noqa: PTH113


def _most_common(folders: Iterable[Path]) -> Templates:
    """The templates of the first model whose default is the one that most models have."""
    having = [found for found in map(templates_of, folders) if found]
    if not having:
        return {}
    counts = Counter(_default(found) for found in having)
    return max(having, key=lambda found: counts[_default(found)])  # the first of equals


def _default(found: Templates) -> str:
    """The template of a plain conversation; differences of white space around it do not count."""
    return found.get(DEFAULT, next(iter(found.values()))).strip()


def template_files(templates: Templates) -> dict[str, str]:
    """The files that hold templates, as transformers writes them: place -> text."""
    return {
        TEMPLATE_FILE if name == DEFAULT else f"{TEMPLATES_FOLDER}/{name}.jinja": text
        for name, text in templates.items()
    }


def is_template_file(place: str) -> bool:
    """Whether a file holds templates and nothing else."""
    return place in (TEMPLATE_FILE, OLD_FILE) or place.startswith(f"{TEMPLATES_FOLDER}/")


def without_template(file: Path) -> str | None:
    """A settings file's text without its chat template; None where it has none."""
    settings = read_json(file)
    if "chat_template" not in settings:
        return None
    del settings["chat_template"]
    return json.dumps(settings, ensure_ascii=False, indent=2) + "\n"
