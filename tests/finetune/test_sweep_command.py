"""`finetune` up to where workers begin: what is to do, and mistakes in one line."""

from pathlib import Path

import pytest

from megatron_encdec.cli import main
from megatron_encdec.finetune.config import load_config
from megatron_encdec.finetune.fingerprints import made_of
from megatron_encdec.finetune.results_tree import RECORD, SETTINGS, write_results
from megatron_encdec.platform.optional import is_available
from megatron_encdec.platform.schema import to_dict
from megatron_encdec.rundir.failure import write_failure
from megatron_encdec.rundir.files import write_json_atomic

CONFIG = """
model: {root}/tiny
results: {root}/results
datasets:
  - {{name: reviews, family: SC, train: {root}/train.jsonl, test: {root}/test.jsonl}}
grid: {{learning_rates: [1e-5, 1e-4], seeds: [0, 1]}}
"""


@pytest.fixture
def config(tmp_path):
    """A config whose grid has four runs, of which one is finished and one failed."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text("{}")
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(root=tmp_path))
    runs = tmp_path / "results/tiny/SC/reviews"
    (runs / "lr1e-05_sd0").mkdir(parents=True)
    write_results(runs / "lr1e-05_sd0", {"validation": {"score": 0.5}, "test": {"score": 0.5}})
    write_failure(runs / "lr1e-05_sd1", "loss is not finite")
    return path


@pytest.fixture
def finetune(config, capsys):
    """`megatron-encdec finetune CONFIG WORDS` in this process: exit code, standard output, standard error."""
    def call(*words):
        code = main(["finetune", str(config), *words])
        return code, *capsys.readouterr()

    return call


def test_what_is_to_do(finetune):
    code, said, _ = finetune("--dry-run")
    assert code == 0
    assert "4 runs (1 models × 1 datasets × 2 learning rates × 2 seeds): 1 finished, 1 failed, 2 to do" in said
    assert "3 to do" in finetune("--dry-run", "--retry-failed")[1]
    assert "0 to do" in finetune("--dry-run", "grid.learning_rates=[1e-5]")[1]


def test_a_sweep_without_anything_to_do(finetune):
    code, said, _ = finetune("grid.learning_rates=[1e-5]", "grid.seeds=[0]")
    assert code == 0 and "all 1 runs are finished: megatron-encdec study report" in said
    code, _, error = finetune("grid.learning_rates=[1e-5]")
    assert code == 1 and "1 of 2 runs failed" in error and "loss is not finite" in error


def test_a_finished_run_of_other_settings_is_refused(config, finetune):
    """Speed, and where things lie, may differ."""
    (run,) = [one for one in load_config(config).runs() if (one.lr, one.seed) == (1e-5, 0)]
    write_json_atomic(run.directory / SETTINGS, to_dict(run))
    assert finetune("--dry-run", "training.micro_batch_size=1", "training.save_model=true")[0] == 0
    for changed, says in (("training.max_steps=7", "training.max_steps=1000, asked for is 7"),
                          ("datasets.0.max_train=3", "dataset.max_train=None, asked for is 3"),
                          ("datasets.0.test=other.jsonl", "dataset.test='test.jsonl', asked for is 'other.jsonl'")):
        code, _, error = finetune(changed)
        assert code == 2 and f"lr1e-05_sd0/{SETTINGS}: the results there were made with {says}" in error


def test_a_finished_run_of_other_contents_is_refused(config, finetune):
    """Of labelled files and of weights, wherever they lie; what is not there any more cannot be compared."""
    (run,) = [one for one in load_config(config).runs() if (one.lr, one.seed) == (1e-5, 0)]
    train, weights = Path(run.dataset.train), Path(run.model.path) / "model.safetensors"
    train.write_text("one")
    weights.write_text("one")
    write_json_atomic(run.directory / RECORD, {"made_of": made_of(run)})
    assert finetune("--dry-run")[0] == 0
    for path, what in ((train, "train.jsonl (train: "), (weights, f"{run.model.path} (model: ")):
        path.write_text("two, longer")
        code, _, error = finetune("--dry-run")
        assert code == 2 and f"lr1e-05_sd0/{RECORD}: the results there were made with other contents of {what}" in error
        assert len(error.strip().splitlines()) == 1
        path.write_text("one")
    train.unlink()
    assert finetune("--dry-run")[0] == 0


def test_contents_are_those_of_the_set_that_a_run_was_trained_on(config, finetune):
    """Retrieval trained on two sets is scored on one, in one folder."""
    files = {}
    for name in ("one", "two"):
        files[name] = config.parent / f"{name}.jsonl"
        files[name].write_text(f"trained on {name}")
    sets = ", ".join(f"{{name: a, family: IR, train_set: {name}, train: {path}, test: {config.parent / 'test.jsonl'}}}"
                     for name, path in files.items())
    words = (f"datasets=[{sets}]", "grid.learning_rates=[1e-5]", "grid.seeds=[0]")
    for run in load_config(config, words).runs():
        run.directory.mkdir(parents=True)
        write_results(run.directory, {"validation": {"score": 0.5}, "test": {"score": 0.5}})
        write_json_atomic(run.directory / RECORD, {"made_of": made_of(run)})
    assert finetune("--dry-run", *words)[::2] == (0, "")
    files["two"].write_text("other text")
    assert "other contents of two.jsonl" in finetune("--dry-run", *words)[2]


@pytest.mark.parametrize(("words", "says"), [
    (["--workers", "0"], "sweep.workers"), (["grid.learning_rates=[0]"], "grid.learning_rates"),
    (["model=nowhere"], "nowhere"), (["datasets.0.family=XX"], "family"),
    (["grid.seeds=[0, 0]"], "expected different numbers"),
    (["datasets.0.columns={text_pairs: b}"], "'text_pairs' is no column of SC; they are text, text_pair, label"),
    (["datasets=[{name: a, family: SC, train_set: one, train: x, test: x}, {name: a, family: SC, train_set: two, "
      "train: y, test: y}]"], "would hold both"),
])
def test_mistakes_are_one_line(finetune, words, says):
    code, _, error = finetune(*words)
    assert code == 2 and says in error and len(error.strip().splitlines()) == 1


@pytest.mark.skipif(is_available("nemo_automodel"), reason="is about its absence")
def test_without_nemo(finetune):
    code, _, error = finetune()
    assert code == 2 and "pip install -e '.[nemo]'" in error
