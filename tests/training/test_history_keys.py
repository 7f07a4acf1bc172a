"""No number may change unseen: every key of the config is part of the history, or it is known to change no number."""

import dataclasses
import re
import types
import typing

import pytest
from small_run import timeline_of

from megatron_encdec.objectives.base import OBJECTIVES, Objective, Vocabulary
from megatron_encdec.platform.schema import ANY_TIME
from megatron_encdec.rundir.lineage import history_hash
from megatron_encdec.training.config import Config

SCALED = ("model.rope_scaling={rope_type: yarn, factor: 2, original_max_position_embeddings: 64}",)
LLAMA3 = ("model.rope_scaling={rope_type: llama3, factor: 2, original_max_position_embeddings: 64, low_freq_factor: 1, "
          "high_freq_factor: 4}",)
RAMP = ("phases.1.objective={name: mlm, mask_ratio: {from: 0.3, to: 0.1}}",)
SPANS = ("phases.1.objective={name: mlm, unit: span}",)
MNTP = ("phases.1.objective={name: mntp}",)
MNTP_RAMP = ("phases.1.objective={name: mntp, mask_ratio: {from: 0.3, to: 0.1}}",)
TURNS = ("phases.1.objective={name: alternate, cycle: [{objective: clm, steps: 1}, {objective: mlm, steps: 2}]}",)
PARTS = ("phases.1.objective={name: mixture, parts: [{objective: clm, weight: 1}, {objective: mlm, weight: 2}]}",)
CUT = ("data.random_length={min: 8, max: 32}",)
OWN = ("phases.1.schedule={name: wsd, warmup_steps: 1, decay_steps: 2, final_lr: 1.0e-5}",)
MORE = ("phases.1.data.train=[{path: nowhere/text}, {path: nowhere/more}]",)
MORE_CUT = ("phases.1.data.random_length={min: 8, max: 32}",)
GROWING = ("phases.1.steps=12", "phases.1.batch.ramp={from: 2, tokens: 768}")


def scaled_later(*, kind: str) -> tuple[str]:
    """The rotary scalings of the model, as the second phase's."""
    return tuple(one.replace("model.", "phases.1.") for one in {"yarn": SCALED, "llama3": LLAMA3}[kind])


FP8 = ("precision.dtype=bf16", "precision.fp8=current", "precision.fp8_bf16_first=1", "precision.fp8_bf16_last=1")

# key -> another value than the base's; then overrides that both have, and ones that only the changed one has
DECIDES = {
    "run.seed": "7",
    "data.train.0.weight": ("2", ("data.train=[{path: nowhere/text}, {path: nowhere/more}]",)),
    "data.seed": "7", "data.sequence_length": "32", "data.isolate_documents": "false",
    "data.random_length.min": ("9", CUT), "data.random_length.max": ("33", CUT),
    "model.num_layers": "4", "model.hidden_size": "64", "model.ffn_hidden_size": "96", "model.num_attention_heads": "8",
    "model.num_query_groups": "4", "model.head_dim": "16", "model.tied_embeddings": "true", "model.norm_eps": "1e-6",
    "model.rope_theta": "5000", "model.layers_without_rope.0": ("1", ("model.layers_without_rope=[0]",)),
    "model.sliding_window": "8", "model.layers_without_window.0": (
        "1", ("model.sliding_window=8", "model.layers_without_window=[0]")),
    "model.norm": "layernorm", "model.activation": "geglu", "model.embedding_norm": "true",
    "model.norm_place": "after", "model.norm_zero_centered": "true", "model.embedding_multiplier": "2",
    "model.residual_multiplier": "2", "model.attention_multiplier": "2", "model.attention_softcap": "2",
    "model.logits_scaling": "2", "model.logits_softcap": "2", "model.attention_output_bias": "true",
    "model.qk_norm_over": ("heads", ("model.qk_norm=true",)),
    "model.prediction_head": "dense", "model.local_rope_theta": ("5000", ("model.sliding_window=8",)),
    "phases.1.local_rope_theta": ("5000", ("model.sliding_window=8",)),
    "model.qkv_bias": "true", "model.qk_norm": "true", "model.init_std": "0.1", "model.vocabulary_size": "400",
    "model.rope_scaling.rope_type": ("yarn", ("model.rope_scaling={rope_type: linear, factor: 2}",),
                                     ("model.rope_scaling.original_max_position_embeddings=64",)),
    "model.rope_scaling.factor": ("4", SCALED),
    "model.rope_scaling.original_max_position_embeddings": ("32", SCALED),
    "model.rope_scaling.attention_factor": ("0.5", SCALED), "model.rope_scaling.beta_fast": ("16", SCALED),
    "model.rope_scaling.beta_slow": ("2", SCALED), "model.rope_scaling.truncate": ("false", SCALED),
    "model.rope_scaling.low_freq_factor": ("2", LLAMA3), "model.rope_scaling.high_freq_factor": ("8", LLAMA3),
    "phases.1.objective(mlm).mask_ratio": "0.5", "phases.1.objective(mlm).random_fraction": (
        "0.1", ("phases.1.objective.mask_fraction=0.5",)), "phases.1.objective(mlm).mask_fraction": "0.5",
    "phases.1.objective(mlm).mask_ratio.from": ("0.4", RAMP), "phases.1.objective(mlm).mask_ratio.to": ("0.2", RAMP),
    "phases.1.objective(mlm).unit": "word", "phases.1.objective(mlm).mean_span": ("4", SPANS),
    "phases.1.objective(mntp).mask_ratio": ("0.5", MNTP), "phases.1.objective(mntp).unit": ("word", MNTP),
    "phases.1.objective(mntp).mask_ratio.from": ("0.4", MNTP_RAMP),
    "phases.1.objective(mntp).mask_ratio.to": ("0.2", MNTP_RAMP),
    "phases.1.objective(mntp).mask_fraction": ("0.5", MNTP),
    "phases.1.objective(mntp).random_fraction": ("0.1", (*MNTP, "phases.1.objective.mask_fraction=0.5")),
    "phases.1.objective(mntp).mean_span": ("4", (*MNTP, "phases.1.objective.unit=span")),
    "phases.1.objective(alternate).cycle.0.steps": ("2", TURNS),
    "phases.1.objective(alternate).cycle.0.objective": ("mdlm", TURNS),
    "phases.1.objective(mixture).parts.0.weight": ("2", PARTS),
    "phases.1.objective(mixture).parts.0.objective": ("mdlm", PARTS),
    "phases.0.steps": "7", "phases.1.optimizer_state": "reset", "phases.1.lr": "1e-4",
    "phases.1.data.train.0.weight": ("2", MORE), "phases.1.data.sequence_length": "32",
    "phases.1.data.isolate_documents": "false", "phases.1.data.random_length.min": ("9", MORE_CUT),
    "phases.1.data.random_length.max": ("33", MORE_CUT), "phases.1.rope_theta": "5000",
    "phases.1.batch.global_size": "16", "phases.1.batch.ramp.from": ("4", GROWING),
    "phases.1.batch.ramp.tokens": ("1536", GROWING),
    "phases.1.rope_scaling.rope_type": ("yarn", ("phases.1.rope_scaling={rope_type: linear, factor: 2}",),
                                        ("phases.1.rope_scaling.original_max_position_embeddings=64",)),
    **{f"phases.1.rope_scaling.{key}": (value, scaled_later(kind="yarn")) for key, value in {
        "factor": "4", "original_max_position_embeddings": "32", "attention_factor": "0.5", "beta_fast": "16",
        "beta_slow": "2", "truncate": "false"}.items()},
    **{f"phases.1.rope_scaling.{key}": (value, scaled_later(kind="llama3")) for key, value in {
        "low_freq_factor": "2", "high_freq_factor": "8"}.items()},
    "phases.1.freeze.0": ("head", ("phases.1.freeze=[embeddings]",)),
    "phases.1.schedule.name": ("constant", ("phases.1.schedule={name: wsd, decay_steps: 2}",)),
    "phases.1.schedule.warmup_steps": ("2", OWN), "phases.1.schedule.decay_steps": ("3", OWN),
    "phases.1.schedule.final_lr": ("1e-4", OWN), "phases.1.schedule.decay": ("1-sqrt", OWN),
    "phases.1.schedule.final_fraction": ("0.1", OWN, ("phases.1.schedule.final_lr=0",)),
    "phases.1.schedule.warmup_tokens": ("1024", OWN, ("phases.1.schedule.warmup_steps=0",)),
    "phases.1.schedule.decay_tokens": ("1536", OWN, ("phases.1.schedule.decay_steps=0",)),
    "optimizer.lr": "1e-4", "optimizer.betas": "[0.9, 0.9]", "optimizer.eps": "1e-7", "optimizer.weight_decay": "0.2",
    "optimizer.clip_grad": "0.5", "optimizer.name": "stable_adamw",
    "optimizer.no_decay.0": ("biases", ("optimizer.no_decay=[norms]",)),
    "schedule.name": "cosine", "schedule.warmup_steps": "3", "schedule.decay_steps": "4", "schedule.final_lr": "1e-4",
    "schedule.warmup_tokens": ("1536", (), ("schedule.warmup_steps=0",)), "schedule.final_fraction": "0.1",
    "schedule.decay_tokens": ("2048", (), ("schedule.decay_steps=0",)), "schedule.decay": "1-sqrt",
    "batch.global_size": "16",
    "precision.dtype": "bf16", "precision.fp8": ("delayed", ("precision.dtype=bf16",)),
    "precision.fp8_bf16_first": ("0", FP8), "precision.fp8_bf16_last": ("0", FP8),
}
# key -> another value: the hash stays, because no weight depends on it
DECIDES_NOTHING = {
    # where things are, what is told and kept, when a run gives up
    "run.dir": "elsewhere", "run.on_nonfinite": "skip", "run.max_skipped": "3", "run.hang_timeout": "9",
    "phases.0.name": "first", "checkpoint.every": "5", "checkpoint.keep": "7", "checkpoint.async": "false",
    "checkpoint.steps.0": ("3", ("checkpoint.steps=[5]",)),
    "evaluation.every": "5", "evaluation.batches": "3", "logging.every": "2", "logging.tensorboard": "true",
    "logging.distance": "true", "logging.trackers.0": ("mlflow", ("logging.trackers=[wandb]",)),
    # validation is read by nobody who trains
    "data.validation.0.path": "nowhere/other", "data.validation.0.weight": "2",
    # another way to say a length: what it comes to is in the history
    "run.total.steps": "12", "run.total.tokens": "6144", "phases.0.tokens": ("3072", (), ("phases.0.steps=null",)),
    "phases.0.fraction": ("0.5", ("run.total.steps=12",), ("phases.0.steps=null",)),
    # rounding of sums, within the tolerance of another topology or kernel
    "run.deterministic": "true", "batch.micro_size": "4",
    "phases.1.batch.micro_size": "4", "parallel.tensor": "2", "parallel.pipeline": "2",
    "parallel.sequence": ("true", ("parallel.tensor=2",)), "model.layers": "torch",
    "performance.attention": "packed", "performance.head_chunk": "64", "performance.triton": "false",
    "performance.fuse_activation": "true", "performance.fuse_gradients": "false", "performance.recompute": "mlp",
    "performance.recompute_layers": ("1", ("performance.recompute=full",)), "performance.overlap_gradients": "true",
    "performance.overlap_parameters": "true", "performance.overlap_tensor": "true", "performance.prefetch": "2",
    "precision.fp8_evaluation": "true",
    # sizes are spelt out in the history; the way out to Hugging Face
    "model.preset": "tiny", "model.family": "qwen3", "model.max_positions": "99",
}
# what it stands for is in the history, and a test of its own changes that
BY_CONTENT = {
    "tokenizer.path": "test_tokenizer_identity", "tokenizer.mask_token": "test_tokenizer_identity",
    "tokenizer.eod_token": "test_tokenizer_identity",  # data written with another end of document is refused
    "phases.1.data.train.0.path": "the fingerprint of the data: test_stretches",
    "data.train.0.path": "the fingerprint of the data: test_stretches",
    "run.from.path": "test_fork", "run.from.step": "test_fork", "run.from.state": "test_fork",
    "parallel.context": "1 is the only value",
}


def keys_of(hint, where: str = "") -> list[str]:
    """Every key that a config may have; items of lists as number 0, phases as 0 and 1. An objective that is part of
    another is one key: its settings are those of the same objective alone."""
    kinds = [kind for kind in typing.get_args(hint) if kind not in (type(None), bool)]
    if typing.get_origin(hint) in (types.UnionType, typing.Union) and len(kinds) == 1:
        return keys_of(kinds[0], where)
    if hint is Objective:
        return [where] if "(" in where else [key for name, kind in OBJECTIVES.items()
                                             for key in keys_of(kind, f"{where}({name})")]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return [where, *(key for kind in kinds if dataclasses.is_dataclass(kind) for key in keys_of(kind, where))]
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return [key for field in dataclasses.fields(hint) for key in keys_of(
            hints[field.name], f"{where}.{field.metadata.get('key', field.name)}".lstrip("."))]
    many = typing.get_origin(hint) is list or Ellipsis in kinds
    return keys_of(kinds[0], f"{where}.0") if many else [where]


def hashes(key: str, change) -> tuple[str, str]:
    """Before and after."""
    value, context, also = (*change, (), ())[:3] if isinstance(change, tuple) else (change, (), ())
    key = re.sub(r"\(\w+\)", "", key)
    sources = tuple("fg"[: 2 if "more" in " ".join(context) else 1])
    base = timeline_of("precision.dtype=fp32", *context, fingerprints=sources)
    changed = timeline_of("precision.dtype=fp32", *context, f"{key}={value}", *also, fingerprints=sources)
    return history_hash(base.history(12)), history_hash(changed.history(min(12, changed.total_steps)))


def test_every_key_has_a_decision():
    known = {key.replace("phases.1", "phases.0") for key in (*DECIDES, *DECIDES_NOTHING, *BY_CONTENT)}
    missing = [key for key in keys_of(Config) if key not in known]
    assert not missing, "say for each whether a number depends on it, and put what does into Stretch.identity"
    assert not known - set(keys_of(Config)), "no such key any more"


def later_of(hint, where: str = "") -> dict[str, str | None]:
    """The `later` of each key, as docs/config.md tells it; names as in `keys_of`."""
    found = {}
    for kind in typing.get_args(hint) or [hint]:
        if kind is Objective:
            for name, one in OBJECTIVES.items() if "(" not in where else ():
                found |= later_of(one, f"{where}({name})")
        elif dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            for field in dataclasses.fields(kind):
                inner, one = hints[field.name], f"{where}.{field.metadata.get('key', field.name)}".lstrip(".")
                many = any(typing.get_origin(part) in (list, tuple) for part in (inner, *typing.get_args(inner)))
                item = f"{one}.0" if many else one
                later = field.metadata.get("later")
                found |= {one: later, item: later, **later_of(inner, item)}
        elif typing.get_args(kind):
            found |= later_of(kind, where)
    return found


def test_what_the_documentation_says_of_later_changes_is_so():
    """A key may change at any time if, and only if, no number depends on it: run.dir, lengths and validation apart."""
    told = later_of(Config)
    free = {key.replace("phases.1", "phases.0") for key in DECIDES_NOTHING} - {
        "run.dir", "run.total.steps", "run.total.tokens", "phases.0.tokens", "phases.0.fraction",
        "data.validation.0.path", "data.validation.0.weight"}
    for key in keys_of(Config):
        assert key in told, key
        if not key.startswith(("data.validation", "parallel.context")):
            assert (told[key] == ANY_TIME) == (key in free), key


@pytest.mark.parametrize("key", DECIDES)
def test_a_key_that_decides_changes_the_hash(key):
    before, after = hashes(key, DECIDES[key])
    assert before != after


@pytest.mark.parametrize("key", DECIDES_NOTHING)
def test_a_key_that_decides_nothing_does_not(key):
    before, after = hashes(key, DECIDES_NOTHING[key])
    assert before == after


def test_what_came_later_is_in_no_history_that_does_not_use_it():
    vocabulary = Vocabulary(20, frozenset({0}), 1)
    found = Objective.from_yaml("mlm:0.3", "objective").identity(vocabulary, 3, 6)
    assert found == {"name": "mlm", "mask_ratio": 0.3, "mask_fraction": 1.0, "random_fraction": 0.0,
                     **vocabulary.identity}  # as before there were units
    stretch = timeline_of(*PARTS).stretches[1]
    inside = stretch.identity({"nowhere/text": "f"}, vocabulary)["objective"]["parts"][1]["objective"]
    assert inside == {"name": "mlm", "mask_ratio": 0.4, "mask_fraction": 1.0, "random_fraction": 0.0}


@pytest.mark.parametrize("context, matters", [(RAMP, True), (TURNS, False), (PARTS, False), ((), False), (
    ("phases.1.objective={name: alternate, cycle: [{objective: {name: mlm, mask_ratio: {from: 0.3, to: 0.1}}, "
     "steps: 1}]}",), True)])
def test_how_long_a_phase_is_matters_where_it_decides_a_ratio(context, matters):
    flat = ("schedule={name: constant}", *context)
    short, long = (history_hash(timeline_of(*flat, f"phases.1.steps={steps}").history(8)) for steps in (6, 7))
    assert (short != long) == matters


@pytest.mark.parametrize("context", [RAMP, TURNS])
def test_a_stretch_that_begins_inside_a_phase_is_none_that_begins_a_phase(context):
    stretch = timeline_of(*context).stretches[1]
    cut = dataclasses.replace(stretch, start=stretch.start + 2)
    whole = dataclasses.replace(cut, phase_start=cut.start)
    vocabulary = Vocabulary(20, frozenset({0}), 1)
    assert cut.identity({"nowhere/text": "f"}, vocabulary) != whole.identity({"nowhere/text": "f"}, vocabulary)


def test_word_starts_are_part_of_the_history_of_what_keeps_to_words():
    plain, other = (Vocabulary(20, frozenset({0}), 1, frozenset(starts)) for starts in ({2, 3}, {2, 4}))
    for context, matters in ((), False), ({"unit": "word"}, True):
        objective = Objective.from_yaml({"name": "mlm", **dict(context)}, "objective")
        assert (objective.identity(plain) != objective.identity(other)) == matters
        mixture = Objective.from_yaml({"name": "mixture", "parts": [{"objective": objective.to_yaml()}]}, "objective")
        assert (mixture.identity(plain) != mixture.identity(other)) == matters
