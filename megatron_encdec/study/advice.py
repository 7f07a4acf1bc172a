"""`study advise`: what to try for a size and a budget, with the numbers that say so, and what is not known.

    1. evidence        the paper's averages (published.csv), or trees of one's own results with intervals
    2. `advise(...)`   share of CLM, mask ratio, learning rates: the nearest evidence, and how sure it is
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from megatron_encdec.finetune.results_tree import FAMILIES
from megatron_encdec.page.tables import Interval
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.progress import short_count
from megatron_encdec.study import published
from megatron_encdec.study.analysis import Analysis, analyse
from megatron_encdec.study.curves import Curves, described, ratios, shares
from megatron_encdec.study.results import ModelRecord, read_trees

PAPER_TOKENS = 2_359_296  # of a step (arXiv 2507.00994)
RATES = "{1, 2, 5}e-5 and {1, 2, 5}e-4"
Averages = Callable[[str, str], Interval | None]  # family, model


def advise(size: str, tokens: float, trees: Sequence[Path] = ()) -> list[str]:
    """Lines of advice for a trunk of `size` (a preset) and a budget of input `tokens`. trees: one's own results,
    instead of the paper's averages. Raises `UserError` where they hold nothing to learn from."""
    if trees:
        analysis = analyse(read_trees(trees))
        models, records, average = analysis.results.models, analysis.results.records, analysis.average
        source = ", ".join(map(str, trees))
    else:
        analysis, records, average, source = None, {}, _published, "arXiv 2507.00994 (averages, without intervals)"
        models = list(published.AVERAGES)
    split = _nearest(shares(models, records), size, tokens, records)
    ratio = _nearest(ratios(models, records), size, tokens, records)
    if split is None and ratio is None:
        raise UserError(f"{source}: no models that differ in their CLM share or mask ratio alone")
    return [f"evidence: {source}", *_table("CLM share of the steps, %", split, size, tokens, average),
            *_table("mask ratio, %", ratio, size, tokens, average), *_rates(analysis),
            *([] if trees else _unknown())]


def _published(family: str, model: str) -> Interval | None:
    value = published.AVERAGES.get(model, {}).get(family)
    return None if value is None else Interval(value / 100, None, 0)


def _nearest(curves: Curves, size: str, tokens: float, records: Mapping[str, ModelRecord]):
    """(label, points, size, tokens) of the curve of this size, else of any, whose budget is nearest in ratio."""
    found = []
    for label, points in curves.items():
        name = described(points[0][1], records.get(points[0][1]))
        budget = records[points[0][1]].run["tokens"] if points[0][1] in records else name.steps * PAPER_TOKENS
        found.append((name.prefix.split("-s")[0] != size, max(budget / tokens, tokens / budget), label, points,
                      name.prefix, budget))
    return min(found, key=lambda one: one[:2])[2:] if found else None


def _table(what: str, curve, size: str, tokens: float, average: Averages) -> list[str]:
    """A row for each point: its family averages and their mean; the best row, and what lies within its intervals."""
    if curve is None:
        return ["", f"{what}: no models that differ in it alone"]
    label, points, prefix, budget = curve
    families = [family for family in FAMILIES if all(average(family, model) for _, model in points)]
    if not families:
        return ["", f"{what}: the models of {label} have no family in common"]
    rows = [(place, [average(family, model) for family in families]) for place, model in points]
    means = {place: sum(one.mean for one in found) / len(found) for place, found in rows}
    best = max(means, key=means.get)
    lines = ["", f"{what} ({label}; {short_count(budget)} tokens)",
             "  " + "".join(f"{name:>16}" for name in ("", *families, "mean"))]
    for place, found in rows:
        cells = [f"{100 * one.mean:.2f}" + (f" ± {100 * one.half_width:.2f}" if one.half_width else "")
                 for one in found]
        cells = [f"{place:.0f}", *cells, f"{100 * means[place]:.2f}"]
        lines.append("  " + "".join(f"{cell:>16}" for cell in cells) + "  <- best" * (place == best))
    close = [f"{place:.0f}" for place, mean in means.items() if place != best and means[best] - mean < 0.005]
    lines.append(f"  try {best:.0f}" + (f"; {', '.join(close)} lie within half a point of it" if close else ""))
    each = {family: rows[max(range(len(rows)), key=lambda row, at=column: rows[row][1][at].mean)][0]
            for column, family in enumerate(families)}
    lines.append("  best by family: " + ", ".join(f"{family} {place:.0f}" for family, place in each.items()))
    if prefix.split("-s")[0] != size:
        lines.append(f"  not known at {size}: this is {prefix or 'another trunk'}")
    if not 0.5 < budget / tokens < 2:
        lines.append(f"  not known at {short_count(tokens)} tokens: this is {short_count(budget)}")
    return lines


def _rates(analysis: Analysis | None) -> list[str]:
    if analysis is None:
        return ["", f"fine-tuning rates: the paper searches {RATES}; which of them won is not printed"]
    chosen = Counter(run.rate for summary in analysis.cells() for run in summary.selected.values() if run.rate)
    total = sum(chosen.values())
    return ["", "fine-tuning rates, by how often validation chose them: "
            + ", ".join(f"{rate:g} {count / total:.0%}" for rate, count in chosen.most_common())]


def _unknown() -> list[str]:
    return ["", "not known:",
            "  the paper prints no intervals of averages: differences of under a point may be noise",
            "  splits were trained at 610M and 40 % only (and one at 1B)"]
