"""Small configs: every architecture of transformers at a size that two cores can compare.

One rule a kind of field, matched by its name over all configs; what an architecture needs beyond that is
in ``OVERRIDES``. Sizes are unlike one another, so that no dim is taken for another, and awkward: 8 query
heads and 2 key-value heads on 3 ranks, an MLP width and a vocabulary that divide by none of 3, 4 and 8.
"""

from __future__ import annotations

import re
from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY = 64, 8, 2, 8, 132, 2003

_RULES: list[tuple[str, int]] = [
    (r"(vocab_size|.*_vocab_size|vocab_size_per_layer_input)", VOCABULARY),
    (r"(num_(hidden_|decoder_|encoder_|neck_hidden_)?layers|n_layers?|(en|de)coder_layers|num_blocks|depth)", 2),
    (r"(hidden_size|d_model|n_embd|dim|emb_dim|embedding_size|embedding_dim|word_embed_proj_dim|d_embed)", HIDDEN),
    (r"((in|out)put_embedding_size)", HIDDEN),
    (r"((pronunciation|shape)_embed_dim)", HIDDEN // 2),
    (r"((attention|encoder|cross_attention|pooler)_hidden_size|projection_dim)", HIDDEN),
    (r"((num_|(en|de)coder_)?(swa_)?attention_heads|num_attention_heads|num_heads|n_heads?)", HEADS),
    (r"(swa_num_attention_heads|num_(en|de)coder_attention_heads)", HEADS),
    (r"(num_key_value_heads|swa_num_key_value_heads|num_kv_heads|num_global_key_value_heads)", KV_HEADS),
    (r"(head_dim|swa_head_dim|d_kv|d_head|dim_head|kv_channels|attention_head_dim|global_head_dim)", HEAD_DIM),
    (r"(intermediate_size|d_ff|dim_ff|dff|ffn_dim|n_inner|d_inner|ffn_hidden_size|(en|de)coder_ffn_dim)", WIDTH),
    (r"(intermediate_size_mlp|dense_intermediate_size|hidden_dim|feed_forward_size)", WIDTH),
    (r"(moe_|expert_|shared_|moe_shared_|shared_experts?_|moe_shared_expert_)+(intermediate|ffn_hidden)_size", 36),
    (r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts)", 4),
    (r"(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|moe_top_k|top_k_experts)", 2),
    (r"(n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|moe_num_shared_experts)", 1),
    (r"(first_k_dense_replace|num_dense_layers|num_sparse_(en|de)coder_layers)", 1),
    (r"((en|de)coder_sparse_step|zero_expert_num)", 2),
    (r"(q_lora_rank)", 24),
    (r"(kv_lora_rank)", 16),
    (r"(qk_rope_head_dim|rotary_dim)", 4),
    (r"(qk_nope_head_dim|v_head_dim)", 8),
    (r"(qk_head_dim)", 12),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|max_source_positions|max_target_positions)", 96),
    (r"(original_max_position_embeddings|model_max_length)", 96),
    (r"(sliding_window|local_attention|attention_chunk_size|window_size|attention_window|sliding_window_size)", 6),
    (r"(mamba_n_heads|mamba_num_heads|linear_num_value_heads)", 8),
    (r"(linear_num_key_heads|linear_num_heads)", 4),
    (r"(mamba_d_head|mamba_head_dim|linear_key_head_dim|linear_value_head_dim|linear_head_dim)", 16),
    (r"(mamba_d_state|ssm_state_size|state_size)", 8),
    (r"(n_groups|mamba_n_groups)", 1),
    (r"(mamba_d_ssm)", 128),
    (r"(mamba_chunk_size|chunk_size)", 8),
    (r"(mamba_dt_rank|time_step_rank)", 8),
    (r"(hidden_size_per_layer_input|ple_embed_dim|laurel_rank|altup_.*rank)", 16),
    (r"(query_pre_attn_scalar)", HEAD_DIM),
    (r"(index_head_dim)", 8),
    (r"(index_n_heads)", 4),
    (r"(index_topk)", 6),
    (r"(d_latents)", HIDDEN),
    (r"(num_latents)", 16),
    (r"(num_self_attends_per_block)", 2),
    (r"(num_filters)", 2),
]
"""(pattern of a whole field name, size)"""

_ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2,
          "attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HEAD_DIM}  # fmt: skip

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": ["full_attention", "sliding_attention"], "rope_parameters": {
        k: {"rope_type": "default", "rope_theta": 1e4} for k in ("full_attention", "sliding_attention")}},
    "dbrx": {"attn_config": {"kv_n_heads": KV_HEADS, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note": {"num_key_value_heads": HEADS},
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 4},
    "esmc": {"num_key_value_heads": HEADS},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"num_hidden_layers": 2, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "neomme": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [4, 3]},
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": _ZAMBA,
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What an architecture needs to be built small, by model type."""


def _field(name: str, value: Any, latent: bool) -> Any:
    """The small value of a config's field, or the same where no rule says otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | None):
        return value
    if value is None and name != "head_dim":
        return None
    if name.endswith(("_token_id", "_token_index", "_index")):
        return value % 97 if value and value > 96 else value
    if latent and name == "num_key_value_heads":  # as many keys as queries
        return HEADS
    size = next((size for pattern, size in _RULES if re.fullmatch(pattern, name)), value)
    return value if value == 0 else size


def _smaller(config: Any) -> dict[str, Any]:
    """The constructor arguments that make a config of this class small."""
    from transformers import PretrainedConfig

    fields = vars(config)
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, PretrainedConfig):
            changed[name] = small_config(type(value)).to_dict()
        elif name.endswith("token_id") and isinstance(value, list):
            changed[name] = [v % 97 for v in value]
        elif (small := _field(name, value, "kv_lora_rank" in fields)) != value:
            changed[name] = small
    if "kv_lora_rank" in fields and fields.get("head_dim") == fields["qk_rope_head_dim"]:
        changed["head_dim"] = changed["qk_rope_head_dim"]
    for kinds in ("layer_types", "layers_block_type"):  # as many layers as there are kinds
        if fields.get(kinds) and kinds not in config.attribute_map:
            each = list(dict.fromkeys(fields[kinds]))
            changed[kinds] = (each * 2)[: max(2, len(each))]
            changed |= {n: len(changed[kinds]) for n in ("num_hidden_layers", "n_layers") if n in fields}
    return changed


def small_config(cls: type, kind: str = "") -> Any:
    """A small config of a class, with the overrides of its model type."""
    base = cls()
    changed = _smaller(base) | OVERRIDES.get(base.model_type, {})
    if hasattr(base, "is_decoder"):
        changed["is_decoder"] = kind == "causal"
    config = cls(**changed)
    config._experts_implementation = "batched_mm"  # the grouped kernels take no float64, the loop depends on data
    return config
