"""`--nproc N`: the local launcher. One process a rank on this machine, signals forwarded, exit codes returned.

    1. start N ranks with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT set; on a CPU by fork, so that
       the imports are done once; with a GPU as new processes, since CUDA does not survive a fork
    2. pass SIGINT, SIGTERM and SIGUSR1 on to every rank; a second one ends them at once
    3. when a rank fails, name it, give the others a moment, end them; return the exit code of the one that failed

Ranks whose launcher is gone (kill -9) notice it themselves: `is_orphan`.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time

SETTLE_SECONDS = 0.5  # a rank that was killed may take longer to be gone than those that miss it
GRACE_SECONDS = 3.0  # for the other ranks when one has failed: long enough for what they have to say
REPEAT_SECONDS = 1.0  # a signal that comes again sooner is the same one (to a process group and forwarded as well)

# Of this process, where it is a rank that was launched by `launch` or by torchrun; else None.
_launcher_pid: int | None = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
_started: float | None = None


def is_orphan() -> bool:
    """Whether this rank's launcher, ours or torchrun's agent, is gone; False where nothing launched it."""
    return _launcher_pid is not None and os.getppid() != _launcher_pid


def started() -> float | None:
    """time.time() when the command was given that launched this rank; None where `launch` did not."""
    return _started


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(arguments: list[str], ranks: int, began: float) -> int:
    """Run `megatron-encdec ARGUMENTS` as `ranks` processes; the exit code of the whole.

    began: time.time() when the command was given.
    """
    from megatron_encdec.platform.device import device_type

    signals = _Forwarder()
    fork = device_type() == "cpu"
    if fork:
        import_what_ranks_need()
    context = multiprocessing.get_context("fork" if fork else "spawn")
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // ranks))
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
                   "OMP_NUM_THREADS": threads}
    sys.stdout.flush()
    sys.stderr.flush()
    processes = [context.Process(target=_rank_main, args=(
        arguments, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, os.getpid(), began))
        for rank in range(ranks)]
    signals.processes = processes
    try:
        for process in processes:
            signal.pthread_sigmask(signal.SIG_BLOCK, _Forwarder.NUMBERS)  # a rank begins with them held back
            process.start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _Forwarder.NUMBERS)
            signals.catch_up(process)
        return _wait(processes, signals)
    finally:
        signals.restore()


def import_what_ranks_need() -> None:
    """What every rank would import for itself: seconds, done once before the fork."""
    import torch._dynamo  # noqa: F401  (torch's optimizers import it in their first step)

    import megatron_encdec.training.execute  # noqa: F401


def _rank_main(arguments: list[str], environment: dict[str, str], launcher_pid: int, began: float) -> None:
    """A rank, from its first instruction to its exit code."""
    global _launcher_pid, _started
    os.setsid()  # a terminal's Ctrl-C goes to the launcher, which forwards it
    os.environ.update(environment)
    for number in _Forwarder.NUMBERS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # the others: by StopSignals, which handles them
    _launcher_pid, _started = launcher_pid, began
    if "torch" in sys.modules:  # forked: torch has read OMP_NUM_THREADS already
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    from megatron_encdec.cli import main

    sys.exit(main(arguments))


class _Forwarder:
    """Signals to the launcher go to every rank."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.processes: list = []
        self.first: float | None = None  # when the first one came
        self.again = False  # a second one has come
        self._received: list[int] = []  # while ranks were still being started, too
        self._previous = {number: signal.signal(number, self._forward) for number in self.NUMBERS}

    def _forward(self, number, _frame) -> None:
        now = time.monotonic()
        self.again |= self.first is not None and now - self.first >= REPEAT_SECONDS
        self.first = self.first or now
        self._received.append(number)
        for process in self.processes:
            self._send(process, number)

    def _send(self, process, number: int) -> None:
        if process.pid is not None and process.exitcode is None:
            os.kill(process.pid, number)

    @property
    def last(self) -> int:
        """Number of the newest signal."""
        return self._received[-1]

    def catch_up(self, process) -> None:
        """Give a rank that was started late the signals that came before it was there."""
        for number in self._received:
            self._send(process, number)

    def restore(self) -> None:
        """As it was before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _wait(processes: list, signals: _Forwarder) -> int:
    """Until all have ended; the exit code of the rank to name, or of a second signal, or 0."""
    deadline = failed = None
    code = 0
    while True:
        running = [process for process in processes if process.exitcode is None]
        now = time.monotonic()
        # a rank that was killed takes others with it, which may be gone before it is: it is the one to name
        bad = sorted((process.exitcode > 0, rank) for rank, process in enumerate(processes) if process.exitcode)
        if bad and not code:
            failed = failed or now
            by_itself, rank = bad[0]
            if not by_itself or not running or now > failed + SETTLE_SECONDS:
                code = _exit_code(processes[rank])
                deadline = now + GRACE_SECONDS
                if code != 2:  # a user's mistake has already said its one line
                    _say_failed(rank, processes[rank])
        if not running:
            return code
        if signals.again and deadline is None:
            deadline = now + REPEAT_SECONDS
            code = 128 + signals.last
        if deadline is not None and now > deadline:
            for process in running:
                process.kill()
        time.sleep(0.02)


def _exit_code(process) -> int:
    """As a shell has it."""
    return process.exitcode if process.exitcode >= 0 else 128 - process.exitcode


def _say_failed(rank: int, process) -> None:
    code = process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    print(f"megatron-encdec: rank {rank} (pid {process.pid}) {how}; ending the other ranks", file=sys.stderr)
