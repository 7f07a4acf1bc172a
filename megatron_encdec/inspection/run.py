"""`inspect run RUN_DIR...`: what a run did and where it stands, from its metrics.jsonl and config.yaml.

    1. `read_run(directory)`       config and metrics; what is not a run directory is refused
    2. `with_ancestors(records)`   a fork's lines, with those of the runs that it continues before them
    3. `phase_summaries(...)`      per phase: steps, tokens, targets, losses, speed
    4. `corpus_entropy(...)`       of the training data, the yardstick of the losses
    5. `inspect(arguments)`        the closing table of one run; several go to `comparison`

Losses are in nats per target. Works on a run in progress too.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_encdec.data.store import TokenStore
from megatron_encdec.engine.checkpoint import newest
from megatron_encdec.engine.run_state import read_run_state
from megatron_encdec.inspection import comparison
from megatron_encdec.inspection.tables import number, print_facts, print_table, say, short
from megatron_encdec.inspection.unigram import Entropy, unigram_entropy
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.metrics import read_metrics
from megatron_encdec.training.config import Config, load_config
from megatron_encdec.training.stretches import lay_out


@dataclass(frozen=True)
class PhaseSummary:
    """A phase as far as it has come; None where nothing is recorded.

    `objective` is as the command line spells it (mlm:0.4); `validation` the last losses by objective name
    and `validation_loss` the one that the phase trains for. `tokens_per_second` is tokens over time, of the
    logged steps. `below_entropy`: both last losses lie below the unigram entropy.
    """

    name: str
    objective: str
    start: int
    steps: int
    planned_steps: int
    tokens: int
    targets: int | None
    first_loss: float | None
    last_loss: float | None
    validation: dict[str, float | None]
    validation_step: int | None
    validation_loss: float | None
    tokens_per_second: float | None
    below_entropy: bool | None


def read_run(directory: str) -> tuple[Config, list[dict]]:
    """The resolved config and the metrics of a run, or a `UserError` that says what is not there."""
    path = Path(directory)
    if not (path / "config.yaml").is_file():
        what = "it has no config.yaml" if path.is_dir() else "there is no such directory"
        raise UserError(f"{directory}: not a run directory ({what}); name the run.dir of a config")
    config = load_config(path / "config.yaml")
    records = read_metrics(path / "metrics.jsonl", torn_tail=True)
    if not any(record.get("kind") == "train" for record in records):
        raise UserError(f"{path / 'metrics.jsonl'}: no step is recorded yet; start the run with "
                        "`megatron-encdec pretrain`")
    return config, records


def parent_of(records: list[dict]) -> dict | None:
    """The run that these lines name as the one they began from: its path, step and state."""
    return next((record["parent"] for record in records if record.get("kind") == "resume" and "parent" in record), None)


def with_ancestors(records: list[dict]) -> list[dict]:
    """The lines of a fork after those of its parent up to the fork, as far as the parents' files are there."""
    parent = parent_of(records)
    if parent is None or parent["state"] != "all":
        return records
    try:
        older = read_metrics(Path(parent["path"]) / "metrics.jsonl", torn_tail=True)
    except UserError:
        older = []
    return [*(record for record in with_ancestors(older) if record.get("step", 0) <= parent["step"]), *records]


def _unseen(records: list[dict]) -> dict:
    """The counters at which the lines begin: 0, or where a fork began whose parent's lines are gone."""
    first = records[0] if records else {}
    begun = first.get("kind") == "resume" and (first.get("parent") or {}).get("state") == "all"
    return {"step": first["step"], "targets": first["targets"]} if begun else {"step": 0, "targets": 0}


def phase_summaries(config: Config, records: list[dict], entropy: Entropy | None) -> list[PhaseSummary]:
    """One summary a phase of the config, in order; phases not yet begun have 0 steps.

    Of a fork whose parent is gone, earlier phases have their steps but no losses, and no targets are known.
    """
    unseen = _unseen(records)
    summaries, before = [], unseen
    for phase in lay_out(config):
        mine = [record for record in records if record.get("phase") == phase.name]
        lines = [record for record in mine if record.get("kind") == "train"]
        evaluations = [record for record in mine if record.get("kind") == "eval"]
        losses = [line["loss"] for line in lines if line["loss"] is not None]
        last = lines[-1] if lines else None
        reached = max(last["step"] if last else 0, min(unseen["step"], phase.end))
        steps = max(0, reached - phase.start)
        validation = evaluations[-1]["losses"] if evaluations else {}
        validation_loss = validation.get(phase.objective.name)
        ends = [loss for loss in (losses[-1] if losses else None, validation_loss) if loss is not None]
        summaries.append(PhaseSummary(
            phase.name, phase.objective.label(), phase.start,
            steps=steps, planned_steps=phase.steps, tokens=steps * phase.tokens_per_step,
            targets=last["targets"] - before["targets"] if last and phase.start >= unseen["step"] else None,
            first_loss=losses[0] if losses else None, last_loss=losses[-1] if losses else None,
            validation=validation, validation_step=evaluations[-1]["step"] if evaluations else None,
            validation_loss=validation_loss,
            tokens_per_second=_mean_speed(lines),
            below_entropy=all(loss < entropy.nats for loss in ends) if ends and entropy else None))
        before = last or before
    return summaries


def _mean_speed(lines: list[dict]) -> float | None:
    """Tokens over time of steps of equal size: the harmonic mean."""
    return len(lines) / sum(1 / line["tokens_per_second"] for line in lines) if lines else None


def corpus_entropy(config: Config, fingerprints: list[str] | None) -> tuple[Entropy | None, str | None]:
    """The training data's unigram entropy, or None and why it cannot be told.

    `fingerprints`: of the data as the newest checkpoint knows it; other data at the same path is not counted.
    """
    try:
        stores = [TokenStore(source.path) for source in config.data.train]
        if fingerprints is not None and fingerprints != [store.fingerprint for store in stores]:
            return None, "the data under data.train is no longer what the run was trained on"
        return unigram_entropy(stores, [source.weight for source in config.data.train],
                               config.model.vocabulary_size), None
    except UserError as error:
        return None, str(error)


def describe(directory: str, config: Config, records: list[dict], with_entropy: bool) -> dict:
    """Everything `inspect run` knows of one run, as plain data; without the entropy no data is read."""
    # the counters of a fork go on from its parent's; those of a run from weights alone begin at 0
    checkpoint, parent = newest(Path(directory) / "checkpoints"), parent_of(records)
    entropy, unknown = None, "not counted when runs are compared"
    if with_entropy:
        fingerprints = read_run_state(checkpoint).data_fingerprints if checkpoint else None
        entropy, unknown = corpus_entropy(config, fingerprints)
    phases = phase_summaries(config, with_ancestors(records), entropy)
    last = [record for record in records if record.get("kind") == "train"][-1]
    return {
        "run": directory, "parent": parent,
        "begun_at": parent["step"] if parent and parent["state"] == "all" else 0,
        "step": last["step"], "planned_steps": phases[-1].start + phases[-1].planned_steps,
        "tokens": last["tokens"], "targets": last["targets"],
        "phases": [asdict(phase) for phase in phases],
        "unigram_entropy": asdict(entropy) if entropy else None, "unigram_entropy_unknown": unknown,
        "all_phases_below_entropy": _all_below(phases) if entropy else None,
        "checkpoint": str(checkpoint) if checkpoint else None,
    }


def _all_below(phases: list[PhaseSummary]) -> bool:
    return all(phase.below_entropy and phase.steps == phase.planned_steps for phase in phases)


def inspect(arguments: argparse.Namespace) -> None:
    """Print the run or runs of `arguments.runs`."""
    runs = arguments.runs + arguments.overrides  # directories with = in their names may stand among the options
    if changes := [run for run in runs if "=" in run and not Path(run).exists()]:
        raise UserError(f"inspect run: {changes[0]}: a config is changed only with --sample")
    if len(runs) > 1:
        if arguments.model:
            raise UserError("inspect run: --model goes with one run; leave it out to compare several")
        found = [(run, *read_run(run)) for run in runs]
        comparison.inspect([(describe(*run, with_entropy=False), run[1]) for run in found], arguments.json)
        return
    directory = runs[0]
    report = {**describe(directory, *read_run(directory), with_entropy=True),
              "models": [_model(model) for model in arguments.model]}
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    _print_phases(report)
    _print_validation(report)
    print_facts(_facts(report))


def _model(directory: str) -> dict:
    path = Path(directory) / "config.json"
    try:
        architectures = json.loads(path.read_text(encoding="utf-8")).get("architectures") or ["unknown class"]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--model {directory}: not an exported model ({path}: {error})") from None
    return {"path": directory, "class": architectures[0]}


def _print_phases(report: dict) -> None:
    rows = []
    for phase in report["phases"]:
        left = f"/{phase['planned_steps']:,}" if phase["steps"] < phase["planned_steps"] else ""
        losses = [number(phase[name]) for name in ("first_loss", "last_loss", "validation_loss")]
        rows.append((phase["name"], phase["objective"], f"{phase['steps']:,}{left}", short(phase["tokens"]),
                     short(phase["targets"]), *losses, short(phase["tokens_per_second"])))
    print_table(f"{report['run']}: step {report['step']:,} of {report['planned_steps']:,}",
                ("phase", "objective", "steps", "tokens", "targets", "first loss", "last loss", "validation",
                 "tokens/s"), rows, left=2)


def _print_validation(report: dict) -> None:
    evaluated = [phase for phase in report["phases"] if phase["validation"]]
    if not evaluated:
        say("no validation losses: no data.validation in the config, or the first is still to come\n")
        return
    names = list(evaluated[0]["validation"])
    print_table("validation loss by objective, where each phase ended or stands", ("phase", "step", *names),
                [(phase["name"], f"{phase['validation_step']:,}",
                  *(number(phase["validation"].get(name)) for name in names)) for phase in evaluated])


def _facts(report: dict) -> list[tuple[str, str]]:
    entropy = report["unigram_entropy"]
    facts = [("unigram entropy", f"not known: {report['unigram_entropy_unknown']}")]
    if entropy:
        whole = entropy["counted"] == entropy["tokens"]
        counted = f"all {entropy['tokens']:,}" if whole else \
            f"{entropy['counted']:,} of {entropy['tokens']:,}, in pieces spread evenly over the"
        facts = [("unigram entropy", f"{entropy['nats']:.4f} nats (counted on {counted} training tokens)"),
                 ("", _verdict(report))]
    checkpoint, parent = report["checkpoint"] or "none yet", report["parent"]
    begun = [("begun from", f"{parent['path']}@{parent['step']}" + (
        " (weights alone)" if parent["state"] == "weights" else ""))] if parent else []
    return [*facts, ("run", report["run"]), *begun, ("newest checkpoint", checkpoint),
            *(("model", f"{model['path']} ({model['class']})") for model in report["models"])]


def _verdict(report: dict) -> str:
    phases = report["phases"]
    every = {1: "the phase", 2: "both phases"}.get(len(phases), f"all {len(phases)} phases")
    if report["all_phases_below_entropy"]:
        return f"{every} ended below it, in training and validation loss"
    parts = []
    for phase in phases:
        where = "ended" if phase["steps"] == phase["planned_steps"] else "stands"
        says = {None: "has no loss yet", True: f"{where} below it", False: f"{where} NOT below it"}
        parts.append(f"{phase['name']} {says[phase['below_entropy']]}")
    return ", ".join(parts)
