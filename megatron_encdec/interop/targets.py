"""What a checkpoint becomes: the class that holds its trunk, and that class's config.

    1. `choose(wish, ...)`             what was asked for, else what the objective trained, as the trunk's family has it
    2. `check_fits(target, ...)`       sizes, features and tokens that the class cannot hold, refused by name
    3. `hugging_face_config(...)`      the class's config

All classes compute the same function up to the attention: causal in decoders; bidirectional in EuroBERT, and in a
decoder's class with `is_causal: false`, which transformers 5.18 honours on every attention path that
tests/interop/test_attention_of_exports.py can reach on a CPU.
"""

from megatron_encdec.interop.families import TARGETS, Target
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.objectives import OBJECTIVES
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer import Tokenizer


def choose(wish: str, objective: str, model: ModelConfig, source: str | None = None) -> Target:
    """The target that `--as` names; for `auto` the class of `objective`, the one trained last, that holds the trunk.

    source: for a checkpoint that an import made, the target that it came from: `auto` gives it back. Else the
    trunk's own family goes first; an encoder becomes EuroBERT where that holds it.
    """
    if wish != "auto":
        if wish not in TARGETS:
            raise UserError(f"--as {wish}: not one of auto, {', '.join(TARGETS)}")
        return TARGETS[wish]
    if source is not None:
        return TARGETS[source]
    if objective not in OBJECTIVES:
        raise UserError(f"--as auto: no class is known for the objective {objective!r}; "
                        f"name one of {', '.join(TARGETS)}")
    attention = OBJECTIVES[objective].attention
    candidates = [target for target in TARGETS.values() if target.attention == attention]
    if attention == "causal":  # an encoder of the trunk's own family comes after EuroBERT
        candidates.sort(key=lambda target: target.family.name != model.family)
    else:
        candidates.sort(key=lambda target: (target.name != "eurobert", target.family.name != model.family))
    for target in candidates:
        if target.family.refuses(model) is None:
            return target
    reasons = "; ".join(f"{target.model_class}: {target.family.refuses(model)}" for target in candidates)
    raise UserError(f"--as auto: no {attention} class of transformers holds this trunk ({reasons})")


def check_fits(target: Target, model: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Refuse what the class cannot hold."""
    reason = target.family.refuses(model)
    if reason:
        raise UserError(f"--as {target.name}: {target.model_class} cannot hold this trunk: {reason}")
    if target.is_encoder and (tokenizer is None or tokenizer.mask_id is None):
        raise UserError(f"--as {target.name}: {target.model_class} needs a mask token and the run's "
                        f"tokenizer names none; use a causal class, or set tokenizer.mask_token in the run")


def hugging_face_config(target: Target, model: ModelConfig, positions: int, tokenizer: Tokenizer | None,
                        bos_id: int | None = None):
    """An instance of the class's config; pad is always set (EuroBERT's default lies beyond small tables).

    positions: how many the weights have been trained for; the more of it and `model.max_positions` is named.
    """
    import transformers

    tokens = {"bos_token_id": bos_id}
    if tokenizer is not None:
        tokens |= {"pad_token_id": tokenizer.pad_id, "eos_token_id": tokenizer.eod_id}
    if target.is_encoder:
        tokens["mask_token_id"] = tokenizer.mask_id
        if not target.family.bidirectional:
            tokens["is_causal"] = False
    rope = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is not None:
        rope |= model.rope_scaling.given
    return getattr(transformers, target.family.config_class)(
        vocab_size=model.vocabulary_size, hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size, num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads, num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim, hidden_act="silu", max_position_embeddings=max(positions, model.max_positions or 0),
        initializer_range=model.init_std, rms_norm_eps=model.norm_eps, rope_parameters=rope,
        tie_word_embeddings=model.tied_embeddings, attention_dropout=0.0, architectures=[target.model_class],
        **target.family.settings(model), **tokens)
