"""Initial weights as a function of (run seed, parameter name, global position): the same on any TP/PP/DP.

    1. megatron.core's sharded state says, for each local tensor, its global name, shape and offset
    2. the global tensor is drawn in blocks of rows, each from its own counter-based stream; a rank draws only the
       blocks that cross its slice, and keeps its part

N(0, std) for every matrix (arXiv 2507.00994, training code; its table prints sigma^2 = 0.2); norms 1, biases 0.
"""

import hashlib

import numpy as np
import torch

from megatron_encdec.platform import megatron as mcore

_ROWS_PER_BLOCK = 256


def fill_initial_weights(trunk: torch.nn.Module, seed: int, std: float) -> None:
    """Overwrite every parameter of `trunk` in place."""
    sharded = trunk.sharded_state_dict()
    mcore.apply_factories(sharded)  # SwiGLU's first layer holds two global tensors' slices in one local tensor
    with torch.no_grad():
        for shard in mcore.nested_values(sharded):
            if isinstance(shard, mcore.ShardedTensor) and shard.data is not None:
                _fill(shard, seed, std)


def _fill(shard: mcore.ShardedTensor, seed: int, std: float) -> None:
    lead = shard.prepend_axis_num  # the layer number comes as an extra leading axis
    name = "/".join([shard.key, *map(str, shard.global_offset[:lead])])
    shape, offset = shard.global_shape[lead:], shard.global_offset[lead:]
    if len(shape) == 1:
        shard.data.fill_(0.0 if shard.key.endswith(".bias") else 1.0)
        return
    values = normal_slice(seed, name, shape, offset, tuple(shard.data.shape))
    shard.data.copy_(torch.from_numpy(values).mul_(std))


def normal_slice(seed: int, name: str, shape: tuple, offset: tuple, size: tuple) -> np.ndarray:
    """The part at `offset`, of `size`, of a global [rows, columns] fp32 matrix of standard normals."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype=np.uint64)
    (first_row, first_column), (rows, columns) = offset, size
    pieces = []
    for block in range(first_row // _ROWS_PER_BLOCK, -(-(first_row + rows) // _ROWS_PER_BLOCK)):
        start = block * _ROWS_PER_BLOCK
        stream = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, block]))
        block_rows = min(_ROWS_PER_BLOCK, shape[0] - start)
        values = stream.standard_normal((block_rows, shape[1]), dtype=np.float32)
        low, high = max(first_row - start, 0), min(first_row + rows - start, block_rows)
        pieces.append(values[low:high, first_column:first_column + columns])
    return np.concatenate(pieces)
