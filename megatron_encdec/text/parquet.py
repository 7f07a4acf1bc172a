"""Rows of Parquet files, a batch of rows at a time: the text column alone, some fields, or all columns.

    1. `row_groups(path, key)`       how many row groups a file has, and that the column is there and is text
    2. `iter_rows(path, key, ...)`   UTF-8 bytes of each row's text, None for a null
    3. `iter_selected(path, ...)`    texts of nested, several or filtered fields
    4. `iter_records(path)`          every column of each row, for labelled sets
    5. `skeleton_of(path)`           the columns, nested ones too
"""

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megatron_encdec.platform.errors import IntegrityError, UserError
from megatron_encdec.text.fields import Fields, Selection, has, leaves, listed
from megatron_encdec.text.remote import is_remote, open_input

# A column without any text, as one file of a data set may have it, is written with type null.
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
ROWS_AT_ONCE, BYTES_AT_ONCE = 1024, 16 << 20


@contextmanager
def _opened(path: str):
    import pyarrow
    import pyarrow.parquet

    try:
        source = open_input(path) if is_remote(path) else path
        with pyarrow.parquet.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise _refusal(path, error) from None
    finally:
        pyarrow.default_memory_pool().release_unused()


def _refusal(path: str, error: Exception) -> UserError:
    """The true cause: copying a sound file again would not help."""
    import pyarrow

    reason = " ".join(str(error).split())[:200]
    if getattr(error, "errno", None) and error.errno != errno.EINVAL:
        return UserError(f"{path}: cannot read the input: {os.strerror(error.errno)}")
    if "ncrypt" in reason or "ecrypt" in reason:
        return UserError(f"{path}: is encrypted ({reason}); write it again without encryption")
    if isinstance(error, pyarrow.ArrowNotImplementedError):
        return UserError(f"{path}: pyarrow {pyarrow.__version__} cannot read this column ({reason}); write the file "
                         "again with a plain string column and another compression")
    return IntegrityError(f"{path}: cannot read this Parquet file ({reason}); it is cut off or damaged: copy it again")


def row_groups(path: str, text_key: Selection) -> int:
    """Number of row groups. Raises `UserError` if there is no column `text_key`, or it holds no text; of fields only
    that one of them is not there."""
    with _opened(path) as file:
        schema = file.schema_arrow
        skeleton = _skeleton(schema)
        there = f"there are {listed(leaves(skeleton))}"
        if isinstance(text_key, Fields):
            for name in text_key.columns:
                if not has(skeleton, name):
                    raise UserError(f"{path}: has no column {name!r} ({there}); name what is there with --text-key and "
                                    "--where")
            return file.num_row_groups
        count = schema.names.count(text_key)
        if not count:
            raise UserError(f"{path}: has no column {text_key!r} ({there}); name the text's column with --text-key")
        if count > 1:
            raise UserError(f"{path}: has {count} columns {text_key!r}; rename all but one of them")
        kind = schema.field(text_key).type
        if not _is_text(kind):
            raise UserError(f"{path}: column {text_key!r} holds {kind}, not text; name another with --text-key "
                            f"({there})")
        return file.num_row_groups


def skeleton_of(path: str) -> dict:
    """The columns as a row has them: a struct is a mapping, a text a string, anything else None."""
    with _opened(path) as file:
        return _skeleton(file.schema_arrow)


def _skeleton(fields) -> dict:
    """Of a schema or a struct."""
    import pyarrow

    return {field.name: _skeleton(field.type) if pyarrow.types.is_struct(field.type) else
            "" if _is_text(field.type) else None for field in fields}


def _is_text(kind) -> bool:
    import pyarrow

    return str(kind.value_type if pyarrow.types.is_dictionary(kind) else kind) in TEXT_TYPES


def iter_rows(path: str, text_key: str, groups: Sequence[int] | None = None) -> Iterator[bytes | memoryview | None]:
    """The text of each row as bytes (not checked to be UTF-8), None where it is null. Very long ones are views."""
    import pyarrow

    row_groups(path, text_key)
    with _opened(path) as file:
        for batch in file.iter_batches(_rows_at_once(file, [text_key], groups), groups, columns=[text_key]):
            column = batch.column(batch.schema.get_field_index(text_key))  # "a.b" also brings the b of a column a
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            column = column.cast(pyarrow.large_binary())
            if column.nbytes < 2 * BYTES_AT_ONCE:
                yield from column.to_pylist()
            else:  # not twice in memory
                yield from (memoryview(row.as_buffer()) if row.is_valid else None for row in column)


def iter_selected(path: str, fields: Fields, groups: Sequence[int]) -> Iterator[tuple]:
    """What `Fields.select` says of each row. Of a nested field no more than itself is read."""
    row_groups(path, fields)
    with _opened(path) as file:
        for batch in file.iter_batches(_rows_at_once(file, fields.columns, groups), groups, columns=fields.columns):
            for record in batch.to_pylist():
                try:
                    yield fields.select(_decoded(record))
                except UnicodeDecodeError:
                    yield None, None, "bad_utf8"


def copy_rows(path: str, key: Selection, group: int, target: Path) -> int:
    """Write what `key` needs of one row group to a Parquet file at `target`; how many row groups that has."""
    import pyarrow.parquet

    names = [key] if isinstance(key, str) else key.columns
    with _opened(path) as file:
        schema = pyarrow.schema([field for field in file.schema_arrow if any(
            field.name in (name, name.partition(".")[0]) for name in names)])
        columns = schema.names
        with pyarrow.parquet.ParquetWriter(target, schema) as writer:
            count = 0
            for batch in file.iter_batches(_rows_at_once(file, columns, [group]), [group], columns=columns):
                if batch.num_rows:
                    writer.write_batch(batch.select(columns))
                    count += 1
    return count


def _decoded(value):
    """Bytes anywhere in `value` as text."""
    if isinstance(value, dict):
        return {name: _decoded(inner) for name, inner in value.items()}
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _rows_at_once(file, names: Sequence[str], groups: Sequence[int] | None) -> int:
    """Fewer where texts are long, since they are in memory twice."""
    rows = size = 0
    for group in range(file.num_row_groups) if groups is None else groups:
        metadata = file.metadata.row_group(group)
        rows += metadata.num_rows
        columns = map(metadata.column, range(metadata.num_columns))
        size += sum(column.total_uncompressed_size for column in columns
                    if any(f"{column.path_in_schema}.".startswith(f"{name}.") for name in names))
    return max(1, min(ROWS_AT_ONCE, BYTES_AT_ONCE * rows // max(size, 1)))


def schema_of(path: str):
    """The file's Arrow schema. Raises `UserError` where two columns share a name."""
    with _opened(path) as file:
        schema = file.schema_arrow
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise UserError(f"{path}: two columns are called {twice[0]!r}; rename one")
    return schema


def iter_records(path: str) -> Iterator[dict]:
    """Each row as {column: Python value}, bytes decoded as text. Raises `UserError` naming a row that is not UTF-8."""
    schema_of(path)
    before = 0
    with _opened(path) as file:
        for batch in file.iter_batches(ROWS_AT_ONCE):
            try:
                yield from _records(batch)
            except UnicodeDecodeError:
                for row in range(batch.num_rows):
                    try:
                        _records(batch.slice(row, 1))
                    except UnicodeDecodeError:
                        raise UserError(f"{path}: row {before + row + 1}: holds text that is not UTF-8; write the file "
                                        "again from text that is") from None
            before += batch.num_rows


def _records(batch) -> list[dict]:
    return [{name: value.decode("utf-8") if isinstance(value, bytes) else value for name, value in record.items()}
            for record in batch.to_pylist()]
