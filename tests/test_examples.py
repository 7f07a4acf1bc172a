"""What lies in examples/ and tools/: configs that build, scripts that parse, entry points that start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_run import run_tool

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.name for path in (ROOT / "examples").glob("*.yaml")
                 if not path.name.startswith(("finetune_", "study_")) or path.name.endswith("_base.yaml"))
FINETUNE = sorted(path.name for path in (ROOT / "examples").glob("finetune_*.yaml"))
SCRIPTS = sorted(str(path.relative_to(ROOT)) for folder in ("examples", "tests", "tools")
                 for path in (ROOT / folder).glob("*.sh")) + [".ci/run"]
TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))


def load(name: str):
    from megatron_encdec.training.config import load_config

    return load_config(ROOT / "examples" / name)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env={**os.environ, **environment})


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_and_its_phases_fit(name):
    from megatron_encdec.training.layout import lay_out

    config = load(name)
    phases = lay_out(config)
    assert phases[-1].end == config.run.total.steps
    assert phases[-1].objective.name == "mlm"


@pytest.mark.parametrize("name", FINETUNE)
def test_fine_tuning_config_builds(name):
    from megatron_encdec.finetune.config import FinetuneConfig
    from megatron_encdec.platform.schema import build, load_yaml

    assert build(FinetuneConfig, load_yaml(ROOT / "examples" / name)).runs()


@pytest.mark.parametrize(("name", "parameters"), [("210m", 212), ("610m", 608), ("1b", 1188)])
def test_real_configs_are_the_papers(name, parameters):
    """arXiv 2507.00994: model table, split 10k + 32k, 2,359,296 tokens a step."""
    from megatron_encdec.training.layout import lay_out

    config = load(f"biphasic_{name}.yaml")
    phases = [(phase.objective.name, phase.start, phase.end) for phase in lay_out(config)]
    assert phases == [("clm", 0, 10_000), ("mlm", 10_000, 42_000)]
    assert config.phases[1].objective.mask_ratio == 0.4
    assert {phase.tokens_per_step for phase in lay_out(config)} == {2_359_296}
    assert (config.data.random_length.min, config.data.random_length.max) == (12, 2048)
    layers, vocabulary = config.model.num_layers, 128_256
    count = layers * config.model.parameters_per_layer + vocabulary * config.model.hidden_size
    assert round(count / 1e6) == parameters


@pytest.mark.parametrize("name", ["biphasic_210m.yaml", "biphasic_610m.yaml", "biphasic_1b.yaml"])
@pytest.mark.parametrize("ranks", [8, 16, 32, 64])
def test_real_configs_divide_over_whole_nodes(name, ranks):
    config = load(name)
    data_ranks = ranks // (config.parallel.tensor * config.parallel.pipeline)
    assert config.batch.global_size % (config.batch.micro_size * data_ranks) == 0


def test_control_differs_from_the_demo_in_phases_alone():
    demo, control = (yaml.safe_load((ROOT / "examples" / name).read_text())
                     for name in ("biphasic_tiny.yaml", "mlm_only_tiny.yaml"))
    assert demo.pop("phases") != control.pop("phases")
    assert demo["run"].pop("dir") != control["run"].pop("dir")
    assert demo == control


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_parses_and_may_be_run(script):
    done = run("bash", "-n", script)
    assert done.returncode == 0, done.stderr
    assert os.access(ROOT / script, os.X_OK)


@pytest.mark.parametrize("tool", TOOLS)
def test_tool_starts_from_any_directory(tool, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_tool(f"tools/{tool}", "--help") == 0
    assert "usage:" in capsys.readouterr().out


def test_launcher_prints_its_help_before_it_installs_anything():
    done = run("bash", "examples/pretrain_biphasic.sh", "--help", MEGATRON_ENCDEC_PYTHON="no-such-python")
    assert done.returncode == 0
    assert done.stdout.startswith("Biphasic pretraining")


def test_launcher_refuses_several_nodes_without_a_place_among_them():
    done = run("bash", "examples/pretrain_biphasic.sh", MEGATRON_ENCDEC_PYTHON=sys.executable,
               CONFIG="examples/biphasic_210m.yaml", NNODES="2", GPUS_PER_NODE="1", NODE_RANK="",
               MASTER_ADDR="")
    assert done.returncode == 2
    assert "NODE_RANK" in done.stderr and "MASTER_ADDR" in done.stderr


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_launcher_says_a_mistake_in_an_override_in_one_line(more):
    done = run("bash", "examples/pretrain_biphasic.sh", "optimizer.lrr=1", *more, GPUS_PER_NODE="2",
               MEGATRON_ENCDEC_PYTHON=sys.executable, CONFIG="examples/biphasic_210m.yaml")
    assert done.returncode == 2
    assert "optimizer.lrr" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("given", "said"), [("no-such-python", "no such program"), ("/bin/false", "3.11")])
def test_environment_refuses_a_bad_interpreter_in_one_line(given, said):
    done = run("bash", "tools/setup_env.sh", MEGATRON_ENCDEC_PYTHON=given)
    assert done.returncode == 1
    assert said in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("arguments", "said"), [
    (["no/such/model"], "no/such/model"),
    (["."], "no config.json"),
])
def test_fill_masks_says_what_is_wrong_in_one_line(arguments, said, capsys):
    assert run_tool("tools/fill_masks.py", *arguments) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1


def test_corpus_that_is_there_is_kept(tmp_path, capsys):
    output = tmp_path / "corpus.jsonl"
    output.write_text("kept\n")
    assert run_tool("tools/build_docstring_corpus.py", output) == 0
    assert "already" in capsys.readouterr().out
    assert output.read_text() == "kept\n"


def test_in_a_container_the_steps_of_a_job_have_the_options_that_pyxis_documents(tmp_path):
    """A program that writes down its words takes srun's place: neither pyxis nor enroot is here, and nothing runs in a
    container."""
    stand_in = tmp_path / "srun"
    stand_in.write_text(f"#!/bin/sh\nprintf '%s\\n' \"$@\" END >>{tmp_path}/said\necho {tmp_path}/run\n")
    stand_in.chmod(0o755)
    (tmp_path / "config.yaml").write_text("run: {dir: elsewhere}\n")
    given = {"SLURM_JOB_NAME": "pretrain", "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "8", "MEGATRON_ENCDEC_PYTHON": "",
             "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    steps = []
    for container in ({}, {"CONTAINER": "registry#encdec:1", "MOUNTS": "/data:/data,/runs:/runs:ro"}):
        done = subprocess.run(["bash", ROOT / "examples/slurm/pretrain.sbatch", "config.yaml", "--nproc", "2"],
                              cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **given, **container})
        assert done.returncode == 0, done.stderr
        words = (tmp_path / "said").read_text().split("\nEND\n")[:-1]
        steps.append([step.split("\n") for step in words])
        (tmp_path / "said").unlink()
    bare, boxed = steps
    assert len(bare) == len(boxed) == 2  # where the run is, and the run
    for without, inside in zip(bare, boxed, strict=True):
        at = inside.index("--container-image")
        options = ["--container-image", "registry#encdec:1", "--container-mounts",
                   f"{tmp_path}:{tmp_path},/data:/data,/runs:/runs:ro", "--container-workdir", str(tmp_path),
                   "--no-container-entrypoint"]
        assert inside[at:at + len(options)] == options
        program = without.index(f"{tmp_path}/.venv/bin/python")
        assert inside[:at] + inside[at + len(options):] == [*without[:program], "/opt/venv/bin/python",
                                                            *without[program + 1:]]
