"""What the paper prints, to stand beside ours (arXiv 2507.00994: its tables of averages and one cell that was checked).

Per cent. Averages (published.csv) are over the three datasets of a family; a model is known by the name that its
results were published under: `610m-mlm40-42k`, `610m-clm-10k-mlm40-42k` (10k steps of CLM, 42k in all) and, continued
from a decayed checkpoint, `610m-clm-dec42k-mlm40-64k`.
"""

import csv
import re
from pathlib import Path

# Family -> the paper's name -> how folders may call it, in lower case without punctuation.
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
CELLS = {("610m-clm-42k", "SST-2"): 91.10}  # (model, dataset) -> per cent
with open(Path(__file__).with_name("published.csv"), encoding="utf-8") as _file:
    AVERAGES = {row.pop("model"): {family: float(value) for family, value in row.items()}  # model -> {family: average}
                for row in csv.DictReader(_file)}


def dataset_name(family: str, folder: str, train_set: str = "") -> str | None:
    """The paper's name of the dataset in the folder `folder`, or None if that is none of the paper's."""
    plain = re.sub(r"[^a-z0-9]", "", folder.lower())
    names = [name for name, folders in DATASETS.get(family, {}).items() if plain in folders]
    return names[0] if names and train_set in TRAIN_SETS else None
