"""Reading trees: what the layout means, and every malformed file refused by its name in one line."""

import json

import pytest
from result_trees import write_grid, write_recorded, write_run

from megatron_encdec.finetune.results_tree import record_model
from megatron_encdec.platform.errors import UserError
from megatron_encdec.study.results import CellKey, natural, read_trees


def test_recorded_tree(tmp_path):
    write_recorded(tmp_path)
    results = read_trees([tmp_path])
    assert list(results.cells) == [CellKey("SC", "sst2", "", "610m-clm-42k")]
    cell = next(iter(results.cells.values()))
    assert cell.rates == [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4] and cell.seeds == [0, 1, 2, 3, 4]
    assert len(cell.finished) == 30 and not cell.missing and not cell.failures
    assert cell.runs[1e-5, 0].validation == 0.8482779097387173
    assert cell.runs[5e-4, 4].test == 0.8153669724770642


def test_train_set_of_retrieval(tmp_path):
    write_grid(tmp_path, "a/IR/nq", {1e-5: [0.5], 2e-5: [0.6]}, train_set="msmarco_pairs_")
    write_grid(tmp_path, "a/IR/nq", {1e-5: [0.1]}, train_set="own_")
    results = read_trees([tmp_path])
    assert results.tasks == [("IR", "nq", "msmarco_pairs"), ("IR", "nq", "own")]
    assert len(results.of_task(("IR", "nq", "msmarco_pairs"))[0].runs) == 2


def test_failed_unfinished_and_planned_runs(tmp_path):
    write_grid(tmp_path, "a/SC/x", {1e-5: [0.5, 0.6], 2e-5: [0.7, 0.8]})
    failed = tmp_path / "a/SC/x/lr0.0002_sd0"
    failed.mkdir()
    (failed / "failure.json").write_text('{"reason": "loss is not finite at step 7"}')
    (tmp_path / "a/SC/x/lr0.0002_sd1").mkdir()  # killed: a folder without either file
    (tmp_path / "a/SC/x/grid.json").write_text('{"runs": ["lr1e-05_sd0", "lr2e-05_sd2"]}')
    cell = next(iter(read_trees([tmp_path]).cells.values()))
    assert [(run.rate, run.seed, run.failure) for run in cell.failures] == [
        (2e-4, 0, "loss is not finite at step 7")]
    assert cell.seeds == [0, 1, 2]  # seed 2 stands in the plan alone
    assert cell.missing == [(1e-5, 2), (2e-5, 2), (2e-4, 1), (2e-4, 2)]
    assert (2e-4, 0) not in cell.finished


def test_results_win_over_an_earlier_failure(tmp_path):
    write_run(tmp_path / "a/SC/x/lr1e-05_sd0", 0.5, 0.5)
    (tmp_path / "a/SC/x/lr1e-05_sd0/failure.json").write_text('{"reason": "of the first attempt"}')
    assert not next(iter(read_trees([tmp_path]).cells.values())).failures


def test_two_trees_are_one(tmp_path):
    write_grid(tmp_path / "one", "a/SC/x", {1e-5: [0.5]})
    write_grid(tmp_path / "two", "a/SC/x", {1e-4: [0.5]})
    write_grid(tmp_path / "two", "b/SC/x", {1e-4: [0.5]})
    results = read_trees([tmp_path / "one", tmp_path / "two"])
    assert results.models == ["a", "b"]
    assert results.cells[CellKey("SC", "x", "", "a")].rates == [1e-5, 1e-4]


def test_foreign_folders_are_named(tmp_path):
    write_grid(tmp_path, "a/SC/x", {1e-5: [0.5]})
    (tmp_path / "logs").mkdir()
    (tmp_path / "a/plots").mkdir()
    (tmp_path / ".cache").mkdir()
    ignored = read_trees([tmp_path]).ignored
    assert len(ignored) == 2 and str(tmp_path / "logs") in ignored[1] and str(tmp_path / "a/plots") in ignored[0]


def test_runs_in_the_wrong_place_are_named(tmp_path):
    write_grid(tmp_path, "a/SC/x", {1e-5: [0.5]})
    write_grid(tmp_path, "a/SC/x/copy", {1e-5: [0.5]})
    (tmp_path / "a/SC/x/results.json").write_text("{}")
    (tmp_path / "a/SC/x/lr1e-05_sd7").mkdir()  # not finished: no fault of the tree's
    ignored = read_trees([tmp_path]).ignored
    assert len(ignored) == 2 and str(tmp_path / "a/SC/x/copy") in ignored[1]
    assert ignored[0].startswith(f"{tmp_path / 'a/SC/x/results.json'}: outside")


def test_model_record(tmp_path):
    write_grid(tmp_path, "a/SC/x", {1e-5: [0.5]})
    (tmp_path / "a/model.json").write_text('{"step": 400, "series": "demo"}')
    record = read_trees([tmp_path]).records["a"]
    assert (record.step, record.series) == (400, ("demo",))


GOOD = {"validation": {"score": 0.5, "scores_i": [1]}, "test": {"score": 0.5}}


@pytest.mark.parametrize(("content", "says"), [
    ("{", "not valid JSON"),
    ("", "not valid JSON"),
    ("[]", "expected a JSON object"),
    (json.dumps({"validation": {"score": 0.5}}), "test.score is missing"),
    (json.dumps({**GOOD, "validation": 0.5}), "validation.score is missing"),
    (json.dumps({**GOOD, "test": {"score": "0.5"}}), "test.score: expected a number, found '0.5'"),
    (json.dumps({**GOOD, "test": {"score": True}}), "expected a number, found True"),
    ('{"validation": {"score": 0.5}, "test": {"score": NaN}}', "not valid JSON"),
    (json.dumps({**GOOD, "test": {"score": 91.1}}), "from 0 to 1, found 91.1 (per cent? divide by 100)"),
    (json.dumps({**GOOD, "test": {"score": -1.1}}), "from 0 to 1"),
    (json.dumps({**GOOD, "test": {"score": 0.5, "scores_i": 3}}), "test.scores_i: expected a list"),
])
def test_malformed_results(tmp_path, content, says):
    write_grid(tmp_path, "a/SC/x", {1e-5: [0.5]})
    path = tmp_path / "a/SC/x/lr1e-05_sd0/results.json"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_trees([tmp_path])
    assert str(error.value).startswith(f"{path}: ") and says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("file", "content", "says"), [
    ("a/SC/x/lr2e-05_sd0/failure.json", '{"reason": ""}', "reason"),
    ("a/SC/x/grid.json", '{"runs": "lr1e-05_sd0"}', "expected a list"),
    ("a/SC/x/grid.json", '{"runs": ["seed0"]}', "lr<LR>_sd<seed>"),
    ("a/model.json", '{"step": "400"}', "step"),
    ("a/model.json", '{"step": 400, "series": 7}', "series"),
    ("baselines/SC/x.json", '{"baselines": {}}', "baselines"),
    ("baselines/SC/x.json", '{"baselines": {"majority": {"test": {"score": 50}}}}', "baselines.majority.test.score"),
    ("baselines/SC/x.json", '{"metric": 3, "baselines": {"majority": {"test": {"score": 0.5}}}}', "metric"),
    ("baselines/XX/x.json", '{"baselines": {"majority": {"test": {"score": 0.5}}}}', "SC, TC, QA, IR"),
])
def test_other_malformed_files(tmp_path, file, content, says):
    write_grid(tmp_path, "a/SC/x", {1e-5: [0.5]})
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read_trees([tmp_path])
    assert str(error.value).startswith(f"{path}: ") and says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["seed0", "lr0_sd0", "lr1e-05", "lr-1_sd0", "lr1e999_sd0", "lr1.2.3_sd0"])
def test_names_that_are_no_run(tmp_path, name):
    write_run(tmp_path / "a/SC/x" / name, 0.5, 0.5)
    with pytest.raises(UserError, match="expected a run's folder to be called"):
        read_trees([tmp_path])


def test_the_same_run_twice(tmp_path):
    write_run(tmp_path / "a/SC/x/lr1e-05_sd0", 0.5, 0.5)
    write_run(tmp_path / "a/SC/x/lr0.00001_sd0", 0.5, 0.5)
    with pytest.raises(UserError, match="given twice, also by .*lr0.00001_sd0"):
        read_trees([tmp_path])
    with pytest.raises(UserError, match="given twice"):
        read_trees([tmp_path, tmp_path])


def test_trees_without_runs(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        read_trees([tmp_path / "absent"])
    with pytest.raises(UserError, match="no run found"):
        read_trees([tmp_path])
    write_grid(tmp_path, "a/SC/x", {1e-5: [0.5]})
    with pytest.raises(UserError, match=f"this is the folder of one model, give {tmp_path}$"):
        read_trees([tmp_path / "a"])


def test_natural_order():
    assert sorted(["m-42k", "m-9k", "m", "10", "a"], key=natural) == ["10", "a", "m", "m-9k", "m-42k"]


def test_results_know_which_state_they_are_of(tmp_path):
    """model.json comes from the export; results of another state of that name are not mixed with them."""
    for place, step in (("a", 8), ("b", 12)):
        (tmp_path / place).mkdir()
        (tmp_path / place / "export.json").write_text(json.dumps({"step": step, "history_hash": f"{step:064x}", "run": {
            "phases": [{"name": "clm", "end": 4, "decayed": False}, {"name": "mlm40", "end": step, "decayed": True}],
            "total": step, "size": "610m", "seed": 1}}))
    write_grid(tmp_path / "tree", "m/SC/toy", {1e-5: [0.5]})
    record_model(tmp_path / "tree", "m", tmp_path / "a", ["m", "n"])
    record_model(tmp_path / "tree", "m", tmp_path / "a", ["m", "n"])
    record_model(tmp_path / "tree", "m", tmp_path / "a")  # by who knows nothing of series
    found = read_trees([tmp_path / "tree"]).records["m"]
    assert (found.step, found.series, found.run["size"]) == (8, ("m", "n"), "610m")
    with pytest.raises(UserError, match=r"m/model.json: the results there are of another model \(step 8, .* step 12"):
        record_model(tmp_path / "tree", "m", tmp_path / "b")
    record_model(tmp_path / "tree", "other", tmp_path / "tree")  # an export of others: nothing is known of it
    assert not (tmp_path / "tree/other").exists()
