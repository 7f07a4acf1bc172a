"""inspect checkpoint: what stands in a real one, and that nothing in a hostile one runs."""

import json
import os
import pickle

from megatron_encdec.inspection.checkpoint import is_weight, read_tensors
from megatron_encdec.training.config import load_config


def test_a_checkpoint_in_words(inspect, real_run):
    code, out, err = inspect("checkpoint", f"{real_run}@6")
    state = json.loads((real_run / "checkpoints/step_00000006/run_state.json").read_text())
    assert (code, err) == (0, "")
    assert "clm in steps 1..4, mlm:0.3 in steps 5..6" in out
    assert state["history_hash"] in out and f"{state['targets']:,} targets" in out
    assert "1 rank(s): tensor 1 x pipeline 1 x data 1, on cpu" in out
    assert f"torch {state['versions']['torch']}" in out


def test_json_of_the_newest(inspect, real_run):
    report = json.loads(inspect("checkpoint", real_run, "--json")[1])
    directory = real_run / "checkpoints/step_00000008"
    assert report["checkpoint"] == str(directory) and report["step"] == 8 and "tensors" not in report
    assert report["bytes"] == sum(file.stat().st_size for file in directory.iterdir())


def test_tensors_add_up_to_the_trunk_and_its_optimizer(inspect, real_run):
    model = load_config(real_run / "config.yaml").model
    tensors = read_tensors(real_run / "checkpoints/step_00000008")
    padding = 2 * (model.padded_vocabulary_size - model.vocabulary_size) * model.hidden_size  # untied
    parameters = model.parameter_count() + padding
    weights = [tensor for tensor in tensors if is_weight(tensor)]
    assert sum(tensor["bytes"] for tensor in weights) == 4 * parameters  # fp32
    assert sum(tensor["bytes"] for tensor in tensors) == 4 * parameters * 4  # and masters, two moments
    assert tensors[: len(weights)] == weights
    embedding = next(tensor for tensor in tensors if tensor["name"] == "embedding.word_embeddings.weight")
    assert (embedding["shape"], embedding["dtype"]) == ([model.padded_vocabulary_size, 32], "float32")
    _, out, _ = inspect("checkpoint", real_run, "--tensors")
    assert f"{len(weights)} weights of " in out and "embedding.word_embeddings.weight" in out


class _Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_is_refused_and_does_not_run(inspect, real_run, tmp_path):
    mark, directory = tmp_path / "it_ran", tmp_path / "run/checkpoints/step_00000001"
    directory.mkdir(parents=True)
    (directory.parent / "latest").write_text("step_00000001\n")
    state = real_run / "checkpoints/step_00000008/run_state.json"
    (directory / "run_state.json").write_text(state.read_text())
    (directory / ".metadata").write_bytes(pickle.dumps(_Hostile(mark)))
    code, _, err = inspect("checkpoint", tmp_path / "run", "--tensors")
    assert code == 2 and "system" in err and ".metadata" in err and err.count("\n") == 1
    assert not mark.exists()
    assert inspect("checkpoint", tmp_path / "run")[0] == 0  # unread without --tensors


def test_damaged_or_missing_metadata_is_named(inspect, real_run, tmp_path):
    whole = (real_run / "checkpoints/step_00000008/.metadata").read_bytes()
    directory = tmp_path / "run/checkpoints/step_00000001"
    directory.mkdir(parents=True)
    state = real_run / "checkpoints/step_00000008/run_state.json"
    (directory / "run_state.json").write_text(state.read_text())
    code, _, err = inspect("checkpoint", f"{tmp_path / 'run'}@1", "--tensors")
    assert code == 2 and ".metadata: missing" in err
    (directory / ".metadata").write_bytes(whole[: len(whole) // 2])
    code, _, err = inspect("checkpoint", f"{tmp_path / 'run'}@1", "--tensors")
    assert code == 2 and "damaged or foreign" in err and err.count("\n") == 1


def test_a_step_that_is_not_there_names_those_that_are(inspect, real_run, tmp_path):
    code, _, err = inspect("checkpoint", f"{real_run}@5")
    assert code == 2 and "step_00000004" in err
    assert inspect("checkpoint", tmp_path)[0] == 2
