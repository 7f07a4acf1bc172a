"""Before trusting a conversion: `python tools/check_parity.py RUN_DIR[@STEP] OUT [--text FILE]`.

OUT is what `megatron-encdec export` wrote from that checkpoint, or, for an imported run, the Hugging Face directory
that it came from. Prints whether every tensor, mapped back, equals the checkpoint's; the largest difference of
logits; the loss of both on the run's validation data under each objective; and the loss of both on each of some texts:
by default the docstrings of this package's own modules. Exit 0 if all agree, 1 if not.

Legend: S tokens of a text, V vocabulary, B windows, N labelled positions.
"""

import argparse
import ast
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import megatron_encdec
from megatron_encdec.platform import device

if __name__ == "__main__":
    device.choose("cpu")  # before megatron.core is imported

from megatron_encdec.data.samples import Samples
from megatron_encdec.interop.families import MODEL_FAMILIES, TARGETS
from megatron_encdec.interop.families.family import Target
from megatron_encdec.interop.hugging_face import (
    DTYPES,
    TOLERANCE,
    ParityError,
    build_model,
    hugging_face_config,
    load_model,
    logits_difference,
)
from megatron_encdec.interop.names import (
    VOCABULARY,
    Row,
    canonical_weights,
    from_hugging_face,
    tied_names,
    to_hugging_face,
)
from megatron_encdec.interop.source import Source, find, whole_trunk
from megatron_encdec.interop.source_config import read_source
from megatron_encdec.interop.source_files import read_object
from megatron_encdec.model.trunk import Trunk
from megatron_encdec.objectives.base import AttentionKind, MicroBatch, Vocabulary, collate, evaluated
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.tokenizer import Tokenizer

TEXTS = 20
LOSS_TOLERANCE = 1e-4
MASK_EVERY = 5  # tokens
Answer = tuple[bool, str]


def main() -> int:
    """Parse and compare; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN_DIR[@STEP]", help="run directory; default: newest checkpoint")
    parser.add_argument("out", metavar="OUT", help="what `export` wrote from it, or what `import` read")
    parser.add_argument("--windows", type=int, default=4, help="validation windows for losses (default: 4)")
    parser.add_argument("--text", metavar="FILE", help=f"one text a line, or JSON lines with the key text; the first "
                        f"{TEXTS} are compared")
    arguments = parser.parse_args()
    try:
        texts = read_texts(arguments.text)
        return 0 if compare(arguments.run, arguments.out, arguments.windows, texts=texts) else 1
    except UserError as error:
        print(f"check_parity: {error}", file=sys.stderr)
        return 2
    except ParityError as error:
        print(f"check_parity: {error}", file=sys.stderr)
        return 1


def read_texts(path: str | None) -> list[str]:
    """Up to `TEXTS` texts of a file, or of this package."""
    if path is None:
        files = sorted(Path(megatron_encdec.__file__).parent.rglob("*.py"))
        found = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "" for file in files)
        return [text for text in found if len(text) > 100][:TEXTS]
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        return [json.loads(line)["text"] if path.endswith(".jsonl") else line for line in lines[:TEXTS]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot read texts from it: {error}") from None


@torch.no_grad()
def losses(trunk: Trunk, hugging_face, batch: MicroBatch) -> tuple[float, float]:
    """Mean loss per target of (trunk, HF model) on `batch`, both in fp32.

    The HF model, which knows no documents, gets every segment on its own: a second, independent statement of
    what isolation means, and a test with one window.
    """
    inputs_BS, cuts, positions_N, labels_N = map(torch.from_numpy, (
        batch.inputs_BS, batch.cu_seqlens, batch.label_positions_N, batch.labels_N))
    here = device.device()
    context = trunk.attention_context(batch.attention, cuts.to(here), batch.longest, batch.isolated, *inputs_BS.shape)
    ours_N = trunk(inputs_BS.to(here), context, positions_N.to(here), labels_N.to(here))
    theirs = 0.0
    for start, end in zip(cuts.tolist(), cuts.tolist()[1:], strict=False):
        inside_N = (positions_N >= start) & (positions_N < end)
        if inside_N.any():
            logits_SV = hugging_face(inputs_BS.view(-1)[None, start:end]).logits[0].float()
            theirs += F.cross_entropy(logits_SV[positions_N[inside_N] - start], labels_N[inside_N],
                                      reduction="none").double().sum().item()
    return ours_N.double().mean().item(), theirs / len(labels_N)


def text_losses(trunk: Trunk, hugging_face, tokenizer: Tokenizer, texts: Iterable[str],
                kind: AttentionKind) -> list[tuple[float, float]]:
    """(trunk's, HF model's) mean loss per target of each text, by itself, in fp32.

    Under causal attention every next token is a target; under bidirectional every `MASK_EVERY`-th token, masked.
    Texts are cut at the trunk's length; those of fewer than two tokens are left out.
    """
    found = []
    for text in texts:
        tokens_S = np.array(tokenizer.encode(text)[: trunk.max_sequence_length], dtype=np.int64)
        length, inputs_S = len(tokens_S), tokens_S.copy()
        if length < 2:
            continue
        if kind == "causal":
            positions_N, labels_N = np.arange(length - 1), tokens_S[1:]
        else:
            positions_N = np.arange(1, length, MASK_EVERY)
            labels_N, inputs_S[positions_N] = tokens_S[positions_N], tokenizer.mask_id
        found.append(losses(trunk, hugging_face, MicroBatch(
            inputs_S[None], positions_N, labels_N, np.array([0, length], dtype=np.int32), length, False, kind, (0,))))
    return found


def rows_of(hugging_face) -> tuple[Row, ...]:
    """The name table of its class."""
    return next(family.rows for family in MODEL_FAMILIES.values() if family.model_class == type(hugging_face).__name__)


def tensor_differences(trunk: Trunk, hugging_face, but_row: int | None = None) -> list[str]:
    """Names of the HF model's tensors that the trunk's, mapped to it, do not equal bit for bit.

    Rows of a vocabulary that only one of them has do not count (a mask that an import added), nor does row `but_row`.
    """
    rows = min(trunk.model.vocabulary_size, hugging_face.config.vocab_size)
    model, theirs = replace(trunk.model, vocabulary_size=rows), dict(hugging_face.state_dict())
    table = rows_of(hugging_face)
    if model.tied_embeddings:
        theirs.pop(tied_names(table)[0], None)
    tables = {row.theirs[0] for row in table if row.layout is VOCABULARY}
    kept = torch.arange(rows) != (-1 if but_row is None else but_row)
    ours = to_hugging_face(canonical_weights(trunk), model, table)

    def same(name: str) -> bool:
        if name not in ours or name not in theirs:
            return False
        found = theirs[name].float()
        return torch.equal(ours[name][kept], found[:rows][kept]) if name in tables else torch.equal(ours[name], found)

    return [name for name in sorted(ours.keys() | theirs.keys()) if not same(name)]


@torch.no_grad()
def compare(run: str, out: str | Path, windows: int = 4, say: Callable[[str], None] = print,
            texts: list[str] | None = None) -> bool:
    """Compare the checkpoint `RUN_DIR[@STEP]` with the Hugging Face model `out`, a line an answer; whether all agree.

    `out`: an export of it, or the directory that it was imported from. Losses are those of the run's first `windows`
    validation samples under every objective (one that the exported class is not made for is computed by a class of
    that attention from the same weights) and, where `texts` are given, of each of them.
    """
    source, out = find(run), Path(out)
    target, dtype = what_is(out)
    with whole_trunk(source) as trunk:
        for parameter in trunk.parameters() if dtype else ():
            parameter.copy_(parameter.to(DTYPES[dtype]))
        model = load_model(target, out)
        answers = [*compare_weights(trunk, model, target, source)]
        if texts:
            answers += compare_texts(trunk, model, target, source, texts)
        try:
            samples = None if source.imported else Samples(source.config.data, "validation")
        except UserError as error:
            say(f"losses are not compared: {error}")
            samples = None
        if samples is not None:
            answers += compare_losses(trunk, model, source, samples, range(windows))
    for agrees, line in answers:
        say(f"{'ok   ' if agrees else 'WRONG'}  {line}")
    return all(agrees for agrees, _ in answers)


def what_is(out: Path) -> tuple[Target, str | None]:
    """Target and dtype of an export, from its record; of another model, from its config.json."""
    record = read_object(out / "export.json")
    if not record:
        return read_source(out).target, None
    if record.get("as") not in TARGETS or record.get("dtype") not in DTYPES:
        raise UserError(f"{out / 'export.json'}: not the record of an export")
    return TARGETS[record["as"]], record["dtype"]


def compare_weights(trunk: Trunk, model, target: Target, source: Source) -> Iterator[Answer]:
    made = (source.imported or {}).get("mask", {"kind": "own"})
    mask = made["id"] if made["kind"] in ("reserved", "added") else None
    differing = tensor_differences(trunk, model, mask)
    found = f"{len(differing)} differ, first {differing[0]}" if differing else "all equal"
    yield not differing, f"tensors, mapped back: {found}{'' if mask is None else f' (row {mask}, the mask, apart)'}"
    difference = logits_difference(trunk, model, target.attention, apart=mask)
    yield difference <= TOLERANCE, f"logits, {target.attention}: largest difference {difference:.3g}"


def compare_texts(trunk: Trunk, model, target: Target, source: Source, texts: list[str]) -> Iterator[Answer]:
    if source.tokenizer is None or (target.is_encoder and source.tokenizer.mask_id is None):
        raise UserError("texts cannot be compared: the run has no tokenizer, or no mask token")
    found = text_losses(trunk, model, source.tokenizer, texts, target.attention)
    worst = max((abs(ours - theirs) for ours, theirs in found), default=0.0)
    ours, theirs = (sum(column) / max(len(found), 1) for column in zip(*found, strict=True)) if found else (0.0, 0.0)
    yield worst <= TOLERANCE, (f"loss per target on {len(found)} texts, {target.attention}: trunk {ours:.6f}, "
                               f"{target.model_class} {theirs:.6f}; largest difference of one text {worst:.2g}")


def compare_losses(trunk: Trunk, model, source: Source, samples: Samples, numbers: range) -> Iterator[Answer]:
    tokenizer, config = source.tokenizer, source.config
    for name, objective in evaluated([phase.objective for phase in config.phases],
                                     tokenizer.mask_id is not None).items():
        target = next(target for target in TARGETS.values()
                      if target.attention == objective.attention and target.family.refuses(config.model) is None)
        there = hugging_face_config(target, config.model, config.data.sequence_length, tokenizer)
        batch = collate(objective, [samples.sample(number) for number in numbers], samples.seed,
                        Vocabulary.of(tokenizer))
        weights = to_hugging_face(from_hugging_face(model.state_dict(), config.model, rows_of(model)), config.model,
                                  target.family.rows)
        ours, theirs = losses(trunk, build_model(target, there, weights), batch)
        yield abs(ours - theirs) <= LOSS_TOLERANCE, (f"loss, {name} on {len(numbers)} validation windows: trunk "
                                                      f"{ours:.6f}, {target.model_class} {theirs:.6f}")


if __name__ == "__main__":
    raise SystemExit(main())
