"""An import that nothing was trained for goes back as it came: its own config, tokenizer files and rows.

    1. `way_back(source, target)`   where the checkpoint is an import's and the class its own; else None
    2. `WayBack`                    the mask's row taken out again, the files of RUN_DIR/source

What the import added for an MLM phase, a mask token and its row, has no place in what the model was before.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from megatron_encdec.interop.families import Target
from megatron_encdec.interop.importing import REPLACED_ROWS
from megatron_encdec.interop.mask_token import copy_tokenizer_files
from megatron_encdec.interop.names import to_hugging_face
from megatron_encdec.interop.source import Source
from megatron_encdec.interop.source_config import read_source
from megatron_encdec.model.config import ModelConfig


@dataclass(frozen=True)
class WayBack:
    """How an import's checkpoint becomes what it was imported from. `config` is its own."""

    directory: Path
    target: Target
    config: object
    model: ModelConfig
    mask: int | None

    def weights(self, trunk: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Hugging Face tensors of the trunk's, of as many rows as there were."""
        found = to_hugging_face(trunk, self.model, self.target.family.names)
        for name, row in self._replaced_rows().items():
            found[name] = found[name].clone()
            found[name][self.mask] = row.to(found[name].dtype)
        return found

    @property
    def replaced_token(self) -> int | None:
        """The token whose rows are others in the trunk; None where all are the same."""
        return self.mask if self._replaced_rows() else None

    def _replaced_rows(self) -> dict[str, torch.Tensor]:
        path = self.directory / REPLACED_ROWS
        return load_file(path) if path.is_file() else {}

    def write_files(self, directory: Path) -> list[str]:
        """The tokenizer as it was; remarks for the user."""
        return [] if copy_tokenizer_files(self.directory, directory) else ["there is no tokenizer with it"]

    def write_generation(self, directory: Path) -> None:
        """generation_config.json, where there was one, in the place of a default one."""
        path = self.directory / "generation_config.json"
        if path.is_file():
            shutil.copyfile(path, directory / path.name)


def way_back(source: Source, target: Target) -> WayBack | None:
    """The way back of `source` as `target`, where that is what it was imported from."""
    imported, directory = source.imported, source.run / "source"
    if not imported or imported["as"] != target.name or imported["architecture"] != target.model_class:
        return None
    config = read_source(directory, imported["ignore"]).configuration()
    model = replace(source.config.model, vocabulary_size=imported["vocabulary_size"])
    return WayBack(directory, target, config, model, imported["mask"]["id"])
