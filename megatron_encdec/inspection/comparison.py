"""`inspect run A B C...`: runs side by side by their final validation losses, and what stands between them.

    1. `validation_basis(config)`  what two validation losses must share to be compared
    2. `remarks(runs)`             where the basis differs, where a run is not finished, what else differs
    3. `inspect(runs, as_json)`    the table; the lowest loss of each objective is marked
"""

import json

from megatron_encdec.inspection.tables import number, print_table, say, short
from megatron_encdec.objectives import evaluated
from megatron_encdec.platform import schema
from megatron_encdec.rundir.lineage import differences
from megatron_encdec.training.config import Config

# Not a difference between two experiments: where a run lives, how it was cut over ranks, what it logged.
_COSMETIC = ("dir", "phases", "checkpoint", "logging", "parallel", "micro_size", "on_nonfinite", "max_skipped",
             "hang_timeout")


def validation_basis(config: Config) -> dict:
    """What a validation loss is measured on, objective settings included."""
    data, settings = schema.to_dict(config.data), schema.to_dict(config)
    return {"data": {key: data[key] for key in ("validation", "seed", "sequence_length", "isolate_documents",
                                                "random_length")},
            "tokenizer": settings["tokenizer"],
            "validation windows": config.evaluation.batches * config.batch.global_size,
            "objectives": {name: schema.to_dict(objective) for name, objective in evaluated(
                [phase.objective for phase in config.phases], has_mask=True).items()}}


def remarks(runs: list[tuple[dict, Config]]) -> list[str]:
    """One line for each thing to know before comparing; the first run is what the others are held against."""
    (first, first_config), lines = runs[0], []
    for report, _ in runs:
        if report["step"] < report["planned_steps"]:
            lines.append(f"{report['run']} is not finished: step {report['step']:,} of "
                         f"{report['planned_steps']:,}")
    for report, config in runs[1:]:
        pair = f"{first['run']} -> {report['run']}"
        basis = differences(validation_basis(first_config), validation_basis(config))
        if basis:
            lines.append(f"{pair}: validation losses CANNOT be compared: {'; '.join(basis)}")
        if report["tokens"] != first["tokens"]:
            lines.append(f"{pair}: not the same budget: {first['tokens']:,} -> {report['tokens']:,} tokens")
        others = [line for line in differences(_essence(first_config), _essence(config)) if line not in basis]
        if others:
            lines.append(f"{pair}: besides the phases they differ in {'; '.join(others)}")
    return lines


def _essence(config: Config) -> dict:
    sections = {name: section for name, section in schema.to_dict(config).items() if name not in _COSMETIC}
    return {name: {key: value for key, value in section.items() if key not in _COSMETIC}
            for name, section in sections.items()}


def final_losses(report: dict) -> dict[str, float]:
    """Validation losses by objective, the newest of the run."""
    newest = next((phase["validation"] for phase in reversed(report["phases"]) if phase["validation"]), {})
    return {name: loss for name, loss in newest.items() if loss is not None}


def inspect(runs: list[tuple[dict, Config]], as_json: bool) -> None:
    """Print `runs`, each its `run.describe` and config."""
    reports = [{**report, "final_validation": final_losses(report)} for report, _ in runs]
    notes = remarks(runs)
    if as_json:
        print(json.dumps({"runs": reports, "remarks": notes}, indent=2))
        return
    names = sorted({name for report in reports for name in report["final_validation"]})
    lowest = {name: min(loss for report in reports
                        if (loss := report["final_validation"].get(name)) is not None) for name in names}
    rows = []
    for report in reports:
        losses = [report["final_validation"].get(name) for name in names]
        marked = [number(loss) + ("*" if loss == lowest[name] else " ")
                  for name, loss in zip(names, losses, strict=True)]
        phases = " + ".join(f"{phase['objective']} {phase['steps']:,}" for phase in report["phases"])
        rows.append((report["run"], phases, short(report["tokens"]), short(report["targets"]), *marked))
    print_table("final validation losses (* lowest)",
                ("run", "phases (steps)", "tokens", "targets", *names), rows, left=2)
    for note in notes or ["the runs differ in nothing but their phases"]:
        say(note)
