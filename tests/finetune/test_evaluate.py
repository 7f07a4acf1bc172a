"""`evaluate`: a model as it is on tasks of one's own equals mteb called by hand; interrupted, it goes on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from finetune_sets import WORDS, write_rows

from megatron_encdec.cli import main
from megatron_encdec.finetune.fingerprints import revision_of
from megatron_encdec.finetune.frozen import FrozenRun, evaluate_one
from megatron_encdec.finetune.mteb_tasks import TaskName, expand, load
from megatron_encdec.finetune.results_tree import TODO, state_of, write_results
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.lock import FolderLock

pytestmark = pytest.mark.nemo  # mteb is in that environment


@pytest.fixture(scope="module")
def folders(root):
    """Two tasks: a BEIR folder, and pairs with a score that is how many words they share."""
    pytest.importorskip("mteb")
    draw = random.Random(0)
    bodies = [" ".join(draw.choices(WORDS, k=draw.randrange(8, 30))) for _ in range(40)]
    retrieval = root / "words_retrieval"
    (retrieval / "qrels").mkdir(parents=True)
    write_rows(retrieval / "corpus.jsonl", [{"_id": f"d{i}", "title": text.split()[0] if i % 2 else "", "text": text}
                                            for i, text in enumerate(bodies)])
    write_rows(retrieval / "queries.jsonl", [{"_id": f"q{i}", "text": " ".join(bodies[i].split()[2:6])}
                                             for i in range(20)])
    (retrieval / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(
        f"q{i}\td{i}\t1\n" for i in range(15)))
    similarity = root / "words_similarity"
    similarity.mkdir()
    pairs = [(draw.choices(WORDS, k=8), draw.choices(WORDS, k=8)) for _ in range(40)]
    write_rows(similarity / "test.jsonl", [{"sentence1": " ".join(a), "sentence2": " ".join(b),
                                            "score": len(set(a) & set(b)) / 2} for a, b in pairs])
    return {"Retrieval": retrieval, "STS": similarity}


def frozen(root, folder, results="evaluated") -> FrozenRun:
    model, task = str(root / "euro"), TaskName(folder.name, folder=str(folder))
    return FrozenRun(model, "euro", revision_of(model), task, str(root / results))


def by_hand(root, folders, kind) -> dict:
    """mteb's scores of the same data, by classes written here as mteb's documentation has them."""
    import mteb
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata
    from sentence_transformers import SentenceTransformer

    base = {"name": "ByHand", "description": "", "type": kind, "category": "t2t", "eval_langs": ["eng-Latn"],
            "dataset": {"path": "none", "revision": "1"},
            "main_score": "ndcg_at_10" if kind == "Retrieval" else "cosine_spearman"}
    lines = lambda name: [json.loads(one) for one in (folders[kind] / name).read_text().splitlines()]  # noqa: E731

    class Retrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(**base)

        def load_data(self, **_):
            self.queries = {"test": {one["_id"]: one["text"] for one in lines("queries.jsonl")[:15]}}
            self.corpus = {"test": {one["_id"]: one for one in lines("corpus.jsonl")}}
            self.relevant_docs = {"test": {f"q{i}": {f"d{i}": 1} for i in range(15)}}
            self.data_loaded = True

    class Similarity(AbsTaskSTS):
        metadata = TaskMetadata(**base)

        def load_data(self, **_):
            self.dataset, self.data_loaded = DatasetDict(test=Dataset.from_list(lines("test.jsonl"))), True

    task = Retrieval() if kind == "Retrieval" else Similarity()
    done = mteb.evaluate(SentenceTransformer(str(root / "euro"), device="cpu"), task, cache=None, co2_tracker=False)
    return done.task_results[0].scores["test"][0]


@pytest.mark.parametrize("kind", ["Retrieval", "STS"])
def test_scores_are_those_of_mteb_by_hand(root, folders, kind):
    import mteb

    run = frozen(root, folders[kind])
    results = evaluate_one(run)
    write_results(run.directory, results)
    expected = by_hand(root, folders, kind)
    assert results["test"]["score"] == pytest.approx(expected["main_score"], abs=1e-6) != 0
    written = json.loads((root / "evaluated/_mteb/results/local__euro" / run.revision / f"{run.task.name}.json")
                         .read_text())["scores"]["test"][0]
    assert written.keys() - {"languages"} == expected.keys() - {"languages"} and len(written) > 8
    numbers = {key: float(value) for key, value in expected.items() if isinstance(value, float)}
    assert {key: written[key] for key in numbers} == pytest.approx(numbers, abs=1e-5, nan_ok=True)  # mteb rounds them
    assert not (run.directory / "mteb").exists()
    found = mteb.ResultCache(root / "evaluated/_mteb").load_task_result(run.task.name, "local/euro", run.revision)
    assert found.get_score() == results["test"]["score"]


def test_a_report_shows_them_beside_fine_tuned_scores(root, folders, tmp_path):
    """The family MTEB, with the model's other families; nothing is missing and no rate is drawn."""
    from megatron_encdec.study.analysis import analyse, problems
    from megatron_encdec.study.content import all_tables
    from megatron_encdec.study.results import read_trees

    for kind, score in (("Retrieval", 0.5), ("STS", -0.1)):
        run = frozen(root, folders[kind], "reported")
        run.directory.mkdir(parents=True)
        write_results(run.directory, {"validation": {"score": score}, "test": {"score": score}})
    for seed in (0, 1):
        tuned = root / f"reported/euro/SC/toy/lr0.001_sd{seed}"
        tuned.mkdir(parents=True)
        write_results(tuned, {"validation": {"score": 0.5}, "test": {"score": 0.75}})
    analysis = analyse(read_trees([root / "reported"]))
    assert analysis.families == ["SC", "MTEB"] and problems(analysis) == []
    overview = all_tables(analysis)["overview"]
    scores = dict(zip((column.full_name for column in overview.columns), overview.rows[0], strict=True))
    assert {name: score.mean for name, score in scores.items() if name != "model"} == {
        "SC toy": 0.75, "MTEB words_retrieval": 0.5, "MTEB words_similarity": -0.1, "MTEB average": pytest.approx(0.2)}
    assert main(["study", "report", str(root / "reported"), "--output", str(tmp_path / "report")]) == 0
    assert "words_similarity" in (tmp_path / "report/report.md").read_text()


def test_what_a_kill_left_is_done_again_and_what_is_of_others_is_refused(root, folders, tmp_path):
    run = frozen(root, folders["STS"], "killed")
    expected = evaluate_one(run)
    torn = run.directory / "mteb/results/local__euro" / run.revision / f"{run.task.name}.json"
    torn.parent.mkdir(parents=True)
    torn.write_text('{"dataset_revision": "')
    assert evaluate_one(run) == expected
    write_results(run.directory, expected)
    run.check()
    with pytest.raises(UserError, match="of other weights .*; give it another name"):
        FrozenRun(run.model, run.name, "0" * 40, run.task, run.results).check()
    shutil.copytree(folders["STS"], tmp_path / run.task.name)
    other = FrozenRun(run.model, run.name, run.revision, TaskName(run.task.name, folder=str(tmp_path / run.task.name)),
                      run.results)
    other.check()  # a copy of the same files
    with open(tmp_path / run.task.name / "test.jsonl", "a") as file:
        file.write("\n")
    with pytest.raises(UserError, match="of other data .*; give --results another folder"):
        other.check()


KILLED = """
import os, signal, sys
from megatron_encdec.finetune.frozen import FrozenRun
from megatron_encdec.finetune.fingerprints import revision_of
from megatron_encdec.finetune.mteb_tasks import TaskName
from megatron_encdec.finetune.sweep import make_runner
from sentence_transformers import SentenceTransformer

model, folder, name, results = sys.argv[1:]
encode, calls = SentenceTransformer.encode, []

def encode_and_die(*arguments, **options):
    calls.append(1)
    return encode(*arguments, **options) if len(calls) < 2 else os.kill(os.getpid(), signal.SIGKILL)

SentenceTransformer.encode = encode_and_die
run = FrozenRun(model, "euro", revision_of(model), TaskName(name, folder=folder), results)
make_runner("megatron_encdec.finetune.frozen:evaluate_one")(run)
"""


@pytest.mark.slow  # a second process with all libraries
def test_a_task_that_kill_9_ends_in_its_middle_is_done_again(root, folders):
    """Killed when half of its texts are embedded, under the lock of its folder; the same results then."""
    run = frozen(root, folders["Retrieval"], "killed_inside")
    words = [run.model, run.task.folder, run.task.name, run.results]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert state_of(run.directory) == TODO and (run.directory / "log.txt").exists()
    with FolderLock(run.directory, "results", patience=None):  # it is free at once
        found = evaluate_one(run)
    whole = evaluate_one(frozen(root, folders["Retrieval"], "not_killed"))
    assert found["test"] == whole["test"] != {"score": 0.0}
    files = [Path(one["mteb"]["file"]) for one in (found, whole)]
    scores_of = [json.loads(file.read_text())["scores"] for file in files]
    assert scores_of[0] == scores_of[1] and not (run.directory / "mteb").exists()


def test_tasks_by_name_benchmark_and_folder(folders, tmp_path):
    assert [one.name for one in expand(["STSBenchmark", str(folders["STS"])])] == ["STSBenchmark", "words_similarity"]
    benchmark = expand(["MTEB(eng, v2)"])
    assert len(benchmark) == 41 and all(one.benchmark for one in benchmark)
    with pytest.raises(UserError, match="--tasks Nothing: no folder, and neither a task nor a benchmark of mteb"):
        expand(["Nothing"])
    with pytest.raises(UserError, match="mteb/stsbenchmark-sts.*--data holds copies"):
        load(TaskName("STSBenchmark"), str(tmp_path))
    with pytest.raises(UserError, match="STSBenchmark: its data set .*without the hub, give --data FOLDER"):
        load(TaskName("STSBenchmark"), None)


def test_a_copy_of_the_hubs_data_is_enough(folders, tmp_path):
    copy = tmp_path / "mteb/stsbenchmark-sts"
    copy.mkdir(parents=True)
    (copy / "test.jsonl").write_bytes((folders["STS"] / "test.jsonl").read_bytes())
    assert len(load(TaskName("STSBenchmark"), str(tmp_path)).dataset["test"]) == 40


@pytest.mark.parametrize(("files", "says"), [
    ({}, "no task: expected BEIR's corpus.jsonl"),
    ({"test.jsonl": '{"text": "a", "label": 1}\n'}, "no task: its columns are label, text; expected .* beside it"),
    ({"test.jsonl": '{"sentence1": "a", "sentence2": "b", "score": "much"}\n'}, "test.jsonl:1: score: regression has"),
    ({"test.jsonl": '{"sentence1": "a", "sentence2": "b", "score": 1}\n' * 2}, "test.jsonl: score: all are 1.0"),
    ({"test.jsonl": '{"sentence1": 1, "sentence2": "b", "score": 1}\n'}, "test.jsonl:1: sentence1: expected a text"),
    ({"test.jsonl": '{"sentence1": "a", "sentence2": "b", "labels": 2}\n'}, "test.jsonl:1: labels: expected 0 or 1"),
    ({"test.jsonl": '{"sentence1": "a", "sentence2": "b", "labels": 0.5}\n'}, "labels: expected 0 or 1, found 0.5"),
    ({"test.jsonl": '{"text": "a", "label": 1}\n', "train.jsonl": '{"text": "a", "label": 0.5}\n'},
     "train.jsonl:1: label: a label is a class, and 0.5 is a score"),
    ({"test.jsonl": '{"text": "a", "label": 1}\n', "train.jsonl": '{"text": "a", "label": 1}\n'},
     "train.jsonl: label: all are '1', so there is nothing to tell apart"),
    ({"corpus.jsonl": '{"_id": "1", "text": "a"}\n', "queries.jsonl": '{"_id": "1", "text": "a"}\n',
      "qrels/test.tsv": "query-id\tcorpus-id\tscore\n1\t1\t0\n"}, "no judgement of split test is above 0"),
    ({"test.jsonl": '{"sentence1": "a", "sentence2": "b", "score": 1}\n{"sentence1": "a"}\n'}, "test.jsonl:2: no "),
    ({"corpus.jsonl": '{"_id": "1", "text": "a"}\n', "queries.jsonl": '{"_id": "1", "text": "a"}\n',
      "qrels/test.tsv": "query-id\tcorpus-id\tscore\n1\t2\t1\n"}, "test.tsv:2: document '2' is in no corpus file"),
    ({"corpus.jsonl": '{"_id": "1"}\n', "queries.jsonl": '{"_id": "1", "text": "a"}\n',
      "qrels/test.tsv": "query-id\tcorpus-id\tscore\n1\t1\t1\n"}, "corpus.jsonl:1: expected _id and text, found _id"),
    ({"corpus.jsonl": "", "queries.jsonl": "", "qrels/dev.tsv": ""}, "test.tsv: no such file; splits of .*: dev"),
])
def test_folders_that_are_no_task(tmp_path, files, says):
    pytest.importorskip("mteb")
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=says):
        load(TaskName("x", folder=str(tmp_path)), None)


@pytest.mark.parametrize(("words", "says"), [
    (["nowhere"], "nowhere: no model there"), (["{root}/euro", "{root}/euro"], "two models have the name euro"),
    (["{root}/euro", "--batch-size", "0"], "--batch-size"), (["baselines={root}/euro"], "'baselines' cannot be"),
    (["{root}/euro", "--data", "nowhere"], "--data nowhere: no such folder")])
def test_mistakes_are_one_line(root, capsys, words, says):
    code = main(["evaluate", *(word.format(root=root) for word in words)])
    error = capsys.readouterr().err
    assert code == 2 and says in error and len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_a_killed_evaluation_goes_on(root, folders):
    """Stopped after its first task, then the same command again: the first is not repeated."""
    words = [sys.executable, "-m", "megatron_encdec", "evaluate", str(root / "euro"), "--results", str(root / "cli"),
             "--tasks", *map(str, folders.values())]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    while "1/2" not in (line := process.stdout.readline()):
        assert line
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = next(Path(root / "cli").rglob("frozen/results.json"))
    before = first.stat().st_mtime_ns
    again = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "1 finished, 1 not" in again.stdout and "all 2 runs are finished" in again.stdout
    assert first.stat().st_mtime_ns == before and len(list(Path(root / "cli").rglob("frozen/results.json"))) == 2
