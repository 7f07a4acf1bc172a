"""A run is what a plain loop of transformers and torch computes: loss and gradient norm, step after step.

The loop reads the run's samples, applies the objectives, and knows nothing else of the trainer: one Hugging Face Llama,
whose attention is what a mask says, all samples of a step one by one, autograd, torch's AdamW.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_run import metrics

from megatron_encdec.interop.families import TARGETS
from megatron_encdec.interop.hugging_face import build_model, hugging_face_config
from megatron_encdec.interop.names import canonical_weights, to_hugging_face
from megatron_encdec.interop.source import one_rank
from megatron_encdec.model.trunk import build_trunk
from megatron_encdec.training.config import load_config
from megatron_encdec.training.plan import resolve

STEPS = 8
OBJECTIVES = {
    "mntp": "{name: mntp, mask_ratio: 0.3}",
    "mdlm": "mdlm",
    "mixture": "{name: mixture, parts: [{objective: mlm, weight: 2}, {objective: clm}, {objective: mdlm}]}",
    "alternate": "{name: alternate, cycle: [{objective: clm, steps: 2}, {objective: {name: mlm, unit: word, "
                 "mask_ratio: {from: 0.5, to: 0.2}}, steps: 1}, {objective: {name: mlm, unit: span}, steps: 1}]}",
}


def initial_model(plan):
    """The run's first weights in a Llama; plain attention, so that a mask is all that it goes by."""
    model = plan.config.model
    with one_rank() as topology:
        trunk = build_trunk(model, topology, torch.float32, 128, plan.config.run.seed)
        weights = {name: tensor.detach().clone() for name, tensor in to_hugging_face(
            canonical_weights(trunk), model).items()}
    config = hugging_face_config(TARGETS["llama"], model, 128, plan.tokenizer)
    config._attn_implementation = "eager"
    return build_model(TARGETS["llama"], config, weights).train()


def attention_mask(ends, kind):
    """[1, 1, S, S]: 0 where position q sees k, else the lowest number."""
    segment_S = torch.from_numpy(np.searchsorted(ends, np.arange(ends[-1]), side="right"))
    sees_SS = segment_S[:, None] == segment_S[None]
    sees_SS = sees_SS.tril() if kind == "causal" else sees_SS
    return torch.zeros(sees_SS.shape).masked_fill(~sees_SS, torch.finfo(torch.float32).min)[None, None]


def plain_loop(plan, steps):
    """(loss, gradient norm) of each step."""
    model, settings = initial_model(plan), plan.config.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), betas=settings.betas, eps=settings.eps,
                                  weight_decay=settings.weight_decay)
    seed, found = plan.config.data.seed, []
    for step in range(1, steps + 1):
        total, weight, stretch = torch.zeros(()), 0, plan.timeline.at(step)
        theta = stretch.rope.theta if stretch.rope else plan.config.model.rope_theta
        model.model.rotary_emb.inv_freq = 1 / theta ** (torch.arange(0, plan.config.model.head_dim, 2).float()
                                                        / plan.config.model.head_dim)
        for index in stretch.samples(step):
            sample = plan.train.sample(index)
            objective = stretch.objective_at(step).of_sample(seed, index)
            one = objective.apply(sample, seed, plan.vocabulary)
            logits_SV = model(torch.from_numpy(one.inputs_S)[None],
                              attention_mask=attention_mask(sample.segment_ends_E, objective.attention)).logits[0]
            losses_N = F.cross_entropy(logits_SV[torch.from_numpy(one.positions_N)], torch.from_numpy(one.labels_N),
                                       reduction="none")
            total = total + (losses_N if one.weights_N is None else losses_N * torch.from_numpy(one.weights_N)).sum()
            weight += one.weight
        optimizer.zero_grad()
        (total / weight).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
        optimizer.param_groups[0]["lr"] = stretch.learning_rate(step)
        optimizer.step()
        found.append((total.item() / weight, norm.item()))
    return found


@pytest.mark.parametrize("name", [*OBJECTIVES, "theta and length"])
def test_loss_and_gradient_norm_are_those_of_a_plain_loop(name, pretrain, root):
    phases = ("phases=[{name: short, objective: clm, steps: 4}, {name: long, objective: mlm, steps: 4, rope_theta: "
              "40000, data: {sequence_length: 128}, batch: {global_size: 4}}]")
    if name in OBJECTIVES:
        phases = f"phases=[{{name: only, objective: {OBJECTIVES[name]}, steps: {STEPS}}}]"
    run = pretrain(name, phases, "batch.micro_size=4")
    expected = plain_loop(resolve(load_config(run / "config.yaml")), STEPS)
    lines = metrics(run)
    assert len(lines) == STEPS
    for line, (loss, norm) in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-5), line["step"]
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3), line["step"]
