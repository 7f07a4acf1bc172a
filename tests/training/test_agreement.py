"""Ranks that do not have everything in common: none takes a step, and one line says who and what.

A rank here is a process as torchrun or srun would start it. Relative paths and a working directory of its own give it
what another host has under the same names: other data, or a run directory that is not shared.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from small_run import final_bits, run_cli

from megatron_encdec.platform.errors import AgreedError, RunFailed, UserError
from megatron_encdec.platform.ranks import RankEnvironment
from megatron_encdec.training.agreement import agree

PACKAGE = Path(__file__).parents[2] / "megatron_encdec"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def variables(rank: int, port: int, ranks: int = 2) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}


@pytest.fixture
def hosts(root, tmp_path):
    """Two working directories that see tokenizer and data under the same relative names."""
    found = []
    for name in ("node0", "node1"):
        (tmp_path / name).mkdir()
        for entry in root.iterdir():
            if entry.name.startswith(("text", "tokenizer")):
                (tmp_path / name / entry.name).symlink_to(entry)
        text = (root / "config.yaml").read_text().replace(f"{root}/", "")
        (tmp_path / name / "config.yaml").write_text(text)
        found.append(tmp_path / name)
    return found


def launch(hosts, *of_each, common=()):
    """`pretrain config.yaml` with `common`, on two ranks, each with its own arguments too; the two ends."""
    port = free_port()
    with ThreadPoolExecutor(2) as threads:
        ends = [threads.submit(run_cli, "pretrain", "config.yaml", *common, *mine, check=False, directory=host,
                               **variables(rank, port))
                for rank, (host, mine) in enumerate(zip(hosts, of_each or ((), ()), strict=True))]
        return [end.result() for end in ends]


def one_line(ends, *words, code=2) -> str:
    """What all ends say together on stderr: one line, with all of `words`; every exit code is `code`."""
    said = "".join(end.stderr for end in ends).strip()
    assert [end.returncode for end in ends] == [code] * len(ends), said
    assert len(said.splitlines()) == 1, said
    for word in words:
        assert word in said
    return said


def test_two_that_agree_train(hosts, tmp_path):
    """As one launcher's ranks do, to the last bit."""
    ends = launch(hosts, common=(f"run.dir={tmp_path / 'run'}", "--until", "2"))
    assert [end.returncode for end in ends] == [0, 0], [end.stderr for end in ends]
    run_cli("pretrain", hosts[0] / "config.yaml", f"run.dir={tmp_path / 'other'}", "--until", "2", "--nproc", "2",
            directory=hosts[0])
    assert final_bits(tmp_path / "run", 2) == final_bits(tmp_path / "other", 2)


@pytest.mark.parametrize(("theirs", "words"), [
    ("optimizer.lr=2e-3", ("optimizer.lr is 0.002 instead of 0.005",)),
    ("--until=3", ("--until is 3 instead of None",)),
    ("phases.1.objective.mask_ratio=0.4", ("phases.1.objective.mask_ratio is 0.4 instead of 0.3",)),
])
def test_another_config_is_named_by_key_and_both_values(hosts, tmp_path, theirs, words):
    run = tmp_path / "run"
    host = socket.gethostname()
    one_line(launch(hosts, (), (theirs,), common=(f"run.dir={run}",)),
             f"rank 1 on {host} differs from rank 0 on {host}: ", *words)
    assert not run.exists()


def test_other_data_under_the_same_path(hosts, root, tmp_path):
    run_cli("preprocess", "--input", root / "corpus.jsonl", "--tokenizer", root / "tokenizer", "--output",
            tmp_path / "all", "--workers", "1")
    for suffix in (".bin", ".idx", ".manifest.json"):
        (hosts[1] / f"text{suffix}").unlink()
        shutil.copy(tmp_path / f"all{suffix}", hosts[1] / f"text{suffix}")
    said = one_line(launch(hosts, common=(f"run.dir={tmp_path / 'run'}",)), "the hash of data.train.0")
    assert re.search(r"data\.train\.0 is '[0-9a-f]{16}' instead of '[0-9a-f]{16}'", said)
    assert "optimizer" not in said and not (tmp_path / "run").exists()


def test_data_that_one_host_does_not_have(hosts, tmp_path):
    (hosts[1] / "text.bin").unlink()
    one_line(launch(hosts, common=(f"run.dir={tmp_path / 'run'}",)), f"rank 1 on {socket.gethostname()}: ", "text.bin")


def test_a_mistake_of_all_is_one_line_too(hosts, tmp_path):
    one_line(launch(hosts, common=(f"run.dir={tmp_path / 'run'}", "optimizer.lrr=1")), "optimizer.lrr")


def test_other_code(hosts, tmp_path):
    """Another installation, of the same version number."""
    shutil.copytree(PACKAGE, tmp_path / "site" / "megatron_encdec", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "site" / "megatron_encdec" / "objectives" / "mlm.py", "a") as file:
        file.write("# mended on this host alone\n")
    port = free_port()
    ranks = [subprocess.Popen(
        [sys.executable, "-m", "megatron_encdec", "pretrain", "config.yaml", f"run.dir={tmp_path / 'run'}"], text=True,
        cwd=host, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path), **variables(rank, port)})
        for rank, (host, path) in enumerate(zip(hosts, (PACKAGE.parent, tmp_path / "site"), strict=True))]
    said = [rank.communicate(timeout=300)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert len("".join(said).splitlines()) == 1
    assert re.search(r"rank 1 on .*: the hash of the code of megatron_encdec is '\w+' instead of '\w+'\.", said[0])


def test_a_run_directory_that_is_not_shared(hosts):
    host = socket.gethostname()
    began = time.monotonic()
    said = one_line(launch(hosts, common=("run.dir=run",)), f"run.dir: run on {host} is not the folder that rank 0 on",
                    "on a disk that all hosts share")
    assert "--fallback" not in said and not list(hosts[1].glob("run/*")) and time.monotonic() - began < 120
    assert not (hosts[0] / "run" / "checkpoints").exists()


def test_a_run_directory_that_one_host_does_not_see_any_more(hosts):
    """At a resume: not a matter of checkpoints, as it looks from there."""
    run_cli("pretrain", "config.yaml", "run.dir=run", "--until", "2", directory=hosts[0])
    one_line(launch(hosts, common=("run.dir=run",)), "on a disk that all hosts share")


def at_once(ranks: int, work) -> list:
    """What `work(store, environment)` returns or raises on `ranks` ranks, threads with a store's client each."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), False)
    found, gate = [None] * ranks, threading.Barrier(ranks)

    def rank(number: int) -> None:
        store = server if number == 0 else dist.TCPStore("127.0.0.1", server.port, None, False, timedelta(seconds=60),
                                                         False)
        gate.wait(60)
        try:
            found[number] = work(store, RankEnvironment(number, ranks, 0))
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return found


def test_many_ranks_agree_and_the_odd_one_is_named():
    plans = at_once(40, lambda store, rank: agree(store, rank, lambda: rank.rank, lambda plan: {"a": [1, 2]}))
    assert plans == list(range(40))
    ends = at_once(40, lambda store, rank: agree(store, rank, lambda: rank.rank, lambda plan: {"a": [1, plan == 31]}))
    assert {type(end) for end in ends} == {AgreedError} and len({str(end) for end in ends}) == 1
    assert "rank 31 on " in str(ends[0]) and "a.1 is True instead of False" in str(ends[0])


def test_whatever_happens_to_a_plan_all_ranks_end():
    def make(rank):
        if rank == 2:
            raise UserError("data.train: not here")
        return rank

    def ends(ranks):
        return at_once(ranks, lambda store, rank: agree(store, rank, lambda: make(rank.rank), lambda plan: {"a": 1}))

    host = socket.gethostname()
    assert {(type(end), str(end)) for end in ends(3)} == {(AgreedError, f"rank 2 on {host}: data.train: not here")}

    def make_of_one(rank):
        if rank.rank == 0:
            raise ZeroDivisionError("a fault")
        return 1

    found = at_once(3, lambda store, rank: agree(store, rank, lambda: make_of_one(rank), lambda plan: {"a": 1}))
    assert [type(end) for end in found] == [ZeroDivisionError, RunFailed, RunFailed]
    assert str(found[1]) == f"rank 0 on {host} failed: ZeroDivisionError: a fault"


def test_slow_plans_are_waited_for(capfd, monkeypatch):
    monkeypatch.setattr("megatron_encdec.training.agreement._SAY_SECONDS", 0.2)

    def make(rank):
        time.sleep(0.7 * (rank == 1))
        return rank

    assert at_once(3, lambda store, rank: agree(store, rank, lambda: make(rank.rank), lambda plan: {})) == [0, 1, 2]
    assert "waiting for the plan of rank 1\n" in capfd.readouterr().err
