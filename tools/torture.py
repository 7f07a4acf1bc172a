"""Kill a training job at random moments, again and again, and see whether anything of it is lost.

    python tools/torture.py --kills 100 --seed 1

A job of five phases that change all that a phase may change (objective, data, window length, rotary base, batch,
learning rate, optimizer state, what is frozen) trains a tiny trunk on two gloo ranks. It is killed with SIGKILL and
started again until it is done; then the next job begins, until there were enough kills. At each end its checkpoint's
tensors and all of its train, eval and phase lines must be those of a job that nobody touched, to the last bit.

    1. `baseline`      the job that nobody touches
    2. `Attempt`       one launch, from start to kill or end; ranks and launcher are real processes
    3. `strike`        waits for the moment it aims at (a save, the boundary, start-up, any step), then kills the
                       whole tree, one rank, or the launcher; where it hit is read from what is left on disk
    4. `differences`   between a finished job and the baseline

Jobs are forked from this process, which has imported everything once, so that a restart takes a second or less.
Exit code 0 if all bits are equal.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

BOUNDARIES, STEPS = (12, 22, 30, 40), 48
CONFIG = """
run: {{dir: RUN, seed: 3, hang_timeout: 60}}
tokenizer: {{path: {root}/tokenizer}}
data: {{train: [{{path: {root}/text}}], validation: [{{path: {root}/text.validation}}], sequence_length: 64}}
model: {{num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, num_query_groups: 2}}
phases:
  - {{name: causal, objective: clm, steps: 12, batch: {{ramp: {{from: 4, tokens: 2048}}}}}}
  - name: masked
    objective: {{name: mlm, mask_ratio: {{from: 0.4, to: 0.2}}, unit: span}}
    steps: 10
    lr: 3.0e-3
    data: {{train: [{{path: {root}/text, weight: 3}}, {{path: {root}/text.validation}}]}}
  - name: long
    objective: mntp
    steps: 8
    data: {{sequence_length: 128}}
    batch: {{global_size: 4, micro_size: 1}}
    rope_theta: 40000
    schedule: {{name: wsd, warmup_steps: 1, decay_steps: 3, decay: 1-sqrt, final_fraction: 0.5}}
  - name: mixed
    objective: {{name: mixture, parts: [{{objective: mlm, weight: 3}}, {{objective: clm, weight: 1}}]}}
    steps: 10
    optimizer_state: reset
    freeze: [embeddings, layers 0]
    data: {{train: [{{path: {root}/text.validation}}], random_length: {{min: 8, max: 50}}}}
    batch: {{global_size: 8, micro_size: 2}}
  - name: diffusion
    objective: {{name: alternate, cycle: [{{objective: mdlm, steps: 1}}, {{objective: clm, steps: 1}}]}}
    steps: 8
    freeze: []
    data: {{train: [{{path: {root}/text}}], sequence_length: 64, random_length: false}}
optimizer: {{lr: 5.0e-3, name: stable_adamw, no_decay: [norms, embeddings]}}
schedule: {{name: wsd, warmup_steps: 4, decay_steps: 8}}
batch: {{global_size: 8, micro_size: 2}}
precision: {{dtype: fp32}}
checkpoint: {{every: 4, keep: 2}}
evaluation: {{every: 8, batches: 1}}
logging: {{tensorboard: false}}
"""
TIMING = ("tokens_per_second", "tokens_per_second_per_device", "mfu")
PLACES = ("in a save", "at the boundary", "in a save there", "start-up", "training", "after the end")
VICTIMS = ("all", "one rank", "launcher")
PATIENCE = 600.0  # seconds that an attempt may take before it counts as hanging


def workspace(root: Path) -> Path:
    """A corpus, a tokenizer and token files under `root`; the config."""
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("re", "un", "over", "mis", "pre") for b in
             ("turn", "told", "read", "wind", "made", "take", "cast", "lead")]
    with open(root / "corpus.jsonl", "w") as file:
        for _ in range(400):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=draw.randint(5, 60)))}) + "\n")
    subprocess.run([sys.executable, "-m", "megatron_encdec", "preprocess", "--input", root / "corpus.jsonl",
                    "--tokenizer", root / "tokenizer", "--train-tokenizer", "301", "--validation-percent", "10",
                    "--output", root / "text", "--workers", "1"], check=True, stdout=subprocess.DEVNULL,
                   cwd=Path(__file__).resolve().parent.parent)
    config = root / "config.yaml"
    config.write_text(CONFIG.format(root=root))
    return config


def children(pid: int) -> list[int]:
    """Processes that `pid` has started."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_alive(pid: int) -> bool:
    """Whether `pid` runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill(pids: list[int]) -> None:
    """SIGKILL, whoever is gone already."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def train_lines(run: Path) -> int:
    """How many there are."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'{"kind": "train"') if path.exists() else 0


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any(run.glob("checkpoints/.step_*.tmp"))


class Attempt:
    """One launch of the job of `run` on two ranks; its output is added to `log`."""

    def __init__(self, config: Path, run: Path, log: Path):
        self.run, self._begun = run, time.monotonic()
        self.lines_before = train_lines(run)
        self._process = multiprocessing.get_context("fork").Process(
            target=_launch, args=(["pretrain", str(config), f"run.dir={run}", "--nproc", "2"], log))
        self._process.start()
        self.launcher = self._process.pid
        self._ranks: list[int] = []

    @property
    def ranks(self) -> list[int]:
        """Process ids, once both have been started."""
        found = children(self.launcher)
        self._ranks = found if len(found) == 2 else self._ranks
        return self._ranks

    def wait(self, true) -> bool:
        """Wait until `true()`; False if the job ended first."""
        while not true():
            if len(self.ranks) == 2 and not self._process.is_alive():
                return False
            self._check_time()
            time.sleep(0.001)
        return True

    def end(self) -> int:
        """Wait until launcher and ranks are gone; the launcher's exit code."""
        while self._process.is_alive() or any(is_alive(rank) for rank in self._ranks):
            self._check_time()
            time.sleep(0.005)
        self._process.join()
        return self._process.exitcode

    def _check_time(self) -> None:
        if time.monotonic() - self._begun > PATIENCE:
            kill([self.launcher, *self.ranks])
            raise SystemExit(f"torture: a launch hangs for {PATIENCE:.0f} s; see {self.run.parent}")


def _launch(arguments: list[str], log: Path) -> None:
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from megatron_encdec.cli import main

    sys.exit(main(arguments))


def strike(attempt: Attempt, draw: random.Random) -> tuple[str, str]:
    """Kill the job at a moment drawn at random; (where it hit, whom)."""
    run, before = attempt.run, attempt.lines_before
    aim = draw.choice(("save", "save", "boundary", "boundary", "start", "step"))
    attempt.wait(lambda: len(attempt.ranks) == 2)
    if aim == "save":
        attempt.wait(lambda: is_saving(run))
        time.sleep(draw.uniform(0, 0.03))
    elif aim == "boundary" and before <= BOUNDARIES[-1]:
        target = draw.choice([one for one in BOUNDARIES if one >= before]) + draw.choice((-1, 0, 1))
        attempt.wait(lambda: train_lines(run) >= max(target, 1))
        time.sleep(draw.uniform(0, 0.03))
    elif aim == "start":
        time.sleep(draw.uniform(0, 0.8))
    else:
        target = before + draw.randint(1, 8)
        attempt.wait(lambda: train_lines(run) >= min(target, STEPS))
        time.sleep(draw.uniform(0, 0.05))
    victim = draw.choices(VICTIMS, (4, 4, 2))[0]
    ranks = attempt.ranks
    over = not is_alive(attempt.launcher)
    kill({"all": [attempt.launcher, *ranks], "one rank": [draw.choice(ranks)], "launcher": [attempt.launcher]}[victim])
    hit = place(attempt) if not over else "after the end"
    attempt.end()
    return hit, victim


def place(attempt: Attempt) -> str:
    """Where the job was when it was killed, by what is on disk."""
    lines = train_lines(attempt.run)
    near = min(abs(lines - one) for one in BOUNDARIES) <= 1  # within a step
    if is_saving(attempt.run):
        return "in a save there" if near else "in a save"
    if near:
        return "at the boundary"
    # lines beyond the checkpoint are cut back before the first new one is written
    return "start-up" if not _has_stepped(attempt.run, attempt.lines_before) else "training"


def _has_stepped(run: Path, before: int) -> bool:
    """Whether the launch got as far as its first step: its train line comes after the newest resume line."""
    path = run / "metrics.jsonl"
    lines = path.read_bytes() if path.exists() else b""
    return b'{"kind": "train"' in lines[lines.rfind(b'{"kind": "resume"') + 1:] and train_lines(run) != before


def finished(run: Path) -> tuple[list[dict], dict[str, str]]:
    """What must be equal: the lines without measured times, and a hash of each file of the last checkpoint's state."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [{key: value for key, value in record.items() if key not in TIMING}
             for record in records if record["kind"] in ("train", "eval", "phase")]
    last = run / "checkpoints" / f"step_{STEPS:08d}"
    state = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(last.iterdir())
             if file.suffix == ".distcp" or file.name in (".metadata", "common.pt")}
    return lines, state


def differences(ours: tuple, theirs: tuple) -> list[str]:
    """What is not equal between two finished jobs; empty if nothing."""
    found = [f"{name}: other bytes" for name in ours[1].keys() | theirs[1].keys()
             if ours[1].get(name) != theirs[1].get(name)]
    if len(ours[0]) != len(theirs[0]):
        found.append(f"{len(ours[0])} lines instead of {len(theirs[0])}")
    return found + [f"line {number}: {a} instead of {b}" for number, (a, b) in enumerate(
        zip(ours[0], theirs[0], strict=False), 1) if a != b]


def torture(root: Path, kills: int, seed: int) -> bool:
    """Run jobs until `kills` blows have fallen; whether every one of them ended with the baseline's bits."""
    config, log, draw = workspace(root), root / "log.txt", random.Random(seed)
    if code := Attempt(config, root / "baseline", log).end():
        raise SystemExit(f"torture: the untouched job ended with {code}; see {log}")
    expected = finished(root / "baseline")
    hits, restarts, jobs, wrong = Counter(), 0, 0, []
    while sum(hits.values()) < kills:
        jobs += 1
        run = root / f"job{jobs}"
        while True:
            attempt = Attempt(config, run, log)
            restarts += 1
            enough = sum(hits.values()) >= kills
            if not enough and draw.random() < 0.9:  # now and then a job may come to its end
                hit = strike(attempt, draw)
                if hit[0] != "after the end":
                    hits[hit] += 1
            elif code := attempt.end():
                raise SystemExit(f"torture: a resumed job ended with {code}; see {log}")
            if (run / "checkpoints" / f"step_{STEPS:08d}").is_dir() and train_lines(run) >= STEPS:
                break
        Attempt(config, run, log).end()  # says that nothing is left to do; writes a line that a kill held back
        wrong += [f"job {jobs}: {line}" for line in differences(finished(run), expected)]
        shutil.rmtree(run)
    _print(hits, jobs, restarts, wrong)
    return not wrong


def _print(hits: Counter, jobs: int, launches: int, wrong: list[str]) -> None:
    print(f"{'killed':<20}" + "".join(f"{place:>19}" for place in PLACES[:-1]) + f"{'together':>10}")
    for victim in (*VICTIMS, None):
        row = [sum(count for (where, whom), count in hits.items() if where == place and victim in (whom, None))
               for place in PLACES[:-1]]
        print(f"{victim or 'together':<20}" + "".join(f"{count:>19}" for count in row) + f"{sum(row):>10}")
    print(f"{sum(hits.values())} kills in {launches} launches of {jobs} jobs of {STEPS} steps, the phases changing "
          f"after the steps {', '.join(map(str, BOUNDARIES))}")
    for line in wrong[:20]:
        print(f"DIFFERENT: {line}")
    verdict = "NOT identical to" if wrong else "identical, bit for bit, to those of"
    print(f"final weights, optimizer state and all train, eval and phase lines: {verdict} the untouched job")


def main() -> int:
    """Parse, prepare, torture; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, metavar="N", help="default: 100")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of moments and victims (default: 0)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep everything here (default: a temporary one)")
    arguments = parser.parse_args()
    os.environ["MEGATRON_ENCDEC_DEVICE"] = "cpu"
    from megatron_encdec.training.command import import_what_ranks_need

    import_what_ranks_need()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() if arguments.work is None else contextlib.nullcontext(arguments.work) as root:
        Path(root).mkdir(parents=True, exist_ok=True)
        equal = torture(Path(root), arguments.kills, arguments.seed)
    print(f"{time.monotonic() - begun:.0f} s")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
