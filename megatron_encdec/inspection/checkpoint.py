"""`inspect checkpoint RUN_DIR[@STEP]`: run_state.json in words, size on disk, the tensors where asked for."""

import argparse
from pathlib import Path

from megatron_encdec.engine.checkpoint import directory_of, read_run_state
from megatron_encdec.inspection.tables import number, print_facts, print_table, say, size
from megatron_encdec.objectives.base import OBJECTIVES, Objective
from megatron_encdec.platform.errors import IntegrityError
from megatron_encdec.platform.restricted_pickle import load_records


def examine(arguments: argparse.Namespace) -> dict:
    """What is recorded of the checkpoint `arguments.checkpoint`, and what lies on disk."""
    checkpoint = directory_of(arguments.checkpoint)
    state = read_run_state(checkpoint)
    sizes = [file.stat().st_size for file in checkpoint.iterdir() if file.is_file()]
    tensors = {"tensors": read_tensors(checkpoint)} if arguments.tensors else {}
    return {"checkpoint": str(checkpoint), "files": len(sizes), "bytes": sum(sizes),
            **{key: value for key, value in state.as_dict().items() if key != "history"},
            # earlier versions recorded phases
            "stretches": state.history.get("stretches", state.history.get("phases", [])), **tensors}


def read_tensors(checkpoint: Path) -> list[dict]:
    """Name, global shape (whatever topology wrote it), dtype and bytes of each tensor, the model's weights first. From
    torch's `.metadata`, a pickle that is read without running anything from it; no tensor is loaded. Raises
    IntegrityError where it is missing or strange."""
    path = checkpoint / ".metadata"
    records = load_records(path)
    try:
        tensors = [{"name": name, "shape": list(item.size), "dtype": str(item.properties.dtype).removeprefix("torch."),
                    "bytes": item.size.numel() * item.properties.dtype.itemsize}
                   for name, item in records.state_dict_metadata.items() if hasattr(item, "size")]
    except (AttributeError, TypeError) as error:
        raise IntegrityError(f"{path}: {error}; this checkpoint is damaged or foreign") from None
    return sorted(tensors, key=lambda tensor: (not is_weight(tensor), tensor["name"]))


def is_weight(tensor: dict) -> bool:
    """Whether it belongs to the model, not to the optimizer."""
    return not tensor["name"].startswith("optimizer.")


def print_report(report: dict) -> None:
    """Print it in words."""
    history = ", ".join(f"{_label(done['objective'])} in steps {done['start'] + 1}..{done['end']}"
                        for done in report["stretches"])
    topology = report["topology"]
    print_facts([
        ("checkpoint", report["checkpoint"]),
        ("on disk", f"{size(report['bytes'])} in {report['files']} files"),
        ("step", number(report["step"])),
        ("phase", f"{report['phase_name']} (number {report['phase']}), objective {report['objective']}"),
        ("history", history or "nothing trained yet"),
        ("consumed", ", ".join(f"{number(report[name])} {name}" for name in ("samples", "tokens", "targets"))),
        ("history hash", report["history_hash"]),
        ("data", ", ".join(report["data_fingerprints"]) or "not recorded"),
        ("tokenizer", str(report["tokenizer_fingerprint"])),
        ("written by", f"{topology.get('world_size')} rank(s): tensor {topology.get('tensor')} x "
                       f"pipeline {topology.get('pipeline')} x data {topology.get('data')}, on "
                       f"{topology.get('device')}, {topology.get('threads')} thread(s)"),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    ])
    if tensors := report.get("tensors"):
        print_table(f"\n{len(tensors)} tensors", ("name", "shape", "dtype", "size"),
                    [(tensor["name"], " x ".join(map(str, tensor["shape"])) or "scalar", tensor["dtype"],
                      size(tensor["bytes"])) for tensor in tensors])
        weights = [tensor["bytes"] for tensor in tensors if is_weight(tensor)]
        say(f"{len(weights)} weights of {size(sum(weights))}, the other {len(tensors) - len(weights)} are the "
            "optimizer's. Layers are stacked: their number comes first.")


def _label(identity: dict) -> str:
    """An objective as the history has it, which may be of a version with other ones."""
    kind = OBJECTIVES.get(identity["name"])
    if kind is None:
        return identity["name"]
    settings = {key: value for key, value in identity.items() if key == "name" or key in kind.setting_names()}
    return Objective.from_yaml(settings, "objective").label()
