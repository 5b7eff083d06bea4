"""Small random instances of the causal language models of transformers that carry a tensor-parallel plan."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

#: What shrinks, where a configuration has it.
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip

#: What a small instance of one architecture needs besides; with the branches that its defaults leave out.
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        }
    },
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 128,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_text": {"global_head_dim": 32, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 128},
    "gemma4_unified_text": {"global_head_dim": 32},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.3, "logits_scaling": 2.0},
    "hrm_text": {"num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 2, "num_hidden_layers": 12},
    "olmo": {"clip_qkv": 0.5},
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
    },
    "phi4_multimodal": {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "crop_size": 28,
        },
        "audio_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_blocks": 2,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 32,
        },
    },
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 16,
    },
    "seed_oss": {"residual_dropout": 0.0},
}

#: Options of an architecture that take another path through its code: a row of their own each.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "cohere": [{"use_qk_norm": True}],
    "gpt_neox": [{"use_parallel_residual": False}],
    "llama": [{"num_key_value_heads": 1}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}],
    "olmo2": [{"num_key_value_heads": 1}],
    "phi": [{"qk_layernorm": True}],
}


def architectures() -> list[str]:
    """Those with a plan of ours, and every model_type with a causal language model whose configuration carries one."""
    carrying = [kind for kind in CLASSES if getattr(CONFIG_MAPPING[kind], "base_model_tp_plan", None)]
    return sorted({"gpt2", "gpt_oss", "jamba", "nemotron_h", *carrying})


def small_config(kind: str, options: dict[str, Any]) -> Any:
    """Two layers of 64 features, dropout off; ``options`` override."""
    cls: Any = CONFIG_MAPPING[kind]
    default = cls()
    own = dir(default)
    given = {name: value for name, value in SMALL.items() if name in own}
    if "kv_lora_rank" in own:  # latent attention: every head has its keys, and the head size follows from others
        given["num_key_value_heads"] = given["num_attention_heads"]
        given.pop("head_dim", None)
    given |= {n: 0.0 for n, v in vars(default).items() if isinstance(v, float) and ("dropout" in n or "pdrop" in n)}
    return cls(**{**given, **SPECIAL.get(kind, {}), **options})


def small_model(kind: str, options: dict[str, Any]) -> nn.Module:
    """With random weights everywhere: norm weights of one and biases of zero would hide mistakes."""
    config = small_config(kind, options)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, CLASSES[kind])(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator) * 0.05)
    return model.train()
