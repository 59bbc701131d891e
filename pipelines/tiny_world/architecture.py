"""The architecture of the tiny world's models."""

from typing import TYPE_CHECKING

from pipelines.tiny_world.sizes import Size

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase

HEAD_SIZE = 32  # the smallest that vLLM's CPU attention supports


def architecture(size: Size, tokenizer: "PreTrainedTokenizerBase") -> "LlamaConfig":
    """A Llama of the given size; embeddings are tied, as is usual for small models."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=size.hidden_size * 8 // 3,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.hidden_size // HEAD_SIZE,
        num_key_value_heads=size.hidden_size // HEAD_SIZE,
        max_position_embeddings=256,
        # At this width the usual 0.02 is too small: attention learns nothing for half the steps.
        initializer_range=size.hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
