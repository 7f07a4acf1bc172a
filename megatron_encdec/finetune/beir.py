"""Retrieval sets as BEIR lays them out: corpus.jsonl, queries.jsonl and qrels/<split>.tsv in a folder.

    corpus.jsonl     {"_id", "title" (optional), "text"}        queries.jsonl     {"_id", "text"}
    qrels/test.tsv   query-id, corpus-id, score, with that header line

What a judgement names and the folder lacks is a `UserError` with file and line; so is an id that is given twice.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_encdec.finetune.rows import read_file
from megatron_encdec.platform.errors import UserError

CORPUS, QUERIES, JUDGEMENTS = "corpus", "queries", "qrels"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclass(frozen=True)
class Beir:
    """A split. corpus: id -> (title, text); queries: id -> text; judgements: query -> document -> score, those above 0
    being answers."""

    corpus: dict[str, tuple[str, str]]
    queries: dict[str, str]
    judgements: dict[str, dict[str, int]]

    def document(self, name: str) -> str:
        """Title and text, as they are embedded: with a blank between them."""
        return _joined(*self.corpus[name])


def is_beir(folder: Path) -> bool:
    """Whether `folder` has a corpus, queries and judgements."""
    return (_file(folder, CORPUS) is not None and _file(folder, QUERIES) is not None
            and (folder / JUDGEMENTS).is_dir())


def read_beir(folder: Path, split: str) -> Beir:
    """The corpus, the judgements of `split`, and the queries that they name."""
    if not is_beir(folder):
        raise UserError(f"{folder}: no BEIR folder (corpus.jsonl, queries.jsonl and qrels/ are expected there)")
    path = folder / JUDGEMENTS / f"{split}.tsv"
    if not path.is_file():
        there = ", ".join(sorted(one.stem for one in (folder / JUDGEMENTS).glob("*.tsv"))) or "none"
        raise UserError(f"{path}: no such file; splits of {folder}: {there}")
    corpus, queries = _texts(folder, CORPUS), _texts(folder, QUERIES)
    judgements: dict[str, dict[str, int]] = {}
    for where, row in read_file(path):
        if not {"query-id", "corpus-id", "score"} <= row.keys():
            raise UserError(f"{path}:1: columns query-id, corpus-id, score are expected, found {', '.join(row)}")
        query, document = row["query-id"], row["corpus-id"]
        if query not in queries or document not in corpus:
            what = f"query {query!r}" if query not in queries else f"document {document!r}"
            raise UserError(f"{where}: {what} is in no {QUERIES if query not in queries else CORPUS} file of {folder}")
        try:
            judgements.setdefault(query, {})[document] = int(row["score"])
        except ValueError:
            raise UserError(f"{where}: score: expected a whole number, found {row['score']!r}") from None
    return Beir(corpus, {query: queries[query][1] for query in judgements}, judgements)


def read_documents(folder: Path) -> list[str]:
    """All documents of the corpus, as they are embedded."""
    return [_joined(*document) for document in _texts(folder, CORPUS).values()]


def _joined(title: str, text: str) -> str:
    return f"{title} {text}".strip()


def _file(folder: Path, name: str) -> Path | None:
    return next((path for suffix in _SUFFIXES if (path := folder / f"{name}{suffix}").is_file()), None)


def _texts(folder: Path, name: str) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for where, row in read_file(_file(folder, name)):
        key, text, title = row.get("_id", row.get("id")), row.get("text"), row.get("title") or ""
        if key is None or not isinstance(text, str) or not isinstance(title, str):
            raise UserError(f"{where}: expected _id and text, found {', '.join(map(str, row))}")
        if str(key) in found:
            raise UserError(f"{where}: _id {key!r} is given twice")
        found[str(key)] = title, text
    return found
