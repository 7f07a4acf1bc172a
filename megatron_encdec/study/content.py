"""What stands in the report's tables.

    overview      models x datasets: test scores with intervals, family averages, published numbers, baselines
    scores        one row a cell: score, seeds, runs, which learning rates were selected
    comparisons   differences of two models over the same seeds
    sensitivity   spread of test scores over learning rates
    rates, seeds  the numbers behind: means at each learning rate, the selected run of each seed
    checkpoints   scores along a run, or along a recipe at growing budgets
    published     the paper's averages
    problems      what failed, is missing or unequal
"""

from collections import Counter

from megatron_encdec.study import published
from megatron_encdec.study.analysis import Analysis, problems
from megatron_encdec.study.statistics import Interval, Summary
from megatron_encdec.study.tables import Column, Table, rate_text

AVERAGE = "average"


def all_tables(analysis: Analysis) -> dict[str, Table]:
    """Every table that has rows, by name, in the report's order."""
    tables = (overview(analysis), scores(analysis), comparisons(analysis), sensitivity(analysis), rates(analysis),
              seeds(analysis), checkpoints(analysis), papers(analysis), amiss(analysis))
    return {table.name: table for table in tables if table.rows}


def overview(analysis: Analysis) -> Table:
    """Models x datasets, with the family's average where it has several datasets."""
    columns, places = [Column("model")], []
    for family in analysis.families:
        tasks = analysis.tasks(family)
        for task in tasks:
            columns.append(Column(analysis.label(task), "interval", family))
            places.append((family, task))
        if len(tasks) > 1:
            columns.append(Column(AVERAGE, "interval", family))
            places.append((family, None))
    rows, ours, incomplete = [], [], set()
    for model in analysis.results.models:
        ours.append(len(rows))
        incomplete |= {(len(rows), place) for place, task in enumerate(places, 1) if _lacks_runs(analysis, task, model)}
        rows.append([model, *(_score(analysis, place, model) for place in places)])
        papers_row = [_published(analysis, place, model) for place in places]
        if any(papers_row):
            rows.append([f"{model}, published", *papers_row])
    best = _best(rows, ours)
    names = list(dict.fromkeys(name for found in analysis.results.baselines.values() for name in found.scores))
    for name in names:
        row = [_baseline(analysis, place, name) for place in places]
        if any(row):
            rows.append([f"{name.replace('_', ' ')} (baseline)", *row])
    return Table("overview", "Test scores", columns, rows,
                 "Per cent. For each seed the learning rate with the best validation score; mean of those test scores "
                 "± 1.96 · std / √n over seeds. Bold: the best model."
                 + (" †: some of its runs failed or are missing." if incomplete else ""), best, incomplete,
                 set(range(len(rows))) - set(ours))


def _score(analysis: Analysis, place: tuple, model: str) -> Interval | None:
    family, task = place
    found = analysis.averages.get((family, model)) if task is None else analysis.summary(task, model)
    return found.score if found else None


def _lacks_runs(analysis: Analysis, place: tuple, model: str) -> bool:
    family, task = place
    found = [analysis.summary(one, model) for one in (analysis.tasks(family) if task is None else [task])]
    return any(summary is not None and not summary.is_complete for summary in found)


def _published(analysis: Analysis, place: tuple, model: str) -> Interval | None:
    family, task = place
    if task is None:
        value = published.AVERAGES.get(model, {}).get(family) if analysis.is_papers(family) else None
    else:
        value = published.CELLS.get((model, published.dataset_name(*task)))
    return None if value is None else Interval(value / 100, None, 0)


def _baseline(analysis: Analysis, place: tuple, name: str) -> Interval | None:
    family, task = place
    found = analysis.results.baselines.get((family, task[1])) if task else None
    return Interval(found.scores[name], None, 0) if found and name in found.scores else None


def _best(rows: list, candidates: list[int]) -> set[tuple[int, int]]:
    """Places of the highest means in each column, where there is more than one to choose from."""
    best = set()
    for place in range(1, len(rows[0]) if rows else 0):
        means = {row: rows[row][place].mean for row in candidates if rows[row][place] is not None}
        if len(means) > 1:
            best |= {(row, place) for row, mean in means.items() if mean == max(means.values())}
    return best


def scores(analysis: Analysis) -> Table:
    """One row for each cell, its published number and baselines beside it."""
    columns = (Column("family"), Column("dataset"), Column("model"), Column("test", "interval"),
               Column("seeds", "count"), Column("runs"), Column("failed", "count"), Column("missing", "count"),
               Column("learning rates selected"), Column("published", "printed"), Column("baselines"))
    rows = [_score_row(analysis, task, cell.key.model) for task in analysis.results.tasks
            for cell in analysis.results.of_task(task)]
    return Table("scores", "Every cell", columns, rows,
                 "`runs`: finished of planned. `learning rates selected`: by validation, with the number of seeds.")


def _score_row(analysis: Analysis, task: tuple, model: str) -> list:
    summary = analysis.summary(task, model)
    cell, paper = summary.cell, _published(analysis, (task[0], task), model)
    found = analysis.results.baselines.get(task[:2])
    baselines = "; ".join(f"{name.replace('_', ' ')} {100 * score:.2f}" for name, score in found.scores.items()) \
        if found else ""
    return [task[0], analysis.label(task), model, summary.score, len(summary.selected),
            f"{len(cell.finished)} of {len(cell.rates) * len(cell.seeds)}", len(cell.failures), len(cell.missing),
            _selected(summary), paper.mean if paper else None, baselines or None]


def _selected(summary: Summary) -> str:
    counts = Counter(run.rate for run in summary.selected.values())
    return ", ".join(f"{rate_text(rate)} × {count}" for rate, count in sorted(counts.items()))


def comparisons(analysis: Analysis) -> Table:
    """Differences over the seeds that two models share."""
    columns = (Column("family"), Column("dataset"), Column("model A"), Column("model B"),
               Column("A − B", "signed"), Column("seeds", "count"), Column("A better", "count"), Column("verdict"))
    rows = [[task[0], analysis.label(task), one.a, one.b, one.difference, len(one.seeds), one.wins,
             _verdict(one.difference)] for task in analysis.results.tasks for one in analysis.comparisons[task]]
    against = f"Against {analysis.reference}. " if analysis.reference else ""
    return Table("comparisons", "Models compared over the same seeds", columns, rows,
                 f"{against}Difference of the selected test scores, in points, seed by seed; mean ± 1.96 · std / √n. "
                 "`A better`: in how many of the seeds.")


def _verdict(difference: Interval) -> str:
    if difference.half_width is None:
        return "one seed: not known"
    return "apart" if difference.excludes_zero else "not apart"


def sensitivity(analysis: Analysis) -> Table:
    """How much the learning rate matters."""
    columns = (Column("family"), Column("dataset"), Column("model"), Column("spread", "interval"),
               Column("deviation", "interval"), Column("best rate", "rate"), Column("worst rate", "rate"),
               Column("seeds", "count"), Column("failed runs", "count"))
    rows = []
    for task in analysis.results.tasks:
        for cell in analysis.results.of_task(task):
            found = analysis.sensitivities.get(cell.key)
            if found is None:
                continue
            means = {rate: value.mean for rate, value in found.by_rate.items()}
            rows.append([task[0], analysis.label(task), cell.key.model, found.spread, found.deviation,
                         max(means, key=means.get) if means else None, min(means, key=means.get) if means else None,
                         found.spread.count if found.spread else 0, len(cell.failures)])
    return Table("sensitivity", "Sensitivity to the learning rate", columns, rows,
                 "In points of the test score; lower is more stable. `spread`: best minus worst learning rate of a "
                 "seed; `deviation`: standard deviation over learning rates of a seed; both averaged over the seeds "
                 "that finished at every rate. Best and worst rate: by the mean test score over seeds.")


def rates(analysis: Analysis) -> Table:
    """Mean test score at each learning rate."""
    columns = (Column("family"), Column("dataset"), Column("model"), Column("learning rate", "rate"),
               Column("test", "interval"), Column("seeds", "count"))
    rows = [[task[0], analysis.label(task), cell.key.model, rate, score, score.count]
            for task in analysis.results.tasks for cell in analysis.results.of_task(task)
            if cell.key in analysis.sensitivities
            for rate, score in analysis.sensitivities[cell.key].by_rate.items()]
    return Table("rates", "Test score at each learning rate", columns, rows, "Over the seeds that finished.")


def seeds(analysis: Analysis) -> Table:
    """The run that was selected for each seed."""
    columns = (Column("family"), Column("dataset"), Column("model"), Column("seed", "count"),
               Column("learning rate", "rate"), Column("validation", "percent"), Column("test", "percent"))
    rows = [[task[0], analysis.label(task), cell.key.model, seed, run.rate, run.validation, run.test]
            for task in analysis.results.tasks for cell in analysis.results.of_task(task)
            for seed, run in analysis.summaries[cell.key].selected.items()]
    return Table("seeds", "The run selected for each seed", columns, rows)


def checkpoints(analysis: Analysis) -> Table:
    """Scores at the points of each curve."""
    columns = (Column("series"), Column("step", "count"), Column("model"), Column("family"), Column("dataset"),
               Column("test", "interval"))
    rows = [[series, step, model, task[0], analysis.label(task), summary.score]
            for series, points in analysis.curves.items() for task in analysis.results.tasks
            for step, model in points if (summary := analysis.summary(task, model)) is not None]
    return Table("checkpoints", "Curves over checkpoints", columns, rows)


def papers(analysis: Analysis) -> Table:
    """The paper's averages, where any dataset of the report is one of the paper's."""
    families = [family for family in analysis.families
                if any(published.dataset_name(*task) for task in analysis.tasks(family))]
    columns = [Column("model"), *(Column(family, "printed") for family in families)]
    rows = [[model, *(values[family] / 100 for family in families)]
            for model, values in published.AVERAGES.items()] if families else []
    datasets = "; ".join(f"{family}: {', '.join(published.DATASETS[family])}" for family in families)
    return Table("published", "The paper's averages", columns, rows,
                 f"arXiv 2507.00994. Each is over three datasets ({datasets}).")


def amiss(analysis: Analysis) -> Table:
    """Everything that a reader of the numbers must know."""
    rows = [[one.kind, one.where, one.what] for one in problems(analysis)]
    return Table("problems", "What failed, is missing or unequal", (Column("what"), Column("where"), Column("detail")),
                 rows)
