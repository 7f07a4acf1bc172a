"""Llama, and what was published in its classes (SmolLM2, ...)."""

from megatron_encdec.interop.families.llama_shaped import NO_BIASES, LlamaShaped

LLAMA = LlamaShaped("llama", "LlamaConfig", "LlamaForCausalLM", whole_heads=True, settings=NO_BIASES)
