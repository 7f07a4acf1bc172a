"""Histories that earlier versions recorded, in today's form, so that their runs go on.

They kept phases, precisions and learning rates beside each other instead of in stretches; and before that the sha256
of the tokenizer's file in the place of the set of ordinary ids.
"""

import hashlib
import struct
from typing import Any

from megatron_encdec.text.tokenizer import Tokenizer
from megatron_encdec.training.stretches import Timeline


def in_todays_form(history: dict[str, Any], timeline: Timeline, tokenizer: Tokenizer) -> dict[str, Any]:
    """`history` as `timeline` would have recorded it. Of learning rates only a hash over all steps was kept: where it
    is that of the timeline's rates, these are taken, else it stands as it is, and differs."""
    if "phases" not in history or not history["phases"]:
        return history
    step, rates = history["step"], history["learning_rates"]
    same = rates == _hash_of_rates(timeline, 0, step)
    precisions = history.get("precision", timeline.stretches[-1].precision)
    if not isinstance(precisions, list):
        precisions = [precisions | {"until": step}]
    common = {"data": history["data"], "batch_global_size": history["batch_global_size"],
              "optimizer": history["optimizer"]}
    stretches = []
    for phase in history["phases"]:
        start = phase["start"]
        for precision in precisions:
            end = min(phase["end"], precision["until"])
            if start >= end:
                continue
            stretches.append({
                "start": start, "end": end, "objective": _objective(phase, timeline, tokenizer),
                "optimizer_state": phase["optimizer_state"] if start == phase["start"] else "carry", **common,
                "precision": {key: value for key, value in precision.items() if key != "until"},
                "learning_rates": _hash_of_rates(timeline, start, end) if same else rates})
            start = end
    beginning = {key: history[key] for key in ("weights", "run_seed") if key in history}
    return {"step": step, **beginning, "model": history["model"], "stretches": stretches}


def _objective(phase: dict[str, Any], timeline: Timeline, tokenizer: Tokenizer) -> dict[str, Any]:
    masking = phase["masking"] or {}
    if masking.get("tokenizer") == tokenizer.file_sha256:
        masking = {"mask_id": masking["mask_id"], "ordinary_ids": timeline.vocabulary.identity["ordinary_ids"]}
    return {key: value for key, value in phase["objective"].items() if value is not None} | masking


def _hash_of_rates(timeline: Timeline, start: int, end: int) -> str:
    rates = (timeline.at(step).learning_rate(step) for step in range(start + 1, end + 1))
    return hashlib.sha256(b"".join(struct.pack("<d", rate) for rate in rates)).hexdigest()
