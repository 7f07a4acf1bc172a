"""What is said before the first step: text that is repeated often, data that nothing vouches for."""

import re
import shutil
from pathlib import Path

import pytest
from small_run import config_of, run_cli

from megatron_encdec.cli import main
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer_models import HuggingFaceModel
from megatron_encdec.training.dry_run import _phases
from megatron_encdec.training.layout import lay_out
from megatron_encdec.training.plan import check_topology


def test_repeated_sources_and_missing_manifests_are_said_at_start(root, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{root / 'text.validation'}{suffix}", tmp_path / f"small{suffix}")
    sources = f"data.train=[{{path: {root / 'text'}}}, {{path: {tmp_path / 'small'}}}]"
    words = ["pretrain", root / "config.yaml", f"run.dir={tmp_path / 'run'}", sources, "phases.0.steps=80"]
    planned = run_cli(*words, "--dry-run").stdout
    assert f"data.train.1: {tmp_path / 'small'} is repeated: " in planned
    assert f"{tmp_path / 'small'}: no manifest" in planned and "small.fingerprint.json" in planned
    started = run_cli(*words, "--until", "1").stdout
    assert f"note: data.train.1: {tmp_path / 'small'} is repeated: " in started and "data.train.0" not in started


def test_a_run_far_too_long_for_its_text_is_told_loudly(root, tmp_path):
    """Before the first step, and at the end of a dry run: more than ten epochs, a step larger than all there is."""
    small = [f"data.train=[{{path: {root / 'text.validation'}}}]", "batch.global_size=256"]
    words = ["pretrain", root / "config.yaml", f"run.dir={tmp_path / 'run'}", *small]
    *_, epochs, step = run_cli(*words, "--dry-run").stdout.splitlines()
    assert re.match(r"WARNING {6}data.train.0: .* is repeated: \d+\.\d epochs of its \d+ windows; beyond 10 ", epochs)
    assert re.match(r"WARNING {6}batch.global_size: one step of 256 windows .* reads all \d+ windows of data.train "
                    r"\d\.\d times; give a smaller batch.global_size", step)
    first, second, *_ = run_cli(*words, "--until", "1").stdout.splitlines()
    assert first.startswith("WARNING: data.train.0: ") and second.startswith("WARNING: batch.global_size: ")


def test_whole_words_of_a_tokenizer_that_marks_none_are_refused_before_training(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(HuggingFaceModel, "word_starts", lambda model: set())
    assert main(["pretrain", str(root / "config.yaml"), f"run.dir={tmp_path / 'run'}",
                 "phases.1.objective.unit=word"]) == 2
    said = capsys.readouterr().err
    assert "phases.1.objective.unit: word, but this tokenizer has no word starts" in said and said.count("\n") == 1


def test_a_dry_run_needs_neither_data_nor_tokenizer_nor_gpu(capsys):
    """What a newcomer tries first: a config made for a cluster, on a laptop."""
    config = str(Path(__file__).parents[2] / "examples" / "biphasic_610m.yaml")
    elsewhere = ("data.train.0.path=nowhere/text", "data.validation.0.path=nowhere/more", "tokenizer.path=nowhere/tok")
    assert main(["pretrain", config, *elsewhere, "precision.fp8=current", "--nproc", "64", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"10001..42000 +75,497,472,000", said)
    assert "parameters   755,625,600 (607,874,688 without the head)" in said and "128,256 is assumed" in said
    assert "step         1,152 windows, 2,359,296 tokens\n" in said
    assert "memory       4.35 GiB a rank" in said  # 6 bytes a parameter, 12 more split over the ranks
    for missing in ("tokenizer.path: nowhere/tok", "data.train.0.path: nowhere/text",
                    "data.validation.0.path: nowhere/more"):
        assert f"note         missing: {missing}\n" in said
    assert "not on this machine: precision.fp8: current is not possible here" in said
    assert main(["pretrain", config, *elsewhere, "--nproc", "7", "--dry-run"]) == 2
    assert "cannot be split over 7 data-parallel ranks" in capsys.readouterr().err


def test_a_source_that_no_phase_reads_is_not_missed(root, tmp_path, capsys):
    """What is missing is told by the key that names it, where a later phase only changes the length of the windows."""
    mine = [f"phases.0.data.train=[{{path: {root / 'text'}}}]", "phases.1.data={sequence_length: 32}"]
    words = ["pretrain", str(root / "config.yaml"), f"run.dir={tmp_path / 'run'}", "--dry-run",
             "data.train=[{path: nowhere/unused}]"]
    assert main([*words, *mine]) == 0
    assert "missing" not in (said := capsys.readouterr().out) and "vocabulary_size: 301" in said
    assert main([*words, mine[0].replace(str(root / "text"), "nowhere/used"), mine[1]]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if "missing" in line] == [
        "note         missing: phases.0.data.train.0.path: nowhere/used"]
    assert "vocabulary_size: 301" in said and "is assumed" not in said  # the tokenizer is there


def test_a_ramp_is_no_change_of_the_batch():
    """One that fills its phase says that it ends too early; what is shown as changed is what the config changes."""
    lines = _phases(config := config_of(
        "phases=[{name: a, objective: clm, steps: 11, batch: {ramp: {from: 2, tokens: 2300}}},"
        " {name: b, objective: clm, steps: 2}, {name: c, objective: clm, steps: 2, batch: {ramp: {from: 4, tokens: "
        "512}}}, {name: d, objective: clm, steps: 2, batch: {global_size: 16, micro_size: 4}}]",
        "schedule={name: constant}"), lay_out(config))
    assert [line.strip() if line.startswith("  ") else line.split()[0] for line in lines] == [
        "phase",
        "a", "batch.ramp: 2 -> 6 windows in 3 sizes, the last from step 10 on; the phase ends before 8 are reached",
        "b",
        "c", "batch.ramp: 4 windows; the phase ends before 8 are reached",
        "d", "batch.global_size: 8 -> 16", "batch.micro_size: 2 -> 4"]
    with pytest.raises(UserError, match="phases.0.batch.ramp: 2 windows cannot be split over 2"):
        check_topology(config, 2)
    only = config_of("phases=[{name: a, objective: clm, steps: 2, batch: {ramp: {from: 6, tokens: 768}}}]",
                     "schedule={name: constant}", "batch.global_size=12")
    with pytest.raises(UserError, match="phases.0.batch.ramp: 6 windows cannot be split over 2"):
        check_topology(only, 2)
