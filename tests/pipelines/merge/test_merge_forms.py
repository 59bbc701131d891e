"""mergekit's other forms of a config: what they say is what the short form says.

Oracle: the same merge in the short form, and lines written by hand.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from pipelines.config import tell_once
from pipelines.errors import InputError
from pipelines.merge import MergeConfig, load_merge_config, merge
from tests.pipelines.merge.conftest import Family, weights_of
from tests.pipelines.merge.test_merge_vocabulary import BY_TOKEN, add_token


def loaded(folder: Path, **fields: Any) -> MergeConfig:
    file = folder / "merge.yaml"
    file.write_text(yaml.safe_dump(fields, sort_keys=False))
    return load_merge_config(file)


def refused(folder: Path, **fields: Any) -> str:
    with pytest.raises(InputError) as caught:
        loaded(folder, **fields)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{folder / 'merge.yaml'}: ")
    return message.removeprefix(f"{folder / 'merge.yaml'}: ")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (1.0, True),
        (0, False),
        ([1.0, 0.0], [True, False]),
        ([{"filter": "mlp", "value": 1}, {"value": 0.0}], "filters"),
        (True, True),
    ],
)
def test_switches_as_numbers(family: Family, tmp_path: Path, written: Any, meant: Any) -> None:
    fields = family.config("dare_ties", parameters={"density": 1, "normalize": written})
    if meant == "filters":
        meant = [{"filter": "mlp", "value": True}, {"value": False}]
    config = loaded(tmp_path, **fields)
    assert config.parameters == {"density": 1, "normalize": meant}
    assert config.parameters["density"] is not True  # only switches are


def test_switches_of_models_and_slices(family: Family, tmp_path: Path) -> None:
    """Wherever parameters stand; numbers that are no switch's stay, and so do other numbers."""
    source = {"model": str(family.models[0]), "layer_range": [0, 2], "parameters": {"weight": 1}}
    base = {"model": str(family.base), "layer_range": [0, 2]}
    slices = [{"sources": [source, base], "parameters": {"normalize": 0.0, "rescale": 1}}]
    fields = {"merge_method": "dare_linear", "base_model": str(family.base), "slices": slices}
    config = loaded(tmp_path, **fields, parameters={"density": 0.5, "int8_mask": 1.0})
    assert config.slices[0].parameters == {"normalize": False, "rescale": True}
    assert config.slices[0].sources[0].parameters == {"weight": 1}
    merge(config, tmp_path / "out")
    message = refused(tmp_path, **fields, parameters={"density": 0.5, "normalize": 2})
    assert message == "normalize: found 2; allowed: true, false"


def test_models_as_mappings(family: Family, tmp_path: Path) -> None:
    def long(path: Path) -> Any:
        return {"model": {"path": str(path), "revision": None}, "lora": None}

    short = family.config("ties", parameters={"density": 0.5}, tokenizer=str(family.models[0]))
    fields = dict(short)
    fields["base_model"] = long(family.base)
    fields["models"] = [{"model": long(path)} for path in family.models]
    fields["tokenizer"] = {"source": long(family.models[0])}
    config = loaded(tmp_path, **fields)
    assert config.base_model == str(family.base)
    assert config.models == MergeConfig.model_validate(short).models
    assert config.tokenizer_wanted == str(family.models[0])
    adapted = {"model": {"path": "a"}, "lora": {"path": "b"}}
    models = [{"model": adapted}, {"model": {"path": "c"}}]
    assert loaded(tmp_path, merge_method="linear", models=models).merged_models == ["a+b", "c"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"model": {"path": "a", "revision": "main"}},
            "models.0.model.model: revision: found 'main'; allowed: path alone, and revision "
            "of a model on the hub",
        ),
        ({"model": {"pth": "a"}}, "models.0.model.model: found {'pth': 'a'}; allowed: a folder, "),
        ({"model": {"path": "a"}, "override_architecture": "X"}, "models.0.model: override_arch"),
        ({"model": {"path": "a"}, "lora": {"path": "b", "revision": "v1"}}, "models.0.model.lora:"),
        (5, "models.0.model: found 5; allowed: a valid string"),
    ],
)
def test_long_forms_that_are_none(tmp_path: Path, model: Any, message: str) -> None:
    fields = {"merge_method": "linear", "models": [{"model": model}]}
    assert refused(tmp_path, **fields).startswith(message)


def test_random_seed(family: Family, tmp_path: Path) -> None:
    fields = family.config("dare_linear", parameters={"density": 0.5})
    assert loaded(tmp_path, **fields, random_seed=420) == loaded(tmp_path, **fields, seed=420)
    both = refused(tmp_path, **fields, seed=1, random_seed=2)
    assert both == "random_seed: is called seed here; found both"
    assert refused(tmp_path, **fields, random_seed="x").startswith("random_seed: found 'x'; allow")


def spellings(folder: Path, name: str) -> dict[str, str]:
    (folder / "link").symlink_to(folder / name)
    names = [name, f"./{name}", f"{name}/", f"{name}/../{name}", str(folder / name), "link"]
    return dict.fromkeys(names, name)


@pytest.mark.parametrize("number", range(6))
def test_a_base_spelled_twice_is_one_folder(
    own_family: Family, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(own_family.base.parent)
    spelled = list(spellings(own_family.base.parent, "base"))[number]
    models = [{"model": "base"}, {"model": "model-1"}, {"model": "model-2"}]
    for method, count in (("slerp", 2), ("model_stock", 3)):
        fields = {"merge_method": method, "models": models[:count]}
        fields |= {"parameters": {"t": 0.5}} if method == "slerp" else {}
        plain = MergeConfig.model_validate(fields | {"base_model": "base"})
        config = loaded(tmp_path, **fields, base_model=spelled)
        assert config.merged_models == plain.merged_models == ["model-1", "model-2"][: count - 1]
        one, two = merge(plain, tmp_path / f"{method}-1"), merge(config, tmp_path / f"{method}-2")
        expected = weights_of(Path(one))
        for name, tensor in weights_of(Path(two)).items():
            assert torch.equal(tensor, expected[name])


def test_places_of_adapters_tokenizers_and_named_merges(
    own_family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A named merge is never a folder of the same name that is spelled otherwise."""
    monkeypatch.chdir(own_family.base.parent)
    models = [{"model": "base+model-1"}, {"model": "./base+./model-1/"}, {"model": "./model-2"}]
    fields = {"merge_method": "linear", "models": models, "tokenizer_source": "model-2"}
    config = loaded(tmp_path, **fields)
    assert config.merged_models == ["base+model-1", "./model-2"]
    assert config.tokenizer_wanted == "./model-2"
    (own_family.base.parent / "soup").mkdir()
    inner = {"merge_method": "linear", "models": [{"model": "model-1"}]}
    models = [{"model": "./soup"}, {"model": "soup"}]
    config = loaded(tmp_path, merge_method="linear", models=models, merges={"soup": inner})
    assert config.merged_models == ["./soup", "soup"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"merge_metod": "linear"}, "merge_metod: unknown field; allowed: allow_missing, "),
        ({"tokenizer": {"sorce": "union"}}, "tokenizer.sorce: unknown field; allowed: pad_to"),
        ({"tokenizer": 5}, "tokenizer: found 5; allowed: a valid string"),
        ({"tokenizer": {"tokens": {"X": {"sorce": "a"}}}}, "tokenizer.tokens.X.sorce: unknown fi"),
        (
            {"tokenizer": {"tokens": {"str": {"source": {"kind": "zeros"}}}}},
            "tokenizer.tokens.str.source.kind: found 'zeros'; allowed: 'zero' or 'model_token'",
        ),
        ({"models": [{"modle": "a"}]}, "models.0.modle: unknown field; allowed: model, parameters"),
        ({"merges": {"Soup": {"modls": []}}}, "merges.Soup.modls: unknown field; allowed: "),
        ({"chat_templat": "auto"}, "chat_templat: unknown field"),
    ],
)
def test_unknown_fields_as_the_user_wrote_them(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    given = {"merge_method": "linear", "models": [{"model": "a"}]} | fields
    found = refused(tmp_path, **given)
    assert found.startswith(message)
    near = {"metod": "merge_method", "sorce": "source", "modle:": "model", "modls": "models"}
    for wrong, right in {**near, "templat:": "chat_template"}.items():
        if wrong in found and "unknown field" in found:
            assert f"; did you mean {right}?" in found
    for word in ("MergeConfig", "TokenizerSettings", "TokenSetting", "TokenRow", "ModelEntry"):
        assert word not in found


def test_single_tokens(own_family: Family, tmp_path: Path) -> None:
    """Rows of a model, of another token, zeros, forced or where missing; a token of nobody."""
    one = add_token(own_family.models[0], "<one>", 1.0)
    second = str(own_family.models[1])
    copied = {"kind": "model_token", "model": {"model": {"path": second}}, "token": "hello"}
    tokens = {
        "<one>": {"source": {"kind": "zero"}},
        "yes": {"source": second, "force": True},
        "no": {"source": {**copied, "token": None, "token_id": 3}, "force": True},
        "<new>": {"source": copied},
        "<empty>": {},
    }
    fields = own_family.config(tokenizer={"source": "union", "tokens": tokens})
    out = Path(merge(loaded(tmp_path, **fields), tmp_path / "out"))
    vocabulary = {
        t: n
        for t, n in AutoTokenizer.from_pretrained(out).get_vocab().items()
        if t in {*tokens, "hello"}
    }
    assert vocabulary["<new>"] == one + 1 and vocabulary["<empty>"] == one + 2
    result, theirs = weights_of(out), weights_of(Path(second))
    for name in BY_TOKEN:
        rows = {token: result[name][number] for token, number in vocabulary.items()}
        torch.testing.assert_close(rows["<one>"], torch.full((32,), 1 / 3))
        torch.testing.assert_close(rows["yes"], theirs[name][vocabulary["yes"]])
        torch.testing.assert_close(rows["no"], theirs[name][3])
        torch.testing.assert_close(rows["<new>"], theirs[name][vocabulary["hello"]])
        assert torch.equal(rows["<empty>"], torch.zeros(32))
    wrong = own_family.config(tokenizer={"tokens": {"<one>": {"source": second}}})
    with pytest.raises(InputError) as caught:
        merge(loaded(tmp_path, **wrong), tmp_path / "other")
    assert str(caught.value) == (
        f"tokenizer.tokens.<one>.source: model {second} has no row for '<one>'"
    )
    wrong = own_family.config(tokenizer={"tokens": {"<one>": {"source": "none"}}})
    with pytest.raises(
        InputError, match=r"tokenizer\.tokens\.<one>\.source: found 'none'; allowed"
    ):
        merge(loaded(tmp_path, **wrong), tmp_path / "other")


def test_a_name_of_the_only_merge(
    family: Family, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tell_once.cache_clear()
    config = loaded(tmp_path, **family.config("linear"), name="my-merge")
    assert config == loaded(tmp_path, **family.config("linear"))
    assert capfd.readouterr().err.strip() == (
        "name: has no effect: no later merge of the file can use this one as a model"
    )
