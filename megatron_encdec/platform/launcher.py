"""`--nproc N`: the local launcher. One process a rank on this machine, signals forwarded, exit codes returned.

    1. start N copies of the same command with RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT set
    2. pass SIGINT, SIGTERM and SIGUSR1 on to every rank
    3. when a rank fails, give the others a grace period, then end them; return the first failing exit code
"""

import os
import signal
import socket
import subprocess
import sys
import time

GRACE_SECONDS = 20.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(arguments: list[str], ranks: int) -> int:
    """Run `python -m megatron_encdec ARGUMENTS` as `ranks` processes; the exit code of the whole."""
    environment = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(_free_port())}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))
    processes = []
    received: list[int] = []

    def forward(number, _frame):
        received.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, forward)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        for rank in range(ranks):
            processes.append(subprocess.Popen(
                [sys.executable, "-m", "megatron_encdec", *arguments], start_new_session=True,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
        for number in list(received):  # one that came while ranks were still being started
            forward(number, None)
        return _wait(processes)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen]) -> int:
    deadline = None
    first_failure = 0
    while any(process.poll() is None for process in processes):
        for rank, process in enumerate(processes):
            code = process.poll()
            if code and not first_failure:
                first_failure = code if code > 0 else 128 - code
                deadline = time.monotonic() + GRACE_SECONDS
                if code != 2:  # a user's mistake has already said its one line
                    print(f"rank {rank} ended with exit code {first_failure}; ending the other ranks",
                          file=sys.stderr)
        if deadline is not None and (first_failure == 2 or time.monotonic() > deadline):
            for process in processes:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.05)
    codes = [process.returncode for process in processes]
    return first_failure or next((abs(code) for code in codes if code), 0)
