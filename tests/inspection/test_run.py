"""inspect run: the closing table against metrics whose answers are known, and against a real run."""

import json
import math

import pytest

ENTROPY = math.log(8)  # of the data under write_run's runs


def report_of(inspect, *arguments) -> dict:
    code, out, err = inspect("run", *arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_phases_are_summed_up_from_the_metrics(inspect, write_run):
    causal, masked = report_of(inspect, write_run())["phases"]
    assert (causal["name"], causal["objective"], causal["steps"]) == ("causal", "clm", 4)
    assert (causal["tokens"], causal["targets"]) == (512, 480)
    assert (causal["first_loss"], causal["last_loss"], causal["validation_loss"]) == (2.5, 1.0, 0.9)
    assert causal["tokens_per_second"] == pytest.approx(4 / (1 / 1000 + 1 / 2000 + 1 / 3000 + 1 / 4000))
    assert (masked["name"], masked["objective"], masked["steps"]) == ("masked", "mlm:0.3", 4)
    assert (masked["tokens"], masked["targets"]) == (512, 120)  # 600 - 480
    assert (masked["first_loss"], masked["last_loss"], masked["validation_loss"]) == (2.5, 1.25, 1.125)
    assert masked["validation"] == {"clm": 1.75, "mlm": 1.125} and masked["validation_step"] == 8
    assert masked["tokens_per_second"] == pytest.approx(500)


def test_the_entropy_is_the_datas_and_both_phases_are_held_against_it(inspect, write_run):
    directory = write_run()
    report = report_of(inspect, directory)
    assert report["unigram_entropy"] == {"nats": pytest.approx(ENTROPY), "counted": 128, "tokens": 128}
    assert report["all_phases_below_entropy"] is True
    _, out, _ = inspect("run", directory)
    assert "2.0794 nats (counted on all 128 training tokens)" in out
    assert "both phases ended below it" in out


def test_each_phase_is_held_against_its_own_data(inspect, write_run, write_pair, tmp_path):
    """`data.train` that no phase reads may be anything, or nowhere; only its own data can cost a phase the verdict."""
    write_pair(tmp_path / "two", [[0, 1] * 64])
    changed = f"4, data: {{train: [{{path: {tmp_path / 'two'}}}]}}"
    directory = write_run(steps=("4}\nbatch", f"{changed}}}\nbatch"))
    report = report_of(inspect, directory)
    assert [phase["unigram_entropy"]["nats"] for phase in report["phases"]] == pytest.approx([ENTROPY, math.log(2)])
    assert [phase["below_entropy"] for phase in report["phases"]] == [True, False]  # 1.25 and 1.125 nats against ln 2
    assert report["unigram_entropy"] is None and report["all_phases_below_entropy"] is False
    out = inspect("run", directory)[1]
    assert "causal: 2.0794 nats (counted on all 128" in out and "masked: 0.6931 nats" in out
    assert "causal ended below it, masked ended NOT below it" in out
    (tmp_path / "even.bin").unlink()
    report = report_of(inspect, directory)
    assert "even.bin" in report["phases"][0]["unigram_entropy_unknown"] and report["all_phases_below_entropy"] is None
    assert [phase["below_entropy"] for phase in report["phases"]] == [None, False]
    assert "masked ended NOT below it" in [line.strip() for line in inspect("run", directory)[1].splitlines()]
    config = directory / "config.yaml"
    config.write_text(config.read_text().replace("clm, steps: 4", f"clm, steps: {changed}"))
    assert report_of(inspect, directory)["unigram_entropy"]["nats"] == pytest.approx(math.log(2))


@pytest.mark.parametrize(("position", "change"), [
    (3, {"loss": ENTROPY + 0.01}),  # the last train loss of causal
    (3, {"loss": float("nan")}),
    (4, {"losses": {"clm": ENTROPY + 0.01, "mlm": 1.0}}),  # its last validation loss
])
def test_a_phase_above_the_entropy_is_named(inspect, write_run, finished, position, change):
    finished[position] |= change
    directory = write_run(lines=finished)
    assert report_of(inspect, directory)["all_phases_below_entropy"] is False
    assert "causal ended NOT below it, masked ended below it" in inspect("run", directory)[1]


def test_validation_under_the_other_objective_does_not_count(inspect, write_run, finished):
    finished[4]["losses"]["mlm"] = 99.0
    assert report_of(inspect, write_run(lines=finished))["all_phases_below_entropy"] is True


def test_an_unfinished_run_says_where_it_stands(inspect, write_run, finished):
    directory = write_run(lines=finished[:8])  # one step into masked
    report = report_of(inspect, directory)
    assert (report["step"], report["planned_steps"]) == (5, 8)
    masked = report["phases"][1]
    assert (masked["steps"], masked["targets"], masked["validation"]) == (1, 40, {})
    _, out, _ = inspect("run", directory)
    assert "step 5 of 8" in out and "1/4" in out and "none yet" in out
    assert "causal ended below it, masked stands NOT below it" in out


def test_a_phase_that_has_not_begun(inspect, write_run, finished):
    directory = write_run(lines=finished[:2])
    assert report_of(inspect, directory)["phases"][1]["steps"] == 0
    code, out, _ = inspect("run", directory)
    assert code == 0 and "no validation losses" in out and "masked has no loss yet" in out


def test_json_is_json_where_numbers_are_none(inspect, write_run, finished):
    """Runs of earlier versions have NaN in their lines."""
    finished[-1]["losses"], finished[-2]["loss"] = {"clm": math.nan, "mlm": math.inf}, -math.inf
    run = write_run(lines=finished)
    for runs in ([run], [run, write_run("other")]):
        report = json.loads(inspect("run", *runs, "--json")[1], parse_constant=pytest.fail)
        phase = report.get("runs", [report])[0]["phases"][1]
        assert phase["validation"] == {"clm": None, "mlm": None} and phase["last_loss"] is None


def test_a_torn_last_line_is_left_out(inspect, write_run):
    directory = write_run()
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert report_of(inspect, directory)["step"] == 8


def test_data_that_is_gone_only_costs_the_entropy(inspect, write_run, tmp_path):
    directory = write_run()
    (tmp_path / "even.bin").unlink()
    report = report_of(inspect, directory)
    assert report["unigram_entropy"] is None and report["all_phases_below_entropy"] is None
    assert "even.bin" in report["unigram_entropy_unknown"]
    assert "not known: " in inspect("run", directory)[1]


@pytest.mark.parametrize("change, words", [
    ({"objective": ...}, "train (it has no objective)"),
    ({"loss": ...}, "train (it has no loss)"), ({"loss": "3"}, "train (loss is '3')"),
    ({"step": 2.5}, "train (step is 2.5)"),
    ({"kind": "eval"}, "eval (it has no losses)"),
    ({"tokens_per_second": None}, "train (tokens_per_second is None)"),
    ({"phase": True}, "train (phase is True)")])
def test_a_damaged_line_is_named(inspect, write_run, finished, tmp_path, change, words):
    finished[2] = {key: value for key, value in (finished[2] | change).items() if value is not ...}
    directory = write_run(lines=finished)
    for more in ([], ["--page", tmp_path / "page"]):
        code, out, err = inspect("run", directory, *more)
        assert (code, out) == (2, "") and f"{directory}/metrics.jsonl:3: a damaged line of the kind {words}" in err
        assert err.count("\n") == 1
    lines = (directory / "metrics.jsonl").read_text().splitlines(keepends=True)
    (directory / "metrics.jsonl").write_text("".join(lines[:2] + lines[3:]))  # the way out works
    assert report_of(inspect, directory)["step"] == 8


def test_what_is_no_run_directory_is_said(inspect, write_run, tmp_path):
    directory = write_run()
    for path, words in ((directory / "config.yaml", "a config file); name its run.dir"),
                        (directory / "metrics.jsonl", "a file); name the run.dir"),
                        (f"{directory}@6", f"one step of {directory}); name {directory} for the whole run, or look at "
                                           f"that step with `megatron-encdec inspect checkpoint {directory}@6`"),
                        (f"{tmp_path}/none@6", "there is no such directory)"),
                        (tmp_path, "it has no config.yaml)")):
        for more in ([], ["--page", tmp_path / "page"]):
            code, out, err = inspect("run", path, *more)
            assert (code, out) == (2, "") and f"{path}: not a run directory ({words}" in err and err.count("\n") == 1


def test_exported_models_are_named(inspect, write_run, tmp_path):
    model = tmp_path / "exported"
    model.mkdir()
    (model / "config.json").write_text('{"architectures": ["EuroBertForMaskedLM"]}')
    directory = write_run()
    assert f"{model} (EuroBertForMaskedLM)" in inspect("run", directory, "--model", model)[1]
    code, _, err = inspect("run", directory, "--model", tmp_path)
    assert code == 2 and "config.json" in err and err.count("\n") == 1


def test_what_is_no_run_is_refused_in_one_line(inspect, write_run, tmp_path):
    begun = write_run(lines=[])
    for path, word in ((tmp_path / "nowhere", "no such directory"), (tmp_path, "no config.yaml"),
                       (begun, "no step is recorded")):
        code, out, err = inspect("run", path)
        assert (code, out) == (2, "") and word in err and str(path) in err and err.count("\n") == 1


def test_the_log_is_at_most_100_columns_wide_paths_apart(inspect, write_run, finished):
    for line in finished:
        if line["kind"] == "train":
            line |= {"targets": line["targets"] * 10**9, "tokens_per_second": 1.2345678e9}
    directory = write_run(lines=finished, global_size=(4, 10**6), name="a_run_with_a_name_of_some_length")
    _, out, _ = inspect("run", directory)
    lines = out.splitlines()
    assert max(len(line) for line in lines if str(directory) not in line) <= 100
    assert "128.000M" in out and "480.000B" in out and "1.235B" in out
    assert all(line == line.rstrip() for line in lines) and "…" not in out


def test_a_real_run(inspect, real_run):
    report = report_of(inspect, real_run)
    lines = [json.loads(line) for line in (real_run / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [phase["first_loss"] for phase in report["phases"]] == [train[0]["loss"], train[4]["loss"]]
    assert [phase["last_loss"] for phase in report["phases"]] == [train[3]["loss"], train[7]["loss"]]
    assert sum(phase["targets"] for phase in report["phases"]) == report["targets"] == train[-1]["targets"]
    assert sum(phase["tokens"] for phase in report["phases"]) == report["tokens"] == 8 * 4 * 32
    assert report["checkpoint"] == str(real_run / "checkpoints" / "step_00000008")
    assert 2 < report["unigram_entropy"]["nats"] < math.log(320)
    assert inspect("run", real_run)[0] == 0


def test_other_data_under_the_same_path_is_not_taken_for_the_runs(inspect, real_run, write_pair, tmp_path):
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    for name in ("metrics.jsonl", "checkpoints/latest"):
        (copy / name).write_text((real_run / name).read_text())
    (copy / "checkpoints/step_00000008").mkdir()
    state = "checkpoints/step_00000008/run_state.json"
    (copy / state).write_text((real_run / state).read_text())
    config = (real_run / "config.yaml").read_text()
    other = write_pair(tmp_path / "other", [[1, 2, 3] * 20])
    (copy / "config.yaml").write_text(config.replace(str(real_run.parent / "corpus") + "\n", f"{other}\n", 1))
    assert "no longer what the run was trained on" in report_of(inspect, copy)["unigram_entropy_unknown"]
