"""What NeMo's YAML names as `_target_`: the model and the training set of a cell, given the path of its cell.json."""

from megatron_encdec.finetune.features import Feature, load_task
from megatron_encdec.finetune.models import build
from megatron_encdec.finetune.record import read_cell


def model_of(cell: str, **_):
    """The model of the cell in the file `cell`, with the head of its family."""
    loaded = read_cell(cell)
    return build(loaded.model.path, loaded.family, load_task(loaded).labels, loaded.model.weights)


def training_features(cell: str, **_) -> list[Feature]:
    """The training set of the cell in the file `cell`."""
    return load_task(read_cell(cell)).train
