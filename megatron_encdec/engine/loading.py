"""A checkpoint into a trunk and optimizer of any topology and precision.

    1. `load(...)`              to go on: weights, moments, update count
    2. `load_weights(...)`      to begin anew from the weights alone
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from megatron_encdec.engine.boxes import FP8_PREFIX, STATE_PREFIX, Box, wanted
from megatron_encdec.engine.integrity import check
from megatron_encdec.engine.optimizer import set_update_count
from megatron_encdec.engine.storage import read_boxes, read_update_count, stored_dtypes

_MASTERS = f"{STATE_PREFIX}.param."


def load(checkpoint: Path, trunk, optimizer=None) -> None:
    """Fill `trunk` (and `optimizer`, if given) from `checkpoint`, whatever topology wrote it; collective.
    Every byte is checked first: `IntegrityError` on every rank, naming the file and the newest intact checkpoint.
    Weights of another dtype come from the fp32 masters. FP8's scales begin anew where the checkpoint has none."""
    check(checkpoint)
    dtypes = stored_dtypes(checkpoint)

    def source(box):
        other = dtypes.get(box.key) not in (None, box.values.dtype)
        return _from_master(box, dtypes) if other and not box.key.startswith(STATE_PREFIX) else box

    read_boxes(checkpoint, [source(box) for box in wanted(trunk, optimizer)
                            if box.key in dtypes or not box.key.startswith(f"{FP8_PREFIX}.")])
    if optimizer is not None:
        set_update_count(optimizer, read_update_count(checkpoint))


def load_weights(checkpoint: Path, trunk, optimizer=None) -> None:
    """Fill `trunk`, and the fp32 masters in `optimizer`, with the weights of `checkpoint` alone; collective.
    They come from the masters, which they were rounded from, where there are some. Moments and update count stay as
    they are; a checkpoint without any, such as an import's, will do."""
    check(checkpoint)
    names = stored_dtypes(checkpoint)
    read_boxes(checkpoint, [_from_master(box, names) for box in wanted(trunk, None)])
    if optimizer is not None:  # by itself: where it holds an fp32 run's weights, its boxes are the same
        read_boxes(checkpoint, [_from_master(box, names) for box in wanted(trunk, optimizer)
                                if box.key.startswith(_MASTERS)])


def _from_master(box: Box, names: Collection[str]) -> Box:
    """The box of a weight or master, read from the checkpoint's master if that is among its `names`."""
    weight = box.key.removeprefix(_MASTERS)
    return replace(box, key=_MASTERS + weight if _MASTERS + weight in names else weight)
