"""What is said before the first step: text that is repeated often, data that nothing vouches for."""

import shutil

from small_run import run_cli


def test_repeated_sources_and_missing_manifests_are_said_at_start(root, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{root / 'text.validation'}{suffix}", tmp_path / f"small{suffix}")
    sources = f"data.train=[{{path: {root / 'text'}}}, {{path: {tmp_path / 'small'}}}]"
    words = ["pretrain", root / "config.yaml", f"run.dir={tmp_path / 'run'}", sources, "phases.0.steps=100"]
    planned = run_cli(*words, "--dry-run").stdout
    assert f"data.train.1: {tmp_path / 'small'} is repeated: " in planned
    assert f"{tmp_path / 'small'}: no manifest" in planned and "small.fingerprint.json" in planned
    started = run_cli(*words, "--until", "1").stdout
    assert f"note: data.train.1: {tmp_path / 'small'} is repeated: " in started and "data.train.0" not in started
