"""Stopping and starting again is nothing but time passing: train lines and final weights are the same bits."""

import re

import pytest
from small_run import final_bits, metrics, run_cli


@pytest.mark.parametrize("stops", [(6,), (1, 3, 11)], ids=["boundary", "thrice"])
def test_same_bits_after_stopping(stops, unbroken, pretrain):
    for step in stops:
        run = pretrain("stopped", "--until", str(step))
        assert metrics(run)[-1]["step"] == step
    run = pretrain("stopped")
    assert metrics(run) == metrics(unbroken)
    assert metrics(run, "eval") == metrics(unbroken, "eval")
    assert final_bits(run, 12) == final_bits(unbroken, 12)


def test_turns_and_ramps_go_on_where_they_were(pretrain):
    """From inside a turn and a ramp. In a longer phase the ratios of the steps done would have been others."""
    masked = "{name: mlm, unit: span, mask_ratio: {from: 0.5, to: 0.1}}"
    cycle = f"[{{objective: clm, steps: 2}}, {{objective: {masked}, steps: 3}}]"
    turns = (f"phases=[{{name: turns, objective: {{name: alternate, cycle: {cycle}}}, steps: 9}}]",
             "schedule={name: constant}")
    whole = pretrain("whole", *turns)
    assert [line["objective"] for line in metrics(whole)] == ["clm"] * 2 + ["mlm"] * 3 + ["clm"] * 2 + ["mlm"] * 2
    targets = [line["targets"] for line in metrics(whole)]
    assert targets[8] - targets[7] < targets[2] - targets[1]
    pretrain("stopped", *turns, "--until", "4")
    ended = pretrain("stopped", *turns)
    assert metrics(ended) == metrics(whole) and final_bits(ended, 9) == final_bits(whole, 9)
    assert metrics(whole, "eval")[-1]["losses"].keys() == {"clm", "mlm"}
    pretrain("longer", *turns, "--until", "4")
    pretrain("longer", *turns, "phases.0.steps=10", code=2)


def test_bf16_and_two_ranks_resume_exactly(pretrain):
    options = ("precision.dtype=bf16", "--nproc", "2", "parallel.tensor=2")
    whole = pretrain("whole", *options)
    pretrain("stopped", *options, "--until", "6")
    assert metrics(pretrain("stopped", *options)) == metrics(whole)


def test_lines_beyond_the_checkpoint_are_cut_back(unbroken, here, begun):
    run = begun("crashed")
    with open(run / "metrics.jsonl", "a") as file:  # as a crash after step 7 would leave it
        file.write('{"kind": "train", "step": 7, "loss": 0}\n{"kind": "tr')
    assert metrics(here("crashed").run) == metrics(unbroken)


def test_a_finished_run_is_left_alone(unbroken):
    before = final_bits(unbroken, 12)
    result = run_cli("pretrain", unbroken / "config.yaml")  # the resolved config is itself an input
    assert "nothing is left to do" in result.stdout
    assert final_bits(unbroken, 12) == before


def test_a_changed_past_is_refused_with_what_differs(here, begun):
    run = begun("changed")
    before = (run / "config.yaml").read_text()
    error = here("changed", "data.seed=99", "schedule.warmup_steps=3", "evaluation.every=3", code=2).err.splitlines()
    assert "changes what determined this state (recorded -> asked for):" in error[0]
    assert error[1:-1] == ["  data.seed: 1234 -> 99", "  schedule.warmup_steps: 2 -> 3"]  # not what may change
    assert "Steps 1..6 are done" in error[-1] and "another run.dir" in error[-1]
    assert "  model.sliding_window: 'absent' -> 8" in here("changed", "model.sliding_window=8", code=2).err
    assert (run / "config.yaml").read_text() == before and metrics(run)[-1]["step"] == 6


def test_what_differs_is_said_of_the_steps_it_is_true_of(here):
    """A ramp that is a step longer moves every later stretch: they are still compared with themselves."""
    phases = ("phases=[{name: ramped, objective: clm, steps: 7, batch: {ramp: {from: 2, tokens: 600}}}, "
              "{name: mixed, objective: mlm, steps: 5, freeze: [embeddings]}]", "batch.global_size=8",
              "schedule={name: constant}")
    here("ramp", *phases)
    error = here("ramp", *phases, "phases.0.batch.ramp.tokens=1400", code=2).err
    assert "steps 5..6 (phase 'ramped'): batch_global_size: 8 -> 4" in error
    assert "phases.0.batch.ramp.tokens: 600 -> 1400" in error
    assert "freeze" not in error and "objective" not in error and "phases: steps 1..2, 3..3" in error


def test_a_longer_run_is_told_why_its_past_would_change(here):
    more = "phases=[{name: a, objective: clm, steps: 6}, {name: b, objective: mlm, steps: 6}, {name: c, objective: " \
           "clm, steps: 2}]"
    here("cosine", "schedule={name: cosine}", "--until", "7")
    error = here("cosine", "schedule={name: cosine}", more, code=2).err
    assert "run.total.steps: 12 -> 14" in error and "phases: 2 -> 3" in error and len(error) < 1200
    assert "cosine comes down over the whole run" in error and "{" not in error
    here("wsd", "schedule.decay_steps=6", "--until", "7")
    error = here("wsd", "schedule.decay_steps=6", more, code=2).err
    (way,) = re.findall(r"A checkpoint at or before step 6 can go on: run.dir=OTHER --fork (\S+)\n", error)
    assert metrics(here("longer", "schedule.decay_steps=6", more, "--fork", way).run)[-1]["step"] == 14


def test_a_changed_future_is_accepted_and_logged(here, begun):
    run = begun("changed")
    ended = here("changed", "phases.1.objective.mask_ratio=0.5", "evaluation.every=3", "checkpoint.every=50",
                 "phases.1.steps=4", "batch.micro_size=4")
    assert metrics(run)[-1]["step"] == 10
    resume, = metrics(run, "resume")
    assert resume["changed"] == {
        "phases.1.objective.mask_ratio": [0.3, 0.5], "evaluation.every": [100, 3], "checkpoint.every": [100, 50],
        "phases.1.steps": [6, 4], "run.total.steps": [12, 10], "batch.micro_size": [2, 4]}
    assert "changed: evaluation.every: 100 -> 3" in ended.out
    assert len(metrics(run, "eval")) == 3  # after steps 6, 9, 10
    here("changed", "phases.1.steps=2", code=2)  # behind where it stands


def test_reset_forgets_the_moments(unbroken, here):
    run = here("reset", "phases.1.optimizer_state=reset").run
    ours, theirs = metrics(run), metrics(unbroken)
    assert ours[:7] == theirs[:7]  # the first step of the phase starts from the same weights
    assert ours[7]["loss"] != theirs[7]["loss"]
    stopped = here("reset_stopped", "phases.1.optimizer_state=reset", "--until", "6").run
    here("reset_stopped", "phases.1.optimizer_state=reset")
    assert metrics(stopped) == ours


def test_checkpoints_kept(here):
    run = here("kept", "checkpoint.every=2").run
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == [
        "latest", "step_00000006", "step_00000012"]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000012\n"
