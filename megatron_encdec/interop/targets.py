"""What a checkpoint can become: the stock Hugging Face classes, and their config for a trunk.

    1. `choose(wish, objective)`       the target: what was asked for, else what the objective trained
    2. `check_fits(target, ...)`       sizes and tokens that the class cannot hold, refused by name
    3. `hugging_face_config(...)`      the class's config

Both classes compute the same function up to the attention: causal in Llama, bidirectional in EuroBERT.
"""

from dataclasses import dataclass

from megatron_encdec.interop.names import LLAMA, Family
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.objectives.base import AttentionKind
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Target:
    """A model class of the transformers library."""

    name: str
    model_class: str
    config_class: str
    auto_class: str
    attention: AttentionKind
    task: str  # of `pipeline`
    family: Family = LLAMA

    @property
    def needs_mask(self) -> bool:
        """Whether the class is of use only with a mask token."""
        return self.task == "fill-mask"


TARGETS = {
    "llama": Target("llama", "LlamaForCausalLM", "LlamaConfig", "AutoModelForCausalLM", "causal",
                    "text-generation"),
    "eurobert": Target("eurobert", "EuroBertForMaskedLM", "EuroBertConfig", "AutoModelForMaskedLM",
                       "bidirectional", "fill-mask"),
}
_OF_OBJECTIVE = {"clm": "llama", "mlm": "eurobert"}


def choose(wish: str, objective: str) -> Target:
    """The target that `--as` names; for `auto` the class of the objective trained last."""
    name = _OF_OBJECTIVE.get(objective) if wish == "auto" else wish
    if name not in TARGETS:
        if wish == "auto":
            raise UserError(f"--as auto: no class is known for the objective {objective!r}; "
                            f"name one of {', '.join(TARGETS)}")
        raise UserError(f"--as {wish}: not one of auto, {', '.join(TARGETS)}")
    return TARGETS[name]


def check_fits(target: Target, model: ModelConfig, tokenizer: Tokenizer) -> None:
    """Refuse what the class cannot hold."""
    if model.hidden_size % model.num_attention_heads:
        raise UserError(f"--as {target.name}: {target.model_class} needs a hidden size that is a multiple "
                        f"of the heads; here model.hidden_size={model.hidden_size}, "
                        f"model.num_attention_heads={model.num_attention_heads}")
    if target.needs_mask and tokenizer.mask_id is None:
        raise UserError(f"--as {target.name}: {target.model_class} needs a mask token and the run's "
                        "tokenizer names none; use --as llama, or set tokenizer.mask_token in the run")


def hugging_face_config(target: Target, model: ModelConfig, sequence_length: int, tokenizer: Tokenizer,
                        bos_id: int | None = None):
    """An instance of the class's config; pad is always set (EuroBERT's default lies beyond small tables)."""
    import transformers

    tokens = {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eod_id, "bos_token_id": bos_id}
    if target.needs_mask:
        tokens["mask_token_id"] = tokenizer.mask_id
    return getattr(transformers, target.config_class)(
        vocab_size=model.vocabulary_size, hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size, num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads, num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim, hidden_act="silu", max_position_embeddings=sequence_length,
        initializer_range=model.init_std, rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tied_embeddings, attention_bias=False, attention_dropout=0.0,
        mlp_bias=False, architectures=[target.model_class], **tokens)
