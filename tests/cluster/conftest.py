"""Three nodes with a Slurm of their own, and a corpus that all of them see. Skipped where there can be none."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_run import Running, outcome, run_cli, workspace
from virtual_cluster import PRETRAIN, Hosts, Slurm, why_not


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Slurm:
    """`cluster.hosts.head`, `cluster.hosts.nodes`, and Slurm on them; every test leaves it as it was."""
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(3, tmp_path_factory.mktemp("cluster")) as hosts:
        yield Slurm(hosts)


@pytest.fixture
def nodes(cluster):
    """The nodes as hosts, without Slurm's part in it."""
    return cluster.hosts.nodes


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    """A `workspace`, made once."""
    return workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def on_one_host(root, tmp_path_factory):
    """A function: (train lines, bits of the last checkpoint) of the config with `overrides`, trained undisturbed by
    `ranks` ranks on one host."""
    done = {}

    def call(*overrides: str, ranks: int = 2) -> tuple[list[dict], list[str]]:
        if (overrides, ranks) not in done:
            run = tmp_path_factory.mktemp("one_host") / "run"
            run_cli("pretrain", root / "config.yaml", f"run.dir={run}", *overrides, "--nproc", str(ranks))
            done[overrides, ranks] = outcome(run)
        return done[overrides, ranks]

    return call


@pytest.fixture
def begin(tmp_path):
    """A function: start a command on a host; (process, file with its output). Ended after the test. A `pretrain` is a
    fork that has imported torch, unless it is to be `cold`."""
    started: list[subprocess.Popen | Running] = []

    def call(host, *words, cold: bool = False, **environment):
        output = tmp_path / f"output{len(started)}"
        if words[:len(PRETRAIN)] == PRETRAIN and not cold:
            process = host.start_cli("pretrain", *words[len(PRETRAIN):], output=output, **environment)
        else:
            process = host.start(*words, output=output, **environment)
        started.append(process)
        return process, output

    yield call
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def on_two(nodes, root, tmp_path, begin):
    """A function: `pretrain` with the same words on nodes 1 and 2, a rank each; the two of `begin`. The path of node
    2's code may be `code`."""
    def call(*words, run: Path = tmp_path / "run", code: Path | None = None):
        second = {"cold": True, "PYTHONPATH": str(code)} if code else {}
        return [begin(node, *PRETRAIN, root / "config.yaml", f"run.dir={run}", "--nnodes", "2", "--node-rank", rank,
                      "--nproc", "1", "--master", nodes[0].name, *words, **(second if rank else {}))
                for rank, node in enumerate(nodes[:2])]

    return call


@pytest.fixture
def submit(cluster, tmp_path):
    """A function: sbatch with the words, from `tmp_path`; the job's number. It ends with the test."""
    jobs = []

    def call(*words, **environment) -> int:
        jobs.append(cluster.sbatch("--chdir", tmp_path, *words, MEGATRON_ENCDEC_PYTHON=sys.executable, **environment))
        return jobs[-1]

    yield call
    cluster.hosts.head.run("scancel", "--signal=KILL", "--full", *jobs, code=None)
    cluster.hosts.head.run("scancel", *jobs, code=None)
