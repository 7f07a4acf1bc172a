"""`study report`: trees of results -> a folder with tables, figures and a page.

    1. read the trees                           results.py
    2. compute everything once                  analysis.py, statistics.py
    3. tables/*.csv, report.md                  content.py, tables.py
    4. figures/*.png                            figures.py
    5. index.html, written last                 page.py
       report.json                              names of these files: the next report replaces them, and nothing else
    6. the scores, and what is amiss, on the terminal
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import require
from megatron_encdec.platform.progress import Progress
from megatron_encdec.rundir.files import write_atomic, write_json_atomic
from megatron_encdec.study.analysis import Analysis, analyse
from megatron_encdec.study.content import all_tables
from megatron_encdec.study.drawing import Picture, png
from megatron_encdec.study.figures import all_figures
from megatron_encdec.study.page import page
from megatron_encdec.study.results import read_trees
from megatron_encdec.study.tables import Table, csv_text, markdown, text_of

RECORD = "report.json"
SHOWN = 10  # lines of what is amiss on the terminal


def report(trees: Sequence[Path], output: Path, reference: str | None = None) -> Analysis:
    """Write the report of `trees` to the folder `output`, and say the scores.

    Files of an earlier report there are replaced, each complete or absent; those that this one has no use for are
    removed. Raises `UserError` as `read_trees` and `analyse` do, where matplotlib is missing, where `output` cannot be
    written, and where it holds a file of a report's name that no report wrote.
    """
    require("matplotlib", "study report")  # before the reading, which can take a while
    with Progress("study report", 0) as shown:
        results = read_trees(trees, lambda runs: shown.update(runs, f"{runs:,} runs read"))
    analysis = analyse(results, reference)
    tables, pictures = all_tables(analysis), all_figures(analysis)
    try:
        _write(output, analysis, tables, pictures)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); name another folder") from None
    _say(tables, output)
    return analysis


def _write(output: Path, analysis: Analysis, tables: dict[str, Table], pictures: Sequence[Picture]) -> None:
    files = {Path("tables") / f"{name}.csv": csv_text(table).encode() for name, table in tables.items()}
    files |= {Path("figures") / f"{picture.name}.png": png(picture) for picture in pictures}
    files[Path("report.md")] = _markdown(tables, pictures).encode()
    files[Path("index.html")] = page(analysis, tables, pictures).encode()
    earlier = _files_of_earlier(output)
    if foreign := [name for name in files if name not in earlier and os.path.lexists(output / name)]:
        raise UserError(f"--output {output}: {foreign[0]} is there, and no study report wrote it (report.json does not "
                        "list it); name another folder, or move it away")
    for folder, ending in (("tables", "csv"), ("figures", "png")):
        (output / folder).mkdir(parents=True, exist_ok=True)
        for old in (output / folder).glob(f"*.{ending}"):
            if old.relative_to(output) in earlier - files.keys():
                old.unlink()
    write_json_atomic(output / RECORD, {"files": sorted(map(str, files))})
    for name, data in files.items():
        write_atomic(output / name, data)


def _files_of_earlier(output: Path) -> set[Path]:
    """What an earlier report wrote there; nothing where there was none, or its record is not readable."""
    try:
        return {Path(name) for name in json.loads((output / RECORD).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _markdown(tables: dict[str, Table], pictures: Sequence[Picture]) -> str:
    parts = ["# Fine-tuning results\n", *map(markdown, tables.values())]
    if pictures:
        parts.append("## Figures\n")
    parts += [f"### {picture.title}\n\n{picture.caption}\n\n![{picture.title}](figures/{picture.name}.png)\n"
              for picture in pictures]
    return "\n".join(parts)


def _say(tables: dict[str, Table], output: Path) -> None:
    scores, problems = tables["scores"], tables.get("problems")
    rows = [[text_of(value, column.kind, 4) for value, column in zip(row[:6], scores.columns, strict=False)]
            for row in scores.rows]
    widths = [max(map(len, column)) for column in zip([c.name for c in scores.columns[:6]], *rows, strict=True)]
    for row in [[column.name for column in scores.columns[:6]], *rows]:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    for kind, where, what in problems.rows[:SHOWN] if problems else ():
        print(f"{kind}: {where}: {what}")
    if problems and len(problems.rows) > SHOWN:
        print(f"and {len(problems.rows) - SHOWN} more: {output / 'tables' / 'problems.csv'}")
    print(f"wrote {output / 'index.html'}, report.md, {len(tables)} tables as CSV, figures as PNG")
