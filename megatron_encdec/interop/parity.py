"""Does the Hugging Face model compute what the trunk computes? Each question has a number as its answer.

    1. `logits_difference`   largest difference of logits on random tokens, under one attention kind
    2. `losses`              loss of both on the same validation windows under an objective
    3. `tensor_differences`  names of tensors that are not equal after mapping the HF model back
    4. `compare`             all of it for a checkpoint and its export, line by line

Legend: B windows, S tokens of a window, V vocabulary, N labelled positions.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_encdec.data.samples import Samples
from megatron_encdec.interop.families import TARGETS, Target
from megatron_encdec.interop.hugging_face import ParityError, build_model, load_model
from megatron_encdec.interop.names import NameTable, canonical_weights, from_hugging_face
from megatron_encdec.interop.source import Source, find, whole_trunk
from megatron_encdec.interop.targets import hugging_face_config
from megatron_encdec.model.trunk import Trunk
from megatron_encdec.objectives import MicroBatch, Objective, ObjectiveConfig, build_objective, collate
from megatron_encdec.objectives.base import AttentionKind
from megatron_encdec.platform.device import device
from megatron_encdec.platform.errors import UserError

TOLERANCE = 1e-3  # on logits in fp32: two orders above what rounding does, far below what any mistake does
_LOSS_TOLERANCE = 1e-4


@torch.no_grad()
def trunk_logits(trunk: Trunk, tokens_BS: torch.Tensor, kind: AttentionKind) -> torch.Tensor:
    """Logits [B, S, V] on the CPU of whole windows, vocabulary padding cut off."""
    windows, length = tokens_BS.shape
    starts = torch.arange(0, windows * length + 1, length, dtype=torch.int32, device=device())
    context = trunk.attention_context(kind, starts, length, False, windows, length)
    hidden = trunk.hidden_states(tokens_BS.to(device()), context)
    positions_N = torch.arange(windows * length, device=device())
    logits_NV = trunk.logits(hidden, positions_N, windows)[:, : trunk.model.vocabulary_size]
    return logits_NV.view(windows, length, -1).cpu()


@torch.no_grad()
def logits_difference(trunk: Trunk, hugging_face, kind: AttentionKind, windows: int = 2,
                      length: int = 64) -> float:
    """max |trunk - HF| over all logits of `windows` x `length` random tokens; NaN if one is.

    Windows are no longer than the model's positions.
    """
    length = min(length, hugging_face.config.max_position_embeddings, trunk.max_sequence_length)
    rows = min(trunk.model.vocabulary_size, hugging_face.config.vocab_size)  # without a mask that an import added
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, rows, (windows, length), generator=generator)
    ours_BSV = trunk_logits(trunk, tokens_BS, kind)[..., :rows]
    return (ours_BSV - hugging_face(tokens_BS).logits[..., :rows]).abs().max().item()


def check_logits(trunk: Trunk, hugging_face, kind: AttentionKind) -> float:
    """`logits_difference`; raises `ParityError` where it is above `TOLERANCE` or NaN."""
    difference = logits_difference(trunk, hugging_face, kind)
    if not difference <= TOLERANCE:
        cause = "the weights hold NaN or infinity" if difference != difference else "the conversion is wrong"
        raise ParityError(f"logits of {type(hugging_face).__name__} and of the trunk differ by "
                          f"{difference:.3g} (allowed {TOLERANCE}): {cause}")
    return difference


@torch.no_grad()
def losses(trunk: Trunk, hugging_face, samples: Samples, objective: Objective,
           numbers: Iterable[int]) -> tuple[float, float]:
    """Mean loss per target of (trunk, HF model) on the samples `numbers`, both in fp32.

    The HF model, which knows no documents, gets every segment on its own: a second, independent statement of
    what isolation means, and a test with one window.
    """
    batch = collate(objective, [samples.sample(number) for number in numbers], samples.seed)
    return _trunk_loss(trunk, batch), _hugging_face_loss(hugging_face, batch)


def _trunk_loss(trunk: Trunk, batch: MicroBatch) -> float:
    def tensor(array):
        return torch.from_numpy(array).to(device())

    windows, length = batch.inputs_BS.shape
    context = trunk.attention_context(batch.attention, tensor(batch.cu_seqlens), batch.longest,
                                      batch.isolated, windows, length)
    loss_N = trunk(tensor(batch.inputs_BS), context, tensor(batch.label_positions_N),
                   tensor(batch.labels_N))
    return loss_N.double().mean().item()


def _hugging_face_loss(hugging_face, batch: MicroBatch) -> float:
    flat = torch.from_numpy(batch.inputs_BS).reshape(-1)
    positions_N, labels_N = torch.from_numpy(batch.label_positions_N), torch.from_numpy(batch.labels_N)
    total = 0.0
    cuts = batch.cu_seqlens.tolist()
    for start, end in zip(cuts, cuts[1:], strict=False):
        inside_N = (positions_N >= start) & (positions_N < end)
        if inside_N.any():
            logits_SV = hugging_face(flat[None, start:end]).logits[0].float()
            total += F.cross_entropy(logits_SV[positions_N[inside_N] - start], labels_N[inside_N],
                                     reduction="none").double().sum().item()
    return total / len(labels_N)


def tensor_differences(trunk: Trunk, hugging_face, names: NameTable) -> list[str]:
    """Canonical names of the trunk's tensors that the HF model's, mapped back, do not equal bit for bit."""
    model = trunk.model
    back = from_hugging_face({name: tensor.float() for name, tensor in hugging_face.state_dict().items()},
                             model, names)
    ours = canonical_weights(trunk)

    def real(name, tensor):  # rows of the padding belong to no token
        return tensor[: model.vocabulary_size] if tensor.shape[0] == model.padded_vocabulary_size else tensor

    return [name for name in ours if not torch.equal(real(name, ours[name]), real(name, back[name]))]


@torch.no_grad()
def compare(run: str, out: str | Path, windows: int = 4, say: Callable[[str], None] = print) -> bool:
    """Compare the checkpoint `RUN_DIR[@STEP]` with its export `out`, a line an answer; whether all agree.

    Losses are those of the run's first `windows` validation samples under every objective: an objective that
    the exported class is not made for is computed by the other class from the same weights.
    """
    source, (target, dtype) = find(run), _exported(Path(out))
    with whole_trunk(source) as trunk:
        if dtype == "bf16":
            for parameter in trunk.parameters():
                parameter.copy_(parameter.bfloat16())
        model = load_model(target, Path(out))
        answers = [*_compare_weights(trunk, model, target)]
        try:
            samples = Samples(source.config.data, "validation")
        except UserError as error:
            say(f"losses are not compared: {error}")
        else:
            answers += _compare_losses(trunk, model, source, samples, range(windows))
    for agrees, line in answers:
        say(f"{'ok   ' if agrees else 'WRONG'}  {line}")
    return all(agrees for agrees, _ in answers)


def _exported(out: Path) -> tuple[Target, str]:
    """Target and dtype of an export, from its record."""
    try:
        record = json.loads((out / "export.json").read_text(encoding="utf-8"))
        return TARGETS[record["as"]], record["dtype"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{out}: no export is there (export.json is missing or unreadable)") from None


def _compare_weights(trunk: Trunk, model, target: Target):
    differing = tensor_differences(trunk, model, target.family.names)
    found = f"{len(differing)} differ, first {differing[0]}" if differing else "all equal"
    yield not differing, f"tensors, mapped back: {found}"
    difference = logits_difference(trunk, model, target.attention)
    yield difference <= TOLERANCE, f"logits, {target.attention}: largest difference {difference:.3g}"


def _compare_losses(trunk: Trunk, model, source: Source, samples: Samples, numbers: range):
    tokenizer, config = source.tokenizer, source.config
    settings = {phase.objective.name: phase.objective for phase in config.phases}
    settings.setdefault("clm", ObjectiveConfig("clm"))
    if tokenizer.mask_id is not None:
        settings.setdefault("mlm", ObjectiveConfig("mlm"))
    for name, setting in sorted(settings.items()):
        objective = build_objective(setting, tokenizer.mask_id, tokenizer.special_ids,
                                    tokenizer.vocabulary_size)
        target = next(target for target in TARGETS.values() if target.attention == objective.attention)
        settings_there = hugging_face_config(target, config.model, config.data.sequence_length, tokenizer)
        same_weights = build_model(target, settings_there, model.state_dict())
        ours, theirs = losses(trunk, same_weights, samples, objective, numbers)
        yield (abs(ours - theirs) <= _LOSS_TOLERANCE,
               f"loss, {name} on {len(numbers)} validation windows: trunk {ours:.6f}, "
               f"{target.model_class} {theirs:.6f}")
