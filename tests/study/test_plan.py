"""Plans of studies: recipes by name, the tree of what they share, and what it comes to. Nothing is trained here."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from small_run import BASE, config_of

from megatron_encdec.cli import main
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.lineage import history_hash
from megatron_encdec.study import recipes
from megatron_encdec.study.config import ContinuedPretraining, StudyConfig, load_study
from megatron_encdec.study.plan import plan_study
from megatron_encdec.study.recipes import expand

PAPER = Path(__file__).parents[2] / "examples" / "study_paper.yaml"
SPLITS = ["610m-clm-{3k,6k,9k}-mlm40-12k", "610m-clm-{5k,11k,17k}-mlm40-22k", "610m-clm-{10k,21k,32k}-mlm40-42k",
          "610m-clm-40k-mlm{20,30,40,50}-42k"]


def plan_of(directory: Path, models: list, **keys):
    """The plan of `models` on the small base, whose data is nowhere: warm-up 2, decay 3."""
    (directory / "base.yaml").write_text(BASE.format(root="nowhere"))
    (directory / "study.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "output": "out", "models": models,
                                                          **keys}))
    return plan_study(load_study(directory / "study.yaml"))


@pytest.mark.parametrize("pattern, names", [
    ("a", ["a"]), ("{a,b}-c{1,2}", ["a-c1", "a-c2", "b-c1", "b-c2"]), ("x{a,b{1,2}}y", ["xay", "xb1y", "xb2y"]),
    ("{ a , b }", ["a", "b"])])
def test_braces(pattern, names):
    assert expand(pattern) == names


@pytest.mark.parametrize("pattern", ["a{b", "a}b", "{a,{b}"])
def test_a_brace_alone_is_refused(pattern):
    with pytest.raises(UserError, match="a brace that is never"):
        expand(pattern)


@pytest.mark.parametrize("models, alone, shared", [
    ([*SPLITS, "610m-clm-42k"], 438_000, 164_000),
    (SPLITS, 396_000, 162_000),  # with the 40k of the trunk that no base model pays for
    (["610m-mlm40-{12k,22k,42k}"], 76_000, 46_000),
    (["610m-clm-42k", "610m-clm-dec42k-mlm40-{44k,54k,64k}"], 42_000 + 162_000, 42_000 + 1_000 + 1_000 + 10_000
     + 1_000 + 11_000)])
def test_the_papers_savings(models, alone, shared):
    plan = plan_study(load_study(PAPER, [f"models={json.dumps(models)}"]))
    assert (plan.steps_alone, plan.steps_shared) == (alone, shared)


def test_the_papers_study(capsys):
    assert main(["study", "plan", str(PAPER), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["models"]) >= 35
    assert found["models"]["610m-clm-10k-mlm40-42k"]["phases"] == [{"objective": "clm", "steps": 10_000},
                                                                   {"objective": "mlm40", "steps": 32_000}]
    assert sum(one["steps"] for one in found["stretches"]) == found["steps_shared"] < found["steps_alone"]
    assert sum(one["steps"] for one in found["models"].values()) == found["steps_alone"]
    stretches = {one["id"]: one for one in found["stretches"]}
    assert len(stretches) == len(found["stretches"])
    for name, model in found["models"].items():  # each path is whole, and ends where the model does
        path = [stretches[one] for one in model["stretches"]]
        assert [one["parent"] for one in path] == [None, *model["stretches"][:-1]]
        assert [one["start"] for one in path] == [0, *(one["end"] for one in path[:-1])]
        assert path[-1]["end"] == model["steps"] and name in path[-1]["ending"]
        assert sum(one["tokens"] for one in path) == model["tokens"]


STAGES = st.sampled_from(["clm", "mlm30", "mlm50"])
NAMES = st.builds(lambda stages, ends: "-".join(f"{stage}-{end}" for stage, end in zip(stages, ends, strict=True)),
                  st.tuples(STAGES, STAGES), st.tuples(st.integers(1, 7), st.integers(8, 14))) | st.builds(
    "{}-{}".format, STAGES, st.integers(6, 14)) | st.builds(
    lambda first, end, last, more: f"{first}-dec{end}-{last}-{end + more}", STAGES, st.integers(6, 8), STAGES,
    st.integers(4, 9))


@settings(max_examples=40, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=7, unique=True))
def test_a_step_is_shared_exactly_where_the_histories_are_equal(tmp_path_factory, names):
    """Counted another way: as many steps as there are different states."""
    directory = tmp_path_factory.mktemp("plan")
    alone = {name: plan_of(directory, [name]).tree.last[name].leading.timeline for name in names}
    states = {name: {step: history_hash(one.history(step)) for step in range(1, one.total_steps + 1)}
              for name, one in alone.items()}
    plan = plan_of(directory, names)
    assert plan.steps_shared == len({state for one in states.values() for state in one.values()})
    for branch in plan.branches:
        assert {states[name][branch.end] for name in branch.models} == {branch.hash_at(branch.end)}


def test_seeds_make_every_model_once_each(tmp_path):
    plan = plan_of(tmp_path, ["clm-{6,8}"], seeds=[0, 7])
    assert [recipe.name for recipe in plan.recipes] == ["clm-6-s0", "clm-6-s7", "clm-8-s0", "clm-8-s7"]
    assert {(recipe.config.run.seed, recipe.config.data.seed) for recipe in plan.recipes} == {(0, 0), (7, 7)}
    assert len(plan.tree.roots) == 2 and plan.steps_alone == 28
    assert plan.steps_shared == 2 * (3 + 3 + 5)  # apart from where the shorter one decays


def test_checkpoints_are_scored_once_where_they_are_shared(tmp_path):
    plan = plan_of(tmp_path, ["clm-4-mlm30-12", "clm-4-mlm50-12"], checkpoints=[2, 4, 8, 12, 99])
    assert [(point.name, point.step, point.models) for point in plan.points] == [
        ("clm-4-mlm30-12@2", 2, ["clm-4-mlm30-12", "clm-4-mlm50-12"]),
        ("clm-4-mlm30-12@4", 4, ["clm-4-mlm30-12", "clm-4-mlm50-12"]),
        ("clm-4-mlm30-12@8", 8, ["clm-4-mlm30-12"]), ("clm-4-mlm30-12", 12, ["clm-4-mlm30-12"]),
        ("clm-4-mlm50-12@8", 8, ["clm-4-mlm50-12"]), ("clm-4-mlm50-12", 12, ["clm-4-mlm50-12"])]


def test_continued_pretraining_with_samples_of_its_own_is_a_run_from_weights(tmp_path):
    plan = plan_of(tmp_path, ["clm-8", "clm-dec8-mlm30-{14,16}"],
                   cpt={"samples": "restart", "optimizer_state": "reset", "decay_steps": 1, "lr": 1e-3})
    first, *rest = plan.branches
    assert (first.start, first.end, first.ending) == (0, 8, ["clm-8"])
    assert [(one.before, one.start, one.end) for one in rest] == [(8, 0, 5), (8, 5, 6), (8, 5, 8)]
    assert rest[0].parent is first and plan.steps_alone == 8 + 14 + 16 and plan.steps_shared == 8 + 5 + 1 + 3
    assert rest[0].leading.timeline.beginning == {"weights": {"step": 8, "history_hash": first.hash_at(8)}}
    assert max(rest[0].stretches[0].learning_rates) == 1e-3


def test_continued_pretraining_of_a_schedule_in_tokens():
    """A tenth of the base's warm-up and half of its decay, whether they are given in steps or in tokens."""
    base = config_of("schedule={warmup_tokens: 5000, decay_steps: 4}")
    found = recipes._continuation(ContinuedPretraining(), base)["schedule"]
    assert (found["warmup_tokens"], found["warmup_steps"], found["decay_tokens"], found["decay_steps"]) == (
        500, 0, None, 2)
    found = recipes._continuation(ContinuedPretraining(warmup_steps=1), base)["schedule"]
    assert (found["warmup_tokens"], found["warmup_steps"]) == (None, 1)


def test_a_model_by_its_phases(tmp_path):
    plan = plan_of(tmp_path, ["clm-5-mlm30-12", {"name": "ramp", "phases": [
        {"objective": "clm", "steps": 5}, {"objective": "mlm:0.3", "steps": 3},
        {"objective": "mlm:0.15", "steps": 4}]}])
    assert plan.steps_shared == 5 + 7 + 7 - 3 and [recipe.steps for recipe in plan.recipes] == [12, 12]


@pytest.mark.parametrize("models, keys, says", [
    (["610m-mlm40"], {}, "models: 610m-mlm40: cannot be read as a recipe"),
    (["clm-9-mlm30-4"], {}, "models: clm-9-mlm30-4: cannot be read as a recipe; .* steps that grow"),
    (["70b-mlm40-42k"], {}, "models: 70b-mlm40-42k: there is no size '70b'"),
    (["clm20-8"], {}, "models: clm20-8: clm20: clm takes no number"),
    (["mlm120-8"], {}, "mask_ratio"),
    (["clm-8", "clm-8"], {}, "clm-8 is given twice"),
    (["clm-4"], {}, "models: clm-4: schedule: warmup_steps=2 .* decay_steps=3 is more than its 4 steps"),
    (["clm-dec8-mlm30-dec12-mlm30-20"], {}, "only the first of two stages"),
    ([{"name": "a/b", "phases": [{"objective": "clm", "steps": 9}]}], {}, "cannot name a folder"),
    (["clm-8"], {"cpt": {"samples": "restart"}}, "cpt.samples: restart .* needs cpt.optimizer_state: reset"),
    (["clm-8"], {"seeds": [1, 1]}, "seeds: expected different"),
    (["clm-8"], {"finetune": {"results": "x"}}, "finetune.results: is the study's"),
    (["clm-8"], {"finetune": {"datasets": [{"name": "x"}]}}, "finetune.datasets.0.family, .*: missing"),
    (["clm-8"], {"resources": {"611m": {"ranks": 2}}}, "resources.611m: no such size"),
    (["clm-dec9"], {}, "only the first of two stages"),
    (["clm-1k", "clm-1000"], {}, "clm-1k and clm-1000 are the same model"),
    (["clm-999999999k"], {}, r"999,999,999,000 steps are more than a run can have"),
    (["clm-\u0669"], {}, "cannot be read as a recipe"),
    ([{"name": "baselines", "phases": [{"objective": "clm", "steps": 9}]}], {}, "'baselines' cannot name a folder"),
    ([{"name": "a\0b", "phases": [{"objective": "clm", "steps": 9}]}], {}, "cannot name a folder"),
    (["clm-8"], {"seeds": [1 << 70]}, "seeds: expected different"),
    (["clm-8"], {"finetune": {}}, "finetune.datasets: missing"),
    (["clm-8"], {"finetune": {"config": 3}}, "finetune.config: expected a path, found 3"),
    (["clm-8"], {"resources": {"base": {"ranks": 3}}}, "batch.global_size: 8 windows cannot be split over 3"),
    ([], {}, "models: empty")])
def test_what_cannot_be_planned_is_one_line(tmp_path, models, keys, says):
    with pytest.raises(UserError, match=says) as error:
        plan_of(tmp_path, models, **keys)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key, value", [("run", "abc"), ("parallel", "[1]"), ("model", "5")])
def test_a_base_of_the_wrong_shape_is_one_line(tmp_path, key, value):
    base = yaml.safe_load(BASE.format(root="nowhere")) | {key: yaml.safe_load(value)}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "study.yaml").write_text("{base: base.yaml, output: out, models: [tiny-clm-8]}")
    with pytest.raises(UserError, match=rf"base.yaml: {key}: expected"):
        plan_study(load_study(tmp_path / "study.yaml"))


def test_a_checkpoint_beyond_every_model_is_said(tmp_path):
    assert "checkpoints: 100: no model has so many steps" in plan_of(tmp_path, ["clm-8"], checkpoints=[4, 100]).text({})


def test_a_missing_base_names_the_file(tmp_path):
    (tmp_path / "study.yaml").write_text("{base: nowhere.yaml, output: out, models: [clm-8]}")
    with pytest.raises(UserError, match=r"nowhere.yaml: no such config file"):
        plan_study(load_study(tmp_path / "study.yaml"))


def test_required_keys_are_three():
    assert {name for name, field in StudyConfig.__dataclass_fields__.items()
            if field.default is field.default_factory} == {"base", "output", "models"}


def test_a_base_that_begins_elsewhere_is_refused(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE.format(root="nowhere").replace("seed: 3", "seed: 3, from: {path: other}"))
    (tmp_path / "study.yaml").write_text("{base: base.yaml, output: out, models: [clm-8]}")
    with pytest.raises(UserError, match="base.yaml: run.from: a study's models begin with run.seed, or with"):
        plan_study(load_study(tmp_path / "study.yaml"))
