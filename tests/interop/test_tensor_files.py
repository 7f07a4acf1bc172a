"""Files that are missing, cut short, foreign or in disagreement: one line that names the file, nothing half-written."""

import json

import pytest
import torch
from random_models import save
from safetensors.torch import save_file

from megatron_encdec.cli import main
from megatron_encdec.interop.source_files import TensorFiles
from megatron_encdec.platform.errors import UserError


@pytest.fixture(scope="module")
def whole(tokenizer_directory, tmp_path_factory):
    """A model in several files."""
    directory = tmp_path_factory.mktemp("whole")
    save("llama2", directory / "model", tokenizer_directory, file_size="40KB")
    return directory / "model"


def test_rows_of_a_tensor(tmp_path):
    tensors = {"a": torch.randn(7, 3), "b": torch.arange(5, dtype=torch.bfloat16), "c": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(files.read(name), tensor)
    assert torch.equal(files.read("a", 2, 6), tensors["a"][2:6])


def _cut(directory):
    file = sorted(directory.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-5])


def _cut_header(directory):
    sorted(directory.glob("*.safetensors"))[0].write_bytes(b"\x00\x01")


def _garbage(directory):
    sorted(directory.glob("*.safetensors"))[0].write_bytes((20).to_bytes(8, "little") + b"x" * 40)


def _missing(directory):
    sorted(directory.glob("*.safetensors"))[2].unlink()


def _misnamed(directory):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, second = sorted(set(index["weight_map"].values()))[:2]
    name = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = second
    path.write_text(json.dumps(index))


def _outside(directory):
    path = directory / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001-of", "../model-00001-of"))


def _no_index(directory):
    (directory / "model.safetensors.index.json").unlink()


def _pickle(directory):
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    torch.save({}, directory / "pytorch_model.bin")


def _nothing(directory):
    for file in directory.glob("*.safetensors*"):
        file.unlink()


def _integers(directory):
    file = sorted(directory.glob("*.safetensors"))[0]
    from safetensors.torch import load_file

    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)


def _config(**changes):
    def change(directory):
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return change


FAULTS = {
    "truncated": (_cut, r"model-00002-of.*: [\d,]+ bytes, not a whole safetensors file .*: it is truncated or damaged"),
    "header cut": (_cut_header, r"model-00001-of.*: 2 bytes, not a whole safetensors file \(.*header too small\)"),
    "garbage": (_garbage, r"model-00001-of.*not a whole safetensors file \(.*invalid JSON in header"),
    "file missing": (_missing, r"model-00003-of.*: missing; model.safetensors.index.json names"),
    "index wrong": (_misnamed, r"does not hold .*, which model.safetensors.index.json says"),
    "index points elsewhere": (_outside, r"index.json: not an index.*no safetensors file beside it"),
    "index missing": (_no_index, r"model-00001-of.* is there, but neither .* nor model.safetensors.index.json"),
    "pickle only": (_pickle, r"only pickled weights \(pytorch_model.bin\).*a pickle can run code.*save_pretrained"),
    "no weights": (_nothing, r"no weights there"),
    "quantised": (_integers, r"is stored as I8; only F32, F16, BF16"),
    "wrong width": (_config(intermediate_size=45), r"has the shape \[.*\], config.json asks for \["),
    "layer too many": (_config(num_hidden_layers=5), r"lacks model.layers.4"),
    "layer too few": (_config(num_hidden_layers=3), r"has no place for model.layers.3"),
    "tied, but differing": (_config(tie_word_embeddings=True), r"lm_head.weight differs from model.embed_tokens"),
    "vocabulary": (_config(vocab_size=300), r"has the shape \[301, 72\], config.json asks for \[300, 72\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_one_line_and_nothing_written(whole, tmp_path, capsys, fault):
    import re
    import shutil

    shutil.copytree(whole, tmp_path / "hf")
    break_it, words = FAULTS[fault]
    break_it(tmp_path / "hf")
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(words, error), error
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


def test_an_untied_model_without_its_head_is_named(whole, tmp_path):
    save("llama3", tmp_path / "hf")
    _config(tie_word_embeddings=False)(tmp_path / "hf")
    assert main(["import", str(tmp_path / "hf"), str(tmp_path / "run")]) == 2
    with pytest.raises(UserError, match="no weights there"):
        TensorFiles(tmp_path)
