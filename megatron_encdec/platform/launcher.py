"""`--nproc G`, `--nnodes N`: our launcher. One process a rank on this node, signals forwarded, exit codes returned.

    1. `read_nodes(...)`   what is to be started here: by command line and, under srun, by the step's numbers
    2. `launch(...)`       start this node's ranks with RANK, WORLD_SIZE, LOCAL_RANK and where they meet; on a CPU by
                           fork, so that the imports are done once; with a GPU as new processes, since CUDA does not
                           survive a fork. Signals (`FORWARDED`) go on to every rank; a second one ends them
    3. when a rank fails, on any node, every node names it and its host, gives the other ranks a moment, ends them, and
       returns the exit code of the one that failed

The launchers of several nodes meet first (`meeting.py`) and keep the connections: failures go over them, node 0's
passes them on. Signals do not: the ranks agree among themselves to save and stop, and each launcher ends with its own
(ranks that were still on their way to a meeting are told when the others have ended).

Ranks whose launcher is gone (kill -9) notice it themselves: `is_orphan`.

Why not torchrun's agent: it forwards no SIGUSR1, exits 1 on SIGTERM even where all ranks have saved and exit 0, waits
300 s for the other agents at its end, and each of its ranks imports torch and megatron.core anew, seconds on every
core. Under torchrun and srun all else works.
"""

import argparse
import multiprocessing
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, field

from megatron_encdec.platform.children import available_cores
from megatron_encdec.platform.errors import UserError, exit_code, stopped_code
from megatron_encdec.platform.meeting import JOB, PORT, Met, Party, of_step, port_of
from megatron_encdec.platform.ranks import Step, host_name
from megatron_encdec.platform.signals import REPEAT_SECONDS, StopSignals, how_it_ended

SETTLE_SECONDS = 0.5  # a rank that was killed may take longer to be gone than those that miss it
GRACE_SECONDS = 3.0  # for the other ranks when one has failed: long enough for what they have to say
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
LOST_CONTACT = 113  # exit code, to the launcher alone, of a rank that another one has left

# Of this process, where it is a rank that was launched by `launch` or by torchrun; else None.
_launcher_pid: int | None = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
_started: float | None = None


@dataclass(frozen=True)
class Nodes:
    """`ranks` to start on this node, number `node` of `count`; where the launchers meet; what srun calls the job."""

    ranks: int
    count: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = PORT
    job: str = ""

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.count * self.ranks

    def party(self, name: str) -> Party:
        """The launchers. name: of the job, where srun has none."""
        return Party(self.job or name, "node", self.node, self.count, self.address, self.port,
                     {"--nnodes": self.count, "--nproc": self.ranks})


def at_least_one(thing: str, option: str, count: int | None) -> None:
    """Raises `UserError` where the `option` asks for fewer than one `thing`."""
    if count is not None and count < 1:
        raise UserError(f"{option} {count}: at least one {thing}")


def read_nodes(nproc: int | None, nnodes: int | None, node: int | None, master: str | None,
               gpus: Callable[[], int]) -> Nodes | None:
    """What `--nproc`, `--nnodes`, `--node-rank` and `--master` ask for here; None where this process is itself a rank,
    alone or of a job that srun or torchrun has started. gpus: how many this process sees. Numbers that do not fit
    together are a `UserError`."""
    at_least_one("rank", "--nproc", nproc)
    at_least_one("node", "--nnodes", nnodes)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
        if nnodes is not None or (nproc or 1) > 1:
            raise UserError(f"--nproc, --nnodes: this is rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} of "
                            "torchrun (RANK and WORLD_SIZE are set); use one launcher of the two")
        return None
    step = Step.read()
    if step and (step.tasks > 1 or nnodes is None):
        return _nodes_of_step(step, nproc, nnodes, gpus)
    if nnodes is None:
        return Nodes(nproc) if (nproc or 1) > 1 else None
    nodes = _nodes_by_hand(nproc or max(1, gpus()), nnodes, node, master)
    return nodes if nodes.world_size > 1 else None


def add_node_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of a verb that is started on several nodes."""
    parser.add_argument("--nnodes", type=int, metavar="N", help="this is one of N nodes; the same command on each, "
                        "with its own --node-rank")
    parser.add_argument("--node-rank", type=int, metavar="R", help="number of this node, from 0 (default: NODE_RANK)")
    parser.add_argument("--master", metavar="ADDRESS[:PORT]", help="where node 0 is reached (default: MASTER_ADDR, "
                        "MASTER_PORT, 29500)")


def check_srun(nproc: int | None, nnodes: int | None) -> None:
    """Refuse to be one process of a Slurm job that has room for several, where the command does not say so."""
    if nnodes is not None or "RANK" in os.environ or Step.read():
        return
    asked = ("SLURM_JOB_NUM_NODES",) if nproc else ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS")
    several = [f"{name}={os.environ[name]}" for name in asked if os.environ.get(name, "1") != "1"]
    if several:
        raise UserError(f"{', '.join(several)}, but this is no step of that job: put srun before the command, or say "
                        "--nnodes 1 to use this node alone")


def _nodes_of_step(step: Step, nproc: int | None, nnodes: int | None, gpus: Callable[[], int]) -> Nodes | None:
    """A task a node starts the node's ranks; a task a rank is one."""
    nodes, counts = len(step.tasks_of_node), set(step.tasks_of_node)
    started = f"srun has started {step.tasks} tasks on {nodes} nodes ({', '.join(map(str, sorted(counts)))} a node)"
    if nnodes not in (None, nodes):
        raise UserError(f"--nnodes {nnodes}: {started}; leave it out, srun says it")
    if counts == {1}:
        ranks = nproc or max(1, gpus())
        name, address, port = of_step(step)
        return Nodes(ranks, nodes, step.task, address, port, name) if ranks > 1 else None
    if nproc is not None and counts != {nproc}:
        raise UserError(f"--nproc {nproc}: {started}; a task a rank needs no --nproc, and --ntasks-per-node 1 lets one "
                        f"task start {nproc} ranks")
    seen = 1 if nproc else gpus()
    if seen > 1 and counts != {seen}:
        raise UserError(f"{started}, and a task sees {seen} GPUs: --ntasks-per-node {seen} is a task a GPU, "
                        f"--ntasks-per-node 1 lets one task start all {seen}")
    return None


def _nodes_by_hand(ranks: int, nnodes: int, node: int | None, master: str | None) -> Nodes:
    if node is None:
        text = os.environ.get("NODE_RANK") or ("0" if nnodes == 1 else "")
        node = int(text) if text.isdigit() else -1
    master = master or os.environ.get("MASTER_ADDR") or ("127.0.0.1" if nnodes == 1 else None)
    if not 0 <= node < nnodes or master is None:
        raise UserError(f"--nnodes {nnodes}: needs --node-rank (or NODE_RANK) from 0 to {nnodes - 1} and --master "
                        "ADDRESS (or MASTER_ADDR), where node 0 is reached")
    address, colon, port = master.rpartition(":")
    if not colon or address.count(":") and not address.endswith("]"):  # no port: a name, or an IPv6 address
        address, port = master, os.environ.get("MASTER_PORT") or str(PORT)
    if not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise UserError(f"--master {master}: write ADDRESS or ADDRESS:PORT, with a port from 1 to 65535")
    return Nodes(ranks, nnodes, node, address.strip("[]"), int(port))


def is_orphan() -> bool:
    """Whether this rank's launcher, ours or torchrun's agent, is gone; False where nothing launched it."""
    return _launcher_pid is not None and os.getppid() != _launcher_pid


def started() -> float | None:
    """time.time() when the command was given that launched this rank; None where `launch` did not."""
    return _started


def where_ranks_meet() -> dict:
    """Node 0's offer to the other launchers: a name that no other job has, and its port."""
    job = secrets.token_hex(8)
    return {"job": job, "port": port_of(job)}


def launch(work: Callable[..., int], arguments: tuple, nodes: Nodes, began: float, imports: Callable[[], None],
           met: Met | None = None) -> int:
    """Run `work(*arguments)` in the ranks of this node, each of which ends with the exit code it gives; that of the
    whole. began: time.time() when the command was given. imports: of what all ranks import, called once before a fork.
    met: how the launchers have met, where there are several."""
    from megatron_encdec.platform.device import device_type

    fork = device_type() == "cpu"
    context = multiprocessing.get_context("fork" if fork else "spawn")
    met = met or Met(offer=where_ranks_meet())
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // nodes.ranks))
    environment = {"WORLD_SIZE": str(nodes.world_size), "MASTER_ADDR": met.address,
                   "MASTER_PORT": str(met.offer["port"]), JOB: met.offer["job"], "OMP_NUM_THREADS": threads}
    processes = [context.Process(target=_rank_main, args=(
        work, arguments, {**environment, "RANK": str(nodes.node * nodes.ranks + local), "LOCAL_RANK": str(local)},
        os.getpid(), began, met if fork else None)) for local in range(nodes.ranks)]
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # held back until all ranks are there to have them
    if fork:
        imports()
    sys.stdout.flush()
    sys.stderr.flush()
    for process in processes:
        process.start()
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # a first spawn lets go of some
    with StopSignals(FORWARDED) as signals:
        return _wait(processes, signals, _Crew(nodes, met))


def _rank_main(work: Callable[..., int], arguments: tuple, environment: dict[str, str], launcher_pid: int,
               began: float, inherited: Met | None) -> None:
    global _launcher_pid, _started
    if inherited:
        inherited.close()  # so that the other nodes see the end of the launcher
    os.setsid()  # a terminal's Ctrl-C goes to the launcher, which forwards it
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # the others: by StopSignals, which handles them
    _launcher_pid, _started = launcher_pid, began
    if "torch" in sys.modules:  # forked: torch has read OMP_NUM_THREADS already
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.exit(exit_code(work, *arguments))


@dataclass(frozen=True, order=True)
class _Failure:
    """kind: 0 a signal ended a rank, and may take others with it; 1 it ended by itself; 2 it missed another one.
    text: what to say of it. code: that the launchers end with. node: its number."""

    kind: int
    text: str = field(compare=False)
    code: int = field(compare=False)
    node: int = field(compare=False)


class _Crew:
    """The launchers of all nodes, as this one sees them."""

    def __init__(self, nodes: Nodes, met: Met):
        self._nodes, self._links = nodes, met.links
        self.alone = nodes.count == 1
        self.stopped: list[int] = []  # the signal that has ended another node's ranks before ours had met them

    def failure(self, local: int, pid: int, ended: int) -> _Failure:
        """Of a rank of this node. ended: its exit code as Python has it."""
        where = "" if self.alone else f" on {host_name()}"
        how = "lost contact with another rank" if ended == LOST_CONTACT else how_it_ended(ended)
        kind = 0 if ended < 0 else 2 if ended == LOST_CONTACT else 1
        code = 1 if ended == LOST_CONTACT else ended if ended > 0 else 128 - ended  # as a shell has it
        return _Failure(kind, f"rank {self._nodes.node * self._nodes.ranks + local} (pid {pid}{where}) {how}", code,
                        self._nodes.node)

    def second(self, number: int) -> _Failure:
        """A second signal ends the ranks of all nodes."""
        return _Failure(0, f"a second {signal.Signals(number).name} on {host_name()}", 128 + number, self._nodes.node)

    def has_been_said(self, failure: _Failure) -> bool:
        """Whether it is a user's mistake, whose line a rank of this node has printed, or one of this job of Slurm."""
        return failure.code == 2 and (self._nodes.node == failure.node == 0 or Step.read() is not None)

    def tell(self, failures: list[_Failure], but: int | None = None) -> None:
        """Tell the other nodes, except node `but`."""
        for failure in failures:
            for node, link in self._links.items():
                if node != but:
                    link.send(failure=list(astuple(failure)))

    def heard(self) -> list[_Failure]:
        """What the others have told since; node 0 passes it on."""
        failures: list[_Failure] = []
        for node, link in list(self._links.items()):
            for message in link.received():
                if "failure" in message:
                    failures.append(_Failure(*message["failure"]))
                    self.tell(failures[-1:], but=node)
                elif "done" in message:
                    self.stopped += message["done"][:1]
                    link.closed = True
                    del self._links[node]
            if link.closed and self._links.pop(node, None):
                print(f"megatron-encdec: the launcher of node {node} is gone; its ranks save and end, if they can",
                      file=sys.stderr)
        return failures

    def done(self, received: list[int]) -> None:
        """This node's ranks have ended, after these signals."""
        for link in self._links.values():
            link.send(done=received)


def _wait(processes: list, signals: StopSignals, crew: _Crew) -> int:
    """Until all ranks of this node have ended; the exit code of the rank to name, or of a second signal, or
    `stopped_code` or 0."""
    failures: list[_Failure] = []
    seen: set[int] = set()
    deadline = failed = None
    code = forwarded = 0
    while True:
        running = [process for process in processes if process.exitcode is None]
        now = time.monotonic()
        ended = [(process.exitcode, local) for local, process in enumerate(processes)
                 if process.exitcode not in (None, 0, stopped_code()) and local not in seen]
        seen.update(local for _, local in ended)
        ours = [crew.failure(local, processes[local].pid, exitcode) for exitcode, local in ended]
        if not code:
            crew.tell(ours)
        failures += [*ours, *crew.heard()]
        if failures and not code:
            failed = failed or now
            worst = min(failures)
            settled = now > failed + SETTLE_SECONDS * (1 if worst.kind < 2 else 4)
            if worst.kind == 0 or settled or crew.alone and not running:
                code, deadline = worst.code, now + GRACE_SECONDS
                if not crew.has_been_said(worst):
                    print(f"megatron-encdec: {worst.text}; ending the other ranks", file=sys.stderr)
        if not running and (code or not failures):
            crew.done(signals.all)
            return code or max(process.exitcode for process in processes)
        for number in (signals.all or crew.stopped[:1])[forwarded:]:
            forwarded += 1
            for process in running:
                os.kill(process.pid, number)
        if signals.repeated and deadline is None:
            deadline = now + REPEAT_SECONDS
            code = 128 + signals.repeated
            crew.tell([crew.second(signals.repeated)])
        if deadline is not None and now > deadline:
            for process in running:
                process.kill()
        time.sleep(0.02)
