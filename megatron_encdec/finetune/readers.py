"""Rows of labelled sets, from files or from the hub, each with where it stands: as many as there are, or one line why.

    1. `read_split(dataset, split)`     "train" | "validation" | "test" -> [(where, row)]
    2. `read_file(path)`                a file by its suffix

    .jsonl [.gz, .zst]                     text/corpus.py's lines, as `preprocess` reads them
    .parquet                               text/parquet.py's rows
    .csv .tsv [.gz, .zst]                  delimited.py
    .conll .bio .iob .iob2 .txt [...]      conll.py

Values are as the file has them; `examples.py` checks them. `where` is FILE:LINE (or row) for messages. A class number
of the hub (and of Parquet that `datasets` wrote) becomes its name, -1 becomes `UNLABELLED`. A file without rows, one
that cannot be parsed, an unknown suffix: `UserError` in one line.
"""

import json
from pathlib import Path
from typing import Any

from megatron_encdec.finetune.config import DatasetConfig
from megatron_encdec.finetune.conll import read_conll
from megatron_encdec.finetune.delimited import read_delimited
from megatron_encdec.finetune.lines import numbered_lines
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import refuse_pointer
from megatron_encdec.text.corpus import hub_name
from megatron_encdec.text.parquet import iter_records, schema_of

Row = tuple[str, dict[str, Any]]
UNLABELLED = object()  # the value of a row that `datasets` marks as one without a label
COLUMN_SUFFIXES = (".conll", ".bio", ".iob", ".iob2", ".txt")
LOCAL_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".tsv")


def read_split(dataset: DatasetConfig, split: str) -> list[Row]:
    """The rows that `dataset` names for `split`: from its files, its local folder, or the hub."""
    name = getattr(dataset, split)
    if dataset.local:
        paths = [Path(dataset.local) / f"{name}{suffix}" for suffix in LOCAL_SUFFIXES]
        there = [path for path in paths if path.is_file()]
        if not there:
            raise UserError(f"{dataset.local}: no {name}{{{','.join(LOCAL_SUFFIXES)}}} there (dataset {dataset.name})")
        if len(there) > 1:
            raise UserError(f"{dataset.local}: both {there[0].name} and {there[1].name} are there; keep one of them")
        return read_file(there[0])
    hub = dataset.train_hub if split == "train" and dataset.train_hub else dataset.hub
    return _read_hub(hub, name) if hub else read_file(Path(name))


def read_file(path: Path) -> list[Row]:
    """The rows of the file at `path`; never none."""
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv, ".tsv": _read_tsv, ".parquet": _read_parquet}
    readers |= dict.fromkeys(COLUMN_SUFFIXES, _read_columns)
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz").removesuffix(".zst")).suffix
    reader = readers.get(suffix)
    if reader is None or (suffix == ".parquet" and not name.endswith(suffix)):
        raise UserError(f"{path}: cannot read this kind of file; known: {', '.join(readers)}, and all but .parquet "
                        "with .gz or .zst behind" + (" (JSON lines are called .jsonl)" if suffix == ".json" else ""))
    if not path.is_file():
        raise UserError(f"{path}: no such file (labelled data)")
    refuse_pointer(path)
    rows = reader(path)
    if not rows:
        raise UserError(f"{path}: empty, there is no example in it")
    return rows


def _read_jsonl(path: Path) -> list[Row]:
    return [(f"{path}:{number}", _object(f"{path}:{number}", line)) for number, line in numbered_lines(path)
            if line.strip(" \t\r\n")]


def _object(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line, object_pairs_hook=_without_repeats)
        if "\\u" in line:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{where}: half of a surrogate pair (\\ud800-\\udfff): not a character") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deep") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def _read_csv(path: Path) -> list[Row]:
    return _placed(path, read_delimited(path, ","))


def _read_tsv(path: Path) -> list[Row]:
    return _placed(path, read_delimited(path, "\t"))


def _read_columns(path: Path) -> list[Row]:
    return _placed(path, read_conll(path))


def _placed(path: Path, rows: list[tuple[int, dict]]) -> list[Row]:
    return [(f"{path}:{line}", row) for line, row in rows]


def _read_parquet(path: Path) -> list[Row]:
    schema, names = schema_of(str(path)), {}
    if b"huggingface" in (schema.metadata or {}):
        import datasets

        names = _class_names(datasets.Features.from_arrow_schema(schema))
    return [(f"{path}: row {number}", _named(row, names)) for number, row in enumerate(iter_records(str(path)), 1)]


def _read_hub(hub: str, split: str) -> list[Row]:
    """A split of the hub (or of its cache)."""
    import datasets

    name, *rest = hub_name(hub)
    subset = ":".join(filter(None, rest)) or None
    try:
        table = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # noqa: BLE001  (the library raises many kinds; all mean that it cannot be had)
        raise UserError(f"{hub}: split {split} cannot be loaded ({str(error).splitlines()[0]}); offline, give "
                        f"`local`, a folder with {split}.parquet") from None
    names = _class_names(table.features)
    rows = [(f"{hub}/{split}: row {number}", _named(row, names)) for number, row in enumerate(table, 1)]
    if not rows:
        raise UserError(f"{hub}: split {split} is empty")
    return rows


def _class_names(features: dict[str, Any]) -> dict[str, list[str]]:
    """column -> the names of its classes, for a ClassLabel or a list of them."""
    found = {column: getattr(kind, "names", None) or getattr(getattr(kind, "feature", None), "names", None)
             for column, kind in features.items()}
    return {column: names for column, names in found.items() if names}


def _named(row: dict[str, Any], classes: dict[str, list[str]]) -> dict[str, Any]:
    def name(value: Any, names: list[str]) -> Any:
        if isinstance(value, list):
            return [name(one, names) for one in value]
        return value if value is None else UNLABELLED if value == -1 else names[value]

    return {column: name(value, classes[column]) if column in classes else value for column, value in row.items()}
