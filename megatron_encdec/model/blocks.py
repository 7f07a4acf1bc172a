"""Attention within a distance, at a cost that grows with the distance: queries in blocks, each with the keys near it.

    1. `reach()`          how far a token sees, for an attention kind and a sliding window
    2. `Blocks`           windows cut into blocks of neighbouring tokens, and put together again
    3. `blocks_within()`  the blocks for a reach; one block, the whole window, where more would not pay
    4. `segment_mask()`   who sees whom inside the blocks

Shape suffixes: S window length, B windows, N blocks of a window, H heads, D head dimension, C queries of a block, K
keys that it is given.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from megatron_encdec.objectives.base import AttentionKind

SMALLEST = 64  # tokens of a block: below, the products are too small to pay for their overhead
Reach = tuple[int, int]  # tokens (before, after) itself that a token sees at most; -1: all of its segment


def reach(kind: AttentionKind, sliding_window: int | None) -> Reach:
    """As transformers 5.18 understands `sliding_window` = w: a causal window holds the token itself, 0 <= i - j < w; a
    bidirectional one reaches so far to either side, |i - j| <= w (masking_utils; ModernBERT's classes too)."""
    if kind == "causal":
        return (-1 if sliding_window is None else sliding_window - 1, 0)
    return (-1, -1) if sliding_window is None else (sliding_window, sliding_window)


@dataclass(frozen=True)
class Blocks:
    """`size` tokens in a row, with the keys of their own block, of `before` blocks before it and `after` behind it."""

    size: int
    before: int = 0
    after: int = 0

    def queries(self, x_SBHD: torch.Tensor) -> torch.Tensor:
        """[N * B, H, C, D], number n * B + b; zeros where the last block goes beyond the window."""
        return self._padded(x_SBHD, 0, 0).flatten(0, 1)

    def keys(self, x_SBHD: torch.Tensor) -> torch.Tensor:
        """[N * B, H, K, D]; zeros beyond either end of the window."""
        blocks_NBHCD, beside = self._padded(x_SBHD, self.before, self.after), self.before + self.after
        if beside:
            count = len(blocks_NBHCD) - beside
            blocks_NBHCD = torch.cat([blocks_NBHCD[first:first + count] for first in range(beside + 1)], dim=3)
        return blocks_NBHCD.flatten(0, 1)

    def _padded(self, x_SBHD: torch.Tensor, before: int, after: int) -> torch.Tensor:
        """[before + N + after, B, H, C, D]"""
        rest = -len(x_SBHD) % self.size
        if before or after or rest:
            x_SBHD = F.pad(x_SBHD, (*[0] * 6, before * self.size, rest + after * self.size))
        return x_SBHD.unflatten(0, (-1, self.size)).permute(0, 2, 3, 1, 4)

    @staticmethod
    def together(x: torch.Tensor, windows: int, length: int) -> torch.Tensor:
        """What was computed for the queries, [N * B, H, C, D]  ->  [S, B, H, D]"""
        return x.unflatten(0, (-1, windows)).permute(0, 3, 1, 2, 4).flatten(0, 1)[:length]


def blocks_within(length: int, far: Reach) -> Blocks:
    """Half of the reach a block: the keys that a block is given and does not need are few then."""
    if far[0] < 0:
        return Blocks(length)
    size = max(SMALLEST, -(-max(far) // 2))
    blocks = Blocks(size, *(-(-side // size) for side in far))
    return blocks if size * (1 + blocks.before + blocks.after) < length else Blocks(length)


def segment_mask(cu_seqlens: torch.Tensor, windows: int, length: int, far: Reach, blocks: Blocks,
                 dtype: torch.dtype) -> torch.Tensor:
    """Additive mask [N * B, 1, C, K]: 0 inside a segment and within the reach `far`, -inf elsewhere.
    cu_seqlens: int32 [segments + 1], cuts of the B * S flattened tokens, 0 and B * S included."""
    positions_T = torch.arange(windows * length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    segment_BS = torch.bucketize(positions_T, cu_seqlens, right=True).view(windows, length)  # 0 is left for filler
    segment_SB11 = segment_BS.T[:, :, None, None]
    allowed = blocks.queries(segment_SB11) == blocks.keys(segment_SB11).transpose(-1, -2)
    ahead_CK = (torch.arange(allowed.shape[-1], device=cu_seqlens.device)
                - torch.arange(blocks.before * blocks.size, (blocks.before + 1) * blocks.size,
                               device=cu_seqlens.device)[:, None])
    if far[0] >= 0:
        allowed &= ahead_CK >= -far[0]
    if far[1] >= 0:
        allowed &= ahead_CK <= far[1]
    return torch.zeros(allowed.shape, dtype=dtype, device=cu_seqlens.device).masked_fill_(~allowed, float("-inf"))
