"""Merged weights are the formula's, of runs as of their exports; what cannot be merged is refused."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from random_models import save
from safetensors.torch import load_file, save_file
from small_run import metrics

from megatron_encdec.cli import main


def words(*parts) -> list[str]:
    return [str(part) for part in parts]


@pytest.fixture(scope="module")
def branches(prepared, tmp_path_factory):
    """Two runs that part after six steps, and their exports: (run, run, model, model)."""
    root = tmp_path_factory.mktemp("branches")
    for number, rate in enumerate(("5.0e-3", "2.0e-2")):
        assert main(words("pretrain", prepared / "config.yaml", f"run.dir={root / f'run{number}'}",
                          f"optimizer.lr={rate}", "precision.dtype=bf16")) == 0
        assert main(words("export", root / f"run{number}", root / f"model{number}")) == 0
    return [root / name for name in ("run0", "run1", "model0", "model1")]


def weights(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def slerp(x, y, t):
    """By the book, in fp64."""
    x, y = x.double(), y.double()
    angle = torch.arccos((x * y).sum() / (x.norm() * y.norm()))
    return (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)


@pytest.mark.parametrize("method", ["mean", "slerp"])
def test_models_are_merged_by_the_formula_and_runs_as_their_exports(branches, tmp_path, method, capsys):
    """Within one rounding to fp32, which is what the exports are in; the runs' masters are."""
    run0, run1, model0, model1 = branches
    how = ("--weights", "3,1", "--method", method)
    assert main(words("merge", model0, model1, tmp_path / "models", *how)) == 0
    x, y, found = weights(model0), weights(model1), weights(tmp_path / "models")
    assert found.keys() == x.keys()
    for name, merged in found.items():
        expected = 0.75 * x[name].double() + 0.25 * y[name].double()
        if method == "slerp":
            expected = slerp(x[name], y[name], 0.25)
        assert not torch.equal(x[name], y[name]) and merged.dtype == torch.float32
        torch.testing.assert_close(merged.double(), expected, rtol=2**-23, atol=1e-9)
    assert main(words("merge", run0, run1, tmp_path / "run", *how)) == 0
    assert main(words("export", tmp_path / "run", tmp_path / "export")) == 0
    of_runs = weights(tmp_path / "export")
    assert of_runs.keys() == found.keys()
    for name, merged in of_runs.items():
        assert torch.equal(merged, found[name]), name
    assert main(words("inspect", "run", tmp_path / "run")) == 2
    said, mistake = capsys.readouterr()
    assert f"{tmp_path}/run: merged from {run0} and {run1}, and nothing is trained in it" in mistake
    assert f"{method} of 0.75 x {run0}, 0.25 x {run1}" in said
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"merged ({method}) of 0.75" in card
    assert json.loads((model0 / "export.json").read_text())["history_hash"] in card


def test_a_merged_model_loads_with_its_tokenizer_and_says_where_it_is_from(branches, tmp_path):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    assert main(words("merge", *branches[2:], tmp_path / "out")) == 0
    model, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForMaskedLM, AutoTokenizer))
    assert model(**tokenizer("turn", return_tensors="pt")).logits.isfinite().all()
    hashes = [json.loads((path / "export.json").read_text())["history_hash"] for path in branches[2:]]
    assert [one["history_hash"] for one in json.loads((tmp_path / "out/merge.json").read_text())["models"]] == hashes
    assert all(digest in (tmp_path / "out/README.md").read_text() for digest in hashes)
    assert not (tmp_path / "out/export.json").exists()


def test_modernberts_are_merged_as_runs_and_as_directories(prepared, tmp_path, capsys):
    """SLERP counts the encoder's queries, keys and values as one tensor, runs as their export; the other class is cut
    otherwise: as a run it can be merged with it."""
    for number in (0, 1):
        model = save("modernbert", tmp_path / f"model{number}", prepared / "tokenizer")
        if number:
            model.load_state_dict({name: tensor * (1 + 0.5 * torch.rand_like(tensor))
                                   for name, tensor in model.state_dict().items()})
            model.save_pretrained(tmp_path / "model1")
        assert main(words("import", tmp_path / f"model{number}", tmp_path / f"run{number}")) == 0
    for kind in ("model", "run"):
        assert main(words("merge", tmp_path / f"{kind}0", tmp_path / f"{kind}1", tmp_path / f"{kind}s", "--method",
                          "slerp", "--weights", "3,1")) == 0
    assert main(words("export", tmp_path / "runs", tmp_path / "export")) == 0
    one, other, found, of_runs = (weights(tmp_path / name) for name in ("model0", "model1", "models", "export"))
    assert found.keys() == one.keys() == of_runs.keys()
    for name, merged in found.items():
        torch.testing.assert_close(merged.double(), slerp(one[name], other[name], 0.25), rtol=2**-22, atol=1e-9)
        torch.testing.assert_close(of_runs[name], merged, rtol=2**-22, atol=1e-9)

    assert main(words("export", tmp_path / "run0", tmp_path / "decoder", "--as", "modernbert-decoder")) == 0
    capsys.readouterr()
    assert main(words("merge", tmp_path / "model0", tmp_path / "decoder", tmp_path / "no")) == 2
    assert "whose tensors are cut otherwise; import both, and merge the two runs" in capsys.readouterr().err
    assert main(words("import", tmp_path / "decoder", tmp_path / "run-decoder")) == 0
    assert main(words("merge", tmp_path / "run0", tmp_path / "run-decoder", tmp_path / "both")) == 0


def test_training_goes_on_from_merged_runs(branches, prepared, tmp_path):
    run = tmp_path / "merged"
    assert main(words("merge", f"{branches[0]}@6", branches[0], branches[1], run)) == 0
    assert main(words("pretrain", prepared / "config.yaml", f"run.dir={tmp_path / 'on'}", f"run.from.path={run}",
                      "run.from.state=weights", "precision.dtype=fp32", "optimizer.lr=1e-4")) == 0
    first = metrics(tmp_path / "on")[0]
    assert first["step"] == 1 and first["loss"] < metrics(branches[0])[0]["loss"] - 0.3  # not a random trunk's
    recorded = json.loads(next((tmp_path / "on/checkpoints").glob("step_*/run_state.json")).read_text())
    assert recorded["history"]["weights"]["step"] == 0
    assert main(words("export", tmp_path / "on", tmp_path / "model")) == 0
    assert "Those were merged (mean) of 0.333333" in (tmp_path / "model/README.md").read_text()


def test_of_one_model_twice_it_is_that_model(branches, tmp_path):
    for method in ("mean", "slerp"):
        assert main(words("merge", branches[2], branches[2], tmp_path / method, "--method", method)) == 0
        found = weights(tmp_path / method)
        for name, tensor in weights(branches[2]).items():
            torch.testing.assert_close(found[name], tensor, rtol=2**-23, atol=0)


def test_dtypes_and_files_of_the_first_are_kept(branches, tmp_path):
    """bf16 stays bf16, rounded once; where they differ it is fp32."""
    run0, run1 = branches[:2]
    for number, run in enumerate((run0, run1)):
        assert main(words("export", run, tmp_path / f"bf16_{number}", "--dtype", "bf16", "--shard-size", "20KB")) == 0
    assert main(words("merge", tmp_path / "bf16_0", tmp_path / "bf16_1", tmp_path / "out")) == 0
    x, y, found = (weights(tmp_path / name) for name in ("bf16_0", "bf16_1", "out"))
    for name, merged in found.items():
        assert torch.equal(merged, ((x[name].double() + y[name].double()) / 2).bfloat16()), name
    names = sorted(path.name for path in (tmp_path / "bf16_0").glob("*.safetensors"))
    assert len(names) > 1 and names == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert index == json.loads((tmp_path / "bf16_0/model.safetensors.index.json").read_text())["weight_map"]
    assert main(words("merge", tmp_path / "bf16_0", branches[3], tmp_path / "mixed")) == 0
    assert {tensor.dtype for tensor in weights(tmp_path / "mixed").values()} == {torch.float32}


@pytest.fixture
def other(branches, tmp_path):
    """A function: a copy of the second model whose files a function has changed."""
    def make(change):
        copy = tmp_path / "other"
        shutil.copytree(branches[3], copy)
        change(copy)
        return copy
    return make


def changed(name, **values):
    def change(directory):
        content = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**content, **values}))
    return change


def damaged(how):
    def change(directory):
        tensors = load_file(directory / "model.safetensors")
        how(tensors)
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return change


@pytest.mark.parametrize(("change", "why"), [
    (changed("config.json", rms_norm_eps=1e-3), "config.norm_eps is 0.001"),
    (damaged(lambda all_: all_.update({"model.norm.weight": torch.ones(3)})), r"model.norm.weight has the shape \[3\]"),
    (damaged(lambda all_: all_.pop("model.norm.weight")), "other: lacks model.norm.weight"),
    (damaged(lambda all_: all_["model.norm.weight"].fill_(torch.nan)), "holds 32 NaN"),
    (lambda directory: (directory / "config.json").unlink(), "no Hugging Face directory.*export the run first"),
])
def test_what_cannot_be_merged_is_refused_and_nothing_is_left(branches, other, tmp_path, capsys, change, why):
    second = other(change)
    assert main(words("merge", branches[2], second, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert re.search(why, said), said
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("scale", [1e-320, 1e308])
def test_only_the_ratio_of_the_weights_counts(branches, tmp_path, scale):
    for name, given in (("one", "1,1"), ("other", f"{scale},{scale}")):
        assert main(words("merge", *branches[2:], tmp_path / name, "--weights", given)) == 0
    one, other = weights(tmp_path / "one"), weights(tmp_path / "other")
    assert all(torch.equal(one[name], other[name]) and one[name].any() for name in one)


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_a_result_inside_one_of_the_models_is_refused(branches, capsys, number):
    models = branches[2:] if number > 1 else branches[:2]
    assert main(words("merge", *models, branches[number] / "merged")) == 2
    assert "is inside" in capsys.readouterr().err and not (branches[number] / "merged").exists()


def test_models_that_are_not_there_are_what_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words("merge", "none", "either", "out")) == 2
    said = capsys.readouterr().err
    assert said.startswith("megatron-encdec: none: no checkpoint there"), said


@pytest.mark.parametrize(("options", "why"), [
    (("--weights", "1"), "1 for 2 models"), (("--weights", "0,0"), "not all of them 0"),
    (("--weights", "1,x"), "numbers with commas"), (("--weights", "1,nan"), "numbers of at least 0"),
    (("--weights", "1,inf"), "numbers of at least 0")])
def test_weights_that_are_none_are_refused(branches, tmp_path, capsys, options, why):
    assert main(words("merge", *branches[2:], tmp_path / "out", *options)) == 2
    assert why in capsys.readouterr().err


def test_slerp_is_of_two_and_a_result_is_not_overwritten(branches, tmp_path, capsys):
    assert main(words("merge", *branches[2:], branches[2], tmp_path / "out", "--method", "slerp")) == 2
    assert "between two models, 3 are named" in capsys.readouterr().err
    assert main(words("merge", branches[2], branches[3])) == 2  # the second is taken for OUT
    assert "one model; name two or more" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").write_text("mine")
    assert main(words("merge", *branches[2:], tmp_path / "out")) == 2
    assert "is there already" in capsys.readouterr().err and (tmp_path / "out/file").read_text() == "mine"


PEAK = """
import resource, sys
from megatron_encdec.interop import merge_directories  # what is imported is no part of it
from megatron_encdec.interop.merging import Recipe
from pathlib import Path
import torch, transformers
first, second, out, small = map(Path, sys.argv[1:])
merge = merge_directories.merge_directories
merge([small, small], Path(f"{out}.small"), Recipe.of("slerp", None, 2))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge([first, second], out, Recipe.of("slerp", None, 2))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_memory_is_below_that_of_the_largest_tensor(branches, tmp_path):
    """Rows are read and written in pieces: 1.3 tensors were allowed."""
    big = tmp_path / "big"
    big.mkdir()
    (big / "config.json").write_text(json.dumps({"model_type": "some"}))
    save_file({"table": torch.ones(2**16, 1024)}, big / "model.safetensors", {"format": "pt"})
    done = subprocess.run([sys.executable, "-c", PEAK, *words(big, big, tmp_path / "out", branches[2])],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < 1.0 * 2**28, done.stdout
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["table"], torch.ones(2**16, 1024))
