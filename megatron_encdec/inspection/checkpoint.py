"""`inspect checkpoint RUN_DIR[@STEP]`: run_state.json in words, size on disk, the tensors where asked for.

    1. `describe(checkpoint)`       what is recorded, as plain data
    2. `read_tensors(checkpoint)`   names, global shapes and dtypes from torch's `.metadata`, a pickle that is
                                    read without running anything from it
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_encdec.engine.checkpoint import directory_of
from megatron_encdec.engine.run_state import read_run_state
from megatron_encdec.inspection.tables import number, print_facts, print_table, say, size
from megatron_encdec.objectives import OBJECTIVES
from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.platform.restricted_pickle import load_records


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint: its global shape, whatever the topology that wrote it; `bytes` in all."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int

    @property
    def is_weight(self) -> bool:
        """Whether it belongs to the model, not to the optimizer."""
        return not self.name.startswith("optimizer.")


def read_tensors(checkpoint: Path) -> list[Tensor]:
    """The tensors, weights first, by name. Raises IntegrityError where `.metadata` is missing or strange."""
    path = checkpoint / ".metadata"
    records = load_records(path)
    try:
        tensors = [Tensor(name, tuple(item.size), str(item.properties.dtype).removeprefix("torch."),
                          item.size.numel() * item.properties.dtype.itemsize)
                   for name, item in records.state_dict_metadata.items() if hasattr(item, "size")]
    except (AttributeError, TypeError) as error:
        raise IntegrityError(f"{path}: {error}; this checkpoint is damaged or foreign") from None
    return sorted(tensors, key=lambda tensor: (not tensor.is_weight, tensor.name))


def describe(checkpoint: Path) -> dict:
    """run_state.json, without the long history, and what lies on disk."""
    state = read_run_state(checkpoint)
    done = state.history.get("stretches", state.history.get("phases", []))  # phases: recorded by earlier versions
    files = [file for file in checkpoint.iterdir() if file.is_file()]
    return {"checkpoint": str(checkpoint), "files": len(files),
            "bytes": sum(file.stat().st_size for file in files),
            **{key: value for key, value in state.as_dict().items() if key != "history"}, "stretches": done}


def inspect(arguments: argparse.Namespace) -> None:
    """Print the checkpoint that `arguments.checkpoint` names."""
    checkpoint = directory_of(arguments.checkpoint)
    report = describe(checkpoint)
    tensors = read_tensors(checkpoint) if arguments.tensors else None
    if arguments.json:
        listed = {} if tensors is None else {"tensors": [vars(tensor) for tensor in tensors]}
        print(json.dumps({**report, **listed}, indent=2))
        return
    print_facts(_facts(report))
    if tensors is not None:
        say("")
        _print_tensors(tensors)


def _print_tensors(tensors: list[Tensor]) -> None:
    rows = [(tensor.name, " x ".join(map(str, tensor.shape)) or "scalar", tensor.dtype, size(tensor.bytes))
            for tensor in tensors]
    print_table(f"{len(tensors)} tensors", ("name", "shape", "dtype", "size"), rows)
    weights = [tensor.bytes for tensor in tensors if tensor.is_weight]
    say(f"{len(weights)} weights of {size(sum(weights))}, the other {len(tensors) - len(weights)} are the "
        "optimizer's. Layers are stacked: their number comes first.")


def _facts(report: dict) -> list[tuple[str, str]]:
    history = ", ".join(f"{_label(done['objective'])} in steps {done['start'] + 1}..{done['end']}"
                        for done in report["stretches"])
    topology = report["topology"]
    return [
        ("checkpoint", report["checkpoint"]),
        ("on disk", f"{size(report['bytes'])} in {report['files']} files"),
        ("step", number(report["step"])),
        ("phase", f"{report['phase_name']} (number {report['phase']}), objective {report['objective']}"),
        ("history", history or "nothing trained yet"),
        ("consumed", f"{number(report['samples'])} samples, {number(report['tokens'])} tokens, "
                     f"{number(report['targets'])} targets"),
        ("history hash", report["history_hash"]),
        ("data", ", ".join(report["data_fingerprints"]) or "not recorded"),
        ("tokenizer", str(report["tokenizer_fingerprint"])),
        ("written by", f"{topology.get('world_size')} rank(s): tensor {topology.get('tensor')} x "
                       f"pipeline {topology.get('pipeline')} x data {topology.get('data')}, on "
                       f"{topology.get('device')}, {topology.get('threads')} thread(s)"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    ]


def _label(identity: dict) -> str:
    """An objective as the history has it, which may be of a version with other ones."""
    kind = OBJECTIVES.get(identity["name"])
    if kind is None:
        return identity["name"]
    return kind(**{key: value for key, value in identity.items() if key in kind.setting_names()}).label()
