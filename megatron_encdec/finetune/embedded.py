"""Tasks that need no download, from the docstring corpus, on documents that pretraining never saw.

Which documents: those of the validation split of `preprocess`, chosen by a hash of the text; the manifest of the
pretraining data says how many per cent. The same hash deals them out: 70 % train, 10 % validation, 20 % test.

    library        SC   which library a docstring is from (the eight with most docstrings; their names are blanked)
    identifiers    TC   which words stood in backquotes (the quotes are taken away)
    parameter_type QA   the type of a parameter, in docstrings of numpy's or Google's style; every third question asks
                        for a parameter of another docstring (no answer)
    summary_body   IR   a docstring's first line as query, the rest of it as the document to find

    1. `derive(dataset)`     {"train": [...], "validation": [...], "test": [...]}
"""

import hashlib
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from megatron_encdec.finetune.config import DatasetConfig
from megatron_encdec.finetune.examples import Pair, Question, Text, Words
from megatron_encdec.finetune.readers import read_file
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.encode import is_validation

LIBRARIES = 8
WORDS = 48  # of a text of the token task, at most
CHARACTERS = 240  # of texts of the other tasks
_PARAMETER = re.compile(r"^[ ]*(?P<name>[a-z_]\w+)(?: : (?P<numpy>[^\n]{2,60})| ?\((?P<google>[^()\n]{2,60})\): )",
                        re.MULTILINE)
_QUOTED = re.compile(r"`+([A-Za-z_][\w.()\[\]]*)`+")
_PIECE = re.compile(r"`+[^`\s]+`+|\w+|[^\w\s`]")


class Held(NamedTuple):
    """A held-out document: its split's name, text, source (`package/module.py:name`) and library."""

    split: str
    where: str
    text: str
    source: str
    library: str


def derive(dataset: DatasetConfig) -> dict[str, list]:
    """The examples of the task `dataset.docstrings`, by split; `UserError` where the corpus has too few."""
    documents = held_out(dataset.corpus, dataset.manifest)
    found = {"library": _library, "identifiers": _identifiers, "parameter_type": _parameter_type,
             "summary_body": _summary_body}[dataset.docstrings](documents)
    splits: dict[str, list] = {"train": [], "validation": [], "test": []}
    for split, example in found:
        splits[split].append(example)
    if not all(splits.values()):
        raise UserError(f"{dataset.corpus}: too few held-out documents for the task {dataset.docstrings} "
                        f"({', '.join(f'{name} {len(rows)}' for name, rows in splits.items())}); preprocess with a "
                        "larger --validation-percent")
    return splits


def held_out(corpus: str, manifest: str) -> list[Held]:
    """The documents of `corpus` that the data of `manifest` kept out of training."""
    try:
        percent = json.loads(Path(manifest).read_text(encoding="utf-8"))["settings"]["validation_percent"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{manifest}: cannot be read as a manifest of `megatron-encdec preprocess`") from None
    if not percent:
        raise UserError(f"{manifest}: nothing was held out of pretraining; preprocess with --validation-percent 10")
    held = []
    for where, row in read_file(Path(corpus)):
        try:
            text, source, library = row["text"], row["source"], row["library"]
        except KeyError as missing:
            raise UserError(f"{where}: no {missing}; make the corpus with tools/build_docstring_corpus.py") from None
        if not all(isinstance(value, str) for value in (text, source, library)):
            raise UserError(f"{where}: text, source and library are to be texts; make the corpus with "
                            "tools/build_docstring_corpus.py")
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        if is_validation(digest, percent):
            held.append(Held(_deal(digest), where, text, source, library))
    return held


def _deal(digest: bytes) -> str:
    """The split, by another part of the hash than the one that held the document out."""
    share = int.from_bytes(digest[8:16], "big") / 2**64
    return "train" if share < 0.7 else "validation" if share < 0.8 else "test"


def _library(documents: list[Held]) -> list[tuple[str, Text]]:
    most = [name for name, _ in Counter(one.library for one in documents).most_common(LIBRARIES)]
    names = re.compile("|".join(re.escape(name) for name in most), re.IGNORECASE)
    return [(one.split, Text(one.where, names.sub("_", one.text)[:CHARACTERS], None, one.library))
            for one in documents if one.library in most]


def _identifiers(documents: list[Held]) -> list[tuple[str, Words]]:
    examples = []
    for one in documents:
        if not _QUOTED.search(one.text):
            continue
        words, tags = [], []
        for piece in _PIECE.findall(one.text):
            quoted = _QUOTED.fullmatch(piece)
            words.append(quoted.group(1) if quoted else piece.strip("`") or "'")
            tags.append("B-CODE" if quoted else "O")
        if "B-CODE" in tags[:WORDS]:
            examples.append((one.split, Words(one.where, words[:WORDS], tags[:WORDS])))
    return examples


def _parameter_type(documents: list[Held]) -> list[tuple[str, Question]]:
    found: dict[str, list[tuple[Held, str, list[re.Match]]]] = {}
    for one in documents:
        first = _PARAMETER.search(one.text)
        begin = max(0, first.start() - 100) if first else 0
        context = one.text[begin : begin + CHARACTERS]
        parameters = list({match["name"]: match for match in _PARAMETER.finditer(context)}.values())
        if len(parameters) > 1:
            found.setdefault(one.split, []).append((one, context, parameters))
    examples = []
    for split, held in found.items():
        draw = random.Random(split)
        for one, context, parameters in held:
            for number, match in enumerate(draw.sample(parameters, min(3, len(parameters)))):
                kind = "numpy" if match["numpy"] else "google"
                name, answers = match["name"], [(match[kind].rstrip(), match.start(kind))]
                if number == 2:
                    name, answers = draw.choice(draw.choice(held)[2])["name"], []
                    if re.search(rf"\b{re.escape(name)}\b", context):
                        continue
                examples.append((split, Question(one.where, f"What is the type of {name}?", context, answers)))
    return examples


def _summary_body(documents: list[Held]) -> list[tuple[str, Pair]]:
    examples = []
    for one in documents:
        summary, _, body = one.text.partition("\n\n")
        summary, body = " ".join(summary.split()), body.strip()[:CHARACTERS]
        if 20 <= len(summary) <= 300 and len(body) >= 100:
            examples.append((one.split, Pair(one.where, summary, [body])))
    return examples
