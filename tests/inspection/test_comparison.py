"""inspect run A B: final validation losses side by side, a word on everything that stands between them."""

import json


def compare(inspect, *runs) -> dict:
    code, out, err = inspect("run", *runs, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_two_equal_experiments_differ_in_nothing(inspect, write_run, finished):
    first = write_run("first")
    finished[-1]["losses"] = {"clm": 1.5, "mlm": 1.5}
    second = write_run("second", lines=finished)
    assert compare(inspect, first, second)["remarks"] == []
    code, out, _ = inspect("run", first, second)
    assert code == 0 and "differ in nothing but their phases" in out
    assert "1.1250*" in out and "1.5000*" in out  # lowest mlm of the first, lowest clm of the second
    assert "1.7500*" not in out and "1.5000 *" not in out
    assert "clm 4 + mlm:0.3 4" in " ".join(out.split())


def test_final_losses_are_the_newest_there_are(inspect, write_run, finished):
    report = compare(inspect, write_run("first"), write_run("second", lines=finished[:8]))
    first, second = (run["final_validation"] for run in report["runs"])
    assert first == {"clm": 1.75, "mlm": 1.125} and second == {"clm": 0.9, "mlm": 3.5}
    assert [line for line in report["remarks"] if "not finished: step 5 of 8" in line]
    assert [line for line in report["remarks"] if "not the same budget: 1,024 -> 640 tokens" in line]


def test_a_run_without_validation_has_dashes(inspect, write_run, finished):
    without = [line for line in finished if line["kind"] != "eval"]
    code, out, _ = inspect("run", write_run("first"), write_run("second", lines=without))
    assert code == 0 and "1.1250*" in out


def test_other_validation_is_called_incomparable(inspect, write_run):
    second = write_run("second", sequence_length=(32, 64), batches=(1, 2))
    remarks = compare(inspect, write_run("first"), second)["remarks"]
    incomparable = next(line for line in remarks if "CANNOT be compared" in line)
    assert "data.sequence_length: 32 -> 64" in incomparable and "validation windows: 4 -> 8" in incomparable


def test_another_mask_ratio_is_called_incomparable(inspect, write_run):
    second = write_run("second", mask_ratio=(0.3, 0.5))
    remarks = compare(inspect, write_run("first"), second)["remarks"]
    assert [line for line in remarks if "CANNOT be compared: objectives.mlm.mask_ratio: 0.3 -> 0.5" in line]


def test_what_else_differs_is_listed_and_cosmetics_are_not(inspect, write_run):
    second = write_run("second", hidden_size=(32, 48), micro_size=(2, 1), every=(6, 7))
    remarks = compare(inspect, write_run("first"), second)["remarks"]
    assert len(remarks) == 1
    assert "besides the phases they differ in" in remarks[0] and "model.hidden_size: 32 -> 48" in remarks[0]
    assert "micro_size" not in remarks[0] and "every" not in remarks[0]


def test_models_go_with_one_run(inspect, write_run):
    code, _, err = inspect("run", write_run("first"), write_run("second"), "--model", "anywhere")
    assert code == 2 and "--model goes with one run" in err
