"""`attention:` of a config. Oracle: transformers' model with each of them, and its own checks."""

from pathlib import Path
from typing import Any

import pytest
from training_files import align_config, metrics, run_here

from pipelines.errors import InputError
from pipelines.train.architecture import meta_model
from pipelines.train.inputs import check_inputs
from pipelines.train.material import material
from tests.hub_models import save_as_on_hub


def test_runs_with_each(tiny_llama: Path, preferences: Path, tmp_path: Path) -> None:
    """The same steps up to rounding; the default is transformers' own choice."""
    runs = {}
    for name in (None, "sdpa", "eager"):
        config = align_config(tiny_llama, preferences, attention=name, num_steps=2)
        runs[name] = metrics(run_here(config, tmp_path / str(name)))
        assert meta_model(tiny_llama, attention=name).config._attn_implementation == (
            name or "sdpa"
        )
    losses = {name: [line["loss"] for line in lines] for name, lines in runs.items()}
    assert losses[None] == losses["sdpa"]
    assert losses["eager"] == pytest.approx(losses["sdpa"], rel=1e-4)


def test_it_is_part_of_the_run(tiny_llama: Path, preferences: Path) -> None:
    """And leaves runs without it as they were."""
    plain, eager = (align_config(tiny_llama, preferences, attention=a) for a in (None, "eager"))
    assert "attention" not in material(plain) and material(eager)["attention"] == "eager"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("flash_attention_2", {}, "found flash_attention_2 with precision float32"),
        ("fast", {}, "Input should be 'eager', 'sdpa', 'flex_attention'"),
    ],
)
def test_refused_configs(
    name: str, fields: dict[str, Any], message: str, tiny_llama: Path, preferences: Path
) -> None:
    """Unknown names, and what cannot compute in float32."""
    with pytest.raises(ValueError, match=message):
        align_config(tiny_llama, preferences, attention=name, **fields)


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        ("bloom", "sdpa", "BloomForCausalLM does not support an attention implementation"),
        ("mamba", "eager", "which has no attention"),
        ("bloom", "flex_attention", "for which transformers has no flex attention"),
    ],
)
def test_refused_models(
    model: str, name: str, reason: str, preferences: Path, tmp_path: Path
) -> None:
    """Before the start, with the model's name."""
    path = save_as_on_hub(model, tmp_path / "model")
    with pytest.raises(InputError) as caught:
        check_inputs(align_config(path, preferences, attention=name))
    assert str(caught.value).startswith(f"attention: found {name} with model {path}")
    assert reason in str(caught.value)


def test_packages_that_are_missing(
    tiny_llama: Path, preferences: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is fetched instead of them."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = align_config(tiny_llama, preferences, attention="flash_attention_2", precision="bf16")
    with pytest.raises(InputError) as caught:
        check_inputs(config)
    assert str(caught.value) == (
        "attention: found flash_attention_2, for which flash_attn is not installed"
    )
