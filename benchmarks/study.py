"""What a study of many models costs before and while it runs: `study plan`, and a driver that waits for a job.

    python benchmarks/study.py                       500 models of 30 checkpoints each
    python benchmarks/study.py --models 4 --seconds 60

The driver's job is stopped (SIGSTOP), so that it runs for ever and costs nothing.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from finetune_sets import write_set  # noqa: E402
from small_run import workspace  # noqa: E402

CLI = (sys.executable, "-m", "megatron_encdec", "study")
TICK = os.sysconf("SC_CLK_TCK")


def write_study(directory: Path, models: int, checkpoints: int) -> Path:
    """`models` models that share trunks: ten of each of some seeds, `checkpoints` points a model."""
    names = [f"clm-{100 * number}-mlm30-42000" for number in range(1, min(models, 10) + 1)]
    (directory / "study.yaml").write_text(yaml.safe_dump({
        "base": str(directory / "config.yaml"), "output": str(directory / "out"), "models": names,
        "seeds": list(range(-(-models // len(names)))),
        "checkpoints": [1400 * number for number in range(1, checkpoints)],
        "finetune": {"datasets": [write_set(directory / "toy", "SC")],
                     "grid": {"learning_rates": [1e-5, 1e-4], "seeds": [0, 1, 2, 3, 4]}}}))
    return directory / "study.yaml"


def plan(study: Path) -> None:
    """CPU seconds and memory of `study plan`."""
    imports = user_seconds(sys.executable, "-c", "import megatron_encdec.study.plan")[0]
    seconds, said = user_seconds(*CLI, "plan", study, "--json")
    said = json.loads(said)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{len(said['models'])} models, {len(said['stretches'])} stretches, {len(said['scored'])} exports: plan "
          f"{seconds:.1f} s of user CPU, of which imports {imports:.1f} s; {peak:.0f} MB", flush=True)


def user_seconds(*command) -> tuple[float, bytes]:
    """User CPU of a command, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    said = subprocess.run(command, check=True, capture_output=True).stdout
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before, said


def drive(study: Path, seconds: float) -> None:
    """CPU time and memory of a driver that waits for a job."""
    with open(study.parent / "driver.log", "w") as log:
        driver = subprocess.Popen([*CLI, "run", study], stdout=log, stderr=log)
    job = None
    try:
        records = study.parent / "out/jobs"
        while not (found := list(records.rglob("job.json"))):
            assert driver.poll() is None, (study.parent / "driver.log").read_text()
            time.sleep(0.1)
        job = json.loads(found[0].read_text())["pid"]
        os.kill(job, signal.SIGSTOP)
        time.sleep(10)
        before = cpu_seconds(driver.pid)
        time.sleep(seconds)
        used = cpu_seconds(driver.pid) - before
        print(f"driver: {100 * used / seconds:.2f} % of a core while it waits, {peak_megabytes(driver.pid)} MB at most")
    finally:
        driver.kill()
        if job:
            os.kill(job, signal.SIGKILL)


def cpu_seconds(pid: int) -> float:
    """Of a process so far, user's and system's."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def peak_megabytes(pid: int) -> int:
    """The most memory it ever had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=500)
    parser.add_argument("--checkpoints", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        study = write_study(workspace(Path(directory)), arguments.models, arguments.checkpoints)
        plan(study)
        drive(study, arguments.seconds)


if __name__ == "__main__":
    main()
