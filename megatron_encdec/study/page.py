"""The report as one HTML file that needs no network: style and figures (as vectors) are inside, there is no script.

    1. `page(analysis, tables, pictures)`     -> the text of index.html
"""

import base64
from collections.abc import Sequence
from html import escape

from megatron_encdec import __version__
from megatron_encdec.study.analysis import Analysis
from megatron_encdec.study.drawing import Picture, svg
from megatron_encdec.study.tables import Table, html

# section -> (title, tables shown open, tables folded away)
SECTIONS = {
    "scores": ("Scores", ("overview",), ("scores", "seeds")),
    "comparisons": ("Comparisons", ("comparisons",), ()),
    "checkpoints": ("Checkpoints", (), ("checkpoints",)),
    "sensitivity": ("Learning rate", ("sensitivity",), ("rates",)),
    "published": ("Published", ("published",), ()),
    "problems": ("Failed or missing", ("problems",), ()),
}
FOLDED_ROWS = 40  # a longer table is folded away, except the first of the page
METHOD = """\
<p>Each model is fine-tuned at several learning rates and seeds. For each seed the run with the best
<em>validation</em> score is selected, and its <em>test</em> score counts; the score of a model is the mean of those
over seeds, with the interval 1.96 · std / √n (std with n − 1). Differences between models are taken seed by seed and
summarised the same way. With few seeds this interval is narrower than Student's t would give. Sensitivity to the
learning rate is the spread of the test scores of one seed over all its learning rates. Runs that failed or are
missing are listed, never filled in.</p>"""
STYLE = """\
:root{--ink:#1f2933;--muted:#6b7785;--line:#e4e8ec;--soft:#f6f8fa;--accent:#0072b2}
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:4rem}
body{margin:0;color:var(--ink);background:#fff;
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif}
header{padding:2.6rem 0 1.6rem;background:var(--soft);border-bottom:1px solid var(--line)}
.wide{max-width:1180px;margin:0 auto;padding:0 1.5rem}
h1{margin:0 0 .3rem;font-size:1.9rem;letter-spacing:-.02em}
h2{margin:0 0 .4rem;font-size:1.3rem;letter-spacing:-.01em}
h3{margin:1.8rem 0 .3rem;font-size:1rem}
p{margin:.3rem 0 .8rem;max-width:78ch}
.sub,.note{color:var(--muted)}
.note{font-size:.86rem}
.facts{display:flex;flex-wrap:wrap;gap:.8rem;margin-top:1.3rem}
.fact{background:#fff;border:1px solid var(--line);border-radius:10px;padding:.6rem 1.1rem;min-width:7.5rem}
.fact b{display:block;font-size:1.35rem;line-height:1.3;font-variant-numeric:tabular-nums}
.fact span{color:var(--muted);font-size:.82rem}
.warn b{color:#b3261e}
nav{position:sticky;top:0;z-index:5;background:#ffffffee;border-bottom:1px solid var(--line)}
nav .wide{display:flex;flex-wrap:wrap;gap:0 1.5rem}
nav a{padding:.75rem 0;color:var(--ink);text-decoration:none;font-size:.9rem}
nav a:hover{color:var(--accent)}
section{padding:2rem 0 1rem}
.scroll{overflow-x:auto;width:fit-content;max-width:100%;border:1px solid var(--line);border-radius:10px;
margin:.7rem 0 1.2rem}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.45rem .8rem;white-space:nowrap;border-bottom:1px solid var(--line);vertical-align:baseline}
tbody tr:last-child td{border-bottom:0}
tbody tr:hover{background:var(--soft)}
th:first-child,td:first-child{position:sticky;left:0;background:#fff}
tbody tr:hover td:first-child,thead th:first-child{background:var(--soft)}
th{background:var(--soft);font-weight:600;font-size:.8rem;color:var(--muted)}
th.g{text-align:center;color:var(--ink);border-left:1px solid var(--line)}
.n{text-align:right}
.t{text-align:left}
td.long{white-space:normal;min-width:22rem}
td small{color:var(--muted);font-size:.82em}
td.best{font-weight:700}
td.best small{font-weight:400}
tr.aside td{color:var(--muted)}
.figures{display:flex;flex-wrap:wrap;gap:1.2rem 2.2rem;margin:1.4rem 0 2rem}
figure{margin:0;max-width:100%}
figure img{display:block;max-width:100%;height:auto}
figcaption{margin-bottom:.6rem}
figcaption b{display:block}
figcaption span{color:var(--muted);font-size:.86rem}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--accent);font-size:.9rem}
footer{padding:1.6rem 0 2.4rem;color:var(--muted);font-size:.84rem;border-top:1px solid var(--line);margin-top:1.5rem}
@media print{nav{display:none}.scroll{overflow:visible}section{break-inside:avoid-page}}
"""
_SHELL = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Fine-tuning results</title>
<style>
{style}</style>
</head>
<body>
<header><div class="wide"><h1>Fine-tuning results</h1>
<p class="sub">{subtitle}</p>
<div class="facts">{facts}</div></div></header>
<nav><div class="wide">{links}</div></nav>
<main class="wide">
{sections}
</main>
<footer><div class="wide">megatron-encdec {version}. Protocol and published numbers: arXiv 2507.00994. Scores in per
cent; four decimals under the pointer, all of them in tables/*.csv.</div></footer>
</body>
</html>
"""


def page(analysis: Analysis, tables: dict[str, Table], pictures: Sequence[Picture]) -> str:
    """The whole file."""
    sections = {name: text for name in SECTIONS if (text := _section(name, tables, pictures))}
    sections["method"] = f'<section id="method"><h2>Method</h2>{METHOD}</section>'
    titles = {**{name: title for name, (title, _, _) in SECTIONS.items()}, "method": "Method"}
    links = "".join(f'<a href="#{name}">{titles[name]}</a>' for name in sections)
    return _SHELL.format(style=STYLE, subtitle=escape(_subtitle(analysis)), facts=_facts(analysis), links=links,
                         sections="\n".join(sections.values()), version=__version__)


def _subtitle(analysis: Analysis) -> str:
    models = analysis.results.models
    shown = ", ".join(models[:4]) + (f" and {len(models) - 4} more" if len(models) > 4 else "")
    return f"{shown} on {', '.join(analysis.label(task) for task in analysis.results.tasks)}"


def _facts(analysis: Analysis) -> str:
    cells = analysis.results.cells.values()
    failed, missing = sum(len(cell.failures) for cell in cells), sum(len(cell.missing) for cell in cells)
    facts = [(len(analysis.results.models), "model", "", ""), (len(analysis.results.tasks), "dataset", "", ""),
             (sum(len(cell.finished) for cell in cells), "run", " finished", ""),
             (failed, "run", " failed", "warn" if failed else ""),
             (missing, "run", " missing", "warn" if missing else "")]
    return "".join(f'<div class="fact {kind}"><b>{count:,}</b><span>{name}{"s" * (count != 1)}{rest}</span></div>'
                   for count, name, rest, kind in facts)


def _section(name: str, tables: dict[str, Table], pictures: Sequence[Picture]) -> str:
    """A section with its tables and figures; empty where it has neither."""
    title, shown, folded = SECTIONS[name]
    figures = "".join(map(_figure, (picture for picture in pictures if picture.section == name)))
    figures = f'<div class="figures">{figures}</div>' if figures else ""
    first = "".join(_table(tables[one], len(tables[one].rows) > FOLDED_ROWS and one != "overview")
                    for one in shown if one in tables)
    rest = "".join(_table(tables[one], True) for one in folded if one in tables)
    if not first and not figures and not rest:
        return ""
    return f'<section id="{name}"><h2>{title}</h2>{first}{figures}{rest}</section>'


def _table(table: Table, is_folded: bool) -> str:
    note = f'<p class="note">{escape(table.note).replace("`", "")}</p>' if table.note else ""
    if is_folded:
        summary = f"{escape(table.title)} ({len(table.rows)} row{'s' * (len(table.rows) != 1)})"
        return f"<details><summary>{summary}</summary>{note}{html(table)}</details>"
    return f"{note}{html(table)}"


def _figure(picture: Picture) -> str:
    source = base64.b64encode(svg(picture)).decode()
    width = round(96 * picture.figure.get_figwidth())
    title, caption = escape(picture.title), escape(picture.caption)
    return (f'<figure style="max-width:{max(width, 480)}px">'
            f"<figcaption><b>{title}</b><span>{caption}</span></figcaption>"
            f'<img width="{width}" alt="{title}. {caption}" src="data:image/svg+xml;base64,{source}"></figure>')
