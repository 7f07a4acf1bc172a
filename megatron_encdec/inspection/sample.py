"""`inspect run CONFIG --sample I`: what the trainer reads, and must predict, at sample I of a run.

    1. `plan_of(path, overrides)`   the trainer's own plan of a config or run directory, on whatever machine
    2. `describe(plan, index)`      the sample through the trainer's own micro-batch, with where it came from
    3. `inspect(arguments)`         the same in words: documents, segments, masks and missing targets marked
"""

import argparse
import json
from pathlib import Path

from megatron_encdec.inspection.tables import say
from megatron_encdec.inspection.windows import indented, marks_of, show
from megatron_encdec.objectives import Labelled
from megatron_encdec.platform.errors import UserError
from megatron_encdec.training.config import load_config
from megatron_encdec.training.plan import Plan, resolve
from megatron_encdec.training.step import micro_batches


def plan_of(path: str, overrides: list[str]) -> Plan:
    """The plan of a config file, or of a run directory's config.yaml; made for a cluster, it can be looked at here."""
    file = Path(path)
    if file.is_dir():
        file /= "config.yaml"
        if not file.is_file():
            raise UserError(f"{path}: not a run directory (it has no config.yaml); name a CONFIG.yaml or a run.dir")
    return resolve(load_config(file, overrides))


def describe(plan: Plan, index: int) -> dict:
    """Sample `index` as plain data; inputs, label positions and labels are the trainer's, position by position."""
    timeline = plan.timeline
    total = timeline.stretches[-1].samples(timeline.total_steps).stop
    if not 0 <= index < total:
        raise UserError(f"inspect run: --sample {index}: the run's samples are 0..{total - 1} ({timeline.total_steps} "
                        "steps)")
    stretch, step = timeline.of_sample(index)
    objective = stretch.objective
    batch = next(micro_batches(plan.train, objective, plan.vocabulary, [range(index, index + 1)]))
    sample = plan.train.sample(index)
    store = plan.train.stores[sample.source]
    length = plan.train.sequence_length
    start = sample.window * length
    document_ends = store.document_ends(start, length).tolist()
    segment_ends = batch.cu_seqlens[1:].tolist()
    labelled = Labelled(batch.inputs_BS[0], batch.label_positions_N, batch.labels_N)
    text = show(plan.tokenizer, sample.tokens_S, document_ends, marks_of(objective, labelled, sample, plan.tokenizer),
                segment_ends)
    return {
        "sample": index, "samples": total, "step": step, "steps": timeline.total_steps, "phase": stretch.name,
        "objective": objective.label(), "attention": batch.attention,
        "source": str(store.prefix), "source_number": sample.source, "epoch": sample.epoch, "window": sample.window,
        "first_token": start, "tokens": length, "targets": len(batch.labels_N), "document_ends": document_ends,
        "segment_ends": segment_ends, "inputs": batch.inputs_BS[0].tolist(),
        "label_positions": batch.label_positions_N.tolist(), "labels": batch.labels_N.tolist(), "text": text}


def inspect(arguments: argparse.Namespace) -> None:
    """Print the samples `arguments.sample` of the run `arguments.runs[0]`."""
    path, *words = arguments.runs
    words += [word for word in arguments.sample if "=" in word]
    for word in words:
        if "=" not in word:
            raise UserError(f"inspect run: --sample looks at one run, found {path} and {word}")
    indices = [_number(word) for word in arguments.sample if "=" not in word]
    if not indices:
        raise UserError("inspect run: --sample needs a sample number, e.g. --sample 0")
    if arguments.model:
        raise UserError("inspect run: --model goes with the table of a run, not with --sample")
    plan = plan_of(path, [*words, *arguments.overrides])
    reports = [describe(plan, index) for index in indices]
    if arguments.json:
        print(json.dumps({"run": path, "samples": reports}, indent=2, ensure_ascii=False))
        return
    for report in reports:
        _print(report)


def _number(word: str) -> int:
    if not (word.isascii() and word.isdigit()):
        raise UserError(f"inspect run: --sample {word}: expected a sample number of 0 or more, or dotted.key=value")
    return int(word)


def _print(report: dict) -> None:
    end = report["first_token"] + report["tokens"] - 1
    say(f"sample {report['sample']:,} of {report['samples']:,}: step {report['step']:,} of {report['steps']:,}, phase "
        f"{report['phase']} ({report['objective']}, {report['attention']} attention)")
    say(f"from {report['source']} (data.train.{report['source_number']}), epoch {report['epoch']}, window "
        f"{report['window']:,}: its tokens {report['first_token']:,}..{end:,}")
    say(f"{report['tokens']:,} tokens in {len(report['segment_ends'])} segment(s) that attention stays in, "
        f"{report['targets']:,} targets ({report['targets'] / report['tokens']:.1%})")
    say(indented(report["text"]) + "\n")
