"""`study report`: trees of results -> a folder with tables, figures and a page.

    1. read the trees                           results.py
    2. compute everything once                  analysis.py, statistics.py
    3. tables/*.csv, report.md                  content.py
    4. figures/*.png                            figures.py
    5. index.html, written last                 page/
    6. the scores, and what is amiss, on the terminal
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_encdec.finetune.results_tree import MODEL
from megatron_encdec.page.drawing import Picture
from megatron_encdec.page.page import Fact, Section, page, write_report
from megatron_encdec.page.tables import Table, csv_text, markdown
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import require
from megatron_encdec.platform.progress import Progress
from megatron_encdec.study.analysis import Analysis, analyse
from megatron_encdec.study.content import all_tables
from megatron_encdec.study.figures import all_figures
from megatron_encdec.study.plan import StudyPlan
from megatron_encdec.study.replicas import loss_tables, recipe_pictures, score_tables
from megatron_encdec.study.results import read_trees
from megatron_encdec.study.runs import budget_pictures, budgets, paths, validation, validation_losses
from megatron_encdec.study.store import Status, Store
from megatron_encdec.study.tree_figure import tree_picture

TITLE = "Fine-tuning results"
SECTIONS = (  # name, title, tables shown open, tables folded away
    ("tree", "The runs", ["paths"], []),
    ("scores", "Scores", ["overview"], ["scores", "seeds"]),
    ("recipes", "Seeds of pretraining", ["recipes", "recipe_losses"], ["recipes_compared", "recipe_losses_compared"]),
    ("comparisons", "Comparisons", ["comparisons"], []),
    ("checkpoints", "Curves", [], ["checkpoints"]),
    ("budgets", "Budgets", ["budgets"], []),
    ("validation", "Validation loss", ["validation"], []),
    ("sensitivity", "Learning rate", ["sensitivity"], ["rates"]),
    ("published", "Published", ["published"], []),
    ("problems", "Failed or missing", ["problems"], []),
)
METHOD = """\
Each model is fine-tuned at several learning rates and seeds. For each seed the run with the best *validation* score is
selected, and its *test* score counts; the score of a model is the mean of those over seeds, with the interval 1.96 ·
std / √n (std with n − 1). Over seeds of pretraining the interval is Student's. Differences between models are taken
seed by seed and summarised the same way. With few seeds this interval is narrower than Student's t would give.
Sensitivity to the learning rate is the spread of the test scores of one seed over all its learning rates. Runs that
failed or are missing are listed, never filled in."""
FOOTER = ("Protocol and published numbers: arXiv 2507.00994. Scores in per cent; four decimals under the pointer, all "
          "of them in tables/*.csv.")
SHOWN_COLUMNS, SHOWN_PROBLEMS = 6, 10  # on the terminal


def report(trees: Sequence[Path], output: Path, reference: str | None = None, plan: StudyPlan | None = None) -> None:
    """Write the report of `trees` to the folder `output`, and say the scores. plan: of the study whose results they
    are; then its runs are in the report. Raises `UserError` as `read_trees`, `analyse` and `write_report` do, and where
    matplotlib is missing."""
    require("matplotlib", "study report")  # before the reading, which can take a while
    with Progress("study report", 0) as progress:
        results = read_trees(trees, lambda runs: progress.update(runs, f"{runs:,} runs read"))
    analysis = analyse(results, reference)
    tables, pictures = all_tables(analysis), all_figures(analysis)
    more = [*score_tables(analysis), budgets(results.records)]
    if plan is not None:
        status = Status(plan, Store(Path(plan.study.output)))
        losses = validation_losses(plan, status.store)
        more += [paths(plan), validation(losses), *loss_tables(losses)]
        pictures.append(tree_picture(plan, status.states()))
    tables |= {table.name: table for table in more if table.rows}
    pictures += budget_pictures(analysis) + recipe_pictures(tables)
    files = {Path("tables") / f"{name}.csv": csv_text(table).encode() for name, table in tables.items()}
    files |= {Path("figures") / f"{picture.name}.png": picture.png() for picture in pictures}
    files[Path("report.md")] = _markdown(tables, pictures).encode()
    models = analysis.results.models
    shown = ", ".join(models[:4]) + (f" and {len(models) - 4} more" if len(models) > 4 else "")
    subtitle = f"{shown} on {', '.join(analysis.label(task) for task in analysis.results.tasks)}"
    files[Path("index.html")] = page(TITLE, subtitle, _facts(analysis), _sections(tables, pictures), FOOTER).encode()
    write_report(output, files, "--output")
    _say(tables, output)


def report_study(plan: StudyPlan, output: Path | None = None, reference: str | None = None) -> None:
    """The report of a study's own results, to OUTPUT/report unless `output` says otherwise. Raises `UserError` where
    some are of another state than the plan's model of that name."""
    root, store = Path(plan.study.output), Store(Path(plan.study.output))
    foreign = [] if plan.facts.missing else [
        point.name for point in plan.points
        if (root / "results" / point.name / MODEL).exists() and not store.has_results(point)]
    if foreign:
        raise UserError(f"{root / 'results' / foreign[0]}: these results are of another model than the study's "
                        f"{foreign[0]} (its base or data have changed since); move the folder away")
    report([root / "results"], output or root / "report", reference, plan)


def _markdown(tables: dict[str, Table], pictures: Sequence[Picture]) -> str:
    return "\n".join([f"# {TITLE}\n", *map(markdown, tables.values()), *(["## Figures\n"] if pictures else []),
                      *(f"### {picture.title}\n\n{picture.caption}\n\n![{picture.title}](figures/{picture.name}.png)\n"
                        for picture in pictures)])


def _facts(analysis: Analysis) -> list[Fact]:
    cells = analysis.results.cells.values()
    failed, missing = sum(len(cell.failures) for cell in cells), sum(len(cell.missing) for cell in cells)
    counts = ((len(analysis.results.models), "model", ""), (len(analysis.results.tasks), "dataset", ""),
              (sum(len(cell.finished) for cell in cells), "run", " finished"), (failed, "run", " failed"),
              (missing, "run", " missing"))
    return [Fact(count, f"{name}{'s' * (count != 1)}{rest}", count > 0 and rest in (" failed", " missing"))
            for count, name, rest in counts]


def _sections(tables: dict[str, Table], pictures: Sequence[Picture]) -> list[Section]:
    return [*(Section(name, title, tables=[tables[one] for one in shown if one in tables],
                      pictures=[picture for picture in pictures if picture.section == name],
                      details=[tables[one] for one in folded if one in tables])
              for name, title, shown, folded in SECTIONS), Section("method", "Method", METHOD)]


def _say(tables: dict[str, Table], output: Path) -> None:
    scores, problems = tables["scores"], tables.get("problems")
    lines = [[column.name for column in scores.columns], *scores.cells(4)]
    columns = list(zip(*lines, strict=True))[:SHOWN_COLUMNS]
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
    for what, where, detail in problems.rows[:SHOWN_PROBLEMS] if problems else ():
        print(f"{what}: {where}: {detail}")
    if problems and len(problems.rows) > SHOWN_PROBLEMS:
        print(f"and {len(problems.rows) - SHOWN_PROBLEMS} more: {output / 'tables' / 'problems.csv'}")
    print(f"wrote {output / 'index.html'}, report.md, {len(tables)} tables as CSV, figures as PNG")
