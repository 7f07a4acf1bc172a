"""FLOPs of training, for MFU: what the mathematics needs, whatever the implementation repeats or wastes.

    matrices    2 per parameter and token, the embedding's look-up not counted
    head        2 * H * V for each labelled position only
    attention   4 * D * heads per pair of positions that may see each other; causal counts half of the pairs
    backward    twice the forward
"""

from megatron_encdec.model.config import ModelConfig

FORWARD_AND_BACKWARD = 3


def training_flops_per_token(model: ModelConfig, sequence_length: int, attention: str,
                             targets_per_token: float = 1.0) -> float:
    """FLOPs of forward and backward for one input token, whole windows of `sequence_length` attended."""
    pairs = sequence_length / 2 if attention == "causal" else sequence_length
    layers = model.num_layers * (2 * model.parameters_per_layer
                                 + 4 * model.head_dim * model.num_attention_heads * pairs)
    head = 2 * model.hidden_size * model.vocabulary_size * targets_per_token
    return FORWARD_AND_BACKWARD * (layers + head)
