"""Several hosts and a real Slurm on this machine, for tests/cluster. Needs root, iproute2 and the packages of Slurm.

    1. `why_not()`              the reason why this machine cannot, or None
    2. `with Hosts(2, ...)`     a head and nodes: Linux namespaces with addresses, names, pids, mounts and /proc of
                                their own; files are shared, as on a cluster. A cable can be cut, the power too
    3. `Slurm(hosts)`           slurmctld on the head, slurmd on each node; sbatch, srun, what became of a job

All that runs on a host ends with it, and all hosts end with this process, however it ends. Addresses and ports are
those of a network of their own, so that any number of sessions work beside each other.
"""

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from small_run import PATIENCE, Running, fork, wait_until

ROOT = Path(__file__).parents[1]
NETWORK = "10.77.0"
HEAD = 254  # last part of its address
PRETRAIN = (sys.executable, "-m", "megatron_encdec", "pretrain")
SOME_SECONDS = ("phases.0.steps=80", "phases.1.steps=80", "checkpoint.every=20")  # a run that can be disturbed
ASK = 0.3  # seconds between questions to Slurm, each of which costs 50 ms of a core
PREFIX = "encdec-"  # of network namespaces: encdec-PID-NUMBER
PROGRAMS = {"ip": "iproute2", "nsenter": "util-linux", "setpriv": "util-linux", "slurmctld": "slurmctld",
            "slurmd": "slurmd", "srun": "slurm-client"}
SLURM_CONF = """
ClusterName=encdec
SlurmctldHost=head({network}.{head})
AuthType=auth/none
AuthInfo=cred_expire=8
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=1,sched_interval=1,sched_min_interval=100000
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=8
TCPTimeout=1
MessageTimeout=5
KillWait=10
CompleteWait=0
MinJobAge=3600
GresTypes=gpu
NodeName=node[1-{count}] NodeAddr={network}.[1-{count}] CPUs=8 RealMemory=8000 Gres=gpu:8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Why there can be no such cluster here."""
    if os.geteuid() != 0:
        return "needs root, for namespaces as hosts"
    if lacking := sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)}):
        return f"needs {' '.join(lacking)}: apt-get install -y --no-install-recommends {' '.join(lacking)}"
    tried = subprocess.run(["unshare", "--net", "--uts", "--pid", "--mount", "--fork", "true"], capture_output=True,
                           text=True)
    return f"needs namespaces, which this machine does not give ({tried.stderr.strip()})" if tried.returncode else None


class Host:
    """One of `Hosts`: `number` is the last part of its `address`."""

    def __init__(self, number: int, name: str, folder: Path):
        self.number, self.name, self.address = number, name, f"{NETWORK}.{number}"
        self.names = folder / f"hosts.{name}"  # its /etc/hosts
        self._space = f"{PREFIX}{os.getpid()}-{number}"
        self._power: subprocess.Popen | None = None
        self._first = 0  # its process 1, as pids are here
        self.environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}

    def power_on(self) -> None:
        """Start it; nothing runs on it yet."""
        setup = f"hostname {self.name}; mount --bind {self.names} /etc/hosts; trap '' CHLD; exec sleep infinity"
        self._power = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self._space, "unshare", "--uts", "--pid",
             "--mount", "--fork", "--kill-child", "--mount-proc", "bash", "-c", setup], stderr=subprocess.DEVNULL)
        children = Path(f"/proc/{self._power.pid}/task/{self._power.pid}/children")
        wait_until(lambda: children.read_text().strip() != "", f"{self.name} has its first process")
        self._first = int(children.read_text())
        command = Path(f"/proc/{self._first}/comm")
        wait_until(lambda: command.read_text() == "sleep\n", f"{self.name} is up")

    def power_off(self) -> None:
        """Everything that runs on it is gone at once, without a word to anyone."""
        if self._power is not None:
            os.kill(self._first, 9)
            self._power.wait()
            self._power = None

    def plug(self, connected: bool) -> None:
        """Put its network cable in, or pull it."""
        _ip("-n", self._space.rpartition("-")[0] + f"-{HEAD}", "link", "set", f"to{self.number}",
            "up" if connected else "down")

    def build(self) -> None:
        """Its network: a cable to the head, which holds the switch."""
        hub = f"{PREFIX}{os.getpid()}-{HEAD}"
        _ip("netns", "add", self._space)
        _ip("-n", self._space, "link", "set", "lo", "up")
        if self.number == HEAD:
            _ip("-n", hub, "link", "add", "eth0", "type", "bridge")
        else:
            _ip("-n", hub, "link", "add", f"to{self.number}", "type", "veth", "peer", "name", "eth0", "netns",
                self._space)
            _ip("-n", hub, "link", "set", f"to{self.number}", "master", "eth0", "up")
        _ip("-n", self._space, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self._space, "link", "set", "eth0", "up")
        self.power_on()

    def remove(self) -> None:
        """It was never there."""
        self.power_off()
        subprocess.run(["ip", "netns", "del", self._space], capture_output=True)

    def run(self, *words, code: int | None = 0, timeout: float = PATIENCE,
            **environment: str) -> subprocess.CompletedProcess:
        """The words as a command on this host, from its start to its end with exit code `code` (None: any)."""
        done = subprocess.run(self._command(words), capture_output=True, text=True, timeout=timeout,
                              env=self._environment(environment))
        assert code in (None, done.returncode), f"exit {done.returncode}: {words}\n{done.stdout}\n{done.stderr}"
        return done

    def start(self, *words, output: Path, **environment: str) -> subprocess.Popen:
        """The words as a command on this host, running; what it says goes to the file `output`. To kill what this
        returns kills the command."""
        with open(output, "w") as file:
            return subprocess.Popen(self._command(words), stdout=file, stderr=subprocess.STDOUT,
                                    stdin=subprocess.DEVNULL, env=self._environment(environment))

    def start_cli(self, *words, output: Path, **environment: str) -> Running:
        """`megatron-encdec WORDS` likewise, in a fork that has imported torch: it spares eight seconds of a core."""
        assert self._power is not None, f"{self.name} is off"
        output.write_text("")
        return fork(_command_on_host, self._first, [str(word) for word in words], said=(output, output),
                    **self.environment, **environment)

    def signal(self, process: subprocess.Popen | Running, number: int) -> None:
        """Send a signal to what `start` or `start_cli` started (its pid is that of who waits for it and forwards
        none)."""
        os.kill(child_of(process.pid), number)

    def _command(self, words) -> list[str]:
        assert self._power is not None, f"{self.name} is off"
        return ["nsenter", "--target", str(self._first), "--net", "--uts", "--pid", "--mount", "--wd=/",
                "--", "setpriv", "--pdeathsig", "KILL", "env", f"--chdir={ROOT}", *map(str, words)]

    def _environment(self, environment: dict[str, str]) -> dict[str, str]:
        return {**os.environ, **self.environment, **environment}


class Hosts:
    """A head and `count` nodes, as long as the context lasts; `folder` (shared) holds what they need."""

    def __init__(self, count: int, folder: Path):
        self.head = Host(HEAD, "head", folder)
        self.nodes = [Host(number, f"node{number}", folder) for number in range(1, count + 1)]
        self.folder = folder
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        _remove_those_of_dead_sessions()
        names = "".join(f"{host.address} {host.name}\n" for host in self)
        with self._stack as stack:
            for host in self:
                host.names.write_text(f"127.0.0.1 localhost\n{names}")
                stack.callback(host.remove)
                host.build()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_exception):
        self._stack.close()

    def __iter__(self) -> Iterator[Host]:
        return iter([self.head, *self.nodes])


class Slurm:
    """Slurm on `hosts`; ends with them."""

    def __init__(self, hosts: Hosts):
        self.hosts, self.folder = hosts, hosts.folder
        (self.folder / "state").mkdir()
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        for number in range(8):
            (self.folder / f"gpu{number}").touch()  # can be asked for, and that is all
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(
            folder=self.folder, network=NETWORK, head=HEAD, count=len(hosts.nodes)))
        for host in hosts:
            host.environment["SLURM_CONF"] = str(self.folder / "slurm.conf")
        hosts.head.start("slurmctld", "-D", "-c", output=self.folder / "slurmctld.out")
        for node in hosts.nodes:
            self._begin(node)
        self.wait_for_nodes(len(hosts.nodes))

    def _begin(self, node: Host) -> None:
        (self.folder / f"spool.{node.name}").mkdir(exist_ok=True)
        node.start("slurmd", "-D", "-N", node.name, output=self.folder / f"slurmd.{node.name}.out")

    def power_on(self, node: Host) -> None:
        """A node that was off, or a new one of its name, comes (back)."""
        node.power_on()
        self._begin(node)

    def wait_for_nodes(self, count: int) -> None:
        """Until `count` nodes have nothing to do."""
        def idle() -> int:
            said = self.hosts.head.run("sinfo", "--noheader", "--states", "idle", "--format", "%D", code=None).stdout
            return sum(map(int, re.findall(r"\d+", said)))
        wait_until(lambda: idle() == count, f"{count} idle nodes", pause=ASK)

    def sbatch(self, *words, **environment: str) -> int:
        """Submit a batch script; the job's number."""
        return int(self.hosts.head.run("sbatch", "--parsable", *words, **environment).stdout.split(";")[0])

    def srun(self, *words, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess:
        """`srun WORDS` from the head, in a job of its own."""
        return self.hosts.head.run("srun", *words, code=code, **environment)

    def job(self, job: int | str) -> dict[str, str]:
        """What scontrol says of a job: JobState, Restarts, ExitCode, BatchHost, NodeList, ..."""
        said = self.hosts.head.run("scontrol", "show", "job", "--oneliner", job).stdout
        return dict(re.findall(r"(\w+)=(\S*)", said.splitlines()[0]))

    def wait_for(self, job: int | str, *states: str, seconds: float = PATIENCE) -> dict[str, str]:
        """Until the job is in one of `states`; what scontrol says then. It must not end in another."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"} - set(states)
        found = {}

        def there() -> bool:
            found.update(self.job(job))
            assert found["JobState"] not in final, found
            return found["JobState"] in states
        wait_until(there, f"job {job} is {' or '.join(states)}", seconds, ASK)
        return found


def child_of(pid: int) -> int:
    """The one child that a process has."""
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def pid_on_its_host(pid: int) -> int:
    """What the host of a process calls it."""
    return int(re.search(r"^NSpid:.*\s(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1])


def _command_on_host(first: int, words: list[str]) -> int:
    """For a fork: `megatron-encdec WORDS` on the host whose first process is `first`, as nsenter would run it."""
    libc = ctypes.CDLL(None, use_errno=True)
    for descriptor in [os.open(f"/proc/{first}/ns/{kind}", os.O_RDONLY) for kind in ("net", "uts", "pid", "mnt")]:
        if libc.setns(descriptor, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(descriptor)
    os.chdir(ROOT)
    child = os.fork()  # the first process that has a pid there
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code if code >= 0 else 128 - code
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    from megatron_encdec.cli import main

    return main(words)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def _remove_those_of_dead_sessions() -> None:
    for line in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout.splitlines():
        found = re.match(rf"{PREFIX}(\d+)-\d+\b", line)
        if found and not Path(f"/proc/{found[1]}").exists():
            subprocess.run(["ip", "netns", "del", found[0]], capture_output=True)


if __name__ == "__main__":  # to try things: python tests/virtual_cluster.py NODES, in a shell on the head
    import tempfile

    with tempfile.TemporaryDirectory() as directory, Hosts(int(sys.argv[1]), Path(directory)) as cluster:
        slurm = Slurm(cluster)
        subprocess.run(cluster.head._command([os.environ.get("SHELL", "bash")]),
                       env=cluster.head._environment({}))
