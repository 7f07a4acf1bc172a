"""What a foreign directory says beside its weights: refused by name, noted, or taken as transformers takes it.

One table of faults, one of notes, one of directories in which two files claim the same.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from random_models import save
from safetensors.torch import load_file, save_file

from megatron_encdec.cli import main
from megatron_encdec.interop.export import export

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456789\n"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@pytest.fixture(scope="module")
def models(tokenizer_directory, tmp_path_factory):
    """The same shapes three times: one file, several files of other weights, and tied embeddings."""
    directory = tmp_path_factory.mktemp("models")
    save("llama2", directory / "single", tokenizer_directory)
    save("llama-linear", directory / "several", tokenizer_directory, file_size="40KB")
    save("smollm2", directory / "tied", tokenizer_directory)
    return directory


def edit(name, **changes):
    def change(directory, _models):
        path = directory / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))
    return change


def write(name, content):
    return lambda directory, _models: (directory / name).write_text(content)


def cut(name):
    def change(directory, _models):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: len(content) // 2])
    return change


def dangle(name):
    def change(directory, _models):
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to("../blobs/123")
    return change


def rename(name, other):
    def change(directory, _models):
        (directory / other).parent.mkdir(exist_ok=True)
        (directory / name).rename(directory / other)
    return change


def tensors(change, file=SINGLE):
    def apply(directory, _models):
        found = load_file(directory / file)
        change(found)
        save_file(found, directory / file, metadata={"format": "pt"})
    return apply


def both(*changes):
    def change(directory, models):
        for one in changes:
            one(directory, models)
    return change


def poison(name, value, count, dtype=torch.float32):
    def change(found):
        found.setdefault(name, found["model.embed_tokens.weight"].clone())
        for key in found:
            found[key] = found[key].to(dtype)
        found[name].view(-1)[:count] = value
    return change


def _twice(directory, _models):
    first, second = sorted(directory.glob("model-*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second, metadata={"format": "pt"})


def _stale_files(directory, models):
    for file in models.joinpath("several").glob("model*"):
        shutil.copyfile(file, directory / file.name)


LINEAR = {"rope_type": "linear", "factor": 3.0}
# name -> (model, what is done to it, what the one line says)
FAULTS = {
    "adapter": ("single", both(write("adapter_config.json", "{}"), write("adapter_model.safetensors", "")),
                r"holds an adapter \(adapter_config.json, adapter_model.safetensors\).*--ignore adapter"),
    "adapter, pickled": ("single", write("adapter_model.bin", ""), r"holds an adapter \(adapter_model.bin\)"),
    "NaN": ("single", tensors(poison("model.norm.weight", float("nan"), 3)),
            rf"{SINGLE}: model.norm.weight holds 3 NaN and 0 infinite values among 72: .*from before it diverged"),
    "infinity": ("single", tensors(poison("model.layers.2.mlp.up_proj.weight", 7e4, 2, torch.float16)),
                 r"up_proj.weight holds 0 NaN and 2 infinite values among 3,168.*float16 ends at 65504"),
    "NaN in a tied head": ("tied", tensors(poison("lm_head.weight", float("nan"), 1)), r"lm_head.weight holds 1 NaN"),
    "NaN in a row of the vocabulary": ("single", tensors(poison("lm_head.weight", float("-inf"), 72)),
                                       r"lm_head.weight holds 0 NaN and 72 infinite"),
    "head unlike its embedding": ("tied", tensors(poison("lm_head.weight", 0.5, 9)),
                                  r"lm_head.weight differs from model.embed_tokens.weight.*with false there both"),
    "tensor without a place": ("single", tensors(lambda found: found.update(score=torch.zeros(2))),
                               r"has no place for score"),
    "in two files": ("several", _twice, r"model-00002-of-.* holds .*, and so does model-00001-of-"),
    "pointer, weights": ("single", write(SINGLE, POINTER), rf"{SINGLE}: a Git LFS pointer.*git lfs pull"),
    "pointer, index": ("several", write(INDEX, POINTER), rf"{INDEX}: a Git LFS pointer"),
    "pointer, config": ("single", write("config.json", POINTER), r"config.json: a Git LFS pointer"),
    "pointer, tokenizer": ("single", write("tokenizer.json", POINTER), r"tokenizer.json: a Git LFS pointer"),
    "pointer, vocabulary": ("single", write("vocab.json", POINTER), r"vocab.json: a Git LFS pointer"),
    "cut, config": ("single", cut("config.json"), r"config.json: not valid JSON.*cut short"),
    "cut, generation": ("single", cut("generation_config.json"), r"generation_config.json: not valid JSON"),
    "cut, tokenizer's config": ("single", cut("tokenizer_config.json"), r"tokenizer_config.json: not valid JSON"),
    "cut, tokenizer": ("single", cut("tokenizer.json"), r"tokenizer.json: not a tokenizer.json"),
    "no object": ("single", write("added_tokens.json", "[]"), r"added_tokens.json: expected an object"),
    "empty weights": ("single", write(SINGLE, ""), rf"{SINGLE}: 0 bytes, not a whole safetensors file"),
    "index without tensors": ("several", edit(INDEX, weight_map={}), rf"{INDEX}: not an index.*lists no tensors"),
    "link, weights": ("single", dangle(SINGLE), rf"{SINGLE}: a link to ../blobs/123, which is not there"),
    "link, config": ("single", dangle("config.json"), r"config.json: a link to ../blobs/123"),
    "link, tokenizer": ("single", dangle("tokenizer.json"), r"tokenizer.json: a link to ../blobs/123"),
    "variant": ("single", rename(SINGLE, "model.fp16.safetensors"),
                rf"model.fp16.safetensors is there, but transformers reads {SINGLE}.*rename it"),
    "weights below": ("single", rename(SINGLE, f"last/{SINGLE}"), r"no weights there.*there are some in .*last"),
    "config below": ("single", rename("config.json", "last/config.json"), r"no config.json\); there is one in .*last"),
    "other config": ("single", edit("config.json", configuration_files=["config.5.0.json"]),
                     r"transformers reads config.5.0.json in its place.*--ignore configuration_files"),
    "other tokenizer": ("single", edit("tokenizer_config.json", fast_tokenizer_files=["tokenizer.4.0.json"]),
                        r"transformers reads tokenizer.4.0.json in place of tokenizer.json.*--ignore fast_token"),
    "named weights gone": ("single", edit("config.json", transformers_weights="new.safetensors"),
                           r"new.safetensors: missing; config.json names it"),
    "named weights outside": ("single", edit("config.json", transformers_weights="../x.safetensors"),
                              r"transformers_weights='../x.safetensors': not a safetensors file"),
    "quantised": ("single", edit("config.json", quantization_config={"quant_method": "awq"}), r"quantised weights"),
    "padding beyond the rows": ("single", edit("config.json", pad_token_id=301), r"pad_token_id=301 is not among"),
    "mask on a token's row": ("single", both(
        lambda directory, _models: (directory / "tokenizer.json").write_text(
            (directory / "tokenizer.json").read_text().replace("<|mask|>", "<|x|>").replace("<|reserved", "<|thing")),
        write("tokenizer_config.json", "{}"), write("added_tokens.json", '{"<new>": 300}')),
        r"an added mask would have id 300, which belongs to '<new>'.*--mask-token"),
}
# name -> (model, what is done to it, options, what a note says)
NOTES = {
    "adapter left out": ("single", write("adapter_config.json", "{}"), ["--ignore", "adapter"],
                         r"the base alone is taken; left out: adapter_config.json"),
    "two claims": ("single", _stale_files, [], rf"{SINGLE} is read, as transformers does; {INDEX} beside it is not"),
    "theta twice": ("single", edit("config.json", rope_theta=5.0), [],
                    r"twice; as in transformers, rope_theta=10000.0.* is taken, not rope_theta=5.0"),
    "scaling twice": ("single", edit("config.json", rope_scaling=LINEAR), [],
                      r"rope_type=linear.* is taken, not rope_parameters.rope_type=default"),
    "narrower dtype": ("single", edit("config.json", dtype="bfloat16"), [], r"in float32; transformers would round"),
    "other ids": ("single", edit("config.json", pad_token_id=7), [],
                  r"pad_token_id 7, the tokenizer's pad token is '<\|pad\|>' \(id 2\)"),
    "tokens beside": ("single", write("added_tokens.json", '{"<new>": 300}'), [],
                      r"tokenizer.json lacks 1 tokens that transformers adds from other files \(<new>\)"),
    "another class": ("single", edit("tokenizer_config.json", tokenizer_class="LlamaTokenizer"), [],
                      r"transformers' LlamaTokenizer encodes .*, tokenizer.json as .*: training and exports go by tok"),
    "code": ("single", edit("config.json", auto_map={"AutoModel": "x.Y"}, _name_or_path="a"), [], r"none of it is run"),
}
# name -> (model, what is done to it): what counts is what transformers loads
CLAIMS = {
    "single and index": ("single", _stale_files),
    "single and a broken index": ("single", write(INDEX, "{")),
    "an index left behind": ("single", lambda directory, models: shutil.copyfile(models / "several" / INDEX,
                                                                                 directory / INDEX)),
    "named by the config": ("single", both(_stale_files, edit("config.json", transformers_weights=INDEX))),
    "variant beside": ("single", lambda directory, models: save_file(
        {name: tensor.half() for name, tensor in load_file(models / "tied" / SINGLE).items()},
        directory / "model.fp16.safetensors")),
    "a file of another set beside": ("several", lambda directory, models: shutil.copyfile(
        models / "single" / SINGLE, directory / "model-00001-of-00099.safetensors")),
    "written by TensorFlow": ("single", lambda directory, _models: save_file(
        load_file(directory / SINGLE), directory / SINGLE, metadata={"format": "tf"})),
}


def copied(models: Path, name: str, change, tmp_path: Path) -> Path:
    shutil.copytree(models / name, tmp_path / "hf")
    change(tmp_path / "hf", models)
    return tmp_path / "hf"


@pytest.mark.parametrize("fault", FAULTS)
def test_refused_in_one_line(models, tmp_path, capsys, fault):
    name, change, words = FAULTS[fault]
    source = copied(models, name, change, tmp_path)
    capsys.readouterr()
    assert main(["import", str(source), str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(words, error), error
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("fault", NOTES)
def test_taken_with_a_note(models, tmp_path, capsys, fault):
    name, change, options, words = NOTES[fault]
    source = copied(models, name, change, tmp_path)
    capsys.readouterr()
    assert main(["import", str(source), str(tmp_path / "run"), *options]) == 0
    out, err = capsys.readouterr()
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert sum(bool(re.search(words, line)) for line in notes) == 1, out
    assert not err


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_transformers_loads_is_what_is_imported(models, tmp_path, capsys, claim):
    name, change = CLAIMS[claim]
    source = copied(models, name, change, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert main(["import", str(source), str(tmp_path / "run")]) == 0
    export(str(tmp_path / "run"), tmp_path / "out", say=lambda _line: None)
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())


@pytest.mark.parametrize("listed", [True, False])
def test_two_files_that_name_the_mask_are_read_as_transformers_reads_them(models, tmp_path, listed):
    change = both(edit("special_tokens_map.json", mask_token="<|reserved_1|>"),
                  edit("tokenizer_config.json", **({"added_tokens_decoder": {}} if listed else {})))
    source = copied(models, "single", change, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(source).mask_token_id
    assert main(["import", str(source), str(tmp_path / "run")]) == 0
    assert main(["import", str(source), str(tmp_path / "chosen"), "--mask-token", "<|reserved_2|>"]) == 0
    for run, mask in (("run", theirs), ("chosen", 5)):
        assert json.loads((tmp_path / run / "checkpoints" / "step_00000000" / "run_state.json").read_text())[
            "imported"]["mask"]["id"] == mask
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / run / "tokenizer").mask_token_id == mask
