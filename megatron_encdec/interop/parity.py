"""Does the Hugging Face model compute what the trunk computes? Each question has a number as its answer.

    1. `logits_difference`   largest difference of logits on random tokens, under one attention kind
    2. `losses`              loss of both on the same validation windows under an objective
    3. `text_losses`         loss of both on texts, one by one, whole and alone
    4. `tensor_differences`  names of tensors that are not equal after mapping the HF model back
    5. `compare`             all of it for a checkpoint and its export, or an import and its source, line by line

Legend: B windows, S tokens of a window, V vocabulary, N labelled positions.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from megatron_encdec.data.samples import Samples
from megatron_encdec.interop.families import TARGETS, Target
from megatron_encdec.interop.hugging_face import ParityError, build_model, load_model
from megatron_encdec.interop.names import NameTable, canonical_weights, from_hugging_face
from megatron_encdec.interop.source import Source, find, whole_trunk
from megatron_encdec.interop.source_config import read_source
from megatron_encdec.interop.targets import hugging_face_config
from megatron_encdec.model.trunk import Trunk
from megatron_encdec.objectives import MicroBatch, Objective, Vocabulary, collate, evaluated
from megatron_encdec.objectives.base import AttentionKind
from megatron_encdec.platform.device import device
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer import Tokenizer

TOLERANCE = 1e-3  # on logits in fp32: two orders above what rounding does, far below what any mistake does
_LOSS_TOLERANCE = 1e-4
_MASK_EVERY = 5  # tokens
_ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}


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
                      length: int = 64, apart: int | None = None) -> float:
    """max |trunk - HF| over all logits of `windows` x `length` random tokens; NaN if one is.

    Windows are no longer than the model's positions. The token `apart` is neither read nor predicted: a mask whose
    rows an import replaced.
    """
    length = min(length, hugging_face.config.max_position_embeddings, trunk.max_sequence_length)
    rows = min(trunk.model.vocabulary_size, hugging_face.config.vocab_size)  # without a mask that an import added
    generator = torch.Generator().manual_seed(0)
    read = torch.tensor([token for token in range(rows) if token != apart])
    tokens_BS = read[torch.randint(0, len(read), (windows, length), generator=generator)]
    ours_BSV, theirs_BSV = trunk_logits(trunk, tokens_BS, kind), hugging_face(tokens_BS).logits
    return (ours_BSV[..., read] - theirs_BSV[..., read]).abs().max().item()


def check_logits(trunk: Trunk, hugging_face, kind: AttentionKind, apart: int | None = None) -> float:
    """`logits_difference`; raises `ParityError` where it is above `TOLERANCE` or NaN."""
    difference = logits_difference(trunk, hugging_face, kind, apart=apart)
    if not difference <= TOLERANCE:
        cause = "the weights hold NaN or infinity" if difference != difference else "the conversion is wrong"
        raise ParityError(f"logits of {type(hugging_face).__name__} and of the trunk differ by "
                          f"{difference:.3g} (allowed {TOLERANCE}): {cause}")
    return difference


@torch.no_grad()
def losses(trunk: Trunk, hugging_face, samples: Samples, objective: Objective, vocabulary: Vocabulary,
           numbers: Iterable[int]) -> tuple[float, float]:
    """Mean loss per target of (trunk, HF model) on the samples `numbers`, both in fp32.

    The HF model, which knows no documents, gets every segment on its own: a second, independent statement of
    what isolation means, and a test with one window.
    """
    batch = collate(objective, [samples.sample(number) for number in numbers], samples.seed, vocabulary)
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


@torch.no_grad()
def text_losses(trunk: Trunk, hugging_face, tokenizer: Tokenizer, texts: Iterable[str],
                kind: AttentionKind) -> list[tuple[float, float]]:
    """(trunk's, HF model's) mean loss per target of each text, by itself, in fp32.

    Under causal attention every next token is a target; under bidirectional every `_MASK_EVERY`-th token, masked.
    Texts are cut at the trunk's length; those of fewer than two tokens are left out.
    """
    found, masked = [], torch.arange(1, trunk.max_sequence_length, _MASK_EVERY)
    for text in texts:
        labels_S = torch.tensor(tokenizer.encode(text)[: trunk.max_sequence_length])
        if len(labels_S) < 2:
            continue
        inputs_S = labels_S.clone()
        if kind == "causal":
            positions_N, labels_N = torch.arange(len(labels_S) - 1), labels_S[1:]
        else:
            positions_N = masked[masked < len(labels_S)]
            labels_N, inputs_S[positions_N] = labels_S[positions_N], tokenizer.mask_id
        length = len(inputs_S)
        context = trunk.attention_context(kind, torch.tensor([0, length], dtype=torch.int32, device=device()), length,
                                          False, 1, length)
        ours_N = trunk(inputs_S[None].to(device()), context, positions_N.to(device()), labels_N.to(device()))
        theirs_NV = hugging_face(inputs_S[None]).logits[0, positions_N].float()
        found.append((ours_N.double().mean().item(), F.cross_entropy(theirs_NV, labels_N).item()))
    return found


def tensor_differences(trunk: Trunk, hugging_face, names: NameTable, but_row: int | None = None) -> list[str]:
    """Canonical names of the trunk's tensors that the HF model's, mapped back, do not equal bit for bit.

    Rows of a vocabulary that only one of them has do not count (a mask that an import added), nor does row `but_row`.
    """
    rows = min(trunk.model.vocabulary_size, hugging_face.config.vocab_size)
    model = replace(trunk.model, vocabulary_size=hugging_face.config.vocab_size)
    back = from_hugging_face({name: tensor.float() for name, tensor in hugging_face.state_dict().items()},
                             model, names)
    ours = canonical_weights(trunk)

    def real(name, tensor):  # rows of the padding belong to no token
        if not name.startswith(("embedding.", "output_layer.")):
            return tensor
        kept = torch.ones(rows, dtype=torch.bool)
        if but_row is not None and but_row < rows:
            kept[but_row] = False
        return tensor[:rows][kept]

    return [name for name in ours if not torch.equal(real(name, ours[name]), real(name, back[name]))]


@torch.no_grad()
def compare(run: str, out: str | Path, windows: int = 4, say: Callable[[str], None] = print,
            texts: list[str] | None = None) -> bool:
    """Compare the checkpoint `RUN_DIR[@STEP]` with the Hugging Face model `out`, a line an answer; whether all agree.

    `out`: an export of it, or the directory that it was imported from. Losses are those of the run's first `windows`
    validation samples under every objective (one that the exported class is not made for is computed by a class of
    that attention from the same weights) and, where `texts` are given, of each of them.
    """
    source, out = find(run), Path(out)
    target, dtype = _what_is(out)
    with whole_trunk(source) as trunk:
        if dtype in ("bf16", "fp16"):
            for parameter in trunk.parameters():
                parameter.copy_(parameter.to(_ROUNDED[dtype]))
        model = load_model(target, out)
        answers = [*_compare_weights(trunk, model, target, source)]
        if texts:
            answers += _compare_texts(trunk, model, target, source, texts)
        try:
            samples = None if source.imported else Samples(source.config.data, "validation")
        except UserError as error:
            say(f"losses are not compared: {error}")
            samples = None
        if samples is not None:
            answers += _compare_losses(trunk, model, source, samples, range(windows))
    for agrees, line in answers:
        say(f"{'ok   ' if agrees else 'WRONG'}  {line}")
    return all(agrees for agrees, _ in answers)


def _what_is(out: Path) -> tuple[Target, str | None]:
    """Target and dtype of an export, from its record; of another model, from its config.json."""
    try:
        record = json.loads((out / "export.json").read_text(encoding="utf-8"))
        return TARGETS[record["as"]], record["dtype"]
    except FileNotFoundError:
        return read_source(out).as_target(), None
    except (OSError, ValueError, KeyError):
        raise UserError(f"{out}: its export.json is unreadable") from None


def _compare_weights(trunk: Trunk, model, target: Target, source: Source):
    imported = source.imported or {"mask": {"kind": "own", "id": None}}
    mask = imported["mask"]["id"] if imported["mask"]["kind"] in ("reserved", "added") else None
    differing = tensor_differences(trunk, model, target.family.names, mask)
    found = f"{len(differing)} differ, first {differing[0]}" if differing else "all equal"
    yield not differing, f"tensors, mapped back: {found}{'' if mask is None else f' (row {mask}, the mask, apart)'}"
    difference = logits_difference(trunk, model, target.attention, apart=mask)
    yield difference <= TOLERANCE, f"logits, {target.attention}: largest difference {difference:.3g}"


def _compare_texts(trunk: Trunk, model, target: Target, source: Source, texts: list[str]):
    if source.tokenizer is None or (target.is_encoder and source.tokenizer.mask_id is None):
        raise UserError("texts cannot be compared: the run has no tokenizer, or no mask token")
    found = text_losses(trunk, model, source.tokenizer, texts, target.attention)
    worst = max((abs(ours - theirs) for ours, theirs in found), default=0.0)
    ours, theirs = (sum(column) / max(len(found), 1) for column in zip(*found, strict=True)) if found else (0.0, 0.0)
    yield worst <= TOLERANCE, (f"loss per target on {len(found)} texts, {target.attention}: trunk {ours:.6f}, "
                               f"{target.model_class} {theirs:.6f}; largest difference of one text {worst:.2g}")


def _compare_losses(trunk: Trunk, model, source: Source, samples: Samples, numbers: range):
    tokenizer, config = source.tokenizer, source.config
    for name, objective in evaluated([phase.objective for phase in config.phases],
                                     tokenizer.mask_id is not None).items():
        target = next(target for target in TARGETS.values()
                      if target.attention == objective.attention and target.family.refuses(config.model) is None)
        settings_there = hugging_face_config(target, config.model, config.data.sequence_length, tokenizer)
        same_weights = build_model(target, settings_there, model.state_dict())
        ours, theirs = losses(trunk, same_weights, samples, objective, Vocabulary.of(tokenizer), numbers)
        yield (abs(ours - theirs) <= _LOSS_TOLERANCE,
               f"loss, {name} on {len(numbers)} validation windows: trunk {ours:.6f}, "
               f"{target.model_class} {theirs:.6f}")
