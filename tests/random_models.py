"""Small random models of every family, saved as transformers saves them: what import and export are tried on."""

from pathlib import Path

import torch

# name -> (class, what its config says besides the sizes); heads odd per group, head dimension not a power of two
SIZES = dict(vocab_size=301, hidden_size=72, intermediate_size=44, num_hidden_layers=4, num_attention_heads=6,
             num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=0,
             pad_token_id=2)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
TWO_BASES = {"full_attention": {"rope_type": "default", "rope_theta": 900.0},
             "sliding_attention": {"rope_type": "default", "rope_theta": 40.0}}
MODELS = {
    "llama2": ("LlamaForCausalLM", {}),
    "llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3, "tie_word_embeddings": True, "head_dim": 20}),
    "llama-linear": ("LlamaForCausalLM", {"rope_parameters": LINEAR}),
    "smollm2": ("LlamaForCausalLM", {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None, "num_attention_heads": 10, "head_dim": 12}),
    "qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("Qwen2ForCausalLM", {"rope_parameters": YARN}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "smollm3": ("SmolLM3ForCausalLM", {"tie_word_embeddings": True}),
    "mistral-window": ("MistralForCausalLM", {"sliding_window": 12, "num_attention_heads": 10, "head_dim": 12}),
    "qwen2-window": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1}),
    "qwen3-window": ("Qwen3ForCausalLM", {"use_sliding_window": True, "sliding_window": 5, "layer_types": [
        "full_attention", "sliding_attention", "full_attention", "sliding_attention"]}),
    "smollm3-window": ("SmolLM3ForCausalLM", {"use_sliding_window": True, "sliding_window": 100, "no_rope_layers": [
        1, 0, 1, 1]}),  # longer than the text
    "eurobert": ("EuroBertForMaskedLM", {"mask_token_id": 1, "rms_norm_eps": 1e-6}),
    "modernbert": ("ModernBertForMaskedLM", {"local_attention": 12, "rope_parameters": TWO_BASES}),
    "modernbert-wide": ("ModernBertForMaskedLM", {  # windows longer than the text, layers in an order of their own
        "local_attention": 200, "tie_word_embeddings": False, "rope_parameters": TWO_BASES, "layer_types": [
            "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]}),
    "modernbert-global": ("ModernBertForMaskedLM", {"layer_types": ["full_attention"] * 4}),
    "modernbert-scaled": ("ModernBertForMaskedLM", {"local_attention": 14, "rope_parameters": {
        "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}}),
    "modernbert-decoder": ("ModernBertDecoderForCausalLM", {"local_attention": 10, "bos_token_id": 0,
                                                            "rope_parameters": TWO_BASES}),
    "modernbert-decoder-wide": ("ModernBertDecoderForCausalLM", {"local_attention": 300, "num_attention_heads": 12,
                                                                 "bos_token_id": 0, "tie_word_embeddings": False}),
}


_WINDOWED = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
MODELS |= {
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True}),
    "qwen3-biases": ("Qwen3ForCausalLM", {"head_dim": 16, "attention_bias": True}),
    "gemma2": ("Gemma2ForCausalLM", {  # bounds that are reached
        "head_dim": 20, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 5.0,
        "sliding_window": 6, "layer_types": _WINDOWED}),
    "gemma2-plain": ("Gemma2ForCausalLM", {
        "head_dim": 12, "query_pre_attn_scalar": 12, "attn_logit_softcapping": None, "final_logit_softcapping": None,
        "tie_word_embeddings": False, "layer_types": ["full_attention"] * 4}),
    "gemma3": ("Gemma3ForCausalLM", {"head_dim": 20, "query_pre_attn_scalar": 7, "sliding_window": 6, "layer_types":
                                     _WINDOWED, "rope_parameters": {
                                         "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 2.0},
                                         "sliding_attention": {"rope_type": "default", "rope_theta": 40.0}}}),
    "gemma3-wide": ("Gemma3ForCausalLM", {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 200,
                                          "final_logit_softcapping": 5.0, "tie_word_embeddings": False}),
    "embeddinggemma": ("Gemma3ForCausalLM", {
        "head_dim": 20, "sliding_window": 12, "layer_types": _WINDOWED, "rope_parameters": TWO_BASES,
        "use_bidirectional_attention": True}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo2-biases": ("Olmo2ForCausalLM", {"attention_bias": True, "tie_word_embeddings": True}),
    "olmo3": ("Olmo3ForCausalLM", {"sliding_window": 6, "layer_types": _WINDOWED, "rope_parameters": {
        "full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}}),
    "olmo3-wide": ("Olmo3ForCausalLM", {"sliding_window": 200}),
    "granite": ("GraniteForCausalLM", {"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "logits_scaling": 6.0,
                                       "attention_multiplier": 0.4, "tie_word_embeddings": True}),
    "granite-plain": ("GraniteForCausalLM", {"attention_multiplier": 12**-0.5, "attention_bias": True}),
    "phi3": ("Phi3ForCausalLM", {}),
    "phi3-window": ("Phi3ForCausalLM", {"sliding_window": 9, "tie_word_embeddings": True}),
}


# `ModelConfig`'s keys of ModernBERT's shape, for a trunk of two layers or more and as many groups as heads
MODERNBERT = dict(norm="layernorm", activation="geglu", embedding_norm=True, prediction_head="dense",
                  tied_embeddings=True, sliding_window=6, layers_without_window=[0], rope_theta=900.0,
                  local_rope_theta=40.0)


def kind_of(name: str) -> str:
    """The attention that the model asks for."""
    model_class, settings = MODELS[name]
    both = model_class.endswith("MaskedLM") or settings.get("use_bidirectional_attention")
    return "bidirectional" if both else "causal"


def build(name: str, **changes):
    """(model in evaluation mode) with weights large enough for attention to matter, norms and biases apart."""
    import transformers

    model_class, settings = MODELS[name]
    model_class = getattr(transformers, model_class)
    known = vars(model_class.config_class())  # a ModernBERT has as many key/value heads as heads, and no key for them
    sizes = {key: value for key, value in SIZES.items() if key in known}
    config = model_class.config_class(**{**sizes, **settings, **changes})
    if model_class.__name__.startswith("Gemma2"):
        config._attn_implementation = "eager"  # SDPA leaves out the bound on the scores
    torch.manual_seed(len(name))
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.5 + torch.rand_like(parameter))
            else:
                parameter.normal_(std=0.15)
    return model


def save(name: str, directory: Path, tokenizer: Path | None = None, dtype: torch.dtype = torch.float32,
         file_size: str = "5GB", **changes):
    """The model of `name` in `directory`, with the tokenizer files of `tokenizer`; the model."""
    import shutil

    model = build(name, **changes).to(dtype)
    model.save_pretrained(directory, max_shard_size=file_size)
    if tokenizer is not None:
        for file in tokenizer.iterdir():
            shutil.copyfile(file, directory / file.name)
    return model
