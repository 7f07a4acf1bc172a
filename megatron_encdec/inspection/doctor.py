"""The verb `doctor`: of this machine alone (platform/doctor.py), or what would run where for a config.

    1. `examine(config, ranks)`   device, kernels, ranks, memory, disk, inputs, trackers; what is missing
    2. `lines(report)`            the same for people

Nothing is loaded or changed. What is missing has a line with the command or the key that helps.
"""

import argparse
import os
import shlex
import shutil
from pathlib import Path

from megatron_encdec.platform import doctor as machine
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.json_text import json_text
from megatron_encdec.platform.optional import INSTALL, install_command, is_available

DESCRIPTION = machine.DESCRIPTION + """
With CONFIG.yaml: what `pretrain` of it would use here, and what is missing for it; exit code 1 if anything but a
tracker is.

  megatron-encdec doctor examples/biphasic_tiny.yaml
  megatron-encdec doctor CONFIG --nproc 8 parallel.tensor=2
"""
BYTES_A_PARAMETER = {"bf16": 14, "fp32": 12}  # of a checkpoint: weights, their fp32 copy, two moments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `doctor`."""
    parser.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="say what this run would use here")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="set a key of the config")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="with CONFIG: so many ranks (default: 1)")
    machine.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; 0 where all is well."""
    if arguments.config is None or not is_available("torch"):
        return machine.run(arguments)
    if arguments.nodes:
        raise UserError("doctor: --nodes compares machines, and CONFIG is looked at on one; give one of the two")
    from megatron_encdec.platform.launcher import at_least_one
    from megatron_encdec.training.config import load_config

    at_least_one("--nproc", arguments.nproc)
    report = examine(load_config(arguments.config, arguments.overrides), arguments.nproc)
    print(json_text(report, 2) if arguments.json else "\n".join(lines(arguments.config, report)))
    return 1 if report["problems"] else 0


def examine(config, ranks: int) -> dict:
    """`{rows: [[what, words], ...], problems: [...]}` of a `Config` on `ranks` ranks of this machine."""
    from megatron_encdec.platform import device
    from megatron_encdec.training.plan import with_dtype

    device.choose("auto")
    config, problems = with_dtype(config), []
    ours = _ranks(config, ranks, problems)
    size = [] if problems else _size(config, ranks, problems)
    rows = [*_device(config, ranks, problems), *ours, *_inputs(config, problems), *size,
            *_run(config, problems), *_exports(config), *_trackers(config)]
    return {"rows": [list(row) for row in rows], "problems": problems}


def lines(name: str, report: dict) -> list[str]:
    """As people read it."""
    width = max(len(what) for what, _ in report["rows"]) + 2
    found = [f"{what:<{width}}{words}" for what, words in report["rows"]]
    if not report["problems"]:
        return [*found, "", f"{name} can run here"]
    return [*found, "", f"{name} cannot run here:", *(f"  {problem}" for problem in report["problems"])]


def _device(config, ranks: int, problems: list[str]) -> list[tuple[str, str]]:
    import torch

    from megatron_encdec.model.config import choose_layers
    from megatron_encdec.model.performance import choose_attention
    from megatron_encdec.platform.device import device_type, visible_gpus
    from megatron_encdec.training.plan import DTYPES, check_kernels

    if device_type() == "cuda":
        gpus = visible_gpus()
        where = f"{len(gpus)} GPU{'s' * (len(gpus) != 1)}, {torch.cuda.get_device_name()}; NCCL"
        if ranks > len(gpus):
            problems.append(f"--nproc {ranks}: there are {len(gpus)} GPUs here, a rank needs one of its own")
    else:
        where = f"CPU, {machine.available_cores()} cores; gloo"
    rows, dtype, softcap = [("device", where)], DTYPES[config.precision.dtype], config.model.attention_softcap
    try:
        layers = choose_layers(config.model.layers, dtype, softcap)
        kind = "Transformer Engine's own" if layers == "transformer_engine" else choose_attention(
            config.performance.attention, dtype, softcap)
        rows += [("layers", "Transformer Engine" if layers == "transformer_engine" else "torch"), ("attention", kind)]
        check_kernels(config)
    except UserError as error:
        problems.append(str(error))
    if device_type() == "cuda" and not is_available("transformer_engine"):
        rows.append(("", f"Transformer Engine, faster and with FP8: {INSTALL['transformer_engine']}"))
    return [*rows, ("precision", config.precision.dtype + (f", FP8 {config.precision.fp8}" if config.precision.fp8
                                                           else ""))]


def _ranks(config, ranks: int, problems: list[str]) -> list[tuple[str, str]]:
    from megatron_encdec.training.plan import check_topology

    try:
        check_topology(config, ranks)
    except UserError as error:
        problems.append(str(error))
        return [("ranks", str(ranks))]
    parallel, batch = config.parallel, config.batch
    data = ranks // (parallel.tensor * parallel.pipeline)
    steps = batch.global_size // (data * batch.micro_size)
    return [("ranks", f"{ranks} = tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {data}"),
            ("batch", f"{batch.global_size:,} windows of {config.data.sequence_length:,} tokens = {data} x {steps} "
             f"micro-batches of {batch.micro_size}")]


def _size(config, ranks: int, problems: list[str]) -> list[tuple[str, str]]:
    """Memory for the state, and disk for checkpoints."""
    import torch

    from megatron_encdec.platform.device import device_type
    from megatron_encdec.training.dry_run import state_bytes, with_vocabulary

    try:
        config = with_vocabulary(config)[0]
    except UserError as error:
        problems.append(str(error))
        return []
    each, on_gpu = state_bytes(config, ranks), device_type() == "cuda"
    there = torch.cuda.get_device_properties(0).total_memory if on_gpu else \
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed, of = (each, "the GPU") if on_gpu else (each * ranks, "this machine")
    if needed > there:
        problems.append(f"memory: weights, gradients and optimizer alone take {needed / 2**30:.1f} GiB of {of}'s "
                        f"{there / 2**30:.1f} GiB; raise parallel.tensor or parallel.pipeline")
    one = config.model.parameter_count() * BYTES_A_PARAMETER[config.precision.dtype]
    kept, folder = one * (config.checkpoint.keep + 1 + len(config.phases)), Path(config.run.dir).absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free
    if kept > free:
        problems.append(f"disk: {config.checkpoint.keep + 1} checkpoints and the phases' ends take about "
                        f"{kept / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free at {folder}; lower checkpoint.keep, "
                        "or give another run.dir")
    return [("memory", f"{each / 2**30:.2f} GiB a rank for weights, gradients and optimizer, activations on top; {of} "
             f"has {there / 2**30:.1f} GiB"),
            ("disk", f"{one / 2**30:.2f} GiB a checkpoint, about {kept / 2**30:.2f} GiB in all; {free / 2**30:.1f} GiB "
             "free")]


def _inputs(config, problems: list[str]) -> list[tuple[str, str]]:
    from megatron_encdec.data.store import TokenStore
    from megatron_encdec.text.manifest import VALIDATION, writing_command
    from megatron_encdec.training.plan import missing_inputs
    from megatron_encdec.training.sources import sources

    missing = dict(line.split(": ", 1) for line in missing_inputs(config))
    rows = [("tokenizer", config.tokenizer.path)]
    for key, source in sources(config):
        if f"{key}.path" in missing:
            continue
        try:
            rows.append((key, f"{source.path}, {TokenStore(source.path).tokens:,} tokens"))
        except UserError as error:
            problems.append(f"{key}.path: {error}")
    names = {source.path for _, source in sources(config)}
    for key, path in missing.items():
        way = {"tokenizer.path": "give the path of one, or train it: megatron-encdec preprocess --input TEXTS "
                                 f"--tokenizer {shlex.quote(path)} --train-tokenizer SIZE --output PREFIX",
               "run.from.path": "give the directory of a run"}.get(key) or "write it: " + writing_command(
                   path, f"{path}.{VALIDATION}" in names, config.tokenizer.path)
        problems.append(f"{key}: {path} is missing; {way}")
    return rows


def _exports(config) -> list[tuple[str, str]]:
    """What a checkpoint goes out as, at the end of each phase."""
    from megatron_encdec.interop.families import choose

    found = {}
    for name in dict.fromkeys(phase.objective.name for phase in config.phases):
        try:
            found[name] = choose("auto", name, config.model).model_class
        except UserError as error:
            found[name] = "not possible, " + str(error).removeprefix("--as auto: ")
    return [("export", "; ".join(f"{name}: {what}" for name, what in found.items()))]


def _run(config, problems: list[str]) -> list[tuple[str, str]]:
    """What stands in run.dir, and whether the run may go on from there."""
    from megatron_encdec.rundir.lock import holder

    folder = Path(config.run.dir)
    launch = holder(folder)
    if launch is not None and launch.runs_here:
        problems.append(f"run.dir: {folder} is in use by {launch}; wait for it, or end it")
    try:
        return [("run", f"{folder}: {_beginning(config)}")]
    except UserError as error:
        if str(error) not in problems:  # a source that cannot be opened, for one
            problems.append(str(error))
        return []


def _beginning(config) -> str:
    """Where the run goes on from. Raises `UserError` where `pretrain` would before it loads anything; while tokenizer
    or data are missing only for what cannot be read."""
    from megatron_encdec.engine.checkpoint import newest, read_run_state
    from megatron_encdec.training.origin import check_origin
    from megatron_encdec.training.plan import missing_inputs, resolve

    if missing_inputs(config):
        found = newest(Path(config.run.dir) / "checkpoints")
        return f"goes on after step {read_run_state(found).step:,}" if found else "begins at step 0"
    origin = check_origin(resolve(config), fallback=False)
    if origin is None:
        return "another launch is saving here"
    whose = f" of {origin.parent['path']}" if origin.parent else ""
    if origin.kind in ("resume", "fork"):
        return f"goes on after step {origin.state.step:,}{whose}"
    return "begins at step 0" + (f" with the weights of step {origin.state.step:,}{whose}" if whose else "")


def _trackers(config) -> list[tuple[str, str]]:
    """One that is missing does not keep the run from running, and is said all the same."""
    named = config.logging.trackers
    rows = [("tracker", f"{name}: {'there' if is_available(name) else f'missing: {install_command(name)}'}")
            for name in (("tensorboard",) if named is None else named)]
    return rows or [("tracker", "none")]
