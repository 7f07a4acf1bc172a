"""The FLOPs of training a trunk, for MFU.

FLOPs are what the mathematics needs, whatever the implementation repeats or wastes:

    matrices    2 per parameter and token, the embedding's look-up not counted
    head        2 * H * V for each labelled position only, and 2 * H * H of a dense layer before
    attention   4 * D * heads per pair of positions that may see each other, within segments and a layer's window;
                causal counts half
    backward    twice the forward: the gradient of what went in, and that of the weight
    frozen      no gradient of a frozen weight, and none at all below the lowest weight that is trained

Recomputed activations, masked-out pairs that a kernel computes anyway, padded columns of the vocabulary, norms, softmax
and the optimizer are not counted. tests/model/test_flops.py holds this against torch's own counter.
"""

import math

import numpy as np

from megatron_encdec.model.config import ModelConfig
from megatron_encdec.model.parts import Frozen


def attended_pairs(cu_seqlens: np.ndarray, attention: str, sliding_window: int | None = None) -> np.ndarray:
    """Pairs (query, key) that attention needs in segments cut at `cu_seqlens`: [2], of a layer that no window bounds
    and of one with `sliding_window`. Those |i - j| apart that may see each other; half of them if causal."""
    lengths = np.diff(cu_seqlens).astype(np.float64)
    farthest = sliding_window - (attention == "causal") if sliding_window else math.inf
    found = []
    for far in (lengths - 1, np.minimum(lengths - 1, farthest)):
        found.append(float((lengths * (2 * far + 1) - far * (far + 1)).sum()))
    return np.array(found) / (2 if attention == "causal" else 1)


def whole_pairs(tokens: float, sequence_length: int, attention: str, sliding_window: int | None = None) -> np.ndarray:
    """The same for `tokens` in windows without any cut: the most that is possible."""
    return attended_pairs(np.array([0, sequence_length]), attention, sliding_window) * tokens / sequence_length


def training_flops(model: ModelConfig, tokens: float, pairs: np.ndarray, targets: float,
                   frozen: Frozen | None = None) -> float:
    """FLOPs of forward and backward for `tokens` inputs that attend to `pairs` and `targets` labelled positions."""
    matrices, attention, table, dense = _forward_flops(model, tokens, pairs, targets)
    forward = model.num_layers * matrices + sum(attention) + table + dense
    whole = 3 * forward  # and backward at twice its cost
    return whole - spared_flops(model, tokens, pairs, targets, frozen) if frozen else whole


def _forward_flops(model: ModelConfig, tokens: float, pairs: np.ndarray,
                   targets: float) -> tuple[float, list[float], float, float]:
    """Of a layer's matrices, of the attention of each layer, of the head's output matrix and of its dense layer."""
    with_window = set(model.layers_with_window)
    return (2 * model.parameters_per_layer * tokens,
            [4 * model.head_dim * model.num_attention_heads * float(pairs[int(layer in with_window)])
             for layer in range(model.num_layers)],
            2 * model.hidden_size * model.vocabulary_size * targets,
            2 * model.hidden_size**2 * targets * (model.prediction_head == "dense"))


def spared_flops(model: ModelConfig, tokens: float, pairs: np.ndarray, targets: float, frozen: Frozen) -> float:
    """Those of the backward pass that a frozen part makes needless. The lowest layer that is trained counts whole."""
    matrices, attention, table, dense = _forward_flops(model, tokens, pairs, targets)
    spared, trained_below = 0.0, not frozen.embeddings
    for layer in range(model.num_layers):
        trained_below |= layer not in frozen.layers
        spared += matrices * (layer in frozen.layers) + (matrices + 2 * attention[layer]) * (not trained_below)
    held = frozen.embeddings if model.tied_embeddings else frozen.head
    spared += dense * (frozen.head + (not trained_below))
    trained_below |= dense > 0 and not frozen.head
    return spared + table * (held + (not trained_below))
