"""Tiny configs of many kinds of models: class -> (model type, fields), by what they are."""

from typing import Any

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
DECODER = TEXT | {"num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PAIR: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 64,
}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
IMAGES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
SOUND: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "conv_dim": [8, 8],
    "conv_stride": [2, 2],
    "conv_kernel": [3, 3],
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
LLAMA = DECODER | {"model_type": "llama"}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}

KINDS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "decoder": {
        "CohereForCausalLM": ("cohere", DECODER),
        "GraniteForCausalLM": ("granite", DECODER),
        "PhiForCausalLM": ("phi", DECODER),
        "Qwen3ForCausalLM": ("qwen3", DECODER | {"head_dim": 16}),
        "SmolLM3ForCausalLM": ("smollm3", DECODER | SPECIAL),
        "StableLmForCausalLM": ("stablelm", DECODER),
        "Starcoder2ForCausalLM": ("starcoder2", DECODER),
    },
    "mixture of experts": {
        "GptOssForCausalLM": (
            "gpt_oss",
            DECODER | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        ),
    },
    "state space": {
        "JambaForCausalLM": (
            "jamba",
            DECODER
            | {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
            | {"expert_layer_period": 2, "expert_layer_offset": 1}
            | {"mamba_d_state": 8, "mamba_dt_rank": 4},
        ),
        "Mamba2ForCausalLM": (
            "mamba2",
            {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4}
            | {"head_dim": 16, "n_groups": 1, "vocab_size": 64},
        ),
        "RwkvForCausalLM": (
            "rwkv",
            {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
            | {"attention_hidden_size": 32},
        ),
    },
    "encoder": {
        "AlbertForMaskedLM": ("albert", TEXT | {"embedding_size": 16}),
        "BertForMaskedLM": ("bert", TEXT),
        "DebertaV2ForTokenClassification": ("deberta-v2", TEXT),
        "DistilBertForSequenceClassification": (
            "distilbert",
            {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "vocab_size": 64},
        ),
        "ElectraForPreTraining": ("electra", TEXT | {"embedding_size": 16}),
        "MPNetForMaskedLM": ("mpnet", TEXT),
        "ModernBertForMaskedLM": (
            "modernbert",
            TEXT | SPECIAL | {"cls_token_id": 1, "sep_token_id": 2},
        ),
        "RobertaForMaskedLM": ("roberta", TEXT),
        "XLMRobertaModel": ("xlm-roberta", TEXT),
    },
    "encoder and decoder": {
        "BartForConditionalGeneration": ("bart", PAIR),
        "MT5ForConditionalGeneration": ("mt5", T5),
        "MarianMTModel": ("marian", PAIR | {"pad_token_id": 0}),
        "PegasusForConditionalGeneration": ("pegasus", PAIR),
        "T5ForConditionalGeneration": ("t5", T5),
    },
    "vision": {
        "ConvNextForImageClassification": ("convnext", STAGES | {"num_stages": 2}),
        "Dinov2Model": ("dinov2", IMAGES),
        "ResNetForImageClassification": ("resnet", STAGES | {"embedding_size": 8}),
        "SiglipVisionModel": ("siglip_vision_model", IMAGES),
        "SwinForImageClassification": (
            "swin",
            {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 32}
            | {"patch_size": 4, "window_size": 2},
        ),
        "ViTForImageClassification": ("vit", IMAGES),
    },
    "audio": {
        "HubertModel": ("hubert", SOUND),
        "Wav2Vec2ForCTC": ("wav2vec2", SOUND),
        "WhisperForConditionalGeneration": (
            "whisper",
            PAIR
            | SPECIAL
            | {"num_mel_bins": 8, "max_source_positions": 16}
            # Its tokens are cut to those that the tests' tokenizer has.
            | {"max_target_positions": 16, "decoder_start_token_id": 1},
        ),
    },
    "text with images": {
        "CLIPModel": (
            "clip",
            {"text_config": TEXT, "vision_config": IMAGES, "projection_dim": 16},
        ),
        "Gemma3ForConditionalGeneration": (
            "gemma3",
            {"text_config": DECODER | {"head_dim": 16}, "vision_config": IMAGES},
        ),
        "Idefics3ForConditionalGeneration": (
            "idefics3",
            {"text_config": LLAMA, "vision_config": IMAGES},
        ),
        "LlavaForConditionalGeneration": (
            "llava",
            {"text_config": LLAMA, "image_token_index": 5}
            | {"vision_config": IMAGES | {"model_type": "clip_vision_model"}},
        ),
        "PaliGemmaForConditionalGeneration": (
            "paligemma",
            {"text_config": DECODER | {"model_type": "gemma", "head_dim": 16}}
            | {"vision_config": IMAGES | {"model_type": "siglip_vision_model"}}
            | {"projection_dim": 32},
        ),
        "Qwen2VLForConditionalGeneration": (
            "qwen2_vl",
            {
                "text_config": DECODER | {"rope_parameters": ROPE},
                "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32}
                | {"num_heads": 2, "patch_size": 8},
            },
        ),
        "SiglipModel": ("siglip", {"text_config": TEXT, "vision_config": IMAGES}),
    },
}
