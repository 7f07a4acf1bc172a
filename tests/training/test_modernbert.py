"""A trunk of ModernBERT's shape through the whole of a run: CLM, MLM and CLM again as a plain loop of transformers does
them, on several ranks, frozen in parts, stopped and continued, out as both of its classes."""

import json

import pytest
import torch
import torch.nn.functional as F
from small_run import config_of, metrics, outcome, run_cli
from transformers import ModernBertConfig, ModernBertDecoderConfig, ModernBertDecoderForCausalLM, ModernBertForMaskedLM

from megatron_encdec.interop.source import one_rank
from megatron_encdec.model.rope import Rope
from megatron_encdec.model.trunk import build_trunk
from megatron_encdec.platform.errors import UserError
from megatron_encdec.training.config import load_config
from megatron_encdec.training.layout import lay_out
from megatron_encdec.training.plan import resolve

# windows shorter than the documents, a global layer in the middle, two rotary bases
SHAPE = ("model={num_layers: 4, hidden_size: 32, ffn_hidden_size: 48, num_attention_heads: 4, num_query_groups: 4, "
         "norm: layernorm, activation: geglu, embedding_norm: true, prediction_head: dense, tied_embeddings: true, "
         "sliding_window: 5, layers_without_window: [0, 3], rope_theta: 500.0, local_rope_theta: 40.0}")
PHASES = ("phases=[{name: causal, objective: clm, steps: 7}, {name: masked, objective: mlm:0.3, steps: 7}, "
          "{name: again, objective: clm, steps: 6}]")


def stock(kind, plan):
    """A class of transformers, eager, in the shape of the run's trunk."""
    model = plan.config.model
    config_class, model_class = {"causal": (ModernBertDecoderConfig, ModernBertDecoderForCausalLM),
                                 "bidirectional": (ModernBertConfig, ModernBertForMaskedLM)}[kind]
    config = config_class(
        vocab_size=model.vocabulary_size, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, norm_eps=model.norm_eps, local_attention=10, global_attn_every_n_layers=3,
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 500.0},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 40.0}},
        **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")})
    config._attn_implementation = "eager"
    model = model_class(config).train()
    model.model.embeddings.tok_embeddings.padding_idx = None  # which gradient would be left out
    return model


def initial_weights(plan):
    """The run's first weights under the decoder's names; written out, not by the package's tables."""
    with one_rank() as topology:
        trunk = build_trunk(plan.config.model, topology, torch.float32, 64, plan.config.run.seed)
    ours = {name: tensor.detach().clone() for name, tensor in trunk.named_parameters()}
    rows, found = plan.config.model.vocabulary_size, {}
    found["decoder.bias"] = ours["output_layer.bias"][:rows]
    found["decoder.weight"] = found["model.embeddings.tok_embeddings.weight"] = (
        ours["embedding.word_embeddings.weight"][:rows])
    found["model.embeddings.norm.weight"] = ours["decoder.layers.0.embedding_norm.weight"]
    found["model.final_norm.weight"] = ours["decoder.final_layernorm.weight"]
    found |= {f"lm_head.{part}.weight": ours[f"prediction_head.{part}.weight"] for part in ("dense", "norm")}
    for layer in range(4):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        if layer:
            found[there + "attn_norm.weight"] = ours[here + "input_layernorm.weight"]
        # a group of one head: its query, its key, its value
        heads = ours[here + "self_attention.linear_qkv.weight"].view(4, 3, 8, 32)
        found |= {f"{there}attn.{part}_proj.weight": heads[:, number].reshape(32, 32)
                  for number, part in enumerate("qkv")}
        found[there + "attn.Wo.weight"] = ours[here + "self_attention.linear_proj.weight"]
        found[there + "mlp_norm.weight"] = ours[here + "pre_mlp_layernorm.weight"]
        found |= {f"{there}mlp.W{end}.weight": ours[f"{here}mlp.linear_fc{number}.weight"]
                  for number, end in ((1, "i"), (2, "o"))}
    return found


def as_class(kind, values):
    """Tensors by the decoder's names (weights, or what Adam keeps of them) by those of the class of `kind`."""
    if kind == "causal":
        return values
    found = {name.replace("lm_head.", "head."): value for name, value in values.items() if "_proj." not in name}
    for layer in range(4):
        parts = [values[f"model.layers.{layer}.attn.{part}_proj.weight"] for part in "qkv"]
        found[f"model.layers.{layer}.attn.Wqkv.weight"] = torch.cat(parts)
    return found


def as_decoder(kind, values):
    """The way back."""
    if kind == "causal":
        return dict(values)
    found = {name.replace("head.", "lm_head.", 1) if name.startswith("head.") else name: value
             for name, value in values.items() if "Wqkv" not in name}
    for layer in range(4):
        parts = values[f"model.layers.{layer}.attn.Wqkv.weight"].chunk(3)
        found |= {f"model.layers.{layer}.attn.{part}_proj.weight": one for part, one in zip("qkv", parts, strict=True)}
    return found


class Loop:
    """torch's AdamW over whichever class the objective wants; weights and moments go along at a switch."""

    def __init__(self, plan):
        self.plan, self.kind, self.steps = plan, None, 0
        self.values = {"param": initial_weights(plan)}

    def become(self, kind):
        if kind == self.kind:
            return
        if self.kind is not None:
            named = dict(self.model.named_parameters())
            self.values = {"param": as_decoder(self.kind, {name: one.detach() for name, one in named.items()})} | {
                key: as_decoder(self.kind, {name: self.adam.state[one][key] for name, one in named.items()})
                for key in ("exp_avg", "exp_avg_sq")}
        self.kind, self.model, settings = kind, stock(kind, self.plan), self.plan.config.optimizer
        weights = as_class(kind, self.values["param"])
        left = self.model.load_state_dict(weights, strict=False)
        assert set(left.missing_keys) <= {"decoder.weight"} and not left.unexpected_keys
        self.adam = torch.optim.AdamW(self.model.parameters(), betas=settings.betas, eps=settings.eps,
                                      weight_decay=settings.weight_decay)
        if self.steps:
            moments = {key: as_class(kind, self.values[key]) for key in ("exp_avg", "exp_avg_sq")}
            for name, one in self.model.named_parameters():
                self.adam.state[one] = {"step": torch.tensor(float(self.steps)), **{
                    key: moments[key][name].clone() for key in moments}}

    def step(self, step):
        """(loss, gradient norm); each document by itself, as the class masks it."""
        stretch, total, weight, plan = self.plan.timeline.at(step), torch.zeros(()), 0, self.plan
        objective = stretch.objective_at(step)
        self.become(objective.attention)
        for index in stretch.samples(step):
            sample = plan.train.sample(index)
            one = objective.apply(sample, plan.config.data.seed, plan.vocabulary)
            inputs_S, positions_N = torch.from_numpy(one.inputs_S), torch.from_numpy(one.positions_N)
            ends = sample.segment_ends_E.tolist()
            logits_SV = torch.cat([self.model(inputs_S[None, start:end]).logits[0]
                                   for start, end in zip([0, *ends], ends, strict=False)])
            total = total + F.cross_entropy(logits_SV[positions_N], torch.from_numpy(one.labels_N), reduction="sum")
            weight += one.weight
        self.adam.zero_grad()
        (total / weight).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), plan.config.optimizer.clip_grad)
        self.adam.param_groups[0]["lr"] = stretch.learning_rate(step)
        self.adam.step()
        self.steps += 1
        return total.item() / weight, norm.item()


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """A run of twenty steps on one process. Only to be read."""
    run = tmp_path_factory.mktemp("modernbert") / "run"
    run_cli("pretrain", root / "config.yaml", f"run.dir={run}", SHAPE, PHASES)
    return run


def test_twenty_steps_are_those_of_a_plain_loop_over_both_classes(alone):
    loop, lines = Loop(resolve(load_config(alone / "config.yaml"))), metrics(alone)
    assert [line["objective"] for line in lines] == ["clm"] * 7 + ["mlm"] * 7 + ["clm"] * 6
    for line in lines:
        loss, norm = loop.step(line["step"])
        assert line["loss"] == pytest.approx(loss, rel=1e-5), line["step"]
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-3), line["step"]


TOPOLOGIES = {
    "tp2": ("--nproc", "2", "parallel.tensor=2"),
    "tp2_sequence": ("--nproc", "2", "parallel.tensor=2", "parallel.sequence=true"),
    "pp2": ("--nproc", "2", "parallel.pipeline=2"),  # tied embeddings on both stages
    "recompute": ("performance.recompute=full",),
    "recompute_mlp_packed": ("performance.recompute=mlp", "performance.attention=packed"),
    "by_steps": ("performance.fuse_activation=false", "performance.head_chunk=64"),
}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_agrees_however_it_is_computed(name, alone, pretrain):
    for ours, theirs in zip(metrics(pretrain(name, SHAPE, PHASES, *TOPOLOGIES[name])), metrics(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), ours["step"]


def test_goes_on_exactly_and_on_another_topology(alone, pretrain):
    pretrain("stopped", SHAPE, PHASES, "--until", "9")
    assert outcome(pretrain("stopped", SHAPE, PHASES)) == outcome(alone)
    two = ("--nproc", "2", "parallel.tensor=2", "parallel.sequence=true")
    pretrain("split", SHAPE, PHASES, "--until", "9", *two)
    for ours, theirs in zip(metrics(pretrain("split", SHAPE, PHASES)), metrics(alone), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4), ours["step"]


def test_both_ends_go_out_as_stock_classes(alone, tmp_path):
    for step, target, architecture in ((7, "modernbert-decoder", "ModernBertDecoderForCausalLM"),
                                       (14, "modernbert", "ModernBertForMaskedLM"),
                                       (20, "modernbert-decoder", "ModernBertDecoderForCausalLM")):
        out = tmp_path / str(step)
        run_cli("export", f"{alone}@{step}", out)
        assert json.loads((out / "export.json").read_text())["as"] == target
        config = json.loads((out / "config.json").read_text())
        assert config["architectures"] == [architecture] and config["local_attention"] == 10
        assert config["rope_parameters"]["sliding_attention"]["rope_theta"] == 40.0


LONGER = ("phases=[{name: short, objective: mlm:0.3, steps: 2}, {name: global, objective: mlm:0.3, steps: 2, "
          "rope_theta: 900.0}, {name: local, objective: mlm:0.3, steps: 2, local_rope_theta: 80.0}]")


def test_a_phase_changes_the_base_of_either_kind_of_layer():
    ropes = [stretch.rope for stretch in lay_out(config_of(SHAPE, LONGER))]
    assert ropes == [None, Rope(900.0, None, 40.0), Rope(900.0, None, 80.0)]
    with pytest.raises(UserError, match="phases.2.local_rope_theta: no layer has a window"):
        lay_out(config_of(LONGER))


def test_an_export_has_the_bases_of_its_phase(pretrain, tmp_path):
    """And computes with them: it is compared with the trunk before it is there."""
    run = pretrain("longer", SHAPE, LONGER)
    run_cli("export", run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {kind: one["rope_theta"] for kind, one in config["rope_parameters"].items()} == {
        "full_attention": 900.0, "sliding_attention": 80.0}
