"""What `gpu_stages.py` does with whole runs of the command line: real text, checkpoints, kills.

    facts, examine     what is here
    pytest, benchmark  other programs of this project, and what they found
    curve, exchange, kill_and_resume    `megatron-encdec pretrain`, read from its metrics.jsonl
    brief              a result in a line
"""

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = """
run: {{dir: RUN, seed: 3}}
tokenizer: {{path: {data}/tokenizer}}
data:
  train: [{{path: {data}/text}}]
  validation: [{{path: {data}/text.validation}}]
  sequence_length: {length}
model: {model}
phases:
  - {{name: causal, objective: clm, steps: {half}}}
  - {{name: masked, objective: {{name: mlm, mask_ratio: 0.4}}, steps: {half}}}
optimizer: {{lr: 1.0e-3}}
schedule: {{name: wsd, warmup_steps: {warmup}, decay_steps: {warmup}}}
batch: {{global_size: {windows}, micro_size: {windows}}}
checkpoint: {{every: 1000000, keep: 2}}
evaluation: {{every: 1000000, batches: 2}}
logging: {{tensorboard: false}}
"""


def on_gpu() -> bool:
    """Whether torch can use a GPU of this machine, and is meant to."""
    import torch

    return torch.cuda.is_available() and os.environ.get("MEGATRON_ENCDEC_DEVICE") != "cpu"


@functools.cache
def facts(results: Path) -> dict:
    """Whether a GPU, Transformer Engine and flash-attn are here and work; as the stage `facts` has found, if it has."""
    if (kept := results / "facts.json").exists() and "gpu" in (found := json.loads(kept.read_text())):
        return found

    from megatron_encdec.platform.doctor import PACKAGES, examine_package

    gpu = on_gpu()
    packages = {package.name: package for package in PACKAGES}  # tried in a child: this process stays off the GPU
    return {"gpu": gpu, **{name: gpu and examine_package(packages[package])["state"] == "usable"
                           for name, package in (("te", "transformer_engine"), ("flash_attn", "flash_attn"))}}


def examine(results: Path) -> dict:
    """doctor's report, and the rate of a large product on random numbers in bf16."""
    doctor = subprocess.run([sys.executable, "-m", "megatron_encdec", "doctor", "--json"], capture_output=True,
                            text=True, timeout=300, cwd=ROOT)
    return {**facts(results), "doctor": json.loads(doctor.stdout), "products": _product_rates(results)}


def _product_rates(results: Path) -> dict:
    import torch

    if not facts(results)["gpu"]:
        return {}
    found = {}
    for size in (4096, 8192):
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(3):
            a @ b
        begin.record()
        for _ in range(10):
            a @ b
        end.record()
        torch.cuda.synchronize()
        found[f"bf16 {size}"] = 10 * 2 * size**3 / (begin.elapsed_time(end) / 1000)
    return found


def pytest(marks: str, seconds: float) -> dict:
    """The tests with these marks, of the files that name them (others may need packages that are not here)."""
    files = [str(file) for file in sorted((ROOT / "tests").rglob("test_*.py"))
             if re.search(r"mark\.(gpu|te)\b", file.read_text())]
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode not in (0, 5):  # 5: nothing had these marks
        raise RuntimeError("\n".join([*lines[-150:], *failed] if lines else [done.stderr[-500:]]))
    return {"summary": lines[-1] if lines else ""}


def benchmark(script: str, options: list[str]) -> dict:
    """A script of this folder that takes --json."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *options, "--json", str(path)],
                              capture_output=True, text=True, timeout=500, cwd=ROOT)
        if done.returncode:
            raise RuntimeError(done.stderr[-1500:])
        return {**json.loads(path.read_text()), "said": done.stdout}


def data_of(book) -> Path:
    """Tokens of the docstrings of the installed packages, and their tokenizer; made once."""
    folder = book.results / "data"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:  # cells side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "text.manifest.json").exists():
            _make_data(book, folder)
    return folder


def _make_data(book, folder: Path) -> None:
    corpus = folder / "corpus.jsonl"
    _call([sys.executable, "tools/build_docstring_corpus.py", str(corpus)])
    if book.rehearse:
        with open(corpus) as file:
            lines = [line for _, line in zip(range(400), file, strict=False)]
        corpus.write_text("".join(lines))
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    entries = "512" if book.rehearse else "16384"
    _call([sys.executable, "-m", "megatron_encdec", "preprocess", "--input", str(corpus), "--tokenizer",
           str(folder / "tokenizer"), "--train-tokenizer", entries, "--validation-percent", "2", "--output",
           str(folder / "text")])


def _call(command: list[str], seconds: float = 500) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:6])}: exit code {done.returncode}: {done.stderr[-1200:]}")
    return done.stdout


def _command(book, name: str, steps: int, *overrides: str) -> tuple[Path, list[str]]:
    """(run directory, the command that trains it)."""
    folder, small = book.results / "runs", book.rehearse
    folder.mkdir(parents=True, exist_ok=True)
    model = ("{num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, num_query_groups: 2}"
             if small else "{num_layers: 8, hidden_size: 512, ffn_hidden_size: 2048, num_attention_heads: 8, "
                           "num_query_groups: 4}")  # 128 divides all of it: every recipe can take it
    config = folder / f"{name}.yaml"
    config.write_text(CONFIG.format(data=data_of(book), length=64 if small else 512, model=model, half=steps // 2,
                                    warmup=max(1, steps // 10), windows=4 if small else 16))
    run = folder / name
    device = "cpu" if small else "auto"
    return run, [sys.executable, "-m", "megatron_encdec", "pretrain", str(config), f"run.dir={run}", "--device", device,
                 *overrides]


def lines_of(run: Path, kind: str = "train") -> list[dict]:
    """Lines of metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def curve(book, dtype: str, recipe: str | None) -> dict:
    """Losses and gradient norms, step by step."""
    steps = 8 if book.rehearse else 200
    run, command = _command(book, f"curve_{recipe or dtype}", steps, f"precision.dtype={dtype}",
                            f"precision.fp8={recipe or 'null'}")
    shutil.rmtree(run, ignore_errors=True)
    _call(command, max(60, book.left()))
    lines = lines_of(run)
    return {"loss": [line["loss"] for line in lines], "grad_norm": [line["grad_norm"] for line in lines],
            "validation": [line["losses"] for line in lines_of(run, "eval")],
            "tokens_per_second": lines[-1]["tokens_per_second"]}


def exchange(book, first: str, second: str) -> dict:
    """Half with one kind of layers, half with the other, beside a run with the first alone."""
    steps = 8 if book.rehearse else 20
    whole, command = _command(book, f"whole_{first}", steps, f"model.layers={first}", "precision.dtype=bf16")
    shutil.rmtree(whole, ignore_errors=True)
    _call(command)
    run, command = _command(book, f"from_{first}", steps, "precision.dtype=bf16")
    shutil.rmtree(run, ignore_errors=True)
    _call([*command, f"model.layers={first}", "--until", str(steps // 2)])
    _call([*command, f"model.layers={second}"])
    pairs = [(a["loss"], b["loss"]) for a, b in zip(lines_of(run), lines_of(whole), strict=True)]
    return {f"{first} to {second}": {"largest_difference": max(abs(a / b - 1) for a, b in pairs),
                                     "losses": [a for a, _ in pairs]}}


def kill_and_resume(book, layers: str) -> dict:
    """Train whole; train, kill -9 in the middle, resume: train lines and tensor files must be the same bits."""
    steps, options = 12 if book.rehearse else 40, ("run.deterministic=true", f"model.layers={layers}",
                                                   "checkpoint.every=4")
    whole, command = _command(book, f"det_{layers}", steps, *options)
    shutil.rmtree(whole, ignore_errors=True)
    _call(command)
    run, command = _command(book, f"killed_{layers}", steps, *options)
    shutil.rmtree(run, ignore_errors=True)
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT,
                              start_new_session=True)
    limit = time.monotonic() + 300
    while _steps(run) < steps // 2 and victim.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    killed_after = _steps(run)
    if victim.poll() is None:
        os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    _call(command)
    same_lines = [strip(line) for line in lines_of(run)] == [strip(line) for line in lines_of(whole)]
    same_files = bits(run, steps) == bits(whole, steps)
    if not (same_lines and same_files):
        raise RuntimeError(f"not the same bits: train lines {same_lines}, tensor files {same_files}")
    return {"killed_after_step": killed_after, "steps": steps, "bit_equal": True}


def _steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b'"kind": "train"') if path.exists() else 0


def strip(line: dict) -> dict:
    """A train line without what is measured."""
    return {key: value for key, value in line.items() if "per_second" not in key and key != "mfu"}


def bits(run: Path, step: int) -> list[str]:
    """Hashes of the last checkpoint's tensor files."""
    files = sorted((run / "checkpoints" / f"step_{step:08d}").glob("*.distcp"))
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def brief(found: dict) -> str:
    """A line for people."""
    if "error" in found:
        short = found["error"].strip().splitlines()
        memory = re.search(r"out of memory", found["error"], re.IGNORECASE)
        return "out of memory" if memory else f"ERROR {short[-1][:140]}"
    if "tokens_per_second" in found:
        mfu = f", MFU {found['mfu']:.1%}" if "mfu" in found else ""
        last = found["loss"][-1] if isinstance(found.get("loss"), list) else found.get("loss")
        memory = f", {found['peak_memory_bytes'] / 2**30:.1f} GiB" if found.get("peak_memory_bytes") else ""
        return f"{found['tokens_per_second']:,.0f} tokens/s{mfu}{memory}, loss {last:.4f}"
    if "largest" in found:
        return "; ".join(f"{one['share']:.1%} {one['name'][:40]}" for one in found["largest"][:3])
    shown = {key: value for key, value in found.items() if isinstance(value, int | float | str | bool)}
    for name, one in found.items():  # results by way of doing it
        if isinstance(one, dict):
            shown |= {f"{name} {key}": f"{value:.2e}" for key, value in one.items()
                      if key in ("loss_error", "gradient_error", "largest_difference")}
    return ", ".join(f"{key} {str(value).strip().splitlines()[-1][:90] if str(value).strip() else ''}"
                     for key, value in shown.items())
