"""Chat templates: read from wherever they stand, written once.

Oracle: what transformers' tokenizer and processor say of a conversation.
"""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pipelines.errors import InputError
from pipelines.merge import MergeConfig, merge, plan_merge
from pipelines.merge.templates import CHATML
from tests.pipelines.merge.conftest import Family

CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]
ONE = "{% for m in messages %}1{{ m.content }}{% endfor %}"
TWO = "{% for m in messages %}2{{ m.content }}{% endfor %}"
TOOLS = "{% for m in messages %}T{{ m.content }}{% endfor %}"
PLACES = ("jinja", "field", "named", "folder", "json", "processor")


def change_json(file: Path, **fields: object) -> None:
    before = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**before, **fields}))


def give(model: Path, template: str | None, place: str = "jinja") -> None:
    """Put a template where a model may have it; none anywhere else."""
    (model / "chat_template.jinja").unlink(missing_ok=True)
    settings = model / "tokenizer_config.json"
    change_json(settings, chat_template=None)
    if template is None:
        return
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": TOOLS}]
    if place == "jinja":
        (model / "chat_template.jinja").write_text(template)
    elif place == "folder":
        (model / "chat_template.jinja").write_text(template)
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
    elif place in ("field", "named"):
        change_json(settings, chat_template=template if place == "field" else named)
    else:
        name = "chat_template.json" if place == "json" else "processor_config.json"
        change_json(model / name, chat_template=template)


def said(model: Path, **arguments: object) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return tokenizer.apply_chat_template(CHAT, tokenize=False, **arguments)


def merged(family: Family, out: Path, template: str, **fields: object) -> Path:
    config = family.config(chat_template=template) | fields
    return Path(merge(MergeConfig.model_validate(config), out))


def one_template(out: Path) -> str:
    """The template of an output, which nothing beside it may contradict."""
    for name in ("tokenizer_config.json", "processor_config.json"):
        if (out / name).is_file():
            assert "chat_template" not in json.loads((out / name).read_text())
    assert not (out / "chat_template.json").exists()
    return (out / "chat_template.jinja").read_text()


@pytest.mark.parametrize("place", PLACES)
def test_a_models_template_wherever_it_stands(
    own_family: Family, tmp_path: Path, place: str
) -> None:
    for model in own_family.models:
        give(model, ONE, "field")
    give(own_family.models[1], TWO, place)
    out = merged(own_family, tmp_path / "out", str(own_family.models[1]))
    assert one_template(out) == TWO
    assert said(out) == "2hello2yes"
    if place in ("named", "folder"):
        assert said(out, chat_template="tool_use") == "ThelloTyes"
    else:
        assert not (out / "additional_chat_templates").exists()


@pytest.mark.parametrize("place", PLACES)
def test_the_most_common_wherever_it_stands(own_family: Family, tmp_path: Path, place: str) -> None:
    """Differences of white space at the ends do not count, and models without one have no word."""
    give(own_family.models[0], ONE, place)
    give(own_family.models[1], TWO, "field")
    give(own_family.models[2], f"\n{TWO} \n", place)
    assert one_template(merged(own_family, tmp_path / "out", "auto")).strip() == TWO
    give(own_family.models[2], None)
    if place == "jinja":
        assert one_template(merged(own_family, tmp_path / "tie", "auto")) == ONE


def test_where_no_model_has_one(own_family: Family, tmp_path: Path) -> None:
    for model in own_family.models:
        give(model, None)
    plan = plan_merge(MergeConfig.model_validate(own_family.config(chat_template="auto")))
    assert plan.notices() == ["chat_template: auto: no model has one, and so the output has none"]
    out = merged(own_family, tmp_path / "out", "auto")
    assert AutoTokenizer.from_pretrained(out).chat_template is None
    line = f"chat_template: found '{own_family.base}', and {own_family.base} has no chat template"
    give(own_family.base, None)
    with pytest.raises(InputError) as caught:
        merged(own_family, tmp_path / "other", str(own_family.base))
    assert str(caught.value).startswith(line)


def test_chatml_by_name(own_family: Family, tmp_path: Path) -> None:
    give(own_family.models[0], ONE, "field")
    out = merged(own_family, tmp_path / "out", "chatml")
    assert one_template(out) == CHATML
    expected = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert said(out) == expected
    assert said(out, add_generation_prompt=True) == expected + "<|im_start|>assistant\n"


def test_a_file(own_family: Family, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(TWO)
    out = merged(own_family, tmp_path / "out", str(file))
    assert one_template(out) == TWO
    assert merged(own_family, tmp_path / "out", str(file)) == out
    file.write_text(ONE)  # another file is another merge
    with pytest.raises(InputError, match="exists already"):
        merged(own_family, tmp_path / "out", str(file))


@pytest.mark.parametrize("name", ["chatlm", "x" * 5000])
def test_a_name_that_is_none(family: Family, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        merged(family, tmp_path / "out", name)
    assert str(caught.value) == (
        f"chat_template: found '{name}', and there is no {name}; allowed: auto, a Jinja template, "
        "its file, a model that has one, chatml"
    )


def test_a_template_of_another_form(own_family: Family, tmp_path: Path) -> None:
    file = own_family.models[0] / "tokenizer_config.json"
    give(own_family.models[0], None)
    change_json(file, chat_template=[{"name": "default"}])
    with pytest.raises(InputError) as caught:
        merged(own_family, tmp_path / "out", "auto")
    assert str(caught.value).startswith(f"{file}: chat_template: found ")
    assert not (tmp_path / "out").exists()


def test_unasked_all_stays_as_it_is(own_family: Family, tmp_path: Path) -> None:
    first = own_family.models[0]
    give(first, ONE, "named")
    change_json(first / "chat_template.json", chat_template=TWO)
    out = Path(merge(MergeConfig.model_validate(own_family.config()), tmp_path / "out"))
    for name in ("tokenizer_config.json", "chat_template.json"):
        assert (out / name).read_bytes() == (first / name).read_bytes()
    assert not (out / "chat_template.jinja").exists()
