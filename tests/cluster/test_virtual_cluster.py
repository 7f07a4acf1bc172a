"""The hosts and the Slurm that the other tests here stand on are what they say."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import wait_until
from virtual_cluster import PREFIX, ROOT

pytestmark = pytest.mark.slurm


def test_a_host_has_a_name_an_address_and_processes_of_its_own(nodes):
    for node in nodes:
        said = node.run("bash", "-c", "hostname; hostname -I; getent hosts node1; ls /proc | grep -c '^[0-9]*$'")
        name, address, first, processes = said.stdout.splitlines()
        assert (name, address.strip()) == (node.name, node.address) and first.split() == [nodes[0].address, "node1"]
        assert int(processes) < 20


def reaches(host, other) -> bool:
    code = f"import socket; socket.create_connection(('{other.name}', 6818), timeout=0.5)"  # where slurmd listens
    return host.run(sys.executable, "-I", "-c", code, code=None).returncode == 0


def test_a_cable_is_cut_and_mended(nodes):
    assert reaches(nodes[0], nodes[1])
    nodes[1].plug(False)
    assert not reaches(nodes[0], nodes[1]) and reaches(nodes[0], nodes[2])
    nodes[1].plug(True)
    assert reaches(nodes[0], nodes[1])


def test_slurm_runs_tasks_on_its_nodes_and_a_power_cut_is_one(cluster, nodes, begin):
    said = cluster.srun("--nodes", "2", "--ntasks-per-node", "2", "hostname").stdout
    assert sorted(said.split()) == ["node1"] * 2 + ["node2"] * 2
    process, _ = begin(nodes[2], "sleep", "100")
    nodes[2].power_off()
    process.wait(10)
    cluster.power_on(nodes[2])
    cluster.wait_for_nodes(3)


def test_a_session_that_is_killed_leaves_nothing_running_and_the_next_clears_its_names(tmp_path):
    code = ("import sys, time; from pathlib import Path; from virtual_cluster import Hosts, Slurm\n"
            "with Hosts(1, Path(sys.argv[1])) as hosts: Slurm(hosts); print('up', flush=True); time.sleep(600)")
    session = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert session.stdout.readline() == "up\n"
    session.send_signal(signal.SIGKILL)
    session.communicate()

    def running():
        return [pid for pid in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in read(pid)
                or f"{PREFIX}{session.pid}-".encode() in read(pid)]
    wait_until(lambda: not running(), "the end of its hosts", 10)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
