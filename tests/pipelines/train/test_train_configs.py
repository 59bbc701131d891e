"""The configs that users copy: all run, the papers' models fit their plans, memory as promised."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_files import align_config, metrics, preference_rows, run_here, write_rows
from transformers import LlamaConfig, LlamaForCausalLM

from pipelines.config import load_config
from pipelines.train import AlignConfig
from pipelines.train.config import LoraSettings
from pipelines.train.memory import Memory, estimate_memory, shape_of
from ray_jobs.align import describe_plan
from tests.tiny_models import tiny_tokenizer

CONFIGS = Path(__file__).resolve().parents[3] / "configs" / "align"
QWEN: dict[str, Any] = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
PAPERS = {
    "online-merging-adamw-qwen1.5-1.8b": (
        QWEN
        | {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 24}
        | {"num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936},
        1_836_828_672,
    ),
    "online-merging-ondare-qwen1.5-7b": (
        QWEN
        | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 151936},
        7_721_324_544,
    ),
    "online-merging-onties-llama-3-8b": (
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256}
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 8},
        8_030_261_248,
    ),
}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_config_runs(path: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """On a tiny model and a few rows, in one process, with everything else as it stands."""
    rows = [row | {"messages": row["prompt"] + row["chosen"]} for row in preference_rows(16)]
    folder = tmp_path / "set"
    folder.mkdir()
    write_rows(folder / "train_prefs.jsonl", rows)
    config = load_config(path, AlignConfig)
    data = folder if config.split else folder / "train_prefs.jsonl"
    overrides = [f"model={tiny_llama}", f"data={data}", "strategy=single", "num_workers=1"]
    overrides += ["global_batch_size=8", "num_epochs=1"]
    if config.optimizer.reference is not None:
        overrides.append(f"optimizer.reference={{base: {tiny_llama}, tuned: {tiny_llama}}}")
    lines = metrics(run_here(load_config(path, AlignConfig, overrides), tmp_path / "run"))
    assert len(lines) == (4 if config.objective.name == "kto" else 2)  # pairs are two rows of kto


@pytest.mark.parametrize("name", PAPERS)
def test_paper_models_are_planned_without_their_weights(name: str, tmp_path: Path) -> None:
    """Built on meta tensors: their size, and what the paper's setting needs on each of 8 GPUs."""
    values, num_parameters = PAPERS[name]
    (tmp_path / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": False}))
    shape = shape_of(tmp_path)
    assert shape.num_parameters == num_parameters
    config = load_config(CONFIGS / f"{name}.yaml", AlignConfig)
    memory = estimate_memory(shape, config)
    numbers = 4 if config.optimizer.name == "adamw" else 5  # gradients too
    assert memory.state + memory.gradients == pytest.approx(4 * numbers * num_parameters / 8, 1e-6)
    assert memory.total < 80e9


def test_plan_says_what_a_run_needs(tiny_llama: Path, preferences: Path) -> None:
    """One line each for what is done and what it costs."""
    lines = describe_plan(align_config(tiny_llama, preferences)).splitlines()
    values = {line[:15].strip(): line[16:] for line in lines}
    assert values["rows"] == "40 of 40 (0 bad, 0 dropped, 0 prompts cut)"
    assert values["steps"] == "6 of 8 rows"
    assert {"state", "gradients", "activations", "logits"} <= values.keys()


def test_memory_formula_by_hand(tiny_llama: Path, preferences: Path) -> None:
    """Single and sharded, on a model whose numbers are small."""
    shape = shape_of(tiny_llama)
    n = shape.num_parameters
    assert n == 2 * shape.largest_block + shape.outside_blocks
    config = align_config(tiny_llama, preferences, micro_batch_size=2, max_length=10)
    tokens, width = 2 * 2 * 10, 15 * 32 + 4 * 48
    assert estimate_memory(shape, config) == Memory(
        state=12 * n,
        weights=0,
        gradients=4 * n,
        gathered=0,
        activations=4 * tokens * width * 2,
        logits=tokens * shape.vocabulary * 16,
        reference=0,
    )
    sharded = align_config(
        tiny_llama, preferences, strategy="zero3", num_workers=4, precision="bf16"
    )
    memory = estimate_memory(shape, sharded)
    assert (memory.state, memory.weights, memory.gradients) == (12 * n // 4, 2 * n // 4, 4 * n // 4)
    live = config.model_copy(update={"reference_log_probabilities": "on_the_fly"})
    assert estimate_memory(shape, live).reference == 4 * n + 4 * tokens * shape.vocabulary
    offloaded = config.model_copy(update={"activation_offload": True})
    assert estimate_memory(shape, offloaded).activations == 4 * tokens * width
    adapters = live.model_copy(update={"lora": LoraSettings()})
    assert estimate_memory(shape, adapters).reference == 4 * tokens * shape.vocabulary


MEASURE = """
import resource, sys
sys.path[:0] = [{root!r}, {here!r}]
from pathlib import Path
import torch, psutil
import pipelines.train.loop
from transformers import LlamaForCausalLM
from training_files import align_config, run_here
from pipelines.train.memory import estimate_memory, shape_of
config = align_config(Path({model!r}), Path({data!r}), num_steps=2, global_batch_size=16,
                      gradient_checkpointing={checkpointing})
before = psutil.Process().memory_info().rss
run_here(config, Path({folder!r}))
held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
print(held, estimate_memory(shape_of(config.model), config, 60).total)
"""


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_memory_formula_against_measurement(checkpointing: bool, tmp_path: Path) -> None:
    """The most a process holds, beyond its start, is within a third of the formula."""
    model = tmp_path / "model"
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    rows = [{"prompt": "a " * 40, "chosen": " b" * 19, "rejected": " c" * 19} for _ in range(16)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    here = Path(__file__).parent
    script = MEASURE.format(
        root=str(here.parents[2]),
        here=str(here),
        model=str(model),
        data=str(data),
        checkpointing=checkpointing,
        folder=str(tmp_path / "run"),
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    measured, expected = (int(word) for word in output.split()[-2:])
    print(f"measured {measured / 1e6:.0f} MB, formula {expected / 1e6:.0f} MB")
    assert measured == pytest.approx(expected, rel=0.33)
