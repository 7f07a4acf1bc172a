"""`--nproc N`: the local launcher. One process a rank on this machine, signals forwarded, exit codes returned.

    1. start N ranks with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT set; on a CPU by fork, so that
       the imports are done once; with a GPU as new processes, since CUDA does not survive a fork
    2. pass SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 on to every rank; a second one ends them at once
    3. when a rank fails, name it, give the others a moment, end them; return the exit code of the one that failed

Ranks whose launcher is gone (kill -9) notice it themselves: `is_orphan`.

Why not torchrun's agent: it forwards no SIGUSR1, exits 1 on SIGTERM even where all ranks have saved and exit 0, and
each of its ranks imports torch and megatron.core anew, seconds on every core. Under torchrun and srun all else works.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable

from megatron_encdec.platform.children import available_cores
from megatron_encdec.platform.errors import exit_code
from megatron_encdec.platform.signals import REPEAT_SECONDS, StopSignals, how_it_ended

SETTLE_SECONDS = 0.5  # a rank that was killed may take longer to be gone than those that miss it
GRACE_SECONDS = 3.0  # for the other ranks when one has failed: long enough for what they have to say
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

# Of this process, where it is a rank that was launched by `launch` or by torchrun; else None.
_launcher_pid: int | None = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
_started: float | None = None


def is_orphan() -> bool:
    """Whether this rank's launcher, ours or torchrun's agent, is gone; False where nothing launched it."""
    return _launcher_pid is not None and os.getppid() != _launcher_pid


def started() -> float | None:
    """time.time() when the command was given that launched this rank; None where `launch` did not."""
    return _started


def launch(work: Callable[..., int], arguments: tuple, ranks: int, began: float, imports: Callable[[], None]) -> int:
    """Run `work(*arguments)` in `ranks` processes, each of which ends with the exit code it gives; that of the whole.
    began: time.time() when the command was given. imports: of what all ranks import, called once before a fork."""
    from megatron_encdec.platform.device import device_type

    fork = device_type() == "cpu"
    context = multiprocessing.get_context("fork" if fork else "spawn")
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, available_cores() // ranks))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "OMP_NUM_THREADS": threads}
    processes = [context.Process(target=_rank_main, args=(
        work, arguments, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, os.getpid(), began))
        for rank in range(ranks)]
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # held back until all ranks are there to have them
    if fork:
        imports()
    sys.stdout.flush()
    sys.stderr.flush()
    for process in processes:
        process.start()
        signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # a first spawn lets go of some
    with StopSignals(FORWARDED) as signals:
        return _wait(processes, signals)


def _rank_main(work: Callable[..., int], arguments: tuple, environment: dict[str, str], launcher_pid: int,
               began: float) -> None:
    global _launcher_pid, _started
    os.setsid()  # a terminal's Ctrl-C goes to the launcher, which forwards it
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # the others: by StopSignals, which handles them
    _launcher_pid, _started = launcher_pid, began
    if "torch" in sys.modules:  # forked: torch has read OMP_NUM_THREADS already
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.exit(exit_code(work, *arguments))


def _wait(processes: list, signals: StopSignals) -> int:
    """Until all have ended; the exit code of the rank to name, or of a second signal, or 0."""
    deadline = failed = None
    code = forwarded = 0
    while True:
        running = [process for process in processes if process.exitcode is None]
        now = time.monotonic()
        # a rank that was killed takes others with it, which may be gone before it is: it is the one to name
        bad = sorted((process.exitcode > 0, rank) for rank, process in enumerate(processes) if process.exitcode)
        if bad and not code:
            failed = failed or now
            by_itself, rank = bad[0]
            if not by_itself or not running or now > failed + SETTLE_SECONDS:
                ended = processes[rank].exitcode
                code = ended if ended > 0 else 128 - ended  # as a shell has it
                deadline = now + GRACE_SECONDS
                if code != 2:  # a user's mistake has already said its one line
                    print(f"megatron-encdec: rank {rank} (pid {processes[rank].pid}) {how_it_ended(ended)}; ending the "
                          "other ranks", file=sys.stderr)
        if not running:
            return code
        for number in signals.all[forwarded:]:
            forwarded += 1
            for process in running:
                os.kill(process.pid, number)
        if signals.repeated and deadline is None:
            deadline = now + REPEAT_SECONDS
            code = 128 + signals.repeated
        if deadline is not None and now > deadline:
            for process in running:
                process.kill()
        time.sleep(0.02)
