"""Two nodes and a spare, with a Slurm of their own; a corpus that all of them see. Skipped where there can be none."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_run import workspace
from virtual_cluster import Hosts, Slurm, why_not

PRETRAIN = (sys.executable, "-m", "megatron_encdec", "pretrain")


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


@pytest.fixture
def begin(tmp_path):
    """A function: start a command on a host; (process, file with its output). Ended after the test."""
    started: list[subprocess.Popen] = []

    def call(host, *words, **environment):
        output = tmp_path / f"output{len(started)}"
        process = host.start(*words, output=output, **environment)
        started.append(process)
        return process, output

    yield call
    for process in started:
        process.kill()
        process.wait()
