"""What the paper prints, to stand beside ours (arXiv 2507.00994: its tables of averages and one cell that was checked).

Per cent. Averages are over the three datasets of a family (`DATASETS`); a model is known by the name that its results
were published under: `610m-mlm40-42k`, `610m-clm-10k-mlm40-42k` (10k steps of CLM, 42k in all) and, continued from a
decayed checkpoint, `610m-clm-dec42k-mlm40-64k`.

    1. `dataset_name(family, folder)`     the paper's name of a dataset, or None if it is not one of the paper's
    2. `AVERAGES[model][family]`, `CELLS[model, dataset]`
"""

import re

FAMILIES = ("SC", "TC", "QA", "IR")
# The paper's name -> how folders may call it, in lower case without punctuation.
DATASETS = {
    "SC": {"SST-2": ("sst2",), "QQP": ("qqp",), "MNLI": ("mnli", "mnlim", "mnlimatched")},
    "TC": {"CoNLL-2003": ("conll2003", "conll03", "conll2003en"),
           "OntoNotes": ("ontonotes", "ontonotes5", "ontonotesv5"),
           "UNER": ("uner", "uneren", "unerewt", "unerenewt")},
    "QA": {"SQuAD": ("squad", "squadv1", "squad11"), "SQuAD-v2": ("squadv2", "squad2", "squad20"),
           "ReCoRD": ("record",)},
    "IR": {"MS MARCO": ("msmarco", "msmarcopassage"), "NQ": ("nq", "naturalquestions"), "MLDR": ("mldr", "mldren")},
}
TRAIN_SETS = ("", "msmarco_pairs", "msmarco")  # of retrieval; other train sets are another experiment

_BASE = {  # objective -> averages at 42k steps for 210M, 610M, 1B
    "mlm20": ("85.07/92.17/51.73/74.74", "87.56/92.79/65.00/77.01", "87.97/92.72/68.41/79.22"),
    "mlm30": ("85.12/92.18/51.01/75.59", "86.43/92.00/61.47/77.50", "87.00/92.51/62.02/79.46"),
    "mlm40": ("84.89/92.13/49.43/75.78", "87.00/92.21/62.77/79.55", "88.23/92.51/70.28/79.95"),
    "mlm50": ("85.04/92.09/48.65/77.04", "86.68/92.53/63.95/79.62", "88.21/92.88/69.61/81.97"),
    "clm": ("82.80/92.18/39.26/72.83", "83.58/92.69/42.09/76.20", "82.68/92.46/44.48/78.68"),
}
_SPLITS = {  # steps in all, thousands -> {steps of CLM: averages}, 610M; without CLM and without MLM at the ends
    12: {0: "83.04/91.58/41.51/69.90", 3: "83.67/92.16/43.77/74.94", 6: "83.63/92.15/42.78/75.22",
         9: "82.32/92.53/41.53/74.99", 12: "80.86/92.14/39.07/72.77"},
    22: {0: "86.07/92.28/51.44/77.54", 5: "86.31/92.77/54.43/77.29", 11: "86.33/92.83/55.97/77.47",
         17: "85.29/92.82/53.39/77.81", 22: "82.97/92.63/41.14/75.71"},
    42: {10: "87.85/93.07/67.77/79.88", 21: "87.58/92.89/59.51/79.67", 32: "87.06/92.92/61.41/79.79"},
}
_CONTINUED = {  # the decayed 42k checkpoint of -> {MLM steps on top, thousands: averages}, 610M
    "mlm40": {2: "87.08/92.16/63.56/80.42", 12: "87.61/92.27/66.57/79.92", 22: "87.47/92.11/67.66/80.45"},
    "clm": {2: "85.39/92.88/47.85/78.57", 12: "87.84/92.77/63.21/80.27", 22: "88.40/92.70/66.62/80.70"},
}


def _averages() -> dict[str, dict[str, float]]:
    rows = {f"{size}-{objective}-42k": text for objective, texts in _BASE.items()
            for size, text in zip(("210m", "610m", "1b"), texts, strict=True)}
    for total, splits in _SPLITS.items():
        for clm, text in splits.items():
            stages = {0: "mlm40", total: "clm"}.get(clm, f"clm-{clm}k-mlm40")
            rows[f"610m-{stages}-{total}k"] = text
    for source, added in _CONTINUED.items():
        rows |= {f"610m-{source}-dec42k-mlm40-{42 + steps}k": text for steps, text in added.items()}
    return {name: dict(zip(FAMILIES, map(float, text.split("/")), strict=True)) for name, text in rows.items()}


AVERAGES = _averages()  # model -> {family: average over its three datasets, per cent}
CELLS = {("610m-clm-42k", "SST-2"): 91.10}  # (model, dataset) -> per cent
_BY_FOLDER = {(family, folder): name for family, names in DATASETS.items()
              for name, folders in names.items() for folder in folders}


def dataset_name(family: str, folder: str, train_set: str = "") -> str | None:
    """The paper's name of the dataset in the folder `folder`, or None if that is none of the paper's."""
    plain = re.sub(r"[^a-z0-9]", "", folder.lower())
    return _BY_FOLDER.get((family, plain)) if train_set in TRAIN_SETS else None
