"""Rows of labelled sets, from files or from the hub, each with where it stands: as many as there are, or one line why.

    1. `read_split(dataset, split)`     "train" | "validation" | "test" | "documents" -> [(where, row)]
    2. `read_file(path)`                a file by its suffix: JSON lines, Parquet, and text in columns (columns.py)
    3. `files_of(dataset)`              all files that a set is read from

Values are as the file has them; `examples.py` checks them. `where` is FILE:LINE (or row) for messages. A class number
of the hub (and of Parquet that `datasets` wrote) becomes its name, -1 becomes `UNLABELLED`. A file without rows, one
that cannot be parsed, an unknown suffix: `UserError` in one line.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_encdec.finetune.columns import read_conll, read_csv, read_tsv
from megatron_encdec.finetune.config import DatasetConfig
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import refuse_pointer
from megatron_encdec.text.corpus import BYTE_ORDER_MARK, hub_name, is_utf16, iter_lines
from megatron_encdec.text.parquet import iter_records, schema_of

Row = tuple[str, dict[str, Any]]
UNLABELLED = object()  # the value of a row that `datasets` marks as one without a label
SPLITS = ("train", "validation", "test", "documents")
LOCAL_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".csv", ".tsv")


def read_split(dataset: DatasetConfig, split: str) -> list[Row]:
    """The rows that `dataset` names for `split`: from its files, its local folder, or the hub."""
    name = getattr(dataset, split)
    if dataset.local:
        there = _local(dataset, split)
        if not there:
            raise UserError(f"{dataset.local}: no {name}{{{','.join(LOCAL_SUFFIXES)}}} there (dataset {dataset.name})")
        if len(there) > 1:
            raise UserError(f"{dataset.local}: both {there[0].name} and {there[1].name} are there; keep one of them")
        return read_file(there[0])
    hub = _hub(dataset, split)
    return _read_hub(hub, name) if hub else read_file(Path(name))


def files_of(dataset: DatasetConfig) -> dict[str, Path]:
    """What each file of the set is to it (a split, `documents`; of BEIR its name in the folder), and where it lies,
    whether it is there or not; nothing of the hub."""
    if dataset.beir:
        return {str(path.relative_to(dataset.beir)): path for path in Path(dataset.beir).rglob("*") if path.is_file()}
    found = {}
    for role in filter(lambda role: getattr(dataset, role), SPLITS):
        if dataset.local:
            found |= dict(zip([role], _local(dataset, role), strict=False))
        elif not _hub(dataset, role):
            found[role] = Path(getattr(dataset, role))
    return found


def _local(dataset: DatasetConfig, split: str) -> list[Path]:
    paths = (Path(dataset.local) / f"{getattr(dataset, split)}{suffix}" for suffix in LOCAL_SUFFIXES)
    return [path for path in paths if path.is_file()]


def _hub(dataset: DatasetConfig, split: str) -> str | None:
    return {"train": dataset.train_hub, "documents": dataset.documents_hub}.get(split) or dataset.hub


def read_file(path: Path) -> list[Row]:
    """The rows of the file at `path`; never none."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz").removesuffix(".zst")).suffix
    if suffix not in READERS or (suffix == ".parquet" and not name.endswith(suffix)):
        raise UserError(f"{path}: cannot read this kind of file; known: {', '.join(READERS)}, and all but .parquet "
                        "also with .gz or .zst" + (" (JSON lines are called .jsonl)" if suffix == ".json" else ""))
    if not path.is_file():
        raise UserError(f"{path}: no such file (labelled data)")
    refuse_pointer(path)
    if suffix == ".parquet":
        rows = _read_parquet(path)
    else:
        rows = [(f"{path}:{number}", row) for number, row in READERS[suffix](path, _lines(path))]
    if not rows:
        raise UserError(f"{path}: empty, there is no example in it")
    return rows


def in_columns(where: str) -> bool:
    """Whether the row at `where` (FILE:LINE) is of a file in which every value is a text."""
    return bool(re.search(r"\.[ct]sv(\.gz|\.zst)?:\d+$", where.lower()))


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file with their ends, UTF-8 without a byte order mark, plain or compressed. What is no text
    (UTF-16, other bytes that are not UTF-8, the NUL bytes that a crash leaves) is a `UserError`."""
    for number, data in enumerate(_encoded_lines(path), 1):
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 (0x{data[error.start]:02x} at byte {error.start + 1} of the "
                            "line); save the file as UTF-8") from None
        if "\0" in text:
            raise UserError(f"{path}:{number}: a NUL byte; the file is damaged, or is UTF-16 (save it as UTF-8)")
        yield text


def _encoded_lines(path: Path) -> Iterator[bytes]:
    """They end in line feeds; in a file without any, in carriage returns."""
    lines = iter_lines(str(path))
    first = next(lines, b"")
    if is_utf16(first):
        raise UserError(f"{path}:1: the file is UTF-16 or UTF-32; save it as UTF-8")
    first = first.removeprefix(BYTE_ORDER_MARK)
    if not first.endswith(b"\n") and b"\r" in first.rstrip(b"\r"):
        yield from (line + b"\r" for line in first.removesuffix(b"\r").split(b"\r"))
    elif first:
        yield first
    yield from lines


def _read_json_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip(" \t\r\n"):
            yield number, _object(f"{path}:{number}", line)


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


def _read_parquet(path: Path) -> list[Row]:
    schema, features = schema_of(str(path)), {}
    if b"huggingface" in (schema.metadata or {}):
        import datasets

        features = datasets.Features.from_arrow_schema(schema)
    return _named(f"{path}", iter_records(str(path)), features)


def _read_hub(hub: str, split: str) -> list[Row]:
    import datasets

    name, *rest = hub_name(hub)
    try:
        table = datasets.load_dataset(name, ":".join(filter(None, rest)) or None, split=split)
    except Exception as error:  # noqa: BLE001  (the library raises many kinds; all mean that it cannot be had)
        raise UserError(f"{hub}: split {split} cannot be loaded ({str(error).splitlines()[0]}); offline, give "
                        f"`local`, a folder with {split}.parquet") from None
    rows = _named(f"{hub}/{split}", table, table.features)
    if not rows:
        raise UserError(f"{hub}: split {split} is empty")
    return rows


def _named(place: str, records: Iterable[dict[str, Any]], features: dict[str, Any]) -> list[Row]:
    """Rows in which numbers of a ClassLabel, or of a list of them, are names."""
    classes = {column: getattr(kind, "names", None) or getattr(getattr(kind, "feature", None), "names", None)
               for column, kind in features.items()}

    def name(value: Any, names: list[str] | None) -> Any:
        if names is None or value is None:
            return value
        if isinstance(value, list):
            return [name(one, names) for one in value]
        return UNLABELLED if value == -1 else names[value]

    return [(f"{place}: row {number}", {column: name(value, classes.get(column)) for column, value in row.items()})
            for number, row in enumerate(records, 1)]


READERS = {".jsonl": _read_json_lines, ".csv": read_csv, ".tsv": read_tsv, ".parquet": _read_parquet,
           **dict.fromkeys((".conll", ".bio", ".iob", ".iob2", ".txt"), read_conll)}
