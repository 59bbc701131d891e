"""Tiny random causal language models of many architectures, saved as they lie on the hub."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.model_kinds import KINDS
from tests.tiny_models import tiny_tokenizer

WEIGHTS = "model.safetensors"
LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GPT_LIKE = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE | {"tie_word_embeddings": True},
    "phi3": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE | {"head_dim": 16},
    "gemma3_text": LLAMA_LIKE | {"head_dim": 16},
    "mixtral": LLAMA_LIKE | {"num_local_experts": 4},
    "qwen2_moe": LLAMA_LIKE | EXPERTS | {"shared_expert_intermediate_size": 24},
    "qwen3_moe": LLAMA_LIKE | EXPERTS | {"head_dim": 16},
    "olmoe": LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": LLAMA_LIKE | DEEPSEEK,
    "deepseek_v3": LLAMA_LIKE | DEEPSEEK | {"n_group": 2, "topk_group": 1},
    "gpt2": GPT_LIKE,
    "gptj": GPT_LIKE | {"rotary_dim": 8},
    "gpt_neox": LLAMA_LIKE,
    "opt": {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}
# Of these the hub's files have no prefix before the names of the base model.
BARE = {"gpt2": "transformer.", "bloom": "transformer.", "opt": "model."}


# Classes of `tests.model_kinds` that are causal language models too; the last ones read images.
CLASSES = {
    name: fields
    for kind in ("decoder", "mixture of experts", "state space", "text with images")
    for name, fields in KINDS[kind].items()
    if name not in ("CLIPModel", "SiglipModel")
}


def random_model(name: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A random model with the tiny tokenizer's vocabulary. All its weights and biases are random;
    transformers' own are often zeros and ones.

    Args:
        name: of `ARCHITECTURES`, or a class of `tests.model_kinds`.
    """
    tokenizer = tiny_tokenizer()
    tokens = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    make: Any = AutoModelForCausalLM.from_config
    if name in ARCHITECTURES:
        config = AutoConfig.for_model(name, **(tokens | ARCHITECTURES[name] | fields))
    else:
        kind, own = CLASSES[name]
        config = AutoConfig.for_model(kind, **(own | fields))
        config.get_text_config().update(tokens)
        make = getattr(transformers, name)._from_config
    torch.manual_seed(seed)
    model: PreTrainedModel = make(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return model


def save_as_on_hub(
    name: str,
    path: Path,
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    fused: bool = False,
    **fields: Any,
) -> Path:
    """A random model with the names and the layout of its architecture's files on the hub.

    Args:
        fused: with the names and the layout of the model's parameters instead.
    """
    model = random_model(name, seed, **fields).to(dtype)
    model.save_pretrained(path, save_original_format=not fused)
    tiny_tokenizer().save_pretrained(path)
    if name in BARE and not fused:
        tensors = load_file(path / WEIGHTS)
        tensors = {key.removeprefix(BARE[name]): value for key, value in tensors.items()}
        if name == "gpt2":
            mask = torch.ones(128, 128).tril().view(1, 1, 128, 128)
            tensors |= {f"h.{layer}.attn.bias": mask.clone() for layer in range(2)}
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    return path
