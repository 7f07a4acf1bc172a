"""The verb `doctor`: can this machine train, with what, and which command brings what is missing.

Needs nothing but Python's own library to say what is missing, and changes nothing on the machine. Packages are imported
in child processes: a broken one is a line, not a traceback. `--nodes` is doctor_nodes.py: do the nodes of a job fit
together.
"""

import argparse
import os
import platform as python_platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from megatron_encdec import __version__
from megatron_encdec.platform.children import available_cores
from megatron_encdec.platform.json_text import json_text
from megatron_encdec.platform.launcher import add_node_arguments, read_nodes
from megatron_encdec.platform.optional import CUDA_PACKAGES, TESTED, install_command
from megatron_encdec.platform.signals import how_it_ended

DESCRIPTION = """\
Say what this machine can train with: versions, device, backends, and for each thing that is missing the
command that installs it. Exit code 0 if training can start here, 1 if not.

  megatron-encdec doctor
  srun --ntasks-per-node 1 megatron-encdec doctor --nodes --directory runs/      all nodes of a job, side by side
  megatron-encdec doctor --nodes --nnodes 2 --node-rank 0 --master HOST          the same by hand, on each node

With --nodes: versions, code, devices, clocks, the network between them, the folder that they share. What differs from
the others is named, and then the exit code is 1.
"""
_PROBE_SECONDS = 120
_PROBE = """
from megatron_encdec.platform.optional import is_available, why_unusable
print(why_unusable({module!r}) if is_available({name!r}) else "missing")
"""


@dataclass(frozen=True)
class Package:
    """A package by import name; `distribution`: as it is installed, where that differs in more than dots and dashes."""

    name: str
    use: str
    required: bool = False  # no training without it
    distribution: str | None = None


PACKAGES = (
    Package("torch", "tensors, autograd, kernels", required=True),
    Package("megatron.core", "parallel layers, optimizer, checkpoints", required=True),
    Package("numpy", "data", required=True),
    Package("psutil", "megatron.core's checkpoints", required=True),
    Package("yaml", "configs", required=True, distribution="PyYAML"),
    Package("rich", "progress and tables", required=True),
    Package("tokenizers", "tokenizer.json", required=True),
    Package("transformers", "export to Hugging Face"),
    Package("safetensors", "export to Hugging Face"),
    Package("sentencepiece", "SentencePiece tokenizers"),
    Package("tensorboard", "curves in the browser"),
    Package("wandb", "curves in the browser"),
    Package("mlflow", "curves in the browser"),
    Package("trackio", "curves in the browser"),
    Package("datasets", "fine-tuning data"),
    Package("matplotlib", "figures of study report and inspect run --page"),
    Package("nemo_automodel", "fine-tuning recipes"),
    Package("transformer_engine", "fused layers and FP8 on GPUs"),
    Package("apex", "fused optimizer on GPUs"),
    Package("flash_attn", "attention kernels on GPUs"),
)
# What to import where the name alone says little: ours puts its CPU backend in place before megatron.core.
_MODULES = {"megatron.core": "megatron_encdec.platform.megatron", **CUDA_PACKAGES}


def examine_package(package: Package) -> dict:
    """`{version, state, why}`; state: `usable`, `missing`, or `broken` (a child process cannot import it)."""
    try:
        version = metadata.version(package.distribution or package.name)
    except metadata.PackageNotFoundError:
        version = None
    name, module = package.name.partition(".")[0], _MODULES.get(package.name, package.name)
    code = _PROBE.format(name=name, module=module)
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    try:
        done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True,
                              errors="replace", stdin=subprocess.DEVNULL, timeout=_PROBE_SECONDS,
                              env={**os.environ, "PYTHONPATH": paths})
        said = done.stdout.splitlines()
        why = said[-1] if said and done.returncode == 0 else f"broken (its import {how_it_ended(done.returncode)})"
    except subprocess.TimeoutExpired:
        why = f"broken (its import did not end in {_PROBE_SECONDS} s)"
    if why == "None":
        return {"version": version, "state": "usable", "why": None}
    if version is None and why == "missing":
        return {"version": None, "state": "missing", "why": "it is not installed"}
    return {"version": version, "state": "broken", "why": why.removeprefix("broken (").removesuffix(")")}


def examine() -> dict:
    """Everything doctor knows, as plain data: what `--json` prints."""
    with ThreadPoolExecutor(min(4, available_cores())) as threads:
        found = list(threads.map(examine_package, PACKAGES))
    packages = {package.name: {**asdict(package), **one, "install": install_command(package.name)}
                for package, one in zip(PACKAGES, found, strict=True)}
    device = _device() if packages["torch"]["state"] == "usable" else None
    if device:
        packages["torch"]["version"] = device["torch"]  # with its build, which pip's records leave out: +cpu, +cu130
    problems = _problems(packages) + ([device["problem"]] if device and device["problem"] else [])
    versions = {"megatron_encdec": __version__, "python": python_platform.python_version(),
                **{name: one["version"] for name, one in packages.items()}}
    backends = _backends(device, packages) if device and not device["problem"] else None
    return {"versions": versions, "packages": packages, "device": device, "backends": backends, "problems": problems,
            "can_train": not problems, "untested": untested(sys.version_info[:2], versions["megatron.core"])}


def untested(python: tuple[int, int], core: str | None) -> str | None:
    """What to say where this Python and megatron.core are no pair that the tests are run with; None where they are."""
    if core is None or TESTED.get(python) == core:
        return None
    pairs = " and ".join(f"Python {'.'.join(map(str, one))} with megatron-core {its}" for one, its in TESTED.items())
    return f"Python {'.'.join(map(str, python))} with megatron-core {core} may work; tested are {pairs}"


def _problems(packages: dict) -> list[str]:
    lines = [f"{name} is {one['state']} ({one['why']})" for name, one in packages.items()
             if one["required"] and one["state"] != "usable"]
    core = packages["megatron.core"]  # fails with what it imports
    culprits = [name for name, one in packages.items() if one["state"] == "broken" == core["state"]
                and one["why"] == core["why"] and one is not core]
    return lines + [f"megatron.core fails with {name}: mend or uninstall that one" for name in culprits]


def _device() -> dict:
    """The device that a run here would use; imports torch, which has been seen to import."""
    import torch

    from megatron_encdec.platform.device import bf16_is_native, device_type, varlen_is_usable

    facts = {"type": device_type(), "torch": torch.__version__, "driver": _driver(), "problem": None, "gpus": [],
             "cpu": _cpu(), "cores": available_cores(), "threads": torch.get_num_threads(),
             "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "cuda": torch.version.cuda,
             "nccl": None, "bf16_native": None, "varlen": False}
    try:
        facts["bf16_native"] = bf16_is_native()
        facts["varlen"] = varlen_is_usable()
        if facts["type"] == "cuda":
            cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
            facts["gpus"] = [{"name": card.name, "memory_bytes": card.total_memory,
                              "capability": [card.major, card.minor]} for card in cards]
            facts["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception as error:  # a driver that is too old, a GPU that is lost: whatever it is, say it
        said = " ".join(str(error).split())[:300]
        facts["problem"] = f"the {facts['type']} device does not answer ({said})"
    return facts


def _cpu() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found[1] if found else python_platform.processor() or python_platform.machine()


def _driver() -> str | None:
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                              check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


def _backends(device: dict, packages: dict) -> dict:
    """What a run with every setting left at its default would use."""
    engine, flash = (packages[name]["state"] for name in ("transformer_engine", "flash_attn"))
    on_gpu = device["type"] == "cuda"
    layers = "torch: Transformer Engine is installed, but broken" if on_gpu and engine == "broken" else "torch"
    attention = "scaled_dot_product_attention of torch"
    if on_gpu and engine == "usable":
        layers = "transformer_engine"
        attention = f"packed attention of Transformer Engine, {'flash-attn or ' if flash == 'usable' else ''}cuDNN"
    elif device["varlen"] and device["bf16_native"]:
        attention = "packed attention of torch, flash kernels"
    return {"communication": "nccl" if on_gpu else "gloo", "layers": layers, "attention": attention,
            "dtype": "bf16" if device["bf16_native"] else "fp32", "fp8": fp8_recipes(device, engine)}


def fp8_recipes(device: dict, transformer_engine: str) -> str:
    """What `precision.fp8` may be on `device` (as `examine` describes it) with TE in that state, or why nothing."""
    from megatron_encdec.platform.device import Fp8Facts, fp8_refusal

    lowest = min((tuple(card["capability"]) for card in device["gpus"]), default=None)
    facts = Fp8Facts(lowest if device["type"] == "cuda" else None, device["cuda"], transformer_engine)
    possible = [recipe for recipe in ("delayed", "current", "blockwise") if not fp8_refusal(recipe, facts)]
    return f"precision.fp8: {', '.join(possible)}" if possible else f"not possible: {fp8_refusal(None, facts)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `doctor`."""
    parser.add_argument("--nodes", action="store_true", help="compare the nodes of this job")
    parser.add_argument("--directory", default=".", metavar="DIR",
                        help="with --nodes: where runs will be; made where it is missing")
    add_node_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb; 0 where training can start, or all nodes fit together, else 1."""
    if arguments.nodes:
        return _run_nodes(arguments)
    report = examine()
    print(json_text(report, 2) if arguments.json else "\n".join(report_lines(report)))
    return 0 if report["can_train"] else 1


def _run_nodes(arguments: argparse.Namespace) -> int:
    from megatron_encdec.platform import device
    from megatron_encdec.platform.doctor_nodes import examine_nodes, odd_ones, table

    device.choose("auto")
    by_hand = read_nodes(None, arguments.nnodes, arguments.node_rank, arguments.master, lambda: 1)
    if by_hand:  # this process is the node's one rank
        os.environ.update(RANK=str(by_hand.node), WORLD_SIZE=str(by_hand.count), LOCAL_RANK="0",
                          MASTER_ADDR=by_hand.address, MASTER_PORT=str(by_hand.port))
    nodes = examine_nodes(arguments.directory, [package.distribution or package.name for package in PACKAGES])
    odd = odd_ones(nodes, arguments.directory)
    if os.environ["RANK"] == "0":
        if arguments.json:
            print(json_text({"nodes": [asdict(node) for node in nodes], "odd": odd}, 2))
        else:
            print("\n".join([*table(nodes), "", *(odd or [f"all {len(nodes)} fit together"])]))
    return 1 if odd else 0


def report_lines(report: dict) -> list[str]:
    """`examine`'s report as people read it."""
    versions, lacking = [], []
    for name, version in report["versions"].items():
        found = report["packages"].get(name)
        if not found or found["state"] == "usable":
            versions.append((name, version or "version unknown"))
            continue
        versions.append((name, found["state"] + (f" ({version})" if version else "")))
        need = "needed to train" if found["required"] else "optional"
        lacking.append((name, f"{found['use']} ({need}): {found['install']}"))
        if found["state"] == "broken":
            lacking.append(("", f"installed, but it does not import: {found['why']}"))
    lines = []
    for title, rows in (("versions", versions), ("device", _device_rows(report["device"])),
                        ("backends", (report["backends"] or {}).items()), ("not usable here", lacking)):
        if rows:
            lines += [title, *(f"  {name:<20} {text}" for name, text in rows), ""]
    lines += [f"note: {report['untested']}", ""] if report["untested"] else []
    if report["can_train"]:
        return [*lines, "training can start here"]
    return [*lines, *(f"training cannot start here: {problem}" for problem in report["problems"])]


def _device_rows(device: dict | None) -> list[tuple[str, str]]:
    if device is None:
        return [("unknown", "torch is not usable")]
    rows = [("cpu", f"{device['cpu']}, {device['cores']} cores, {device['threads']} threads of torch"),
            ("memory", f"{device['memory_bytes'] / 2**30:.1f} GiB")]
    for number, card in enumerate(device["gpus"]):
        rows.append((f"gpu {number}", f"{card['name']}, {card['memory_bytes'] / 2**30:.1f} GiB, compute capability "
                     f"{'.'.join(map(str, card['capability']))}"))
    if device["type"] == "cuda":
        nccl, driver = device["nccl"] or "unknown", device["driver"] or "unknown"
        rows.append(("cuda", f"{device['cuda']}, NCCL {nccl}, driver {driver}"))
    elif device["driver"]:  # the commonest accident: a GPU, and a torch that does not see it
        build = f"is built for CUDA {device['cuda']} and finds no GPU" if device["cuda"] else "is a CPU build"
        rows.append(("gpu", f"not used: driver {device['driver']} is here, but this torch {build}"))
        rows.append(("", f"for a build that fits the driver: {install_command('torch')}"))
    else:
        rows.append(("gpu", "none"))
    if device["bf16_native"] is not None:
        rows.append(("bf16", "native" if device["bf16_native"] else "emulated, slower than fp32"))
    return rows
