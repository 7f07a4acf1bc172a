"""`inspect run RUN_DIR`: what a run did and where it stands, from its metrics.jsonl and config.yaml.

    1. `read_run(directory)`       config and metrics; what is not a run directory is refused
    2. `with_ancestors(records)`   a fork's lines, with those of the runs that it continues before them
    3. `phase_summaries(...)`      per phase: steps, tokens, targets, losses, speed
    4. `corpus_entropy(...)`       of the training data, the yardstick of the losses

Losses are in nats per target. Works on a run in progress too.
"""

import argparse
import json
from pathlib import Path

from megatron_encdec.data.store import TokenStore
from megatron_encdec.engine.checkpoint import newest, read_run_state
from megatron_encdec.inspection.tables import number, print_facts, print_table, say, short
from megatron_encdec.inspection.token_statistics import unigram_entropy
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.metrics import read_metrics
from megatron_encdec.training.config import Config, load_config
from megatron_encdec.training.stretches import lay_out


def examine(arguments: argparse.Namespace) -> dict:
    """The run `arguments.runs[0]`, and the exported models `arguments.model`."""
    (directory,) = arguments.runs
    return {**describe(directory, *read_run(directory), with_entropy=True),
            "models": [_model(model) for model in arguments.model]}


def read_run(directory: str) -> tuple[Config, list[dict]]:
    """The resolved config and the metrics of a run, or a `UserError` that says what is not there."""
    path = Path(directory)
    if not (path / "config.yaml").is_file():
        what = "it has no config.yaml" if path.is_dir() else "there is no such directory"
        raise UserError(f"{directory}: not a run directory ({what}); name the run.dir of a config")
    config, records = load_config(path / "config.yaml"), read_metrics(path / "metrics.jsonl", torn_tail=True)
    if not of_kind("train", records):
        raise UserError(f"{path / 'metrics.jsonl'}: no step is recorded yet; start the run with "
                        "`megatron-encdec pretrain`")
    return config, records


def of_kind(kind: str, records: list[dict]) -> list[dict]:
    """The lines of that kind."""
    return [record for record in records if record.get("kind") == kind]


def describe(directory: str, config: Config, records: list[dict], with_entropy: bool) -> dict:
    """Everything `inspect run` knows of one run; without the entropy no data is read."""
    # the counters of a fork go on from its parent's; those of a run from weights alone begin at 0
    checkpoint, parent = newest(Path(directory) / "checkpoints"), parent_of(records)
    entropy, unknown = None, "not counted when runs are compared"
    if with_entropy:
        fingerprints = read_run_state(checkpoint).data_fingerprints if checkpoint else None
        entropy, unknown = corpus_entropy(config, fingerprints)
    phases = phase_summaries(config, with_ancestors(records), entropy and entropy["nats"])
    last = of_kind("train", records)[-1]
    return {
        "run": directory, "parent": parent, "begun_at": parent["step"] if _continues(parent) else 0,
        "step": last["step"], "planned_steps": phases[-1]["start"] + phases[-1]["planned_steps"],
        "tokens": last["tokens"], "targets": last["targets"], "phases": phases,
        "unigram_entropy": entropy, "unigram_entropy_unknown": unknown,
        "all_phases_below_entropy": all(phase["below_entropy"] and phase["steps"] == phase["planned_steps"]
                                        for phase in phases) if entropy else None,
        "checkpoint": str(checkpoint) if checkpoint else None,
    }


def parent_of(records: list[dict]) -> dict | None:
    """The run that these lines name as the one they began from: its path, step and state."""
    return next((record["parent"] for record in of_kind("resume", records) if "parent" in record), None)


def _continues(parent: dict | None) -> bool:
    """Whether a run with that parent is a fork of it; else it has at most the weights of it."""
    return parent is not None and parent["state"] == "all"


def with_ancestors(records: list[dict]) -> list[dict]:
    """The lines of a fork after those of its parent up to the fork, as far as the parents' files are there."""
    parent = parent_of(records)
    if not _continues(parent):
        return records
    try:
        older = read_metrics(Path(parent["path"]) / "metrics.jsonl", torn_tail=True)
    except UserError:
        older = []
    return [*(record for record in with_ancestors(older) if record.get("step", 0) <= parent["step"]), *records]


def phase_summaries(config: Config, records: list[dict], entropy: float | None) -> list[dict]:
    """A summary a phase of the config, in order, as far as it has come; None where nothing is recorded.

    `objective` is as the command line spells it (mlm:0.4); `validation` the last losses by objective name and
    `validation_loss` the one that the phase trains for. `tokens_per_second` is tokens over time, of the logged steps.
    `below_entropy`: both last losses lie below the unigram entropy. Of a fork whose parent is gone, earlier phases
    have their steps but no losses, and no targets are known.
    """
    first = records[0] if records else {}
    unseen, targets_before = 0, 0  # the counters at which the lines begin: of a fork whose parent's lines are gone
    if first.get("kind") == "resume" and _continues(first.get("parent")):
        unseen, targets_before = first["step"], first["targets"]
    summaries = []
    for phase in lay_out(config):
        mine = [record for record in records if record.get("phase") == phase.name]
        lines, evaluations = of_kind("train", mine), of_kind("eval", mine)
        losses = [line["loss"] for line in lines if line["loss"] is not None]
        reached = lines[-1]["step"] if lines else min(unseen, phase.end)
        steps = max(0, reached - phase.start)
        evaluation = evaluations[-1] if evaluations else {"losses": {}, "step": None}
        validation_loss = evaluation["losses"].get(phase.objective.name)
        ends = [loss for loss in (*losses[-1:], validation_loss) if loss is not None]
        summaries.append({
            "name": phase.name, "objective": phase.objective.label(), "start": phase.start,
            "steps": steps, "planned_steps": phase.steps, "tokens": steps * phase.tokens_per_step,
            "targets": lines[-1]["targets"] - targets_before if lines and phase.start >= unseen else None,
            "first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None,
            "validation": evaluation["losses"], "validation_step": evaluation["step"],
            "validation_loss": validation_loss,
            "tokens_per_second": len(lines) / sum(1 / line["tokens_per_second"] for line in lines) if lines else None,
            "below_entropy": all(loss < entropy for loss in ends) if ends and entropy is not None else None})
        if lines:
            targets_before = lines[-1]["targets"]
    return summaries


def corpus_entropy(config: Config, fingerprints: list[str] | None) -> tuple[dict | None, str | None]:
    """The training data's unigram entropy, or None and why it cannot be told: one reason is that the data's
    fingerprints are not those that the newest checkpoint knows."""
    try:
        stores = [TokenStore(source.path) for source in config.data.train]
        if fingerprints is not None and fingerprints != [store.fingerprint for store in stores]:
            return None, "the data under data.train is no longer what the run was trained on"
        weights = [source.weight for source in config.data.train]
        return unigram_entropy(stores, weights, config.model.vocabulary_size), None
    except UserError as error:
        return None, str(error)


def _model(directory: str) -> dict:
    path = Path(directory) / "config.json"
    try:
        architectures = json.loads(path.read_text(encoding="utf-8")).get("architectures") or ["unknown class"]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--model {directory}: not an exported model ({path}: {error})") from None
    return {"path": directory, "class": architectures[0]}


def print_report(report: dict) -> None:
    """Print the closing table."""
    rows = []
    for phase in report["phases"]:
        left = f"/{phase['planned_steps']:,}" if phase["steps"] < phase["planned_steps"] else ""
        losses = [number(phase[name]) for name in ("first_loss", "last_loss", "validation_loss")]
        rows.append((phase["name"], phase["objective"], f"{phase['steps']:,}{left}", short(phase["tokens"]),
                     short(phase["targets"]), *losses, short(phase["tokens_per_second"])))
    print_table(f"{report['run']}: step {report['step']:,} of {report['planned_steps']:,}",
                ("phase", "objective", "steps", "tokens", "targets", "first loss", "last loss", "validation",
                 "tokens/s"), rows, left=2)
    if evaluated := [phase for phase in report["phases"] if phase["validation"]]:
        names = list(evaluated[0]["validation"])
        print_table("validation loss by objective, where each phase ended or stands", ("phase", "step", *names),
                    [(phase["name"], f"{phase['validation_step']:,}",
                      *(number(phase["validation"].get(name)) for name in names)) for phase in evaluated])
    else:
        say("no validation losses: no data.validation in the config, or the first is still to come\n")
    print_facts(_facts(report))


def _facts(report: dict) -> list[tuple[str, str]]:
    entropy = report["unigram_entropy"]
    facts = [("unigram entropy", f"not known: {report['unigram_entropy_unknown']}")]
    if entropy:
        whole = entropy["counted"] == entropy["tokens"]
        counted = f"all {entropy['tokens']:,}" if whole else \
            f"{entropy['counted']:,} of {entropy['tokens']:,}, in pieces spread evenly over the"
        facts = [("unigram entropy", f"{entropy['nats']:.4f} nats (counted on {counted} training tokens)"),
                 ("", _verdict(report))]
    facts.append(("run", report["run"]))
    if parent := report["parent"]:
        alone = " (weights alone)" if parent["state"] == "weights" else ""
        facts.append(("begun from", f"{parent['path']}@{parent['step']}{alone}"))
    return [*facts, ("newest checkpoint", report["checkpoint"] or "none yet"),
            *(("model", f"{model['path']} ({model['class']})") for model in report["models"])]


def _verdict(report: dict) -> str:
    phases = report["phases"]
    if report["all_phases_below_entropy"]:
        every = {1: "the phase", 2: "both phases"}.get(len(phases), f"all {len(phases)} phases")
        return f"{every} ended below it, in training and validation loss"
    parts = []
    for phase in phases:
        where = "ended" if phase["steps"] == phase["planned_steps"] else "stands"
        says = {None: "has no loss yet", True: f"{where} below it", False: f"{where} NOT below it"}
        parts.append(f"{phase['name']} {says[phase['below_entropy']]}")
    return ", ".join(parts)
