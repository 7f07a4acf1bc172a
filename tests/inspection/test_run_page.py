"""inspect run --page: what stands on the page of a run, whatever state the run is in, and of runs over each other."""

import base64
import csv
import json
import re
import struct

import pytest

from megatron_encdec.inspection.history import RunHistory
from megatron_encdec.rundir.failure import write_failure
from megatron_encdec.rundir.lock import FolderLock

pytest.importorskip("matplotlib")


@pytest.fixture
def page_of(inspect, tmp_path):
    """page_of(runs...) -> (the page's text, its folder, what was printed)."""
    def call(*runs):
        code, out, err = inspect("run", *runs, "--page", tmp_path / "page")
        assert (code, err) == (0, "")
        return (tmp_path / "page/index.html").read_text(), tmp_path / "page", out
    return call


def rows(folder, name: str) -> list[dict]:
    return list(csv.DictReader((folder / f"tables/{name}.csv").read_text().splitlines()))


def pictures(folder) -> set[str]:
    """Names of the PNGs, each of which is one, and wide enough."""
    found = {path.stem: path.read_bytes() for path in (folder / "figures").iterdir()}
    for data in found.values():
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">I", data[16:20])[0] > 900
    return set(found)


def with_happenings(lines: list[dict]) -> list[dict]:
    """A run that was continued after step 5 with another interval, skipped step 6, and failed to save at step 7."""
    later = {"kind": "resume", "step": 5, "tokens": 640, "samples": 20, "targets": 520, "topology": {"world_size": 2},
             "changed": {"checkpoint.every": [6, 7]}}
    failed = {"kind": "checkpoint", "step": 7, "phase": "masked", "tokens": 896, "error": "rank 0: No space left"}
    lines[8]["nonfinite"] = {"loss": "nan", "grad_norm": "nan", "samples": [20, 23]}
    lines[6] |= {"bytes": 4096, "seconds_blocked": 0.25, "seconds_total": 0.5}
    return [*lines[:8], later, *lines[8:10], failed, *lines[10:]]


def test_the_page_of_a_finished_run(page_of, write_run, finished, inspect, tmp_path):
    run = write_run(lines=with_happenings(finished))
    text, folder, out = page_of(run)
    assert "finished, step 8 of 8. clm → mlm:0.3" in text and "http" not in text.partition("</style>")[2]
    assert "<script" not in text
    drawn = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(drawn) == len(pictures(folder)) == 8
    assert pictures(folder) == {"loss", "validation", "lr", "grad_norm", "tokens_per_second", "mfu", "timeline",
                                "epochs"}
    assert all(base64.b64decode(one).startswith(b"<?xml") for one in drawn)
    assert [row["what_happened"] for row in rows(folder, "events")] == [
        "end of phase causal", "continued after step 5 on 2 ranks", "changed: checkpoint.every: 6 -> 7",
        "skipped: loss nan, gradient norm nan: not learnt from", "checkpoint failed: rank 0: No space left"]
    (saved,) = rows(folder, "checkpoints")
    assert (saved["step"], saved["bytes"], saved["training_held_up,_s"], saved["still_there"]) == (
        "4", "4096", "0.25", "no")
    causal, masked = rows(folder, "sources")  # 128 tokens are 4 windows; 4 windows a step
    assert (causal["phase"], causal["share"], causal["tokens"], causal["window"]) == ("causal", "100.0", "128", "32")
    assert (float(causal["epochs_so_far"]), float(masked["epochs_so_far"])) == (4.0, 8.0)
    assert f"wrote {folder}/index.html, 8 figures as PNG, 5 tables as CSV" in out
    code, out, _ = inspect("run", run, "--page", folder, "--json")  # again, into the same folder
    assert code == 0 and json.loads(out)["page"][-1] == f"{folder}/index.html"
    assert (folder / "index.html").read_text() == text  # no dates in it


def test_a_run_on_its_way_whose_data_is_gone(page_of, write_run, finished, tmp_path):
    run = write_run(lines=finished[:3])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # being written just now
    (tmp_path / "even.bin").unlink()
    text, folder, _ = page_of(run)
    assert "the sources cannot be read here" in text and "stopped after step 3 of 8" in text
    assert "loss" in pictures(folder) and not pictures(folder) & {"validation", "epochs"}


def test_whether_a_run_is_under_way(write_run, finished):
    def state():
        return RunHistory.of(str(run), with_entropy=False).state

    run = write_run(lines=finished[:3])
    assert state() == "stopped after step 3 of 8"
    with FolderLock(run):
        assert state() == "running, step 3 of 8"
        holder = json.loads((run / "run.lock").read_text())
    (run / "run.lock").write_text(json.dumps(holder | {"started": 1}))  # no process that began then
    assert state() == "killed after step 3 of 8"
    (run / "run.lock").write_text(json.dumps(holder | {"host": "node7"}))
    assert state() == "step 3 of 8, last held by node7"


def test_a_run_that_failed_says_so(page_of, write_run, finished, inspect):
    """Until another launch is at work."""
    run = write_run(lines=finished[:3])
    write_failure(run, "step 4: loss nan; <first> seen in sample 3", step=3)
    text, folder, out = page_of(run)
    assert "failed after step 3 of 8" in text
    assert rows(folder, "events")[-1] == {"after_step": "3",
                                          "what_happened": "failed: step 4: loss nan; <first> seen in sample 3"}
    assert "failed             after step 3: step 4: loss nan" in out
    report = json.loads(inspect("run", run, "--json")[1])
    assert report["failure"]["reason"].startswith("step 4") and report["failure"]["step"] == 3
    assert "run failed after step 3: step 4: loss nan" in inspect("run", write_run("other"), run)[1]
    with FolderLock(run):
        assert RunHistory.of(str(run), with_entropy=False).state == "running, step 3 of 8"
        assert json.loads(inspect("run", run, "--json")[1])["failure"] is None


def test_a_run_that_failed_before_its_first_step(inspect, write_run):
    run = write_run(lines=[])
    assert "no step is recorded yet; start the run with `megatron-encdec pretrain`" in inspect("run", run)[2]
    write_failure(run, "step 1: loss nan", step=0)
    assert "no step is recorded yet; the last launch failed: step 1: loss nan" in inspect("run", run)[2]


def test_a_run_of_many_steps_is_a_page_of_ordinary_size(page_of, write_run, finished):
    template, steps = finished[0], 30_000
    lines = [template | {"step": step, "loss": 10 / step**0.3 + (step % 7) / 10, "tokens": 128 * step}
             for step in range(1, steps + 1)]
    run = write_run(lines=lines, steps=(4, 20_000))
    text, folder, _ = page_of(run)
    assert len(text) < 1_500_000 and "stopped after step 30,000 of 40,000" in text


def test_each_objective_has_losses_of_its_own_in_each_phase(write_run, finished):
    for line in finished[1:4:2]:
        line["objective"] = "mntp"
    losses = RunHistory.of(str(write_run(lines=finished)), with_entropy=False).losses
    assert {name: [one.steps_P.tolist() for one in parts] for name, parts in losses.items()} == {
        "clm": [[1, 3]], "mntp": [[2, 4]], "mlm": [[5, 7, 8]]}


def test_two_runs_over_each_other(page_of, write_run, finished):
    second = write_run("second", lines=finished[:8], batches=(1, 2))
    text, folder, out = page_of(write_run("first"), second)
    assert "2 runs" in text and "first: finished, step 8 of 8; second: stopped after step 5 of 8" in text
    assert "validation losses CANNOT be compared" in text
    assert pictures(folder) >= {"loss_clm", "loss_mlm", "validation_clm", "validation_mlm", "timeline", "epochs_0",
                                "epochs_1"}
    assert [row["run"] for row in rows(folder, "phases")] == ["first", "first", "second", "second"]
    assert "final validation losses" in out


def test_what_cannot_be_drawn_is_left_out_and_counted(page_of, write_run, finished):
    nan, infinite = float("nan"), float("inf")
    finished[0]["grad_norm"], finished[1]["grad_norm"] = nan, infinite
    finished[7] |= {"loss": nan, "grad_norm": infinite, "tokens_per_second": infinite, "mfu": nan}
    finished[4] |= {"losses": {"clm": None, "mlm": nan}, "nonfinite": {"clm": "inf"}}  # as it is now, as it was
    for line in finished:
        line |= {"lr": -infinite} if line["kind"] == "train" else {}
    text, folder, _ = page_of(write_run(lines=finished))
    for words in ("3 of the gradient norm; 8 of the learning rate", "1 of MFU; 1 of tokens a second",
                  "1 of the training loss; 1 of the validation loss clm; 1 of the validation loss mlm"):
        assert f"<p>Not drawn, being NaN or infinite: {words}.</p>" in text
    assert pictures(folder) == {"loss", "validation", "grad_norm", "tokens_per_second", "mfu", "timeline", "epochs"}
    text, _, _ = page_of(write_run("other", lines=finished), write_run("third"))
    assert "Not drawn, being NaN or infinite: 1 of MFU (other); 1 of tokens a second (other)" in text


def test_a_folder_of_somebody_else(inspect, write_run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/index.html").write_text("mine")
    code, _, err = inspect("run", write_run(), "--page", tmp_path / "mine")
    assert code == 2 and f"--page {tmp_path}/mine: index.html is there, and no report wrote it" in err


def test_a_page_goes_with_runs(inspect, write_run, tmp_path):
    code, _, err = inspect("run", write_run(), "--sample", 0, "--page", tmp_path / "page")
    assert code == 2 and "--page goes with the table of a run, not with --sample" in err
