"""The verbs as Python functions: what they return, what they raise, and that they are the verbs."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from small_run import BASE, final_bits, metrics, run_cli, workspace

import megatron_encdec
from megatron_encdec import IntegrityError, UserError, dry_run, export, load_run, preprocess, pretrain
from megatron_encdec.cli import main
from megatron_encdec.platform import schema
from megatron_encdec.training.config import load_config

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return workspace(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def trained(root):
    """A run by the function, from a dict; and by the verb, from the file."""
    config = schema.parse_yaml(BASE.format(root=root), "base")
    run = pretrain(config, {"run.dir": str(root / "function"), "phases.1.steps": 4})
    run_cli("pretrain", root / "config.yaml", f"run.dir={root / 'verb'}", "phases.1.steps=4")
    assert config == schema.parse_yaml(BASE.format(root=root), "base")  # what was given is as it was
    return run


def test_importing_the_package_imports_nothing_else():
    said = subprocess.run([sys.executable, "-c", "import sys; before = set(sys.modules); import megatron_encdec; "
                           "print(*sorted(set(sys.modules) - before)); print(dir(megatron_encdec))"],
                          capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == "megatron_encdec"
    assert all(name in said[1] for name in megatron_encdec.__all__)
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        megatron_encdec.pretrian  # noqa: B018


def test_preprocess_returns_what_the_verb_prints(root, tmp_path, capsys):
    inputs, tokenizer = str(root / "corpus.jsonl"), str(root / "tokenizer")
    made = preprocess(inputs, tokenizer, tmp_path / "text", validation_percent=10, workers=1, progress=False)
    capsys.readouterr()
    assert main(["preprocess", "--input", inputs, "--tokenizer", tokenizer, "--output", str(tmp_path / "text"),
                 "--validation-percent", "10"]) == 0
    assert capsys.readouterr().out == f"{made}\n"
    assert made.train.documents + made.validation.documents == 400
    assert made.train.fingerprint == json.loads((root / "text.manifest.json").read_text())["fingerprint"]
    with pytest.raises(UserError, match="preprocess: validation_precent is no option of it"):
        preprocess(inputs, tokenizer, tmp_path / "text", validation_precent=10)
    with pytest.raises(UserError, match="no such file"):
        preprocess("nowhere", tokenizer, tmp_path / "text")


def test_pretrain_is_the_verb(root, trained, tmp_path):
    assert metrics(root / "function") == metrics(root / "verb")
    assert final_bits(root / "function", 10) == final_bits(root / "verb", 10)
    assert (trained.step, trained.planned_steps, trained.finished) == (10, 10, True)
    assert trained.checkpoints == [6, 10] and [phase["name"] for phase in trained.phases] == ["causal", "masked"]
    again = pretrain(trained.config)  # as the resolved Config: nothing is left to do
    assert again.step == 10 and len(again.metrics()) == 10
    part = pretrain(root / "config.yaml", [f"run.dir={tmp_path / 'part'}"], until=2)
    assert (part.step, part.finished) == (2, False)
    branch = pretrain(str(root / "config.yaml"), {"run.dir": str(tmp_path / "branch"), "phases.1.objective": "mlm:0.2"},
                      fork=f"{root / 'function'}@6")
    assert branch.parent["step"] == 6 and branch.finished and branch.metrics()[0]["step"] == 7


def test_load_run_prints_what_inspect_prints(trained, capsys):
    assert main(["inspect", "run", str(trained.directory)]) == 0
    assert capsys.readouterr().out == f"{load_run(trained.directory)}\n"
    assert repr(trained).endswith("function: step 10 of 10>")


def test_export_returns_what_was_written(trained, tmp_path):
    made = export(trained.directory, tmp_path / "encoder")
    assert (made.model_class, made.attention, made.step) == ("EuroBertForMaskedLM", "bidirectional", 10)
    assert made.difference < 1e-3 and (made.path / "model.safetensors").is_file()
    assert export(trained.directory, tmp_path / "encoder").difference is None
    causal = export(f"{trained.directory}@6", tmp_path / "decoder", dtype="bf16")
    assert (causal.model_class, causal.dtype) == ("LlamaForCausalLM", "bf16")
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        export(f"{trained.directory}@7", tmp_path / "none")


def test_dry_run_is_the_verbs(root, capsys):
    assert main(["pretrain", str(root / "config.yaml"), "run.dir=elsewhere", "--dry-run"]) == 0
    assert capsys.readouterr().out == dry_run(root / "config.yaml", {"run.dir": "elsewhere"}) + "\n"


@pytest.mark.parametrize("call", [dry_run, pretrain])
def test_no_rank_at_all_is_refused(root, tmp_path, call):
    with pytest.raises(UserError, match="^--nproc 0: at least one rank$"):
        call(root / "config.yaml", {"run.dir": str(tmp_path / "run")}, nproc=0)


def test_mistakes_are_raised_and_not_printed(root, trained, tmp_path, capsys):
    config = root / "config.yaml"
    for call, error, words in [
            (lambda: pretrain(config, {"optimizer.lrr": 1}), UserError, "optimizer.lrr: unknown key"),
            (lambda: pretrain(config, {"phases.7.steps": 1}), UserError, "phases.7 is not an item"),
            (lambda: pretrain(config, ["run.dir=x", "tokenizer.path=/nowhere"]), UserError, "/nowhere"),
            (lambda: pretrain({"run": {"dir": "x"}}), UserError, "tokenizer.path, data.train, model, phases: missing"),
            (lambda: pretrain(trained.config, {"data.seed": 5}), UserError, "data.seed: 1234 -> 5"),
            (lambda: load_run(tmp_path), UserError, "not a run directory")]:
        with pytest.raises(error) as raised:
            call()
        assert words in str(raised.value)
    shutil.copytree(trained.directory, tmp_path / "damaged")
    (tmp_path / "damaged/checkpoints/step_00000010/.metadata").write_bytes(b"")
    with pytest.raises((IntegrityError, UserError), match="truncated|metadata"):
        pretrain(trained.config, {"run.dir": str(tmp_path / "damaged"), "phases.1.steps": 6,
                                  "run.total.steps": None, "schedule.decay_steps": 0})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("options, words", [
    ({"on_error": "raise"}, "--on-error: 'raise' is not one of count, stop"),
    ({"encoder": "hf"}, "--encoder: 'hf' is not one of gigatoken, tokenizers"),
    ({"share": "5/4"}, "--shard 5/4: the parts are numbered from 1 to 4"),
    ({"share": "1:4"}, "--shard: '1:4' is not of the form I/N"),
    ({"share": 4}, "--shard: expected a string, found an integer 4"),
    ({"share": (1, 2, 3)}, "--shard: '1/2/3' is not of the form I/N"),
    ({"workers": 1.5}, "--workers: expected an integer, found a number 1.5"),
    ({"workers": True}, "--workers: expected an integer, found a boolean True"),
    ({"validation_percent": "much"}, "--validation-percent: expected a number, found a string 'much'"),
    ({"where": "lang"}, "--where 'lang': expected FIELD=VALUE"),
    ({"where": [5]}, "--where: expected a string, found an integer 5"),
    ({"tokenizer": None}, "preprocess: --tokenizer is missing; see"),
    ({"input": 5}, "--input: expected a string, found an integer 5")])
def test_preprocess_refuses_what_the_command_line_refuses(root, tmp_path, options, words):
    given = {"input": root / "corpus.jsonl", "tokenizer": root / "tokenizer", "output": tmp_path / "text"}
    with pytest.raises(UserError, match=re.escape(words)):
        preprocess(**given | options, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_preprocess_takes_values_in_several_forms(root, tmp_path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"a cat {number}", "lang": "en" if number % 2
                                                           else "de"}) + "\n" for number in range(8)))
    made = [preprocess(tmp_path / "in.jsonl", root / "tokenizer", tmp_path / f"{number}", where=where, workers=workers,
                       share=share, progress=False).train for number, (where, workers, share) in enumerate(
                           [("lang=en", 1, "1/1"), (["lang=en"], np.int64(1), (1, 1)), (("lang=en",), "1", [1, 1])])]
    assert [one.documents for one in made] == [4, 4, 4] and len({one.fingerprint for one in made}) == 1


@pytest.mark.parametrize("call, words", [
    (lambda config: dry_run(None), "config: expected the path of a YAML file, a mapping, or a Config, found nothing"),
    (lambda config: dry_run([1]), "found a list [1]"),
    (lambda config: dry_run(config, 5), "override 5: expected dotted.key=value"),
    (lambda config: dry_run(config, [None]), "override None: expected dotted.key=value"),
    (lambda config: dry_run(config, {5: 1}), "override: expected a dotted key, found an integer 5"),
    (lambda config: dry_run(config, nproc=0), "--nproc 0: at least one rank"),
    (lambda config: dry_run(config, nproc="two"), "--nproc: expected an integer, found a string 'two'"),
    (lambda config: pretrain(config, nproc=0), "--nproc 0: at least one rank"),
    (lambda config: pretrain(config, until="five"), "--until: expected an integer, found a string 'five'"),
    (lambda config: pretrain(config, until="0"), "--until 0: a step number of 1 or more"),
    (lambda config: pretrain(config, time_limit=3600), "--time-limit: expected a string, found an integer 3600"),
    (lambda config: pretrain(config, profile=10), "--profile: expected a string, found an integer 10"),
    (lambda config: pretrain(config, fallback="no"), "--fallback: expected true or false, found a string 'no'"),
    (lambda config: pretrain(config, device="gpu"), "--device: 'gpu' is not one of auto, cpu, cuda"),
    (lambda config: export("somewhere", "out", dtype="fp8"), "--dtype: 'fp8' is not one of auto, fp32, bf16, fp16"),
    (lambda config: export("somewhere", None), "out: expected a string, found nothing")])
def test_values_of_another_type_are_mistakes_too(root, tmp_path, capfd, call, words):
    config = schema.parse_yaml(BASE.format(root=root), "base") | {"run": {"dir": str(tmp_path / "run")}}
    with pytest.raises(UserError, match=re.escape(words)):
        call(config)
    assert capfd.readouterr().err == ""


def test_a_config_may_hold_paths_and_numbers_of_numpy(root):
    config = schema.parse_yaml(BASE.format(root=root), "base") | {"run": {"dir": root / "elsewhere"}}
    plain = dry_run(config, {"run.dir": "elsewhere", "optimizer.lr": 0.5, "checkpoint.every": 3,
                             "optimizer.betas": [0.5, 0.75]}, nproc=1)
    assert plain == dry_run(config, {"run.dir": Path("elsewhere"), "optimizer.lr": np.float64(0.5), "checkpoint.every":
                                     np.int32(3), "optimizer.betas": (np.float32(0.5), 0.75)}, nproc=np.int64(1))
    assert f"dir: {root / 'elsewhere'}" in dry_run(config, None)


def test_another_thread_than_the_main_one_can_train(root, tmp_path):
    found = []
    config = load_config(root / "config.yaml", [f"run.dir={tmp_path / 'run'}"])
    thread = threading.Thread(target=lambda: found.append(pretrain(config, until=1)))
    thread.start()
    thread.join()
    assert found[0].step == 1


@pytest.mark.slow
def test_several_processes_are_started_by_the_verb(root, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    run = pretrain(root / "config.yaml", {"run.dir": str(tmp_path / "two")}, nproc=2, until=2)
    assert run.step == 2 and run.metrics("train")[0]["tokens_per_second_per_device"] > 0
    with pytest.raises(UserError, match="parallel.tensor=3 .* does not divide the 2 ranks"):
        pretrain(root / "config.yaml", {"run.dir": str(tmp_path / "other"), "parallel.tensor": 3}, nproc=2)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """Every cell of it, in an empty folder with the documentation beside it."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("*.svg", "*.png"))
    done = subprocess.run([sys.executable, ROOT / "examples/notebook.py"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("docs.validation: ", "forked from step 20", "schedule.warmup: unknown key; did you mean",
                  "EuroBertForMaskedLM, bidirectional attention", "torch.Size([3, 256])", "of steps [20, 40]"):
        assert words in done.stdout, done.stdout
