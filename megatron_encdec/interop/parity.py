"""Does the Hugging Face model compute what the trunk computes? Logits tell; tools/check_parity.py asks more.

Legend: B windows, S tokens of a window, V vocabulary, N positions.
"""

import torch

from megatron_encdec.interop.hugging_face import ParityError
from megatron_encdec.model.trunk import Trunk
from megatron_encdec.objectives.base import AttentionKind
from megatron_encdec.platform.device import device

TOLERANCE = 1e-3  # on logits in fp32: two orders above what rounding does, far below what any mistake does


@torch.no_grad()
def trunk_logits(trunk: Trunk, tokens_BS: torch.Tensor, kind: AttentionKind) -> torch.Tensor:
    """Logits [B, S, V] on the CPU of whole windows, vocabulary padding cut off."""
    windows, length = tokens_BS.shape
    starts = torch.arange(0, windows * length + 1, length, dtype=torch.int32, device=device())
    context = trunk.attention_context(kind, starts, length, False, windows, length)
    hidden = trunk.hidden_states(tokens_BS.to(device()), context)
    positions_N = torch.arange(windows * length, device=device())
    logits_NV = trunk.logits(hidden, positions_N, windows)[:, : trunk.model.vocabulary_size]
    return logits_NV.view(windows, length, -1).cpu()


@torch.no_grad()
def logits_difference(trunk: Trunk, hugging_face, kind: AttentionKind, windows: int = 2,
                      length: int = 64, apart: int | None = None) -> float:
    """max |trunk - HF| over all logits of `windows` x `length` random tokens; NaN if one is.

    Windows are no longer than the model's positions. The token `apart` is neither read nor predicted: a mask whose
    rows an import replaced.
    """
    length = min(length, hugging_face.config.max_position_embeddings, trunk.max_sequence_length)
    rows = min(trunk.model.vocabulary_size, hugging_face.config.vocab_size)  # without a mask that an import added
    generator = torch.Generator().manual_seed(0)
    read = torch.tensor([token for token in range(rows) if token != apart])
    tokens_BS = read[torch.randint(0, len(read), (windows, length), generator=generator)]
    ours_BSV, theirs_BSV = trunk_logits(trunk, tokens_BS, kind), hugging_face(tokens_BS).logits
    return (ours_BSV[..., read] - theirs_BSV[..., read]).abs().max().item()


def check_logits(trunk: Trunk, hugging_face, kind: AttentionKind, apart: int | None = None) -> float:
    """`logits_difference`; raises `ParityError` where it is above `TOLERANCE` or NaN."""
    difference = logits_difference(trunk, hugging_face, kind, apart=apart)
    if not difference <= TOLERANCE:
        cause = "the weights hold NaN or infinity" if difference != difference else "the conversion is wrong"
        raise ParityError(f"logits of {type(hugging_face).__name__} and of the trunk differ by "
                          f"{difference:.3g} (allowed {TOLERANCE}): {cause}")
    return difference
