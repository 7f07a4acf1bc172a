"""From an objective's config and the tokenizer's special tokens to the objective itself."""

from collections.abc import Iterable

from megatron_encdec.objectives.base import Objective
from megatron_encdec.objectives.config import OBJECTIVES, ObjectiveConfig
from megatron_encdec.objectives.mlm import MLM
from megatron_encdec.platform.errors import UserError


def build_objective(config: ObjectiveConfig, mask_id: int | None, special_ids: Iterable[int],
                    vocabulary_size: int) -> Objective:
    """The objective of `config`; `vocabulary_size` is the tokenizer's, without padding columns.

    Raises UserError where mlm has no mask token.
    """
    kind = OBJECTIVES[config.name]
    if kind is not MLM:
        return kind()
    if mask_id is None:
        raise UserError("tokenizer.mask_token: the tokenizer has no mask token and mlm needs one; name a "
                        "token of its vocabulary that no text uses (a reserved one)")
    return kind(config.mask_ratio, mask_id, list(special_ids), vocabulary_size,
                config.mask_fraction, config.random_fraction)
