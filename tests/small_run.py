"""A run as small as they come: its config, `megatron-encdec` and tools as users call them, what a run logged."""

import faulthandler
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

PATIENCE = 900.0  # seconds: what is waited for comes, however busy the machine is; only a fault lets it pass
TIMING = ("tokens_per_second", "tokens_per_second_per_device", "mfu", "seconds_blocked", "seconds_total")
BASE = """
run: {{dir: RUN, seed: 3}}
tokenizer: {{path: {root}/tokenizer}}
data:
  train: [{{path: {root}/text}}]
  validation: [{{path: {root}/text.validation}}]
  sequence_length: 64
model: {{num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2}}
phases:
  - {{name: causal, objective: clm, steps: 6}}
  - {{name: masked, objective: {{name: mlm, mask_ratio: 0.3}}, steps: 6}}
optimizer: {{lr: 5.0e-3}}
schedule: {{name: wsd, warmup_steps: 2, decay_steps: 3}}
batch: {{global_size: 8, micro_size: 2}}
precision: {{dtype: fp32}}
checkpoint: {{every: 100, keep: 1}}
evaluation: {{every: 100, batches: 1}}
logging: {{tensorboard: false}}
"""


def config_of(*overrides: str):
    """The config with `overrides`, of data that is nowhere."""
    from megatron_encdec.platform import schema
    from megatron_encdec.training.config import Config

    data = schema.parse_yaml(BASE.format(root="nowhere"), "base")
    for override in overrides:
        schema.apply_override(data, override, Config)
    return schema.build(Config, data)


def timeline_of(*overrides: str, fingerprints: tuple[str, ...] = ("f",)):
    """The timeline of `config_of(...)`, with a vocabulary of 301 tokens, of which 8 are special and 1 is the mask."""
    from megatron_encdec.objectives.base import Vocabulary
    from megatron_encdec.training.layout import lay_out
    from megatron_encdec.training.stretches import Timeline

    config = config_of(*overrides)
    paths = dict.fromkeys(one.path for stretch in lay_out(config) for one in stretch.data.train)
    known = {path: fingerprints[number] if number < len(fingerprints) else path for number, path in enumerate(paths)}
    return Timeline(lay_out(config), {"run_seed": config.run.seed}, config.model.identity(), known,
                    Vocabulary(301, frozenset(range(8)), 1))


def forks() -> BaseContext:
    """A server of forks that has imported torch and megatron.core: seconds less than a new process. Not of this one:
    gloo's threads, some fifty a run, never end, and a fork of a process that has them hangs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_encdec.training.execute", "torch._dynamo"])
    return context


def fork(work: Callable, *arguments, said: Sequence[Path], directory: str | Path | None = None,
         **environment: str) -> "Running":
    """`work(*arguments)`, whose result is an exit code, in a process of its own. said: the files for what it prints to
    out and err. directory: where it runs."""
    child = forks().Process(target=_end_with, args=(
        work, arguments, said, {**os.environ, "OMP_NUM_THREADS": "1", **environment}, str(directory or os.getcwd())))
    child.start()
    return Running(child)


def fork_cli(*arguments: str, said: Sequence[Path], directory: str | Path | None = None,
             **environment: str) -> "Running":
    """`megatron-encdec ARGUMENTS` in a fork, running."""
    return fork(_command, [str(word) for word in arguments], said=said, directory=directory, **environment)


def run_cli(*arguments: str, check: bool = True, code: int = 0, directory: str | Path | None = None,
            **environment: str) -> subprocess.CompletedProcess:
    """`megatron-encdec ARGUMENTS` in a fork that runs in `directory`. check: that its exit code is `code`."""
    with tempfile.TemporaryDirectory() as temporary:
        said = Path(temporary) / "out", Path(temporary) / "err"
        child = fork_cli(*arguments, said=said, directory=directory, **environment)
        try:
            ended = child.wait(PATIENCE)
        finally:
            child.kill()
        out, err = (path.read_text() for path in said)
    if check and ended != code:
        raise AssertionError(f"exit {ended}\n{out}\n{err}")
    return subprocess.CompletedProcess(arguments, ended, out, err)


def workspace(directory: Path) -> Path:
    """Make there `tokenizer/`, `text.*`, `text.validation.*` and `config.yaml` (run.dir left to the test)."""
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("re", "un", "over", "mis", "pre") for b in
             ("turn", "told", "read", "wind", "made", "take", "cast", "lead")]
    with open(directory / "corpus.jsonl", "w") as file:
        for _ in range(400):
            text = " ".join(draw.choice(words) for _ in range(draw.randint(5, 60)))
            file.write(json.dumps({"text": text}) + "\n")
    run_cli("preprocess", "--input", directory / "corpus.jsonl", "--tokenizer", directory / "tokenizer",
            "--train-tokenizer", "301", "--validation-percent", "10", "--output", directory / "text",
            "--workers", "1")
    (directory / "config.yaml").write_text(BASE.format(root=directory))
    return directory


def run_tool(tool: str | Path, *arguments: str) -> int:
    """`python TOOL ARGUMENTS` in this process, which spares a cold start of torch; the exit code."""
    argv, path = sys.argv, sys.path
    tool = (Path(__file__).parent.parent / tool).resolve()
    sys.argv, sys.path = [str(tool), *map(str, arguments)], [str(tool.parent), *path]
    try:
        runpy.run_path(str(tool), run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv, sys.path = argv, path
    return 0


def _command(words: list[str]) -> int:
    from megatron_encdec.cli import main

    return main(words)


def run_code(code: str, *arguments) -> int:
    """For `fork`: `python -c CODE ARGUMENTS`."""
    faulthandler.enable(open(2, "w", closefd=False))  # noqa: SIM115
    sys.argv = ["-c", *map(str, arguments)]
    exec(compile(textwrap.dedent(code), "<code>", "exec"), {"__name__": "__main__"})
    return 0


def _end_with(work: Callable, arguments: tuple, said: tuple[Path, Path], environment: dict[str, str],
              directory: str) -> None:
    """End this process, a fork, with the exit code that `work` returns; out and err go to the files `said`."""
    code = 70
    for descriptor, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    try:
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(directory)
        import torch

        torch.set_num_threads(1)  # as a process of its own has it: bits are compared
        code = work(*arguments)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Running:
    """A fork under way, in the words of `subprocess.Popen`."""

    def __init__(self, process: BaseProcess):
        self.pid, self._process = process.pid, process

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        assert self.poll() is not None, f"still running after {timeout} s"
        return self.poll()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start_cli(*arguments: str, output: Path, **environment: str) -> Running:
    """`megatron-encdec ARGUMENTS` in a fork, running; what it says goes to the file `output`."""
    output.write_text("")
    return fork(_command, [str(word) for word in arguments], said=(output, output), **environment)


def start_code(code: str, *arguments: str, output: Path) -> Running:
    """`python -c CODE ARGUMENTS` likewise."""
    output.write_text("")
    return fork(run_code, code, *arguments, said=(output, output))


def start_cold(*arguments: str, output: Path) -> subprocess.Popen:
    """The same in a new process, which has to import everything."""
    with open(output, "w") as file:
        return subprocess.Popen([sys.executable, "-m", "megatron_encdec", *map(str, arguments)], stdout=file,
                                stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_until(true: Callable[[], bool], what: str, seconds: float = PATIENCE, pause: float = 0.02) -> None:
    """Wait for `true()`, with a pause before it is asked again; an AssertionError after `seconds`."""
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit, f"{what}: not within {seconds:.0f} s"
        time.sleep(pause)


def take_over(folder: Path) -> None:
    """Have the lock of `folder` say that a process of another host holds it."""
    from megatron_encdec.rundir.lock import Holder

    (folder / "run.lock").write_text(json.dumps({**vars(Holder.this_process()), "host": "elsewhere"}))


def steps_done(run: Path) -> int:
    """Train lines in the metrics of a run that may be under way."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0


def ranks_of(launcher: Running) -> list[int]:
    """Process ids of the ranks that a launcher started, in order of rank."""
    return [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]


def final_bits(run: Path, step: int) -> list[str]:
    """Hashes of a checkpoint's tensor files."""
    files = sorted((run / "checkpoints" / f"step_{step:08d}").glob("*.distcp"))
    assert files
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def outcome(run: Path) -> tuple[list[dict], list[str]]:
    """What a finished run is compared by: its train lines, and the bits of its last checkpoint."""
    lines = metrics(run)
    return lines, final_bits(run, lines[-1]["step"])


def metrics(run: Path, kind: str = "train") -> list[dict]:
    """Lines of one kind, without the fields that are measured times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING}
            for line in lines if line["kind"] == kind]
