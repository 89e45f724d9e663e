"""A tiny model of each student family, and of the corners of their attention."""

from transformers import GPT2Config, LlamaConfig, OPTConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

VOCAB = 97
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCAB}
GROUPED = {**SIZES, "num_key_value_heads": 1, "intermediate_size": 48}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCAB, **NO_DROPOUT}
FAMILIES: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**GPT2, **TOKENS),
    "opt": OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=16, dropout=0.0, **TOKENS),
    "qwen2": Qwen2Config(**GROUPED, **TOKENS),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16, **TOKENS),
    "llama": LlamaConfig(**GROUPED, **TOKENS),
}
# Scores that change with the layer, and a window shorter than rows in one of two layers.
CORNERS: dict[str, PreTrainedConfig] = {
    "gpt2, scaled by layer": GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True, **TOKENS),
    "qwen2, sliding window": Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1, **TOKENS
    ),
}
