"""inspect run CONFIG --sample I: the trainer's own micro-batches, and what they are made of, in words."""

import json

import pytest

from megatron_encdec.training.config import load_config
from megatron_encdec.training.plan import make_plan
from megatron_encdec.training.step import micro_batches


@pytest.fixture
def config(workspace, tmp_path):
    """A config never run: clm for two steps of 4 windows, then mlm for three."""
    path = tmp_path / "config.yaml"
    path.write_text(f"""
run: {{dir: {tmp_path}/run, seed: 3}}
tokenizer: {{path: {workspace}/tokenizer}}
data: {{train: [{{path: {workspace}/corpus}}], sequence_length: 64, random_length: {{min: 8, max: 40}}}}
model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 2, num_query_groups: 2}}
phases:
  - {{name: causal, objective: clm, steps: 2}}
  - {{name: masked, objective: {{name: mlm, mask_ratio: 0.3}}, steps: 3}}
batch: {{global_size: 4, micro_size: 2}}
""")
    return path


def samples_of(inspect, *arguments) -> list[dict]:
    code, out, err = inspect("run", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)["samples"]


def test_every_sample_is_what_the_trainers_micro_batches_hold(inspect, config):
    shown = samples_of(inspect, config, "--sample", *range(20))
    plan = make_plan(load_config(config), world_size=1)
    for step in range(1, 6):
        stretch = plan.timeline.at(step)
        first = (step - 1) * 4
        assert stretch.samples(step) == range(first, first + 4)
        shares = [range(first, first + 2), range(first + 2, first + 4)]  # as share_of_batch cuts it
        for batch in micro_batches(plan.train.parts[0], stretch.objective, plan.vocabulary, shares):
            for row, number in enumerate(batch.samples):
                one = shown[number]
                assert (one["sample"], one["step"], one["phase"]) == (number, step, stretch.name)
                assert one["attention"] == batch.attention
                assert one["inputs"] == batch.inputs_BS[row].tolist()
                mine = batch.label_positions_N // 64 == row
                assert one["label_positions"] == (batch.label_positions_N[mine] - 64 * row).tolist()
                assert one["labels"] == batch.labels_N[mine].tolist() and one["targets"] == mine.sum()
                ends = [end - 64 * row for end in batch.cu_seqlens.tolist() if 64 * row < end <= 64 * row + 64]
                assert one["segment_ends"] == ends


def test_where_it_comes_from_and_its_marks(inspect, config):
    plan = make_plan(load_config(config), world_size=1)
    for one in samples_of(inspect, config, "--sample", 1, 9):
        store = plan.train.stores[0]
        assert one["source"] == str(store.prefix) and one["first_token"] == 64 * one["window"]
        seen = dict(enumerate(one["inputs"])) | dict(zip(one["label_positions"], one["labels"], strict=True))
        tokens = store.read(one["first_token"], 64).tolist()
        if one["objective"] == "clm":
            tokens_seen = one["inputs"]
            assert one["text"].count("[NO TARGET:") == len(one["segment_ends"])
        else:
            tokens_seen = [seen[position] for position in range(64)]
            assert one["text"].count("[MASK:") == one["targets"] > 5
        assert tokens_seen == tokens
        documents = store.document_ends(one["first_token"], 64).tolist()
        assert one["document_ends"] == documents and set(documents) <= set(one["segment_ends"])
        assert one["text"].count("[END OF DOCUMENT]") == len(documents)
        assert one["text"].count("[END OF SEGMENT]") == len(one["segment_ends"]) - len(documents)


def test_in_words(inspect, config):
    code, out, _ = inspect("run", config, "--sample", 9)
    assert code == 0
    assert "sample 9 of 20: step 3 of 5, phase masked (mlm:0.3, bidirectional attention)" in out
    assert "(data.train.0), epoch 0, window " in out and "64 tokens in " in out and "[MASK:" in out


def test_overrides_change_the_run_as_they_do_for_the_trainer(inspect, config):
    (plain,) = samples_of(inspect, config, "--sample", 9)
    for words in (["--sample", 9, "data.seed=5"], ["data.seed=5", "--sample", 9]):
        (other,) = samples_of(inspect, config, *words)
        assert other["inputs"] != plain["inputs"]
    (causal,) = samples_of(inspect, config, "phases.1.objective=clm", "--sample", 9)
    assert causal["objective"] == "clm" and causal["window"] == plain["window"]


def test_a_config_for_a_cluster_can_be_looked_at(inspect, config):
    (plain,) = samples_of(inspect, config, "--sample", 9)
    cluster = ["parallel.tensor=2", "parallel.pipeline=2", "precision.dtype=bf16", "precision.fp8=current",
               "model.layers=transformer_engine"]
    assert samples_of(inspect, config, *cluster, "--sample", 9) == [plain]


def test_a_run_directory_will_do(inspect, real_run):
    (one,) = samples_of(inspect, real_run, "--sample", 31)
    assert (one["step"], one["phase"], one["tokens"]) == (8, "masked", 32)


@pytest.mark.parametrize(("words", "message"), [
    (["--sample", "20"], "--sample 20: the run's samples are 0..19 (5 steps)"),
    (["--sample", "-1"], "--sample"), (["--sample", "x"], "--sample x: expected a sample number"),
    (["--sample", "data.seed=1"], "--sample needs a sample number"),
    (["other", "--sample", "1"], "--sample looks at one run"),
    (["--sample", "1", "data.sed=1"], "did you mean 'seed'"),
    (["data.seed=1"], "a config is changed only with --sample"),
])
def test_mistakes_are_one_line(inspect, config, capsys, words, message):
    try:
        code, out, err = inspect("run", config, *words)
        assert err.count("\n") == 1
    except SystemExit as end:  # argparse's own: -1 looks like an option
        code, out, err = end.code, "", capsys.readouterr().err
    assert (code, out) == (2, "") and message in err


def test_a_directory_that_is_no_run(inspect, tmp_path):
    code, _, err = inspect("run", tmp_path, "--sample", 0)
    assert code == 2 and "it has no config.yaml" in err


def test_a_sample_of_a_mixture_is_shown_as_its_own_objective(inspect, config):
    parts = "{name: mixture, parts: [{objective: clm}, {objective: mntp:0.4}, {objective: {name: mlm, unit: word}}]}"
    turns = "{name: alternate, cycle: [{objective: clm, steps: 1}, {objective: mdlm, steps: 1}]}"
    shown = samples_of(inspect, config, f"phases.0.objective={turns}", f"phases.1.objective={parts}", "--sample",
                       *range(20))
    assert [one["objective"] for one in shown[:8]] == ["clm"] * 4 + ["mdlm"] * 4
    assert {one["objective"] for one in shown[8:]} == {"clm", "mntp:0.4", "mlm:0.4 (word)"}
    for one in shown:
        assert one["attention"] == ("causal" if one["objective"] == "clm" else "bidirectional")
        marked = one["text"].count("[MASK:")
        assert marked == (0 if one["objective"] == "clm" else one["targets"])
        if one["objective"] == "mntp:0.4":
            assert not {0, *(end for end in one["segment_ends"])} & {place + 1 for place in one["label_positions"]}
