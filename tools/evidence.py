"""The numbers of docs/evidence.md, from the study itself or from what was kept of it.

    python tools/evidence.py examples/study_tiny.yaml --curve RUN --keep docs/evidence --page docs/evidence.md
    python tools/evidence.py docs/evidence --page docs/evidence.md [--check]

The first reads the results tree, writes the kept files (one row a fine-tuning run, a model, a stretch) and puts the
tables into the page, between its marks `<!-- NAME -->` and `<!-- end -->`; figures go to docs/images. The second does
the same from the kept files, and with --check says whether the page has the very tables. RUN: a run of MLM alone that
was evaluated often, for the curve that budgets were chosen from.
"""

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from megatron_encdec.page.drawing import STYLE, dots, line, panels
from megatron_encdec.page.tables import Column, Interval, Table, markdown_rows
from megatron_encdec.rundir.metrics import read_metrics
from megatron_encdec.study.analysis import Analysis, analyse
from megatron_encdec.study.replicas import Values, by_recipe, gains, loss_tables, score_tables, verdict
from megatron_encdec.study.results import Cell, CellKey, Results, RunScores
from megatron_encdec.study.statistics import student

ROOT = Path(__file__).parent.parent
LONG = 1600  # steps of the larger budget
SPLITS = {0: f"mlm40-{LONG}", 25: f"clm-400-mlm40-{LONG}", 50: f"clm-800-mlm40-{LONG}", 75: f"clm-1200-mlm40-{LONG}",
          100: f"clm-{LONG}"}  # share of CLM in per cent -> recipe
CLAIMS = {  # table -> pairs of recipes, the one that the paper finds better first
    "mlm_over_clm": (("mlm40-800", "clm-800"), (f"mlm40-{LONG}", f"clm-{LONG}")),
    "early": (("clm-800@400", "mlm40-800@400"),),
    "biphasic": tuple((SPLITS[share], SPLITS[0]) for share in (25, 50, 75)),
    "continued": ((f"clm-dec{LONG}-mlm40-2000", f"mlm40-dec{LONG}-mlm40-2000"),),
    "ratio": ((f"mlm20-{LONG}", f"mlm40-{LONG}"),)}
PATTERN = re.compile(r"<!-- (?P<name>\w+) -->\n.*?<!-- end -->", re.DOTALL)


@dataclass
class Numbers:
    """Rows by the name of the file that keeps them."""

    runs: list[dict] = field(default_factory=list)  # model, family, dataset, rate, seed, validation, test
    models: list[dict] = field(default_factory=list)  # model, step, tokens, targets, flops, clm, mlm
    stretches: list[dict] = field(default_factory=list)  # id, steps, tokens, models, seconds
    baselines: list[dict] = field(default_factory=list)  # family, dataset, name, score
    curve: list[dict] = field(default_factory=list)  # step, clm, mlm


def of_study(file: Path, curve: Path | None) -> Numbers:
    """Read from the results tree and the run directories of a study."""
    from megatron_encdec.study.config import load_study
    from megatron_encdec.study.plan import plan_study
    from megatron_encdec.study.results import read_trees
    from megatron_encdec.study.runs import validation_losses
    from megatron_encdec.study.store import Status, Store

    plan = plan_study(load_study(file))
    output = Path(plan.study.output)
    store, results = Status(plan, Store(output)).store, read_trees([output / "results"])
    losses, found = validation_losses(plan, store), Numbers()
    for key, cell in sorted(results.cells.items()):
        found.runs += [{"model": key.model, "family": key.family, "dataset": key.dataset, "rate": run.rate,
                        "seed": run.seed, "validation": run.validation, "test": run.test}
                       for run in cell.finished.values()]
    found.models = [{"model": model, "step": record.step, **{key: record.run[key] for key in
                                                             ("tokens", "targets", "flops")}, **losses.get(model, {})}
                    for model, record in sorted(results.records.items())]
    found.stretches = [{"id": branch.id, "steps": branch.steps, "tokens": branch.tokens, "models": len(branch.models),
                        "seconds": sum(map(seconds, (output / "stretches").glob(f"{branch.id}*/metrics.jsonl")))}
                       for branch in plan.branches]
    found.baselines = [{"family": family, "dataset": dataset, "name": name, "score": score}
                       for (family, dataset), scores in results.baselines.items() for name, score in scores.items()]
    if curve is not None:
        found.curve = [{"step": one["step"], **one["losses"]} for one in read_metrics(curve / "metrics.jsonl")
                       if one["kind"] == "eval"]
    return found


def seconds(metrics: Path) -> float:
    """In the steps of a run, evaluations and checkpoints left out."""
    total, before = 0.0, None
    for one in read_metrics(metrics):
        if one["kind"] == "train" and before is not None:
            total += (one["tokens"] - before) / one["tokens_per_second"]
        before = one.get("tokens", before)
    return total


def kept(folder: Path) -> Numbers:
    """Read from the files that `keep` wrote."""
    found = Numbers()
    for path in folder.glob("*.csv"):
        with open(path, encoding="utf-8") as file:
            setattr(found, path.stem, [{key: number(value) for key, value in row.items() if value}
                                       for row in csv.DictReader(file)])
    return found


def number(text: str) -> int | float | str:
    """As it was before it was written."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def keep(numbers: Numbers, folder: Path) -> None:
    """A file for each kind of row."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in vars(numbers).items():
        if rows:
            with open(folder / f"{name}.csv", "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(max(rows, key=len)), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


def analysis_of(numbers: Numbers) -> Analysis:
    """The report's analysis of the fine-tuning runs."""
    results = Results()
    for row in numbers.runs:
        key = CellKey(row["family"], row["dataset"], "", row["model"])
        run = RunScores(row["rate"], row["seed"], row["validation"], row["test"], None, Path())
        results.cells.setdefault(key, Cell(key)).runs[run.rate, run.seed] = run
    return analyse(results)


def tables(numbers: Numbers) -> dict[str, str]:
    """Every table of the page, as Markdown, by the name of its mark."""
    analysis = analysis_of(numbers)
    losses = {row["model"]: {name: row[name] for name in ("clm", "mlm") if name in row} for row in numbers.models}
    scores = {analysis.label(task): by_recipe({one.model: one.score.mean for one in analysis.cells([task])})
              for task in analysis.results.tasks}
    of_loss = {f"{name} loss": by_recipe({model: found[name] for model, found in losses.items() if name in found})
               for name in ("mlm", "clm")}
    made = {name: markdown_rows(_claim(pairs, scores, of_loss), 2) for name, pairs in CLAIMS.items()}
    made |= {"scores": markdown_rows(_with_baselines(score_tables(analysis)[0], numbers, analysis), 1),
             "losses": markdown_rows(loss_tables({model: found for model, found in losses.items() if found})[0], 3),
             "spread": markdown_rows(_spread(analysis), 1), "budgets": markdown_rows(_budgets(numbers.models), 1),
             "cost": markdown_rows(_cost(numbers), 1), "curve": markdown_rows(_curve(numbers.curve), 1)}
    return made


def _claim(pairs: Iterable[tuple[str, str]], scores: Mapping[str, Values], losses: Mapping[str, Values]) -> Table:
    """A row for each pair and yardstick: A − B over the seeds, and in how many of them A is better."""
    rows = []
    for one, other in pairs:
        for what, values, sign, factor in (*((f"{name}, points", found, 1, 100) for name, found in scores.items()),
                                           *((f"{name}, nats", found, -1, 1) for name, found in losses.items())):
            if differences := [factor * gain for gain in gains(values, one, other)]:
                mean = student(differences)
                better = {True: "A", False: "B"}[sign * mean.mean > 0]
                rows.append([one, other, what, mean, f"{sum(sign * gain > 0 for gain in differences)} of "
                             f"{len(differences)}", f"{better} better" if verdict(mean) == "apart" else verdict(mean)])
    return Table("claim", "", [Column("A"), Column("B"), Column("measured by"), Column("A − B", "signed number"),
                               Column("seeds where A is better"), Column("verdict")], rows)


def _with_baselines(table: Table, numbers: Numbers, analysis: Analysis) -> Table:
    """The recipes' scores, and below them what costs no encoder."""
    place = {task[:2]: 2 + column for column, task in enumerate(analysis.results.tasks)}
    rows: dict[str, list] = {}
    for row in numbers.baselines:
        cells = rows.setdefault(row["name"], [f"{row['name'].replace('_', ' ')}", None, *[None] * len(place)])
        cells[place[row["family"], row["dataset"]]] = Interval(row["score"], None, 1)
    return Table(table.name, table.title, table.columns, [*table.rows, *rows.values()])


def _spread(analysis: Analysis) -> Table:
    """Best minus worst learning rate of a seed of fine-tuning: mean over those, then over the seeds of pretraining."""
    tasks = analysis.results.tasks
    values = [by_recipe({one.model: one.sensitivity.spread.mean for one in analysis.cells([task])}) for task in tasks]
    recipes = list(dict.fromkeys(recipe for found in values for recipe in found))
    columns = [Column(analysis.label(task), "interval", task[0]) for task in tasks]
    return Table("spread", "", [Column("recipe"), *columns], [
                  [recipe, *(student(list(found[recipe].values())) for found in values)] for recipe in recipes])


def _budgets(models: Sequence[dict]) -> Table:
    """Means over the seeds, whose masks differ a little."""
    values = [by_recipe({row["model"]: row[key] for row in models}) for key in ("step", "tokens", "targets", "flops")]
    return Table("budgets", "", [Column("recipe"), Column("steps", "count"), Column("tokens", "count"),
                                 Column("labels", "count"), Column("FLOPs", "number")],
                 [[recipe, *(round(fmean(found[recipe].values())) for found in values)] for recipe in values[0]])


def _cost(numbers: Numbers) -> Table:
    """One by one a stretch counts for each model on it. Seconds are those of the steps, on one core."""
    def both(key: str) -> list[float]:
        return [sum(row[key] * row["models"] for row in numbers.stretches), sum(row[key] for row in numbers.stretches)]

    rows = [["steps", *both("steps")], ["tokens", *both("tokens")],
            ["minutes of one core, in steps", *(round(each / 60) for each in both("seconds"))]]
    return Table("cost", "", [Column(""), Column("one by one", "count"), Column("shared", "count"), Column("saved")],
                 [[*row, f"{100 * (1 - row[2] / row[1]):.0f} %"] for row in rows])


def _curve(rows: Sequence[dict]) -> Table:
    """Every second row up to 400 steps, then every 200 steps."""
    shown = [row for row in rows if row["step"] % (100 if row["step"] <= 400 else 200) == 0]
    return Table("curve", "", [Column("steps", "count"), Column("tokens", "count"), Column("validation MLM loss")],
                 [[row["step"], 2048 * row["step"], f"{row['mlm']:.2f}"] for row in shown])


def figures(numbers: Numbers, folder: Path) -> None:
    """evidence_shares.png: scores and MLM loss over the share of CLM; evidence_recipes.png: less those of MLM alone."""
    from matplotlib import rc_context

    analysis = analysis_of(numbers)
    panels_of = {analysis.label(task): (100, by_recipe({one.model: one.score.mean for one in analysis.cells([task])}))
                 for task in analysis.results.tasks}
    panels_of["validation MLM loss"] = (1, by_recipe({row["model"]: row["mlm"] for row in numbers.models
                                                      if "mlm" in row}))
    with rc_context(STYLE):
        figure, axes = panels(list(panels_of), 2.6)
        for axis, (factor, values) in zip(axes, panels_of.values(), strict=True):
            means = {share: student([factor * one for one in values[recipe].values()])
                     for share, recipe in SPLITS.items() if recipe in values}
            line(axis, [(share, one.mean, one.half_width or 0) for share, one in means.items()], "#0072B2", "")
            axis.set_xticks(list(SPLITS))
            axis.set_xlabel("CLM share of the steps, %")
        _save(figure, folder / "evidence_shares.png")
        rows = [recipe for recipe in SPLITS.values() if recipe != SPLITS[0]]
        figure, axes = panels(list(panels_of), 1.15 + 0.3 * len(rows), rows)
        for axis, (factor, values) in zip(axes, panels_of.values(), strict=True):
            found = {recipe: student([factor * one for one in gains(values, recipe, SPLITS[0])]) for recipe in rows}
            axis.axvline(0, color="#1f2933", lw=1)
            dots(axis, rows, {recipe: (one.mean, one.half_width or 0) for recipe, one in found.items() if one},
                 lambda _: "#0072B2")
        _save(figure, folder / "evidence_recipes.png")


def _save(figure, path: Path) -> None:
    figure.savefig(path, dpi=110, metadata={"Software": None})


def put(page: str, made: Mapping[str, str]) -> str:
    """The page with its tables. Raises `KeyError` for a mark without a table."""
    return PATTERN.sub(lambda match: f"<!-- {match['name']} -->\n\n{made[match['name']]}\n<!-- end -->", page)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="STUDY.yaml, or the folder of kept files")
    parser.add_argument("--curve", type=Path, metavar="RUN")
    parser.add_argument("--keep", type=Path, metavar="DIR")
    parser.add_argument("--page", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the page has other tables")
    given = parser.parse_args(arguments)
    numbers = kept(given.source) if given.source.is_dir() else of_study(given.source, given.curve)
    if given.keep:
        keep(numbers, given.keep)
    made = tables(numbers)
    if not given.page:
        print("\n".join(f"{name}\n\n{text}" for name, text in made.items()))
        return 0
    before = given.page.read_text(encoding="utf-8")
    after = put(before, made)
    if given.check:
        return int(before != after)
    given.page.write_text(after, encoding="utf-8")
    figures(numbers, given.page.parent / "images")
    return 0


if __name__ == "__main__":
    sys.exit(main())
