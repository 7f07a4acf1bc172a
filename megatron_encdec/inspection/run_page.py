"""`inspect run RUN... --page DIR`: a run, or several over each other, as one self-contained page.

    1. read each run            history.py
    2. tables/*.csv             phases, events, checkpoints, sources
    3. figures/*.png            run_figures.py
    4. index.html, written last page/
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_encdec.engine.integrity import name_of
from megatron_encdec.inspection.history import RunHistory, Series, SourceRead
from megatron_encdec.inspection.run_figures import RunFigures
from megatron_encdec.page.drawing import Picture
from megatron_encdec.page.page import Fact, Section, page, write_report
from megatron_encdec.page.tables import Column, Table, as_markdown, csv_text
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import require
from megatron_encdec.platform.progress import short_count

SECTIONS = (  # name, title, tables shown open, tables folded away
    ("phases", "Phases", ["phases"], []),
    ("loss", "Loss", [], ["validation"]),
    ("timeline", "Time line", ["events"], ["checkpoints"]),
    ("optimizer", "Optimizer", [], []),
    ("speed", "Speed", [], []),
    ("data", "Data", ["sources"], []),
    ("distance", "Distance", [], []),
)
NOT_DRAWN = {  # field of the lines: section that would show it, what it is called there
    "loss": ("loss", "the training loss"), "losses": ("loss", "the validation loss"),
    "lr": ("optimizer", "the learning rate"), "grad_norm": ("optimizer", "the gradient norm"),
    "tokens_per_second": ("speed", "tokens a second"), "mfu": ("speed", "MFU"),
    "distance": ("distance", "the distance")}
FOOTER = ("From metrics.jsonl, config.yaml and failure.json of the run directory. Losses in nats a label; a step is an "
          "optimizer update. The same command draws the page anew.")


def write_page(directories: Sequence[str], folder: Path, remarks: Sequence[str]) -> list[Path]:
    """Write the page of the runs in `directories` into `folder`; the paths of its files in it. remarks: lines on what
    stands between several runs. Raises `UserError` where one is no run or has no step yet, matplotlib is missing, or
    the folder cannot be written."""
    require("matplotlib", "inspect run --page")  # before the reading
    runs = [RunHistory.of(one, with_entropy=len(directories) == 1) for one in directories]
    figures = RunFigures(runs)
    pictures, sources, unknown = figures.all(), [], []
    for place, (run, name) in enumerate(zip(runs, figures.names, strict=True)):
        read, series, why = _epochs(run)
        sources.append(read)
        pictures += [figures.epochs(place, series)] if series else []
        unknown += [f"{as_markdown(name)}: the sources cannot be read here ({as_markdown(why)})."] if why else []
    tables = {table.name: table for table in _tables(runs, figures.names, sources) if table.rows}
    files = {Path("tables") / f"{name}.csv": csv_text(table).encode() for name, table in tables.items()}
    files |= {Path("figures") / f"{picture.name}.png": picture.png() for picture in pictures}
    texts = {"phases": "\n".join(f"- {as_markdown(remark)}" for remark in remarks), "data": "\n\n".join(unknown),
             **_left_out(runs, figures.names)}
    title = figures.names[0] if len(runs) == 1 else f"{len(runs)} runs"
    files[Path("index.html")] = page(title, _subtitle(runs, figures.names), _facts(runs), _sections(
        tables, pictures, texts), FOOTER).encode()
    write_report(folder, files, "--page")
    return list(files)


def _epochs(run: RunHistory) -> tuple[list[SourceRead], dict[str, Series], str | None]:
    try:
        return *run.epochs(), None
    except UserError as error:
        return [], {}, str(error)


def _subtitle(runs: Sequence[RunHistory], names: Sequence[str]) -> str:
    if len(runs) > 1:
        return "; ".join(f"{name}: {run.state}" for name, run in zip(names, runs, strict=True))
    (run,), report = runs, runs[0].report
    phases = " → ".join(phase["objective"] for phase in report["phases"][:6])
    more = f" and {len(report['phases']) - 6} more" if len(report["phases"]) > 6 else ""
    size = short_count(run.config.model.parameter_count()) if run.config.model.vocabulary_size else "unknown"
    return f"{run.directory}: {run.state}. {phases}{more}; {size} parameters"


def _facts(runs: Sequence[RunHistory]) -> list[Fact]:
    if len(runs) > 1:
        going = [run for run in runs if run.step < run.planned]
        return [Fact(len(runs), "runs"), *([Fact(len(going), "not finished", True)] if going else [])]
    (run,) = runs
    kinds = [event.kind for event in run.events]
    counts = [(run.step, "steps", False), (run.report["tokens"], "tokens", False),
              (run.report["targets"], "labels", False), (len(run.checkpoints), "checkpoints saved", False),
              (kinds.count("resume"), "times continued", False), (kinds.count("skip"), "steps skipped", True),
              (kinds.count("failed save"), "saves failed", True)]
    return [Fact(count, name, warns) for count, name, warns in counts if count]


def _left_out(runs: Sequence[RunHistory], names: Sequence[str]) -> dict[str, str]:
    """A sentence for each section whose figures lack values, on how many there are."""
    found: dict[str, list[str]] = {}
    for run, its_name in zip(runs, names, strict=True):
        for (key, name), count in sorted(run.not_finite.items()):
            section, what = NOT_DRAWN.get(key, (None, ""))
            of = f" ({its_name})" if len(runs) > 1 else ""
            if section:
                found.setdefault(section, []).append(f"{count:,} of {what}{name and ' '}{name}{of}")
    return {section: f"Not drawn, being NaN or infinite: {as_markdown('; '.join(parts))}."
            for section, parts in found.items()}


def _sections(tables: dict[str, Table], pictures: Sequence[Picture], texts: Mapping[str, str]) -> list[Section]:
    return [Section(name, title, texts.get(name, ""), [tables[one] for one in shown if one in tables],
                    [picture for picture in pictures if picture.section == name],
                    [tables[one] for one in folded if one in tables]) for name, title, shown, folded in SECTIONS]


def _tables(runs: Sequence[RunHistory], names: Sequence[str], sources: Sequence[list[SourceRead]]) -> list[Table]:
    """All of them; of several runs each row begins with the run's name."""
    many = len(runs) > 1

    def table(name: str, title: str, columns: Sequence[Column], rows_of, note: str = "") -> Table:
        rows = [[*([its_name] if many else []), *row] for place, (run, its_name) in
                enumerate(zip(runs, names, strict=True)) for row in rows_of(run, place)]
        return Table(name, title, [*([Column("run")] if many else []), *columns], rows, note)

    losses = list(dict.fromkeys(name for run in runs for name in run.validation))
    return [
        table("phases", "Phases", [
            Column("phase"), Column("objective"), Column("steps", "count"), Column("planned", "count"),
            Column("tokens", "count"), Column("labels", "count"), Column("first loss", "number"),
            Column("last loss", "number"), Column("validation", "number"), Column("tokens/s", "count")],
            lambda run, _: [[phase["name"], phase["objective"], phase["steps"], phase["planned_steps"],
                             phase["tokens"], phase["targets"], phase["first_loss"], phase["last_loss"],
                             phase["validation_loss"], _whole(phase["tokens_per_second"])]
                            for phase in run.report["phases"]]),
        table("validation", "Where each phase ended or stands", [
            Column("phase"), Column("step", "count"), *(Column(name, "number") for name in losses)],
            lambda run, _: [[phase["name"], phase["validation_step"], *map(phase["validation"].get, losses)]
                            for phase in run.report["phases"] if phase["validation"]]),
        table("events", "Events", [Column("after step", "count"), Column("what happened")],
              lambda run, _: [[event.step, f"{_LABELS.get(event.kind, '')}{event.what}"] for event in run.events]),
        table("checkpoints", "Checkpoints", [
            Column("step", "count"), Column("phase"), Column("bytes", "count"), Column("training held up, s", "number"),
            Column("until durable, s", "number"), Column("still there")], _checkpoint_rows),
        table("sources", "Sources by phase", [
            Column("phase"), Column("source"), Column("share", "percent"), Column("tokens", "count"),
            Column("window", "count"), Column("epochs so far", "number"), Column("at the phase's end", "number")],
            lambda run, place: [[one.phase, one.path, one.share, one.tokens, one.sequence_length, one.epochs_now,
                                 one.epochs_planned] for one in sources[place]],
            "Share in per cent of the samples. Epochs count from the run's beginning, on average over a source's "
            "windows of that length.")]


_LABELS = {"change": "changed: ", "skip": "skipped: ", "failed save": "checkpoint failed: ",
           "failure": "failed: "}


def _checkpoint_rows(run: RunHistory, _: int) -> list[list]:
    there = Path(run.directory) / "checkpoints"
    return [[line["step"], line["phase"], line.get("bytes"), line.get("seconds_blocked"), line.get("seconds_total"),
             "yes" if (there / name_of(line["step"])).is_dir() else "no"] for line in run.checkpoints]


def _whole(value: float | None) -> int | None:
    return round(value) if value is not None and math.isfinite(value) else None
