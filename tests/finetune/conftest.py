"""Tiny encoders, with the same weights as EuroBERT and as Llama."""

import pytest
from finetune_sets import write_model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    write_model(folder / "euro")
    write_model(folder / "llama", "llama")
    return folder
