"""The stages of `benchmarks/gpu.sh`: what is measured on a GPU, in which order, restartable.

    python benchmarks/gpu_stages.py STAGE... [--results DIR] [--minutes 9] [--only PATTERN]... [--rehearse]

    facts         doctor's report, wheels, the rates that everything is held against
    tests         the tests marked gpu and te
    throughput    610M CLM and MLM, 1B CLM, 210M MLM, in bf16 and FP8: tokens/s, MFU, memory
    peer          the same model and batch in transformers + torch.compile
    largest       the largest micro-batch of the 1B
    head          the chunked loss against the plain one, the masked head against the FLOP count
    specs         Transformer Engine's layers, torch's and fp32 on the same weights; each loads the other's checkpoint
    curves        200 steps on real text in fp32, bf16 and FP8
    resume        kill -9 and resume with run.deterministic: the same bits
    costs         a profile of a step: the largest kernels
    report        all of it in one table

A stage is cells; each finished one is a JSON file in DIR and is not done again (delete it to repeat it). No cell begins
that might not end within --minutes; a stage that is not through ends with exit code 75: the same command goes on. Cells
that measure a speed have the GPU to themselves, one after another; those that only compare numbers run side by side.
--rehearse: the same stages at tiny sizes on a CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import gpu_runs

HERE = Path(__file__).resolve().parent
NOT_THROUGH = 75
RECIPES = ("delayed", "current", "blockwise")
SIZES = {"210m": 32, "610m": 24, "1b": 12}  # windows of a micro-batch: the host has to keep ahead of the GPU


class Book:
    """The cells: which are done, how long is left, and doing one."""

    def __init__(self, results: Path, minutes: float, rehearse: bool, only: list[str]):
        self.results, self.rehearse, self._only = results, rehearse, only
        self._end = time.monotonic() + 60 * minutes
        self._spare: subprocess.Popen | None = None
        self.unfinished = 0
        results.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def do(self, name: str, work, longest: float = 120.0):
        """The result of cell `name`: as kept, or `work()`, which takes `longest` seconds at most; None: no time.

        What goes wrong is a result too: {"error": ...}; it is tried again by the next call.
        """
        path = self.results / f"{name}.json"
        if path.exists() and "error" not in (kept := json.loads(path.read_text())):
            return kept
        if self._only and not any(fnmatch(name, pattern) for pattern in self._only):
            return None
        if self.left() < (longest if not self.rehearse else 1):
            self.unfinished += 1
            print(f"{name}: not begun, {self.left():.0f} s are left", flush=True)
            return None
        start = time.monotonic()
        try:
            found = work()
        except Exception as error:  # one cell must not cost the others
            found = {"error": f"{type(error).__name__}: {error}"[-20000:]}
        found["cell_seconds"] = time.monotonic() - start
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(found, indent=2))
        temporary.replace(path)
        print(f"{name}: {gpu_runs.brief(found)}", flush=True)
        return found

    def together(self, works: dict, longest: float = 240.0) -> None:
        """`do` for each name and work, side by side: for cells that measure no speed."""
        with ThreadPoolExecutor(1 if self.rehearse else max(1, (os.cpu_count() or 1) // 3)) as pool:
            list(pool.map(lambda name: self.do(name, works[name], longest), works))

    def cell(self, name: str, longest: float = 120.0, **asked):
        """A measurement of gpu_cells.py."""
        return self.do(name, lambda: self.ask(asked, longest), longest)

    def ask(self, asked: dict, seconds: float) -> dict:
        """gpu_cells.py in a process of its own; its last line. The next one imports its packages meanwhile."""
        self.prepare()
        process, self._spare = self._spare, None
        if not self.rehearse:
            self.prepare()
        try:
            out, err = process.communicate(json.dumps(asked), timeout=max(30.0, min(2 * seconds, self.left())))
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {(err or out)[-1500:]}")
        return json.loads(out.strip().splitlines()[-1])

    def prepare(self) -> None:
        """A process that imports while something else is done."""
        self._spare = self._spare or start_cell()

    def close(self) -> None:
        """The process that waits for a cell goes."""
        if self._spare:
            self._spare.kill()
            self._spare.wait()


def start_cell() -> subprocess.Popen:
    """gpu_cells.py, which imports and waits for its question."""
    return subprocess.Popen([sys.executable, str(HERE / "gpu_cells.py")], cwd=HERE.parent, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def common(book: Book) -> dict:
    """Sizes of a cell."""
    if book.rehearse:
        return {"length": 64, "vocabulary": 512, "warmup": 1, "steps": 2}
    return {"length": 2048, "warmup": 3, "steps": 6}


def presets(book: Book) -> dict[str, int]:
    """Preset -> windows of a micro-batch."""
    return {"tiny": 2} if book.rehearse else SIZES


def recipes(book: Book) -> tuple[str, ...]:
    """FP8 recipes that the machine can try."""
    return RECIPES if gpu_runs.facts(book.results)["te"] and not book.rehearse else ()


def facts(book: Book) -> None:
    """What was measured on."""
    book.do("facts", lambda: gpu_runs.examine(book.results), 60)


def tests(book: Book) -> None:
    """One process for the GPU's tests; where there is none, they are collected and skipped."""
    book.do("tests", lambda: gpu_runs.pytest("gpu or te", min(book.left(), 480)), 240)


def throughput(book: Book) -> None:
    """Isolated documents; what the targets name first, then variants of one of them."""
    book.prepare()
    sizes, fast = presets(book), recipes(book)
    cells = [("610m", "clm", None), ("610m", "clm", "delayed"), ("610m", "mlm", None), ("1b", "clm", None),
             ("210m", "mlm", None), ("1b", "clm", "delayed"), ("610m", "mlm", "delayed"), ("610m", "clm", "current"),
             ("610m", "clm", "blockwise"), ("1b", "clm", "current")]
    if book.rehearse:
        cells = [("tiny", "clm", None), ("tiny", "mlm", None)]
    for preset, objective, recipe in cells:
        if recipe is None or recipe in fast:
            book.cell(f"throughput.{preset}.{objective}.{recipe or 'bf16'}", 60, kind="throughput", preset=preset,
                      objective=objective, fp8=recipe, micro=sizes[preset], **common(book))
    preset = cells[0][0]
    for name, changes in variants().items():
        book.cell(f"throughput.{preset}.clm.{name}", 60, kind="throughput", preset=preset, objective="clm",
                  micro=sizes[preset], **{**common(book), **changes})


def variants() -> dict[str, dict]:
    """What else is tried in bf16, one change at a time."""
    return {"torch_layers": {"layers": "torch"}, "whole_windows": {"isolated": False},
            "no_triton": {"performance": {"triton": False}},
            "unfused_gradients": {"performance": {"fuse_gradients": False}},
            "no_prefetch": {"performance": {"prefetch": 0}}}


def peer(book: Book) -> None:
    """Each attention that transformers has here; the best one counts. Whole windows on both sides."""
    book.prepare()
    attentions = ("sdpa", "flash_attention_2") if gpu_runs.facts(book.results)["flash_attn"] else ("sdpa",)
    for preset, micro in presets(book).items():
        for objective in ("clm", "mlm"):
            for attention in attentions:
                # all logits of a micro-batch at once: a quarter of the windows, four times as often
                book.cell(f"peer.{preset}.{objective}.{attention}", 100, kind="peer", preset=preset,
                          objective=objective, micro=max(1, micro // 4), micro_batches=2 * micro // max(1, micro // 4),
                          attention=attention, compile=not book.rehearse, **common(book))
            book.cell(f"peer.{preset}.{objective}.ours", kind="throughput", preset=preset, objective=objective,
                      micro=micro, isolated=False, **common(book))


def largest(book: Book) -> None:
    """Doubling until memory is short, then halving the interval; every size is a cell."""
    preset = "tiny" if book.rehearse else "1b"

    def fits(micro: int) -> bool | None:
        found = book.cell(f"largest.{preset}.{micro}", kind="throughput", preset=preset, objective="clm", micro=micro,
                          **{**common(book), "warmup": 1, "steps": 2, "micro_batches": 1})
        return None if found is None else "error" not in found

    low, high = 0, 4 if book.rehearse else 8
    while (held := fits(high)) and high < (8 if book.rehearse else 128):
        low, high = high, 2 * high
    low = high if held else low
    while held is not None and high - low > 1 and not book.rehearse:
        middle = (low + high) // 2
        held = fits(middle)
        low, high = (middle, high) if held else (low, middle)
    if held is not None:
        book.do(f"largest.{preset}", lambda: {"micro_size": low, "windows_of": common(book)["length"]})


def head(book: Book) -> None:
    """The benchmarks of the head, as they stand."""
    small = ["--positions", "256", "--vocabulary", "1000", "--width", "32"] if book.rehearse else ["--dtype", "bf16"]
    book.do("head.memory", lambda: gpu_runs.benchmark("cross_entropy.py", small), 100)
    sizes = (["--width", "64", "--vocabulary", "512", "--length", "64", "--rounds", "2"] if book.rehearse else
             ["--width", "1152", "--layers", "8", "--vocabulary", "128256", "--length", "2048", "--dtype", "bf16"])
    book.do("head.masked", lambda: gpu_runs.benchmark("masked_head.py", sizes), 100)


def specs(book: Book) -> None:
    """Numbers on the same weights, then each way through a checkpoint."""
    sizes = {"length": 64, "vocabulary": 512} if book.rehearse else {"length": 1024, "vocabulary": 8192}
    for objective in ("clm", "mlm"):
        book.cell(f"specs.{objective}", kind="specs", preset="tiny", objective=objective, micro=2,
                  te=gpu_runs.facts(book.results)["te"], **sizes)
    kinds = ("torch", "transformer_engine") if gpu_runs.facts(book.results)["te"] else ("torch", "torch")
    book.together({f"specs.{first}": lambda first=first, second=second: gpu_runs.exchange(book, first, second)
                   for first, second in (kinds, kinds[::-1])})


def curves(book: Book) -> None:
    """The same run in each precision; real text."""
    ways = [("fp32", None), ("bf16", None), *(("bf16", recipe) for recipe in recipes(book))]
    book.together({f"curves.{recipe or dtype}": lambda dtype=dtype, recipe=recipe: gpu_runs.curve(book, dtype, recipe)
                   for dtype, recipe in ways})


def resume(book: Book) -> None:
    """With each kind of layers that is here."""
    kinds = ("torch", *(["transformer_engine"] if gpu_runs.facts(book.results)["te"] else []))
    book.together({f"resume.{layers}": lambda layers=layers: gpu_runs.kill_and_resume(book, layers)
                   for layers in kinds})


def costs(book: Book) -> None:
    """Of the 610M, CLM and MLM in bf16, CLM in FP8, with a trace of each for Perfetto."""
    preset = "tiny" if book.rehearse else "610m"
    ways = [("clm", None), ("mlm", None), *(("clm", recipe) for recipe in recipes(book)[:2])]
    for objective, recipe in ways:
        name = f"costs.{preset}.{objective}.{recipe or 'bf16'}"
        book.cell(name, kind="costs", preset=preset, objective=objective, fp8=recipe, micro=presets(book)[preset],
                  micro_batches=1, trace=str(book.results / f"{name}.trace.json.gz"), **common(book))


def report(book: Book) -> None:
    """Everything that is there, in one file and on the screen."""
    cells = {path.stem: json.loads(path.read_text()) for path in sorted(book.results.glob("*.json"))
             if path.name != "all.json"}
    (book.results / "all.json").write_text(json.dumps({"rehearsal": book.rehearse, "cells": cells}, indent=1))
    for name, found in cells.items():
        print(f"{name:<42} {gpu_runs.brief(found)}")


STAGES = {stage.__name__: stage for stage in (facts, tests, throughput, peer, largest, head, specs, curves, resume,
                                              costs, report)}


def main() -> int:
    """The stages asked for, in order; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "all"], metavar="STAGE")
    parser.add_argument("--results", type=Path, default=Path("work_dirs/gpu"))
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--only", action="append", metavar="PATTERN", help="cells to measure: 'throughput.610m.*'")
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    if arguments.rehearse:
        os.environ["MEGATRON_ENCDEC_DEVICE"] = "cpu"
    book = Book(arguments.results.resolve(), arguments.minutes, arguments.rehearse, arguments.only or [])
    if not arguments.rehearse and arguments.stages != ["report"] and not gpu_runs.on_gpu():
        print("torch can use no GPU here, nothing is measured; `python -m megatron_encdec doctor` says what is here, "
              "--rehearse goes through the stages on a CPU", file=sys.stderr)
        return 1
    try:
        for name in STAGES if "all" in arguments.stages else arguments.stages:
            print(f"== {name}, {book.left():.0f} s left", flush=True)
            STAGES[name](book)
    finally:
        book.close()
    failed = [path.stem for path in book.results.glob("*.json")
              if path.name != "all.json" and "error" in json.loads(path.read_text())]
    if failed:
        print(f"with errors: {', '.join(sorted(failed))}")
    if book.unfinished:
        print(f"{book.unfinished} cells were not begun; the same command goes on")
        return NOT_THROUGH
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
