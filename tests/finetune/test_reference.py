"""The recipes beside a plain loop of transformers and torch that reads the same batches: 30 steps, loss within 1e-4."""

import json

import pytest
import torch
from finetune_sets import run_of

from megatron_encdec.finetune.run import make_recipe

pytestmark = pytest.mark.nemo
STEPS, WARMUP = 30, 3


@pytest.mark.parametrize("family", ["SC", "TC"])
def test_thirty_steps_are_those_of_a_plain_loop(root, family):
    from transformers import (
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        get_linear_schedule_with_warmup,
    )

    run = run_of(root, family, "reference", steps=STEPS)
    recipe = make_recipe(run)
    auto = AutoModelForSequenceClassification if family == "SC" else AutoModelForTokenClassification
    model = auto.from_config(recipe.encoder.config)
    model.load_state_dict(recipe.encoder.state_dict())
    seen, backward = [], recipe._backward
    recipe._backward = lambda features, scale: seen.append(features) or backward(features, scale)
    recipe.run_train_validation_loop()
    lines = [json.loads(line) for line in (run.directory / "checkpoints/training.jsonl").read_text().splitlines()]
    optimizer = torch.optim.AdamW(model.parameters(), run.lr, (0.9, 0.95), 1e-5, 0.1)
    schedule = get_linear_schedule_with_warmup(optimizer, WARMUP, STEPS)
    assert len(seen) == STEPS == len(lines)
    for features, line in zip(seen, lines, strict=True):
        width = max(len(feature["ids"]) for feature in features)
        ids, mask, labels = (torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows]) for rows, fill in (
            ([feature["ids"] for feature in features], 2), ([[1] * len(feature["ids"]) for feature in features], 0),
            ([feature["labels"] if family == "TC" else [0] for feature in features], -100)))
        if family == "SC":
            labels = torch.tensor([feature["labels"] for feature in features])
        assert line["lr"] == pytest.approx(schedule.get_last_lr()[0])
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert line["loss"] == pytest.approx(float(loss), abs=1e-4)
        assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-2)
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
