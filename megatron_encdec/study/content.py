"""What stands in the report's tables; `all_tables` has them in their order."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_encdec.page.tables import Column, Interval, Table, as_markdown, rate_text
from megatron_encdec.study import published
from megatron_encdec.study.analysis import Analysis, Task, problems
from megatron_encdec.study.replicas import verdict
from megatron_encdec.study.statistics import Summary

# Columns that are not text, by their names; in `seeds`, which holds single runs, `test` is no interval.
KINDS = {"test": "interval", "spread": "interval", "deviation": "interval", "A − B": "signed", "validation": "percent",
         "published": "printed", **dict.fromkeys(("learning rate", "best rate", "worst rate"), "rate"),
         **dict.fromkeys(("seed", "seeds", "failed", "missing", "A better", "failed runs", "step"), "count")}


def all_tables(analysis: Analysis) -> dict[str, Table]:
    """Every table that has rows, by name, in the report's order."""
    makers = (_overview, _scores, _comparisons, _sensitivity, _rates, _seeds, _checkpoints, _published, _problems)
    return {table.name: table for table in (make(analysis) for make in makers) if table.rows}


def _table(name: str, title: str, rows: Sequence[Mapping[str, Any]], note: str = "", **kinds: str) -> Table:
    """A table whose columns are the keys of its rows."""
    kinds = KINDS | kinds
    return Table(name, title, [Column(key, kinds.get(key, "text")) for key in (rows[0] if rows else ())],
                 [list(row.values()) for row in rows], note)


def _of_task(analysis: Analysis, task: Task, **more: str) -> dict[str, Any]:
    return {"family": task[0], "dataset": analysis.label(task), **more}


def _of_cell(analysis: Analysis, summary: Summary) -> dict[str, Any]:
    return _of_task(analysis, summary.task, model=summary.model)


def _overview(analysis: Analysis) -> Table:
    """Models x datasets, with family averages, published numbers and baselines."""
    places: list[tuple[str, Task | None]] = []  # a family with each of its tasks, and with None for their average
    for family in analysis.families:
        tasks = analysis.tasks(family)
        places += [(family, task) for task in tasks] + [(family, None)] * (len(tasks) > 1)
    columns = [Column("model"), *(Column(analysis.label(task) if task else "average", "interval", family)
                                  for family, task in places)]
    rows, ours, incomplete = [], [], set()
    for model in analysis.results.models:
        ours.append(len(rows))
        lacking = {summary.task for summary in analysis.cells() if summary.model == model and summary.lacks_runs}
        incomplete |= {(len(rows), column) for column, (family, task) in enumerate(places, 1)
                       if lacking.intersection([task] if task else analysis.tasks(family))}
        rows.append([model, *(analysis.score(task, model) if task else analysis.average(family, model)
                              for family, task in places)])
        printed = [_printed(analysis, family, task, model) for family, task in places]
        if any(printed):
            rows.append([f"{model}, published", *printed])
    best = _best(rows, ours)
    for name in dict.fromkeys(name for scores in analysis.results.baselines.values() for name in scores):
        scores = [_single(analysis.baselines(task).get(name) if task else None) for _, task in places]
        if any(scores):
            rows.append([f"{name.replace('_', ' ')} (baseline)", *scores])
    return Table("overview", "Test scores", columns, rows,
                 "Per cent. For each seed the learning rate with the best validation score; mean of those test scores "
                 "± 1.96 · std / √n over seeds. Bold: the best model."
                 + (" †: some of its runs failed or are missing." if incomplete else ""), best, incomplete,
                 set(range(len(rows))) - set(ours))


def _printed(analysis: Analysis, family: str, task: Task | None, model: str) -> Interval | None:
    """The number that the paper prints for a cell, or for an average where the datasets are the paper's three."""
    if task is not None:
        value = published.CELLS.get((model, published.dataset_name(*task)))
    else:
        names = {published.dataset_name(*one) for one in analysis.tasks(family)}
        all_of_them = names == set(published.DATASETS.get(family, {}))
        value = published.AVERAGES.get(model, {}).get(family) if all_of_them else None
    return _single(None if value is None else value / 100)


def _single(score: float | None) -> Interval | None:
    """A score that is no mean of ours."""
    return None if score is None else Interval(score, None, 0)


def _best(rows: list, candidates: list[int]) -> set[tuple[int, int]]:
    """Places of the highest means in each column, where there is more than one to choose from."""
    best = set()
    for place in range(1, len(rows[0])):
        means = {row: rows[row][place].mean for row in candidates if rows[row][place] is not None}
        if len(means) > 1:
            best |= {(row, place) for row, mean in means.items() if mean == max(means.values())}
    return best


def _scores(analysis: Analysis) -> Table:
    rows = []
    for summary in analysis.cells():
        cell, task = summary.cell, summary.task
        printed = _printed(analysis, task[0], task, summary.model)
        rates = Counter(run.rate for run in summary.selected.values())
        baselines = [f"{name.replace('_', ' ')} {100 * score:.2f}" for name, score in analysis.baselines(task).items()]
        rows.append(_of_cell(analysis, summary) | {
            "test": summary.score, "seeds": len(summary.selected),
            "runs": f"{len(cell.finished)} of {len(cell.rates) * len(cell.seeds)}", "failed": len(cell.failures),
            "missing": len(cell.missing),
            "learning rates selected": ", ".join(f"{rate_text(rate)} × {rates[rate]}" for rate in sorted(rates)),
            "published": printed.mean if printed else None, "baselines": "; ".join(baselines) or None})
    return _table("scores", "Every cell", rows,
                  "`runs`: finished of planned. `learning rates selected`: by validation, with the number of seeds.")


def _comparisons(analysis: Analysis) -> Table:
    rows = [_of_task(analysis, task) | {"model A": one.a, "model B": one.b, "A − B": one.difference,
                                        "seeds": one.difference.count, "A better": one.wins,
                                        "verdict": verdict(one.difference)}
            for task in analysis.results.tasks for one in analysis.comparisons[task]]
    against = f"Against {as_markdown(analysis.reference)}. " if analysis.reference else ""
    return _table("comparisons", "Models compared over the same seeds", rows,
                  f"{against}Difference of the selected test scores, in points, seed by seed; mean ± 1.96 · std / √n. "
                  "`A better`: in how many of the seeds.")


def _sensitivity(analysis: Analysis) -> Table:
    rows = []
    for summary in analysis.cells():
        if (found := summary.sensitivity) is not None:
            means = {rate: score.mean for rate, score in found.by_rate.items()}
            rows.append(_of_cell(analysis, summary) | {
                "spread": found.spread, "deviation": found.deviation,
                "best rate": max(means, key=means.get, default=None),
                "worst rate": min(means, key=means.get, default=None),
                "seeds": found.spread.count if found.spread else 0, "failed runs": len(summary.cell.failures)})
    return _table("sensitivity", "Sensitivity to the learning rate", rows,
                  "In points of the test score; lower is more stable. `spread`: best minus worst learning rate of a "
                  "seed; `deviation`: standard deviation over learning rates of a seed; both averaged over the seeds "
                  "that finished at every rate. Best and worst rate: by the mean test score over seeds.")


def _rates(analysis: Analysis) -> Table:
    rows = [_of_cell(analysis, summary) | {"learning rate": rate, "test": score, "seeds": score.count}
            for summary in analysis.cells() if summary.sensitivity
            for rate, score in summary.sensitivity.by_rate.items()]
    return _table("rates", "Test score at each learning rate", rows, "Over the seeds that finished.")


def _seeds(analysis: Analysis) -> Table:
    rows = [_of_cell(analysis, summary) | {"seed": seed, "learning rate": run.rate, "validation": run.validation,
                                           "test": run.test}
            for summary in analysis.cells() for seed, run in summary.selected.items()]
    return _table("seeds", "The run selected for each seed", rows, test="percent")


def _checkpoints(analysis: Analysis) -> Table:
    rows = [{"series": series, "step": step, "model": model} | _of_task(analysis, task) | {"test": summary.score}
            for series, points in analysis.curves.items() for task in analysis.results.tasks
            for step, model in points if (summary := analysis.summary(task, model)) is not None]
    return _table("checkpoints", "Curves over checkpoints", rows)


def _published(analysis: Analysis) -> Table:
    families = [family for family in analysis.families
                if any(published.dataset_name(*task) for task in analysis.tasks(family))]
    rows = [{"model": model} | {family: values[family] / 100 for family in families}
            for model, values in published.AVERAGES.items()] if families else []
    datasets = "; ".join(f"{family}: {', '.join(published.DATASETS.get(family, {}))}" for family in families)
    return _table("published", "The paper's averages", rows,
                  f"arXiv 2507.00994. Each is over three datasets ({datasets}).", **dict.fromkeys(families, "printed"))


def _problems(analysis: Analysis) -> Table:
    return _table("problems", "What failed, is missing or unequal", [one._asdict() for one in problems(analysis)])
