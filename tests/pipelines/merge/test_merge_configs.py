"""The examples in configs/merge run as they are, with other models in the places of theirs.

Oracle: every example has to end with a model whose numbers are finite.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from pipelines.merge import load_merge_config, merge
from tests.pipelines.checkpoints.test_lora_adapters import save_adapter
from tests.pipelines.merge.conftest import Family, weights_of
from tests.pipelines.merge.test_merge_coefficients import drawn, is_layer, write

EXAMPLES = sorted((Path(__file__).parents[3] / "configs" / "merge").glob("*.yaml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(family: Family, tmp_path: Path, example: Path) -> None:
    text = example.read_text()
    assert text.startswith("# ")
    if "runs/adapters" in text:
        settings = {"r": 2, "target_modules": ["q_proj", "up_proj"]}
        for seed, name in enumerate(("helpful", "harmless")):
            save_adapter(family.base, tmp_path / "adapters" / name, seed=seed, **settings)
        text = text.replace("runs/adapters", str(tmp_path / "adapters"))
    if "./dam.safetensors" in text:
        own = drawn(weights_of(family.base), 3, is_layer)
        file = write(tmp_path / "dam.safetensors", family, own)
        text = text.replace("./dam.safetensors", str(file))
    names = ("dpo-helpful", "dpo-honest", "dpo-harmless")
    for name, short, path in zip(names, ("one", "two", "three"), family.models, strict=True):
        text = text.replace(f"runs/demo/models/{name}", str(path)).replace(f"./{short}", str(path))
    text = text.replace("runs/demo/models/sft", str(family.base)).replace(
        "./base", str(family.base)
    )
    assert "runs/" not in text
    file = tmp_path / "merge.yaml"
    file.write_text(text)
    config = load_merge_config(file)
    assert config.notices() == []
    out = merge(config, tmp_path / "out")
    assert all(torch.isfinite(values).all() for values in weights_of(out).values())
    AutoModelForCausalLM.from_pretrained(out)
