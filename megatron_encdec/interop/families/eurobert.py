"""EuroBERT (arXiv 2503.05500): an encoder of a Llama's shape."""

from megatron_encdec.interop.families.llama_shaped import LlamaShaped

EUROBERT = LlamaShaped("eurobert", "EuroBertConfig", "EuroBertForMaskedLM", attentions=("bidirectional",),
                       whole_heads=True, biases=True, settings={"mlp_bias": False})
