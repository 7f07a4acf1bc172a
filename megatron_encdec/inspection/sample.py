"""`inspect run CONFIG --sample I`: what the trainer reads, and must predict, at sample I of a run."""

import argparse
from pathlib import Path

from megatron_encdec.inspection.run import refuse_beginning
from megatron_encdec.inspection.tables import say
from megatron_encdec.inspection.windows import indented, marks_of, show
from megatron_encdec.objectives.base import Labelled
from megatron_encdec.platform.errors import UserError
from megatron_encdec.training.config import load_config
from megatron_encdec.training.plan import Plan, resolve
from megatron_encdec.training.step import micro_batches


def examine(arguments: argparse.Namespace) -> dict:
    """The samples `arguments.sample` of the run or config `arguments.runs[0]`; made for a cluster, it can be looked at
    here."""
    (path,) = arguments.runs
    file = Path(path)
    if file.is_dir():
        file /= "config.yaml"
        if not file.is_file():
            raise UserError(f"{path}: not a run directory (it has no config.yaml); name a CONFIG.yaml or a run.dir")
        refuse_beginning(path)
    plan = resolve(load_config(file, arguments.overrides))
    return {"run": path, "samples": [describe(plan, index) for index in arguments.sample]}


def describe(plan: Plan, index: int) -> dict:
    """Sample `index` and where it came from; inputs, label positions and labels are the trainer's own micro-batch."""
    timeline, tokenizer = plan.timeline, plan.tokenizer
    total = timeline.stretches[-1].samples(timeline.total_steps).stop
    if index >= total:
        raise UserError(f"inspect run: --sample {index}: the run's samples are 0..{total - 1} ({timeline.total_steps} "
                        "steps)")
    stretch, step = timeline.of_sample(index)
    samples = plan.train.of(index)
    objective = stretch.objective_at(step).of_sample(samples.seed, index)
    batch = next(micro_batches(samples, objective, plan.vocabulary, [range(index, index + 1)]))
    labelled = Labelled(batch.inputs_BS[0], batch.label_positions_N, batch.labels_N)
    sample, length = samples.sample(index), samples.sequence_length
    store, start = samples.stores[sample.source], sample.window * length
    document_ends, segment_ends = store.document_ends(start, length).tolist(), batch.cu_seqlens[1:].tolist()
    marks = marks_of(objective, labelled, sample, tokenizer)
    return {
        "sample": index, "samples": total, "step": step, "steps": timeline.total_steps, "phase": stretch.name,
        "objective": objective.label(), "attention": batch.attention,
        "source": str(store.prefix), "source_key": f"{stretch.train_key}.{sample.source}",
        "source_number": sample.source, "epoch": sample.epoch, "window": sample.window,
        "first_token": start, "tokens": length, "targets": len(batch.labels_N), "document_ends": document_ends,
        "segment_ends": segment_ends, "inputs": labelled.inputs_S.tolist(),
        "label_positions": labelled.positions_N.tolist(), "labels": labelled.labels_N.tolist(),
        "text": show(tokenizer, sample.tokens_S, document_ends, marks, segment_ends)}


def print_report(report: dict) -> None:
    """Print each sample in words."""
    for one in report["samples"]:
        end = one["first_token"] + one["tokens"] - 1
        say(f"sample {one['sample']:,} of {one['samples']:,}: step {one['step']:,} of {one['steps']:,}, phase "
            f"{one['phase']} ({one['objective']}, {one['attention']} attention)")
        say(f"from {one['source']} ({one['source_key']}), epoch {one['epoch']}, window "
            f"{one['window']:,}: its tokens {one['first_token']:,}..{end:,}")
        say(f"{one['tokens']:,} tokens in {len(one['segment_ends'])} segment(s) that attention stays in, "
            f"{one['targets']:,} targets ({one['targets'] / one['tokens']:.1%})")
        say(indented(one["text"]) + "\n")
