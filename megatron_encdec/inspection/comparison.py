"""`inspect run A B C...`: runs side by side by their final validation losses, and what stands between them.

    1. `validation_basis(config)`  what two validation losses must share to be compared
    2. `remarks(runs)`             where the basis differs, where a run is not finished, what else differs
"""

import argparse

from megatron_encdec.inspection.run import describe, read_run
from megatron_encdec.inspection.tables import number, print_table, say, short
from megatron_encdec.objectives.base import evaluated
from megatron_encdec.platform import schema
from megatron_encdec.rundir.lineage import differences
from megatron_encdec.training.config import Config

# Not a difference between two experiments: where a run lives, how it was cut over ranks, what it logged.
_COSMETIC = ("dir", "phases", "checkpoint", "logging", "parallel", "micro_size", "on_nonfinite", "max_skipped",
             "hang_timeout")


def examine(arguments: argparse.Namespace) -> dict:
    """The runs `arguments.runs`, each as `inspect run` knows it, with its newest validation losses by objective."""
    runs = []
    for directory, (config, records) in [(run, read_run(run)) for run in arguments.runs]:
        report = describe(directory, config, records, with_entropy=False)
        newest = next((phase["validation"] for phase in reversed(report["phases"]) if phase["validation"]), {})
        losses = {name: loss for name, loss in newest.items() if loss is not None}
        runs.append(({**report, "final_validation": losses}, config))
    return {"runs": [report for report, _ in runs], "remarks": remarks(runs)}


def validation_basis(config: Config) -> dict:
    """What two validation losses must share to be compared, objective settings included."""
    data, objectives = schema.to_dict(config.data), [phase.objective for phase in config.phases]
    return {"data": {key: data[key] for key in ("validation", "seed", "sequence_length", "isolate_documents",
                                                "random_length")},
            "tokenizer": schema.to_dict(config.tokenizer),
            "validation windows": config.evaluation.batches * config.batch.global_size,
            "objectives": {name: schema.to_dict(one) for name, one in evaluated(objectives, has_mask=True).items()}}


def remarks(runs: list[tuple[dict, Config]]) -> list[str]:
    """One line for each thing to know before comparing; the first run is what the others are held against."""
    (first, first_config), *others = runs
    lines = [f"{report['run']} is not finished: step {report['step']:,} of {report['planned_steps']:,}"
             for report, _ in runs if report["step"] < report["planned_steps"]]
    for report, config in others:
        pair = f"{first['run']} -> {report['run']}"
        basis = differences(validation_basis(first_config), validation_basis(config))
        if basis:
            lines.append(f"{pair}: validation losses CANNOT be compared: {'; '.join(basis)}")
        if report["tokens"] != first["tokens"]:
            lines.append(f"{pair}: not the same budget: {first['tokens']:,} -> {report['tokens']:,} tokens")
        if rest := [line for line in differences(_essence(first_config), _essence(config)) if line not in basis]:
            lines.append(f"{pair}: besides the phases they differ in {'; '.join(rest)}")
    return lines


def _essence(config: Config) -> dict:
    return {name: {key: value for key, value in section.items() if key not in _COSMETIC}
            for name, section in schema.to_dict(config).items() if name not in _COSMETIC}


def print_report(report: dict) -> None:
    """Print the table; the lowest loss of each objective is marked."""
    finals = [run["final_validation"] for run in report["runs"]]
    lowest = {name: min(losses[name] for losses in finals if name in losses) for name in sorted(set().union(*finals))}
    rows = []
    for run, losses in zip(report["runs"], finals, strict=True):
        phases = " + ".join(f"{phase['objective']} {phase['steps']:,}" for phase in run["phases"])
        marked = [number(losses.get(name)) + ("*" if losses.get(name) == least else " ")
                  for name, least in lowest.items()]
        rows.append((run["run"], phases, short(run["tokens"]), short(run["targets"]), *marked))
    print_table("final validation losses (* lowest)", ("run", "phases (steps)", "tokens", "targets", *lowest), rows,
                left=2)
    for remark in report["remarks"] or ["the runs differ in nothing but their phases"]:
        say(remark)
