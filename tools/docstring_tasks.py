"""Labelled sets without a download: `python tools/docstring_tasks.py CORPUS.jsonl MANIFEST.json OUT`.

Four tasks from the docstring corpus, on documents that pretraining never saw: those of the validation split of
`preprocess`, chosen by a hash of the text (the manifest of the pretraining data says how many per cent). The same hash
deals them out: 70 % train, 10 % validation, 20 % test. OUT/<task>/{train,validation,test}.jsonl, for `finetune`:

    library        SC   which library a docstring is from (the eight with most docstrings; their names are blanked)
    identifiers    TC   which words stood in backquotes (the quotes are taken away)
    parameter_type QA   the type of a parameter, in docstrings of numpy's or Google's style; every third question asks
                        for a parameter of another docstring (no answer)
    summary_body   IR   a docstring's first line as query, the rest of it as the document to find

The same corpus and manifest give the same files.
"""

import argparse
import hashlib
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from megatron_encdec.finetune.rows import read_file
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import write_atomic
from megatron_encdec.text.encode import is_validation

SPLITS = ("train", "validation", "test")
LIBRARIES = 8
WORDS = 48  # of a text of the token task, at most
CHARACTERS = 240  # of texts of the other tasks
_PARAMETER = re.compile(r"^[ ]*(?P<name>[a-z_]\w+)(?: : (?P<numpy>[^\n]{2,60})| ?\((?P<google>[^()\n]{2,60})\): )",
                        re.MULTILINE)
_QUOTED = re.compile(r"`+([A-Za-z_][\w.()\[\]]*)`+")
_PIECE = re.compile(r"`+[^`\s]+`+|\w+|[^\w\s`]")

Row = tuple[str, dict[str, Any]]  # the split it belongs to, and what a line of its file holds


class Document(NamedTuple):
    """One that pretraining did not see: its split, text and library."""

    split: str
    text: str
    library: str


def held_out(corpus: Path, manifest: Path) -> list[Document]:
    """The documents of `corpus` that the data of `manifest` kept out of training."""
    try:
        percent = json.loads(manifest.read_text(encoding="utf-8"))["settings"]["validation_percent"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{manifest}: cannot be read as a manifest of `megatron-encdec preprocess` ({error})") from None
    if not percent:
        raise UserError(f"{manifest}: nothing was held out of pretraining; preprocess with --validation-percent 10")
    held = []
    for where, row in read_file(corpus):
        text, library = row.get("text"), row.get("library")
        if not isinstance(text, str) or not isinstance(library, str):
            raise UserError(f"{where}: expected text and library, two strings; make the corpus with "
                            "tools/build_docstring_corpus.py")
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        if is_validation(digest, percent):
            held.append(Document(_deal(digest), text, library))
    return held


def _deal(digest: bytes) -> str:
    """The split, by another part of the hash than the one that held the document out."""
    share = int.from_bytes(digest[8:16], "big") / 2**64
    return "train" if share < 0.7 else "validation" if share < 0.8 else "test"


def library(documents: list[Document]) -> Iterator[Row]:
    """{text, label}"""
    most = [name for name, _ in Counter(one.library for one in documents).most_common(LIBRARIES)]
    names = re.compile("|".join(re.escape(name) for name in most), re.IGNORECASE)
    for one in documents:
        if one.library in most:
            yield one.split, {"text": names.sub("_", one.text)[:CHARACTERS], "label": one.library}


def identifiers(documents: list[Document], most_bytes: int | None = None) -> Iterator[Row]:
    """{tokens, tags}; most_bytes: of a sentence, a blank before each word counted in."""
    for one in documents:
        if not _QUOTED.search(one.text):
            continue
        words, tags = [], []
        for piece in _PIECE.findall(one.text):
            quoted = _QUOTED.fullmatch(piece)
            words.append(quoted.group(1) if quoted else piece.strip("`") or "'")
            tags.append("B-CODE" if quoted else "O")
        sizes = accumulate(len(word.encode()) + 1 for word in words[:WORDS])
        count = sum(most_bytes is None or size <= most_bytes for size in sizes)
        if "B-CODE" in tags[:count]:
            yield one.split, {"tokens": words[:count], "tags": tags[:count]}


def parameter_type(documents: list[Document]) -> Iterator[Row]:
    """{question, context, answers}"""
    found: dict[str, list[tuple[str, list[re.Match]]]] = {}
    for one in documents:
        first = _PARAMETER.search(one.text)
        begin = max(0, first.start() - 100) if first else 0
        context = one.text[begin : begin + CHARACTERS]
        parameters = list({match["name"]: match for match in _PARAMETER.finditer(context)}.values())
        if len(parameters) > 1:
            found.setdefault(one.split, []).append((context, parameters))
    for split, held in found.items():
        draw = random.Random(split)
        for context, parameters in held:
            for number, match in enumerate(draw.sample(parameters, min(3, len(parameters)))):
                kind = "numpy" if match["numpy"] else "google"
                name, answers = match["name"], [{"text": match[kind].rstrip(), "answer_start": match.start(kind)}]
                if number == 2:
                    name, answers = draw.choice(draw.choice(held)[1])["name"], []
                    if re.search(rf"\b{re.escape(name)}\b", context):
                        continue
                yield split, {"question": f"What is the type of {name}?", "context": context, "answers": answers}


def summary_body(documents: list[Document]) -> Iterator[Row]:
    """{query, positive}"""
    for one in documents:
        summary, _, body = one.text.partition("\n\n")
        summary, body = " ".join(summary.split()), body.strip()[:CHARACTERS]
        if 20 <= len(summary) <= 300 and len(body) >= 100:
            yield one.split, {"query": summary, "positive": body}


TASKS = (library, identifiers, parameter_type, summary_body)


def write_tasks(corpus: Path, manifest: Path, output: Path, most_bytes: int | None = None) -> dict[str, list[int]]:
    """Write every task; {task: how many examples of train, validation and test}. most_bytes: of a sentence of words."""
    documents, counts = held_out(corpus, manifest), {}
    for task in TASKS:
        name, rows = task.__name__, list(task(documents, most_bytes) if task is identifiers else task(documents))
        lines = {split: [json.dumps(row) + "\n" for its, row in rows if its == split] for split in SPLITS}
        counts[name] = list(map(len, lines.values()))
        if not all(counts[name]):
            raise UserError(f"{corpus}: too few held-out documents for the task {name} ({counts[name]} examples of "
                            f"{', '.join(SPLITS)}); preprocess with a larger --validation-percent")
        (output / name).mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            write_atomic(output / name / f"{split}.jsonl", "".join(lines[split]))
    return counts


def main() -> int:
    """Parse and write; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, metavar="CORPUS.jsonl", help="of tools/build_docstring_corpus.py")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST.json", help="of the pretraining data made from it")
    parser.add_argument("output", type=Path, metavar="OUT")
    parser.add_argument("--most-bytes", type=int, metavar="N",
                        help="cut the sentences of the task `identifiers` at N bytes, which no byte-level tokenizer "
                             "makes more than N tokens of: for a model of short windows")
    arguments = parser.parse_args()
    try:
        counts = write_tasks(arguments.corpus, arguments.manifest, arguments.output, arguments.most_bytes)
    except (UserError, OSError) as error:
        print(f"docstring_tasks: {error}", file=sys.stderr)
        return 2
    for name, count in counts.items():
        print(f"{arguments.output / name}: {', '.join(f'{n:,} {of}' for n, of in zip(count, SPLITS, strict=True))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
