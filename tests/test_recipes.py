"""examples/recipes/ and the small studies: all can be planned without data; Ettin's plan is the published one, and its
three phases train when they are cut down."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml
from random_models import save
from small_run import metrics, run_cli, workspace

from megatron_encdec.cli import main
from megatron_encdec.model.flops import training_flops, whole_pairs
from megatron_encdec.platform.schema import load_yaml
from megatron_encdec.training.config import load_config
from megatron_encdec.training.layout import lay_out
from megatron_encdec.training.stretches import tokens_between

EXAMPLES = Path(__file__).parent.parent / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
STUDIES = sorted(path for path in EXAMPLES.glob("study_*.yaml") if not path.stem.endswith("_base"))
PRETRAINING = sorted(set(EXAMPLES.glob("*.yaml")) - set(STUDIES) - set(EXAMPLES.glob("finetune_*.yaml")))
OF_AN_IMPORT = ("llm2vec", "modernbert_bio", "study_bridge")  # their trunk is that of a run directory


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return workspace(tmp_path_factory.mktemp("workspace"))


def planned(path: Path, capsys, *words: str) -> str:
    assert main(["pretrain", str(path), *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_there_are_recipes_and_studies():
    assert len(RECIPES) == 8 and len(STUDIES) == 9


@pytest.mark.parametrize("path", [path for path in [*PRETRAINING, *RECIPES] if path.stem not in OF_AN_IMPORT],
                         ids=lambda path: path.stem)
def test_a_config_can_be_planned_without_data(path, capsys):
    """And a recipe for eight ranks: its batches, ramps included, can be split over them."""
    said = planned(path, capsys, *(["--nproc", "8"] if path in RECIPES else []))
    assert all(phase.name in said for phase in load_config(path).phases)


@pytest.mark.parametrize("path", [path for path in STUDIES if path.stem not in OF_AN_IMPORT],
                         ids=lambda path: path.stem)
def test_a_study_can_be_planned_without_data(path, capsys):
    assert main(["study", "plan", str(path), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["models"]) > 3 and plan["steps_shared"] <= plan["steps_alone"]


def test_ettins_plan_is_the_published_one(capsys):
    """JHU-CLSP/ettin-encoder-vs-decoder, pretraining/configs/standard/base."""
    said = planned(EXAMPLES / "recipes" / "ettin.yaml", capsys)
    table = said[said.index("\nphase "):]
    phases = re.findall(r"^(\w+) +mlm:([\d.]+) +(\d+)\.\.(\d+) +([\d,]+)$", table, re.MULTILINE)
    tokens = [int(found[4].replace(",", "")) for found in phases]
    assert [found[:2] for found in phases] == [("pretraining", "0.3"), ("long", "0.3"), ("decay", "0.15")]
    per_step = 4608 * 1024, 4608 * 7999, 4608 * 7999
    assert all(0 <= found - wanted < step for found, wanted, step in zip(tokens, (1.7e12, 250e9, 50e9), per_step,
                                                                        strict=True))
    assert "batch.ramp: 72 -> 4608 windows in 64 sizes" in table and table.count("batch.ramp") == 1
    assert re.findall(r"\w*rope_theta: .*|lr: .*|sequence_length: .*", table) == [
        "sequence_length: 1024 -> 7999", "rope_theta: 10000.0 -> 160000.0", "local_rope_theta: 10000.0 -> 160000.0",
        "lr: 0.0008 -> 0.0004"]


def test_ettins_learning_rates():
    stretches = lay_out(load_config(EXAMPLES / "recipes" / "ettin.yaml"))
    ramp, (pretraining, long, decay) = stretches[:-3], stretches[-3:]
    assert 50e9 <= pretraining.first_sample * 1024 < 50.2e9 and len(ramp) == 63
    warm = next(step for step in range(1, ramp[-1].end) if pretraining.learning_rate(step) == 8e-4)
    assert 0 <= tokens_between(ramp, 0, warm) - 3e9 < 1e6
    for stretch, peak, part in ((long, 8e-4, 0.5), (decay, 4e-4, 0.04)):
        assert stretch.learning_rate(stretch.end) == pytest.approx(part * peak)
        quarter = stretch.learning_rate(stretch.start + stretch.steps // 4)  # 1-sqrt: half of the way
        assert quarter == pytest.approx(peak * (1 + part) / 2, rel=1e-3)
    assert pretraining.learning_rate(pretraining.end) == 8e-4


def test_ettin_cut_down_trains_through_its_three_phases(root, tmp_path):
    """Tokens by 5e-8, windows by 32, the batch from 4608 windows to 8; masks, rates and rotary bases as they are."""
    config = load_yaml(EXAMPLES / "recipes" / "ettin.yaml")
    config["run"]["dir"] = str(tmp_path / "run")
    config["tokenizer"]["path"] = str(root / "tokenizer")
    config["model"] |= dict(num_layers=2, sliding_window=8, hidden_size=32, ffn_hidden_size=48, num_attention_heads=4,
                            num_query_groups=4, vocabulary_size=None)
    config["batch"] = {"global_size": 8, "micro_size": 2}
    config["precision"]["dtype"] = "fp32"
    config["evaluation"] = {"every": 1000, "batches": 1}
    config["logging"] = {"every": 1, "tensorboard": False}
    config["data"]["validation"] = [{"path": str(root / "text.validation")}]
    config["phases"][0]["batch"]["ramp"]["from"] = 2
    for place in (config, *config["phases"]):
        if "data" in place:
            place["data"]["train"] = [{"path": str(root / "text")}]
            if "sequence_length" in place["data"]:
                place["data"]["sequence_length"] //= 32
        for holder in (place, place.get("schedule", {}), place.get("batch", {}).get("ramp", {})):
            holder |= {key: int(holder[key] * 5e-8) for key in ("tokens", "warmup_tokens", "decay_tokens")
                       if key in holder}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run_cli("pretrain", tmp_path / "config.yaml")
    lines, switches = metrics(tmp_path / "run"), metrics(tmp_path / "run", "phase")
    assert list(dict.fromkeys(line["phase"] for line in lines)) == ["pretraining", "long", "decay"]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    ends = {line["phase"]: line for line in lines}
    assert [ends[name]["lr"] for name in ends] == pytest.approx([8e-4, 4e-4, 0.04 * 4e-4])
    assert ends["pretraining"]["loss"] < lines[0]["loss"] - 0.5
    sizes = [new["tokens"] - old["tokens"] for old, new in zip([{"tokens": 0}, *lines], lines, strict=False)]
    assert sorted(set(sizes[:ends["pretraining"]["step"]])) == [64, 128, 192, 256]
    assert set(sizes[ends["pretraining"]["step"]:]) == {8 * (7999 // 32)}
    assert len(switches) == 3


def of_an_import(recipe, missing: str, name: str, root, tmp_path) -> list[str]:
    """The recipe is refused while its `missing` import is not there; then the words that give it one of the model
    `name`, small data and a log of every step."""
    said = run_cli("pretrain", recipe, "--dry-run", code=2).stderr
    assert said == f"megatron-encdec: model.run: {missing}: not a run directory (it has no config.yaml)\n"
    save(name, tmp_path / "hf", root / "tokenizer")
    run_cli("import", tmp_path / "hf", tmp_path / "imported")
    return [f"run.dir={tmp_path / 'run'}", f"run.from.path={tmp_path / 'imported'}",
            f"model.run={tmp_path / 'imported'}", f"tokenizer.path={tmp_path / 'imported' / 'tokenizer'}",
            f"data.train.0.path={root / 'text'}", f"data.validation.0.path={root / 'text.validation'}",
            "data.sequence_length=64", "precision.dtype=fp32", "logging={every: 1, tensorboard: false}"]


def test_llm2vec_begins_with_an_import(root, tmp_path):
    """Before the import its trunk is not known, which is said; after it the recipe plans and trains."""
    recipe = EXAMPLES / "recipes" / "llm2vec.yaml"
    words = [*of_an_import(recipe, "runs/sheared_llama", "llama2", root, tmp_path), "batch.global_size=4",
             "phases.0.steps=3"]
    assert "mntp:0.2 (mask 0.8, random 0.1)" in run_cli("pretrain", recipe, *words, "--dry-run").stdout
    run_cli("pretrain", recipe, *words)
    assert [math.isfinite(line["loss"]) for line in metrics(tmp_path / "run")] == [True] * 3


@pytest.mark.slow
def test_the_bridge_begins_with_an_import(root, tmp_path):
    """Each model's first state is the import's; a model of the study is the run that `pretrain` makes alone."""
    said = run_cli("study", "plan", EXAMPLES / "study_bridge.yaml", code=2).stderr
    assert "model.run: runs/sheared_llama: not a run directory" in said and said.count("\n") == 1
    save("llama2", tmp_path / "hf", root / "tokenizer")
    run_cli("import", tmp_path / "hf", tmp_path / "imported")
    base = yaml.safe_load((EXAMPLES / "recipes" / "llm2vec.yaml").read_text())
    base["run"]["from"]["path"] = base["model"]["run"] = str(tmp_path / "imported")
    base["tokenizer"]["path"] = str(tmp_path / "imported/tokenizer")
    base["data"] |= {"train": [{"path": str(root / "text")}], "validation": [], "sequence_length": 64}
    base |= {"batch": {"global_size": 4, "micro_size": 4}, "precision": {"dtype": "fp32"},
             "logging": {"tensorboard": False}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    study = yaml.safe_load((EXAMPLES / "study_bridge.yaml").read_text()) | {"base": "base.yaml", "output": "out"}
    for model in study["models"]:
        model["phases"][0]["steps"] = 3
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    assert "missing" not in run_cli("study", "plan", tmp_path / "study.yaml").stdout
    run_cli("study", "run", tmp_path / "study.yaml", "--jobs", "2")
    alone = run_cli("pretrain", tmp_path / "base.yaml", f"run.dir={tmp_path / 'alone'}",
                    "phases=[{name: phase0, objective: {name: mntp, mask_ratio: 0.2}, steps: 3}]")
    (mntp,) = (tmp_path / "out/stretches").glob("mntp*")
    assert "beginning with the weights" in alone.stdout and metrics(mntp) == metrics(tmp_path / "alone")
    assert sorted(path.name for path in (tmp_path / "out/models").iterdir()) == ["mdlm", "mlm", "mntp"]


def test_the_detour_begins_with_an_imported_modernbert(root, tmp_path):
    recipe = EXAMPLES / "recipes" / "modernbert_bio.yaml"
    words = [*of_an_import(recipe, "runs/modernbert", "modernbert", root, tmp_path),
             "batch={global_size: 4, micro_size: 4}", "phases.0.tokens=768", "phases.1.tokens=768",
             "phases.1.schedule.decay_tokens=768", "schedule.warmup_tokens=256"]
    run_cli("pretrain", recipe, *words)
    lines = metrics(tmp_path / "run")
    assert [line["objective"] for line in lines] == ["clm"] * 3 + ["mlm"] * 3
    assert all(math.isfinite(line["loss"]) for line in lines)
    run_cli("export", tmp_path / "run", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["ModernBertForMaskedLM"]


def test_supervision_compares_at_equal_labels_and_equal_flops():
    from megatron_encdec.study.config import load_study
    from megatron_encdec.study.recipes import planned_models

    def done(recipe) -> tuple[float, float]:
        """Labels, and FLOPs with the demo's vocabulary of 4096; documents are taken to fill their windows."""
        labels = flops = 0.0
        for one in recipe.stretches:
            tokens = one.steps * one.tokens_per_step
            targets = tokens * (1.0 if one.objective.name == "clm" else one.objective.mask_ratio)
            pairs = whole_pairs(tokens, one.data.sequence_length, one.objective.attention)
            labels, flops = labels + targets, flops + training_flops(model, tokens, pairs, targets)
        return labels, flops

    recipes = planned_models(load_study(EXAMPLES / "study_supervision.yaml"))
    model = load_config(EXAMPLES / "study_tiny_base.yaml", ["model.vocabulary_size=4096"]).model
    alone, tokens, labels, flops, causal = (done(recipe) for recipe in recipes)
    assert recipes[0].steps == recipes[1].steps
    assert labels[0] == pytest.approx(alone[0], rel=2e-3) and causal[0] == pytest.approx(alone[0])
    assert flops[1] == pytest.approx(alone[1], rel=2e-3) and tokens[1] > 1.1 * alone[1]
