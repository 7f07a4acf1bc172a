"""`inspect run RUN_DIR...`: what a run did and where it stands, from its metrics.jsonl and config.yaml; several runs
side by side by their final validation losses, and what stands between them.

    1. `read_run(directory)`       config and metrics; what is not a run directory is refused
    2. `with_ancestors(records)`   a fork's lines, with those of the runs that it continues before them
    3. `phase_summaries(...)`      per phase: steps, tokens, targets, losses, speed
    4. `corpus_entropies(...)`     of each phase's training data, the yardstick of its losses
    5. `compare(directories)`      where the runs' bases differ, where one is not finished, what else differs

Losses are in nats per target. Works on a run in progress too.
"""

import argparse
import json
from pathlib import Path

from megatron_encdec.data.config import SourceConfig
from megatron_encdec.data.store import TokenStore
from megatron_encdec.engine.checkpoint import newest, read_run_state
from megatron_encdec.inspection.data import unigram_entropy
from megatron_encdec.inspection.tables import facts_text, number, print_table, say, short, table_text
from megatron_encdec.objectives.base import evaluated
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.schema import to_dict
from megatron_encdec.rundir.failure import read_failure
from megatron_encdec.rundir.lineage import differences
from megatron_encdec.rundir.lock import holder
from megatron_encdec.rundir.metrics import read_metrics
from megatron_encdec.training.config import Config, load_config
from megatron_encdec.training.layout import lay_out
from megatron_encdec.training.stretches import by_phase, tokens_between

# Not a difference between two experiments: where a run lives, how it was cut over ranks, what it logged.
_COSMETIC = ("dir", "phases", "checkpoint", "logging", "parallel", "micro_size", "on_nonfinite", "max_skipped",
             "hang_timeout")
# What is read of the lines of metrics.jsonl, and the types that it has; a loss is None where a step had no target.
_NUMBER = (int, float)
NEEDED = {"train": {"step": (int,), "phase": (str,), "objective": (str,), "loss": (*_NUMBER, type(None)),
                    "tokens": (int,), "targets": (int,), "tokens_per_second": _NUMBER},
          "eval": {"step": (int,), "phase": (str,), "losses": (dict,)},
          "phase": {"step": (int,), "phase": (str,)}, "checkpoint": {"step": (int,), "phase": (str,)},
          "resume": {"step": (int,)}}
Entropy = tuple[dict | None, str | None]  # as `unigram_entropy` counts it; where it is not known, why


def examine(arguments: argparse.Namespace) -> dict:
    """The run `arguments.runs[0]` and the exported models `arguments.model`; or several runs, compared."""
    directory, *others = arguments.runs
    if others:
        return compare(arguments.runs)
    return {**describe(directory, *read_run(directory), with_entropy=True),
            "models": [_model(model) for model in arguments.model]}


def read_run(directory: str) -> tuple[Config, list[dict]]:
    """The resolved config and the metrics of a run, or a `UserError` that says what is not there."""
    path = Path(directory)
    if not (path / "config.yaml").is_file():
        raise UserError(f"{directory}: not a run directory ({_what_instead(path)}")
    refuse_beginning(directory)
    config = load_config(path / "config.yaml")
    records = read_metrics(path / "metrics.jsonl", torn_tail=True, needed=NEEDED)
    if not of_kind("train", records):
        failure = _failure(directory, 0)
        way_out = f"the last launch failed: {failure['reason']}" if failure else \
            "start the run with `megatron-encdec pretrain`"
        raise UserError(f"{path / 'metrics.jsonl'}: no step is recorded yet; {way_out}")
    return config, records


def _what_instead(path: Path) -> str:
    """What stands at `path`, where no run directory does, and what to name."""
    run, at, step = str(path).rpartition("@")
    if path.is_dir():
        return "it has no config.yaml); name the run.dir of a config"
    if at and step.isdigit() and (Path(run) / "config.yaml").is_file():
        return (f"one step of {run}); name {run} for the whole run, or look at that step with `megatron-encdec inspect "
                f"checkpoint {path}`")
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return "a config file); name its run.dir; a config is looked at with --sample, or `pretrain --dry-run`"
    return f"{'a file' if path.exists() else 'there is no such directory'}); name the run.dir of a config"


def refuse_beginning(directory: str) -> None:
    """Raises `UserError` for an import or a merge, in which no step is ever trained."""
    path = Path(directory)
    if (path / "metrics.jsonl").exists() or (checkpoint := newest(path / "checkpoints")) is None:
        return
    state = read_run_state(checkpoint)
    if state.is_beginning:
        what = f"imported ({state.imported.get('architecture', 'a model')})" if state.imported else \
            f"merged from {' and '.join(state.merged.get('models', ()))}"
        raise UserError(f"{directory}: {what}, and nothing is trained in it; `megatron-encdec inspect checkpoint "
                        f"{directory}` shows it, run.from.path={directory} and run.from.state=weights train on from it")


def of_kind(kind: str, records: list[dict]) -> list[dict]:
    """The lines of that kind."""
    return [record for record in records if record.get("kind") == kind]


def describe(directory: str, config: Config, records: list[dict], with_entropy: bool) -> dict:
    """Everything `inspect run` knows of one run; without the entropy no data is read."""
    # the counters of a fork go on from its parent's; those of a run from weights alone begin at 0
    checkpoint, parent = newest(Path(directory) / "checkpoints"), parent_of(records)
    entropies = [(None, "not counted when runs are compared")] * len(config.phases)
    if with_entropy:
        fingerprints = read_run_state(checkpoint).data_fingerprints if checkpoint else None
        entropies = corpus_entropies(config, fingerprints)
    phases = phase_summaries(config, with_ancestors(records), entropies)
    alike = all(one == entropies[0] for one in entropies)
    entropy, unknown = entropies[0] if alike else (None, "not one: phases have data of their own")
    last = of_kind("train", records)[-1]
    return {
        "run": directory, "parent": parent, "begun_at": parent["step"] if _continues(parent) else 0,
        "step": last["step"], "planned_steps": phases[-1]["start"] + phases[-1]["planned_steps"],
        "tokens": last["tokens"], "targets": last["targets"], "phases": phases,
        "unigram_entropy": entropy, "unigram_entropy_unknown": unknown,
        "all_phases_below_entropy": all(phase["below_entropy"] and phase["steps"] == phase["planned_steps"]
                                        for phase in phases) if all(one for one, _ in entropies) else None,
        "checkpoint": str(checkpoint) if checkpoint else None,
        "failure": _failure(directory, last["step"]),
    }


def _failure(directory: str, step: int) -> dict | None:
    """How the last launch failed, if it did: after which step, why, when. None while another launch is at work."""
    found, launch = read_failure(directory), holder(directory)
    if found is None or (launch is not None and launch.runs_here):
        return None
    known = found.get("step")
    return {"step": known if isinstance(known, int) else step, "reason": found["reason"], "when": found.get("when")}


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
        older = read_metrics(Path(parent["path"]) / "metrics.jsonl", torn_tail=True, needed=NEEDED)
    except UserError:
        older = []
    return [*(record for record in with_ancestors(older) if record.get("step", 0) <= parent["step"]), *records]


def phase_summaries(config: Config, records: list[dict], entropies: list[Entropy]) -> list[dict]:
    """A summary a phase of the config, in order, as far as it has come; None where nothing is recorded.

    `objective` is as the command line spells it (mlm:0.4); `validation` the last losses by objective name and
    `validation_loss` the one that the phase trains for. `tokens_per_second` is tokens over time, of the logged steps.
    `below_entropy`: both last losses lie below the unigram entropy of the phase's data. Of a fork whose parent is gone,
    earlier phases have their steps but no losses, and no targets are known.
    """
    first = records[0] if records else {}
    unseen, targets_before = 0, 0  # the counters at which the lines begin: of a fork whose parent's lines are gone
    if first.get("kind") == "resume" and _continues(first.get("parent")):
        unseen, targets_before = first["step"], first["targets"]
    summaries = []
    for parts in by_phase(lay_out(config)):
        phase = parts[0]
        mine = [record for record in records if record.get("phase") == phase.name]
        lines, evaluations = of_kind("train", mine), of_kind("eval", mine)
        losses = [line["loss"] for line in lines if line["loss"] is not None]
        reached = lines[-1]["step"] if lines else min(unseen, parts[-1].end)
        steps = max(0, reached - phase.start)
        evaluation = evaluations[-1] if evaluations else {"losses": {}, "step": None}
        validation_loss = evaluation["losses"].get(phase.objective.name)
        ends = [loss for loss in (*losses[-1:], validation_loss) if loss is not None]
        entropy, unknown = entropies[phase.index]
        summaries.append({
            "name": phase.name, "objective": phase.objective.label(), "start": phase.start,
            "steps": steps, "planned_steps": phase.phase_steps, "tokens": tokens_between(parts, 0, reached),
            "targets": lines[-1]["targets"] - targets_before if lines and phase.start >= unseen else None,
            "first_loss": losses[0] if losses else None, "last_loss": losses[-1] if losses else None,
            "validation": evaluation["losses"], "validation_step": evaluation["step"],
            "validation_loss": validation_loss,
            "tokens_per_second": len(lines) / sum(1 / line["tokens_per_second"] for line in lines) if lines else None,
            "unigram_entropy": entropy, "unigram_entropy_unknown": unknown,
            "below_entropy": all(loss < entropy["nats"] for loss in ends) if ends and entropy else None})
        if lines:
            targets_before = lines[-1]["targets"]
    return summaries


def corpus_entropies(config: Config, fingerprints: list[str] | None) -> list[Entropy]:
    """The unigram entropy of the training data of each phase, or None and why it cannot be told: one reason is that the
    data's `fingerprints` are not those that the newest checkpoint knows."""
    known: dict[str, Entropy] = {}
    found = []
    for parts in by_phase(lay_out(config)):
        key = parts[0].train_key
        if key not in known:
            known[key] = _entropy_of(key, parts[0].data.train, config.model.vocabulary_size, fingerprints)
        found.append(known[key])
    return found


def _entropy_of(key: str, sources: list[SourceConfig], vocabulary_size: int, fingerprints: list[str] | None) -> Entropy:
    try:
        stores = [TokenStore(source.path) for source in sources]
        if fingerprints is not None and not set(fingerprints).issuperset(store.fingerprint for store in stores):
            return None, f"the data under {key} is no longer what the run was trained on"
        return unigram_entropy(stores, [source.weight for source in sources], vocabulary_size), None
    except UserError as error:
        return None, str(error)


def _model(directory: str) -> dict:
    path = Path(directory) / "config.json"
    try:
        architectures = json.loads(path.read_text(encoding="utf-8")).get("architectures") or ["unknown class"]
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--model {directory}: not an exported model ({path}: {error})") from None
    return {"path": directory, "class": architectures[0]}


def compare(directories: list[str]) -> dict:
    """Each run as `inspect run` knows it, with its newest validation losses by objective, and what to know of them."""
    runs = []
    for directory, (config, records) in [(run, read_run(run)) for run in directories]:
        report = describe(directory, config, records, with_entropy=False)
        newest_losses = next((phase["validation"] for phase in reversed(report["phases"]) if phase["validation"]), {})
        losses = {name: loss for name, loss in newest_losses.items() if loss is not None}
        runs.append(({**report, "final_validation": losses}, config))
    return {"runs": [report for report, _ in runs], "remarks": _remarks(runs)}


def _validation_basis(config: Config) -> dict:
    """What two validation losses must share to be compared, objective settings included."""
    data, objectives = to_dict(config.data), [phase.objective for phase in config.phases]
    return {"data": {key: data[key] for key in ("validation", "seed", "sequence_length", "isolate_documents",
                                                "random_length")},
            "tokenizer": to_dict(config.tokenizer),
            "validation windows": config.evaluation.batches * config.batch.global_size,
            "objectives": {name: to_dict(one) for name, one in evaluated(objectives, has_mask=True).items()}}


def _remarks(runs: list[tuple[dict, Config]]) -> list[str]:
    """One line for each thing to know before comparing; the first run is what the others are held against."""
    (first, first_config), *others = runs
    lines = [f"{report['run']} is not finished: step {report['step']:,} of {report['planned_steps']:,}"
             for report, _ in runs if report["step"] < report["planned_steps"]]
    lines += [f"{report['run']} failed after step {report['failure']['step']:,}: {report['failure']['reason']}"
              for report, _ in runs if report["failure"]]
    for report, config in others:
        pair = f"{first['run']} -> {report['run']}"
        basis = differences(_validation_basis(first_config), _validation_basis(config))
        if basis:
            lines.append(f"{pair}: validation losses CANNOT be compared: {'; '.join(basis)}")
        if report["tokens"] != first["tokens"]:
            lines.append(f"{pair}: not the same budget: {first['tokens']:,} -> {report['tokens']:,} tokens")
        if rest := [line for line in differences(_essence(first_config), _essence(config)) if line not in basis]:
            lines.append(f"{pair}: besides the phases they differ in {'; '.join(rest)}")
    return lines


def _essence(config: Config) -> dict:
    return {name: {key: value for key, value in section.items() if key not in _COSMETIC}
            for name, section in to_dict(config).items() if name not in _COSMETIC}


def print_report(report: dict) -> None:
    """Print the closing table of a run, or the comparison of several."""
    if "runs" in report:
        _print_comparison(report)
    else:
        say(in_words(report))
    if files := report.get("page"):
        figures, tables = (sum(one.endswith(end) for one in files) for end in (".png", ".csv"))
        say(f"\nwrote {files[-1]}, {figures} figures as PNG, {tables} tables as CSV")


def in_words(report: dict) -> str:
    """The closing table of a run."""
    rows = []
    for phase in report["phases"]:
        left = f"/{phase['planned_steps']:,}" if phase["steps"] < phase["planned_steps"] else ""
        losses = [number(phase[name]) for name in ("first_loss", "last_loss", "validation_loss")]
        rows.append((phase["name"], phase["objective"], f"{phase['steps']:,}{left}", short(phase["tokens"]),
                     short(phase["targets"]), *losses, short(phase["tokens_per_second"])))
    parts = [table_text(f"{report['run']}: step {report['step']:,} of {report['planned_steps']:,}",
                        ("phase", "objective", "steps", "tokens", "targets", "first loss", "last loss", "validation",
                         "tokens/s"), rows, left=2)]
    if phases := [phase for phase in report["phases"] if phase["validation"]]:
        names = list(phases[0]["validation"])
        parts.append(table_text(
            "validation loss by objective, where each phase ended or stands", ("phase", "step", *names),
            [(phase["name"], f"{phase['validation_step']:,}",
              *(number(phase["validation"].get(name)) for name in names)) for phase in phases]))
    else:
        parts.append("no validation losses: no data.validation in the config, or the first is still to come\n")
    return "\n".join([*parts, facts_text(_facts(report))])


def _print_comparison(report: dict) -> None:
    """The lowest loss of each objective is marked."""
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


def _facts(report: dict) -> list[tuple[str, str]]:
    phases = report["phases"]
    found = [(phase["unigram_entropy"], phase["unigram_entropy_unknown"]) for phase in phases]
    facts = []
    for one in [one for place, one in enumerate(found) if one not in found[:place]]:
        names = [phase["name"] for phase, other in zip(phases, found, strict=True) if other == one]
        of = "" if len(names) == len(phases) else f"{', '.join(names)}: "
        facts.append(("" if facts else "unigram entropy", f"{of}{_entropy_in_words(*one)}"))
    if any(entropy for entropy, _ in found):
        facts.append(("", _verdict(report)))
    facts.append(("run", report["run"]))
    if parent := report["parent"]:
        alone = " (weights alone)" if parent["state"] == "weights" else ""
        facts.append(("begun from", f"{parent['path']}@{parent['step']}{alone}"))
    if failure := report["failure"]:
        facts.append(("failed", f"after step {failure['step']:,}: {failure['reason']}"))
    return [*facts, ("newest checkpoint", report["checkpoint"] or "none yet"),
            *(("model", f"{model['path']} ({model['class']})") for model in report["models"])]


def _entropy_in_words(entropy: dict | None, unknown: str | None) -> str:
    if entropy is None:
        return f"not known: {unknown}"
    whole = entropy["counted"] == entropy["tokens"]
    counted = f"all {entropy['tokens']:,}" if whole else \
        f"{entropy['counted']:,} of {entropy['tokens']:,}, in pieces spread evenly over the"
    return f"{entropy['nats']:.4f} nats (counted on {counted} training tokens)"


def _verdict(report: dict) -> str:
    phases = report["phases"]
    if report["all_phases_below_entropy"]:
        every = {1: "the phase", 2: "both phases"}.get(len(phases), f"all {len(phases)} phases")
        return f"{every} ended below it, in training and validation loss"
    parts = []
    for phase in (phase for phase in phases if phase["unigram_entropy"]):
        where = "ended" if phase["steps"] == phase["planned_steps"] else "stands"
        says = {None: "has no loss yet", True: f"{where} below it", False: f"{where} NOT below it"}
        parts.append(f"{phase['name']} {says[phase['below_entropy']]}")
    return ", ".join(parts)
