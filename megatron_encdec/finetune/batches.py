"""Texts of like length together: little padding, and the same texts.

    1. `like_lengths(lengths, ...)`     numbers of texts, in batches
    2. `padding_of(lengths, batches)`   the tokens that are computed for nothing

From the longest text on, a batch ends where it is full, or where its padding would cost more than another batch does.
"""

from collections.abc import Sequence

import torch

# What a batch costs beside its tokens, in tokens. On a CPU 15 to 160 were measured, for encoders of 1M to 90M
# parameters, with gradients and without; of a GPU, where each kernel has to be started, it is an estimate.
BATCH_COST = {"cpu": 64, "cuda": 2048}


def like_lengths(lengths: Sequence[int], most_texts: int, most_tokens: int | None = None,
                 cost: int | None = None) -> list[list[int]]:
    """Numbers of texts of so many tokens, the longest first, in batches of at most `most_texts` of them and
    `most_tokens` with padding (a text that has more is alone). cost: of a batch; by default that of this machine."""
    if cost is None:
        cost = BATCH_COST["cuda" if torch.cuda.is_available() else "cpu"]
    batches: list[list[int]] = []
    longest = padding = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        padding += longest - lengths[number]
        full = batches and (len(batches[-1]) == most_texts or padding > cost
                            or most_tokens is not None and (len(batches[-1]) + 1) * longest > most_tokens)
        if full or not batches:
            batches.append([])
            longest, padding = lengths[number], 0
        batches[-1].append(number)
    return batches


def padding_of(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> int:
    """How many tokens of padding `batches` have."""
    return sum(max(lengths[number] for number in batch) - lengths[number] for batch in batches for number in batch)
