"""Llama, and what was published in its classes (SmolLM2, ...)."""

from megatron_encdec.interop.families.llama_shaped import LlamaShaped

LLAMA = LlamaShaped("llama", "LlamaConfig", "LlamaForCausalLM", whole_heads=True, biases=True,
                    settings={"mlp_bias": False})
