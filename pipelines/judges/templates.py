"""Templates: files from which the questions to a judge are made.

Poise's own are YAML files in `words/`: a template, or several by name where a protocol asks in
several ways. Published ones are read where they lie: FastChat's `judge_prompts.jsonl`, and
AlpacaEval's text files, from a path or from the installed package as `alpaca-eval:FOLDER/FILE`.
"""

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from pipelines.config import Config, check, load_yaml
from pipelines.engines.interface import Message
from pipelines.errors import InputError
from pipelines.judges.parsers import Parser, parser_of

PACKAGE = "alpaca-eval:"
_FIELD = re.compile(r"(?<!\{)\{([A-Za-z_]\w*)\}(?!\})")
_CHATML = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.DOTALL)
# FastChat's names of MT-Bench's four ways to ask.
_FASTCHAT = {
    "first": "single-v1",
    "first_with_reference": "single-math-v1",
    "second": "single-v1-multi-turn",
    "second_with_reference": "single-math-v1-multi-turn",
}


class Template(Config):
    """One way to ask: texts in which `{name}` stands for a field of the document."""

    system: str = ""
    prompt: str
    parser: Any = Field(None, description="how the reply is read")

    @property
    def fields(self) -> set[str]:
        """The names of its fields."""
        return set(_FIELD.findall(self.system)) | set(_FIELD.findall(self.prompt))

    def filled(self, values: Mapping[str, str]) -> list[Message]:
        """The messages with a document's values. Braces in values stay as they are."""

        def fill(text: str) -> str:
            return _FIELD.sub(lambda match: values[match[1]], text)

        system = [{"role": "system", "content": fill(self.system)}] if self.system else []
        return [*system, {"role": "user", "content": fill(self.prompt)}]


def load_templates(
    source: str | None,
    protocol: str,
    ways: Mapping[str, set[str]],
    parser: Mapping[str, Any] | None,
) -> dict[str, tuple[Template, Parser]]:
    """The templates of a protocol by its ways to ask, with their parsers.

    Args:
        source: a file, or `alpaca-eval:FOLDER/FILE`; None: Poise's own.
        ways: the fields that each may use.
        parser: instead of the templates' own.

    Raises:
        InputError: a file that is not there or of no known form, an unknown field, no parser.
    """
    path = _own(protocol) if source is None else _path(source)
    found = _read(path, ways)
    ready = {}
    for way, template in found.items():
        where = f"{path}: {way}" if len(found) > 1 else str(path)
        unknown = sorted(template.fields - ways[way])
        if unknown:
            raise InputError(
                f"{where}: unknown field {{{unknown[0]}}}; allowed: {', '.join(sorted(ways[way]))}"
            )
        if not template.fields:
            raise InputError(f"{where}: has no field; allowed: {', '.join(sorted(ways[way]))}")
        values, place = (parser, "parser") if parser is not None else (template.parser, where)
        if values is None:
            raise InputError(f"{where}: has no parser; allowed: parser: {{kind: rating, ...}}")
        ready[way] = (template, parser_of(values, place))
    return ready


def _own(protocol: str) -> Path:
    return Path(__file__).with_name("words") / f"{protocol}.yaml"


def _path(source: str) -> Path:
    """The file that a config names."""
    if not source.startswith(PACKAGE):
        return Path(source)
    spec = importlib.util.find_spec("alpaca_eval")
    if spec is None or spec.origin is None:
        raise InputError(
            f"template: {source}: the package alpaca-eval is not installed "
            "(pip install alpaca-eval)"
        )
    return Path(spec.origin).parent / "evaluators_configs" / source.removeprefix(PACKAGE)


def _read(path: Path, ways: Mapping[str, set[str]]) -> dict[str, Template]:
    """The templates of a file, by its name's ending."""
    if path.suffix in (".yaml", ".yml"):
        values = load_yaml(path)
        if isinstance(values, Mapping) and "prompt" not in values and set(values) & set(ways):
            missing = sorted(set(ways) ^ set(values))
            if missing:
                raise InputError(f"{path}: expected {', '.join(ways)}; differs in {missing[0]!r}")
            return {way: check(values[way], Template, f"{path}: {way}") for way in ways}
        return _for_all(check(values, Template, str(path)), path, ways)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no text"
        raise InputError(f"template: {path}: {reason}") from None
    if path.suffix == ".jsonl":
        return _fastchat(text, path, ways)
    return _for_all(_chatml(text, path), path, ways)


def _for_all(template: Template, path: Path, ways: Mapping[str, set[str]]) -> dict[str, Template]:
    """One template for a protocol that asks in one way, or with and without a reference."""
    if set(ways) == set(_FASTCHAT):
        raise InputError(f"{path}: expected {', '.join(ways)}; found one template")
    return dict.fromkeys(ways, template)


def _chatml(text: str, path: Path) -> Template:
    """AlpacaEval's form: `<|im_start|>ROLE ... <|im_end|>`, or a plain text of the user."""
    parts = _CHATML.findall(text)
    roles = [role for role, _ in parts]
    if not parts:
        return Template(prompt=text.strip())
    if roles not in (["user"], ["system", "user"]):
        raise InputError(f"{path}: found the roles {roles}; allowed: system and user, or user")
    said = {role: content.strip() for role, content in parts}
    return Template(system=said.get("system", ""), prompt=said["user"])


def _fastchat(text: str, path: Path, ways: Mapping[str, set[str]]) -> dict[str, Template]:
    """FastChat's `judge_prompts.jsonl`; its ratings are read as `[[7]]`."""
    if set(ways) != set(_FASTCHAT):
        raise InputError(f"{path}: FastChat's templates are allowed with judged: mt_bench alone")
    try:
        rows = {row["name"]: row for row in map(json.loads, filter(str.strip, text.splitlines()))}
        found = {
            way: Template(
                system=rows[name]["system_prompt"],
                prompt=rows[name]["prompt_template"],
                parser={"kind": "rating"},
            )
            for way, name in _FASTCHAT.items()
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not FastChat's templates: {error}") from None
    if any("{{" in each.system + each.prompt for each in found.values()):
        raise InputError(f"{path}: holds doubled braces; allowed: fields alone")
    return found
