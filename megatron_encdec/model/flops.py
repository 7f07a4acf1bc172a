"""FLOPs of training, for MFU: what the mathematics needs, whatever the implementation repeats or wastes.

    matrices    2 per parameter and token, the embedding's look-up not counted
    head        2 * H * V for each labelled position only
    attention   4 * D * heads per pair of positions that may see each other, within segments; causal counts half
    backward    twice the forward

Recomputed activations, masked-out pairs that a kernel computes anyway, padded columns of the vocabulary, norms, softmax
and the optimizer are not counted. tests/model/test_flops.py holds this against torch's own counter.
"""

import numpy as np

from megatron_encdec.model.config import ModelConfig


def attended_pairs(cu_seqlens: np.ndarray, attention: str) -> float:
    """Pairs (query, key) that attention needs in segments cut at `cu_seqlens`; half of all of them if causal."""
    lengths = np.diff(cu_seqlens).astype(np.float64)
    pairs = float(np.square(lengths).sum())
    return pairs / 2 if attention == "causal" else pairs


def whole_pairs(tokens: float, sequence_length: int, attention: str) -> float:
    """The same for `tokens` in windows without any cut: the most that is possible."""
    return attended_pairs(np.array([0, sequence_length]), attention) * tokens / sequence_length


def training_flops(model: ModelConfig, tokens: float, pairs: float, targets: float) -> float:
    """FLOPs of forward and backward for `tokens` inputs that attend to `pairs` and `targets` labelled positions."""
    layer = 2 * model.parameters_per_layer * tokens + 4 * model.head_dim * model.num_attention_heads * pairs
    head = 2 * model.hidden_size * model.vocabulary_size * targets
    return 3 * (model.num_layers * layer + head)  # forward, and backward at twice its cost
