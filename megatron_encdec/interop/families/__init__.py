"""The families of Hugging Face models that a trunk comes from and goes to: one module each, and their table.

    1. `MODEL_FAMILIES`            every family; what it reads, writes and refuses is in its module
    2. `TARGETS`                   what a checkpoint can become: a family's class under one attention kind
    3. `choose(wish, ...)`         what was asked for, else what the objective trained, as the trunk's family has it
    4. `check_fits(target, ...)`   sizes, features and tokens that the class cannot hold, refused by name

To add a family: a module here, and its row in `MODEL_FAMILIES`. Everything else reads this table.
"""

from megatron_encdec.interop.families.eurobert import EUROBERT
from megatron_encdec.interop.families.family import Target
from megatron_encdec.interop.families.gemma import GEMMA2, GEMMA3
from megatron_encdec.interop.families.granite import GRANITE
from megatron_encdec.interop.families.llama import LLAMA
from megatron_encdec.interop.families.mistral import MISTRAL
from megatron_encdec.interop.families.modernbert import MODERNBERT, MODERNBERT_DECODER
from megatron_encdec.interop.families.olmo import OLMO2, OLMO3
from megatron_encdec.interop.families.phi3 import PHI3
from megatron_encdec.interop.families.qwen import QWEN2, QWEN3
from megatron_encdec.interop.families.smollm3 import SMOLLM3
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.objectives.base import OBJECTIVES
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer import Tokenizer

MODEL_FAMILIES = {family.name: family for family in (
    LLAMA, EUROBERT, MISTRAL, QWEN2, QWEN3, SMOLLM3, MODERNBERT, MODERNBERT_DECODER, GEMMA2, GEMMA3, OLMO2, OLMO3,
    GRANITE, PHI3)}
TARGETS = {target.name: target for target in sorted(
    (Target(family, attention) for family in MODEL_FAMILIES.values() for attention in family.attentions),
    key=lambda target: not target.is_native)}


def choose(wish: str, objective: str, model: ModelConfig, source: str | None = None) -> Target:
    """The target that `--as` names; for `auto` the class of `objective`, the one trained last, that holds the trunk.

    source: for a checkpoint that an import made, the target that it came from: `auto` gives it back. Else a class made
    for that attention goes first (for an encoder of a Llama's shape EuroBERT), then the trunk's own family.
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
    attention = OBJECTIVES[objective].attention_of_models()
    candidates = sorted((target for target in TARGETS.values() if target.attention == attention),
                        key=lambda target: (not target.is_native, target.family.name != model.family))
    reasons = {}
    for target in candidates:
        reason = target.family.refuses(model)
        if reason is None:
            return target
        reasons.setdefault(reason, []).append(target.model_class)
    said = "; ".join(f"{', '.join(classes)}: {reason}" for reason, classes in reasons.items())
    raise UserError(f"--as auto: no {attention} class of transformers holds this trunk ({said})")


def check_fits(target: Target, model: ModelConfig, tokenizer: Tokenizer | None) -> None:
    """Refuse what the class cannot hold."""
    if reason := target.family.refuses(model):
        raise UserError(f"--as {target.name}: {target.model_class} cannot hold this trunk: {reason}")
    if target.is_encoder and (tokenizer is None or tokenizer.mask_id is None):
        raise UserError(f"--as {target.name}: {target.model_class} needs a mask token and the run's "
                        f"tokenizer names none; use a causal class, or set tokenizer.mask_token in the run")
