"""Rows of labelled sets: JSONL, CSV, Parquet and CoNLL columns, or a split of the hub; each with where it stands.

    1. `read_split(dataset, split)`     "train" | "validation" | "test" -> [(where, row)]
    2. `read_file(path)`                a file by its suffix

Values are as the file has them; `examples.py` checks them. `where` is FILE:LINE (or row) for messages. A file without
rows, one that cannot be parsed, an unknown suffix: `UserError` in one line.
"""

import csv
import json
from pathlib import Path
from typing import Any

from megatron_encdec.finetune.config import DatasetConfig
from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.corpus import hub_name

Row = tuple[str, dict[str, Any]]
COLUMN_SUFFIXES = (".conll", ".bio", ".iob", ".iob2", ".txt")
LOCAL_SUFFIXES = (".parquet", ".jsonl", ".csv")


def read_split(dataset: DatasetConfig, split: str) -> list[Row]:
    """The rows that `dataset` names for `split`: from its files, its local folder, or the hub."""
    name = getattr(dataset, split)
    if dataset.local:
        for suffix in LOCAL_SUFFIXES:
            if (path := Path(dataset.local) / f"{name}{suffix}").is_file():
                return read_file(path)
        raise UserError(f"{dataset.local}: no {name}{{{','.join(LOCAL_SUFFIXES)}}} there (dataset {dataset.name})")
    hub = dataset.train_hub if split == "train" and dataset.train_hub else dataset.hub
    return _read_hub(hub, name) if hub else read_file(Path(name))


def read_file(path: Path) -> list[Row]:
    """The rows of the file at `path`; never none."""
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet}
    readers |= dict.fromkeys(COLUMN_SUFFIXES, _read_columns)
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: cannot read this kind of file; known: {', '.join(readers)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file (labelled data)")
    try:
        rows = reader(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"{path}: empty, there is no example in it")
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}")
        rows.append((f"{path}:{number}", row))
    return rows


def _read_csv(path: Path) -> list[Row]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path}:{reader.line_num}: other than {len(reader.fieldnames)} columns")
            rows.append((f"{path}:{reader.line_num}", row))
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    return [(f"{path}: row {number}", row) for number, row in enumerate(table.to_pylist(), 1)]


def _read_columns(path: Path) -> list[Row]:
    """CoNLL columns: the word first, its tag last, a blank line between sentences; `-DOCSTART-` lines are skipped."""
    rows, words, tags, start = [], [], [], 1
    for number, line in enumerate([*path.read_text(encoding="utf-8").split("\n"), ""], 1):
        columns = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or line.startswith("-DOCSTART-"):
            if words:
                rows.append((f"{path}:{start}", {"tokens": words, "tags": tags}))
            words, tags, start = [], [], number + 1
        elif len(columns) < 2:
            raise UserError(f"{path}:{number}: one column, expected a word and a tag")
        else:
            words.append(columns[0])
            tags.append(columns[-1].strip())
    return rows


def _read_hub(hub: str, split: str) -> list[Row]:
    """A split of the hub (or of its cache); class numbers become their names, -1 (no label) drops the row."""
    import datasets

    name, *rest = hub_name(hub)
    subset = ":".join(filter(None, rest)) or None
    try:
        table = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # noqa: BLE001  (the library raises many kinds; all mean that it cannot be had)
        raise UserError(f"{hub}: split {split} cannot be loaded ({str(error).splitlines()[0]}); offline, give "
                        f"`local`, a folder with {split}.parquet") from None
    named = {column: kind for column, kind in table.features.items() if _names(kind)}
    rows = []
    for number, row in enumerate(table, 1):
        if any(row[column] == -1 for column in named):
            continue
        rows.append((f"{hub}/{split}: row {number}",
                     {**row, **{column: _named(row[column], _names(kind)) for column, kind in named.items()}}))
    if not rows:
        raise UserError(f"{hub}: split {split} is empty")
    return rows


def _names(kind: Any) -> list[str] | None:
    """The names of a ClassLabel, or of a list of them."""
    return getattr(kind, "names", None) or getattr(getattr(kind, "feature", None), "names", None)


def _named(value: int | list[int], names: list[str]) -> Any:
    return [names[one] for one in value] if isinstance(value, list) else names[value]
