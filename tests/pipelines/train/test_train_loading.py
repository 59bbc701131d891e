"""Models that are more than Llama's matrices: buffers, scaled embeddings, a head stored twice.

Oracle: transformers' own model, and a run of one worker.
"""

from pathlib import Path

import pytest
import torch
from processes import run_workers_in_turn
from safetensors.torch import load_file, save_file
from training_files import align_config, metrics, run_here
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
)

from pipelines.errors import InputError
from pipelines.train import AlignConfig, plan_alignment
from pipelines.train.data import collate
from pipelines.train.objectives import score_responses
from tests.tiny_models import save_tiny_llama, tiny_tokenizer

WEIGHTS = "model.safetensors"
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_gemma(path: Path, version: int) -> Path:
    """Gemma 3 scales its embeddings by a buffer that no file holds; Gemma 4 stores a buffer."""
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    torch.manual_seed(0)
    if version == 3:
        model = Gemma3ForCausalLM(Gemma3TextConfig(vocab_size=size, **SHAPE))
    else:
        more = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 16}
        config = Gemma4TextConfig(vocab_size=size, vocab_size_per_layer_input=size, **SHAPE, **more)
        model = Gemma4ForCausalLM(config)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("version", [3, 4])
def test_the_first_step_is_that_of_transformers(
    version: int, preferences: Path, tmp_path: Path
) -> None:
    """Every buffer has its value, stored or computed."""
    model = save_gemma(tmp_path / "model", version)
    config = align_config(model, preferences, num_steps=1, global_batch_size=40)
    (line,) = metrics(run_here(config, tmp_path / "run"))
    table = plan_alignment(config, tmp_path / "cache").table
    batch = collate(table, list(range(40)), 0, "cpu")
    with torch.no_grad():
        found = score_responses(AutoModelForCausalLM.from_pretrained(model), batch)
    expected = found.log_probability[:40].mean().item()
    assert line["chosen_log_probability"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_sharded_models_have_their_buffers(preferences: Path, tmp_path: Path) -> None:
    """Two workers make the steps of one."""
    alone: dict[int, Path] = {}
    configs: dict[Path, AlignConfig] = {}
    for version in (3, 4):
        model = save_gemma(tmp_path / f"gemma{version}", version)
        config = align_config(model, preferences, num_steps=3)
        alone[version] = run_here(config, tmp_path / f"alone{version}" / "run")
        for strategy in ("fsdp2", "zero2", "zero3"):
            two = {"strategy": strategy, "num_workers": 2}
            place = tmp_path / f"{strategy}-{version}" / "run"
            configs[place] = align_config(model, preferences, num_steps=3, **two)
    run_workers_in_turn(configs)
    for run, config in configs.items():
        version = 3 if config.model.name == "gemma3" else 4
        for one, other in zip(metrics(alone[version]), metrics(run), strict=True):
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4), run


LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
ARCHITECTURES: dict[str, dict[str, int]] = {
    "qwen2": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "mixtral": LLAMA_LIKE | {"num_local_experts": 4},
    "gemma3_text": LLAMA_LIKE | {"head_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gpt_neox": LLAMA_LIKE,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_on_the_right_needs_no_mask(name: str) -> None:
    """Attention of several kinds, experts, a state space: nothing sees the padding after it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=60, **ARCHITECTURES[name])
    model = AutoModelForCausalLM.from_config(config).eval()
    lengths = torch.tensor([12, 7, 4])
    mask = (torch.arange(12) < lengths[:, None]).long()
    ids = torch.randint(1, 60, (3, 12)) * mask
    with torch.no_grad():
        masked = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        plain = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(plain[mask.bool()], masked[mask.bool()], rtol=1e-5, atol=1e-6)


def with_a_stored_head(path: Path) -> dict[str, torch.Tensor]:
    """A model with tied embeddings whose file has the head, too; returns its tensors."""
    save_tiny_llama(path, tied=True)
    tensors = load_file(path / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    return tensors


def test_a_tied_head_that_is_stored_is_trained_too(preferences: Path, tmp_path: Path) -> None:
    """It leaves with the embedding's values, so that transformers ties both again."""
    before = with_a_stored_head(tmp_path / "model")
    config = align_config(tmp_path / "model", preferences, optimizer={"learning_rate": 1e-2})
    out = run_here(config, tmp_path / "run") / "model"
    after = load_file(out / WEIGHTS)
    assert after.keys() == before.keys()
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_of_other_values_is_refused(preferences: Path, tmp_path: Path) -> None:
    """transformers would not tie it, against the config."""
    tensors = with_a_stored_head(tmp_path / "model")
    tensors["lm_head.weight"][3, 4] += 1
    save_file(tensors, tmp_path / "model" / WEIGHTS, metadata={"format": "pt"})
    message = (
        r"model .*/model: model\.embed_tokens\.weight and lm_head\.weight differ, but its config "
        r"ties them; allowed: equal values, or tie_word_embeddings false$"
    )
    with pytest.raises(InputError, match=message):
        plan_alignment(align_config(tmp_path / "model", preferences))
