"""What a dataset gives without an encoder, written once beside the tree of results:

    {"metric": "accuracy", "baselines": {"majority": {"validation": {"score": 0.55}, "test": {"score": 0.51}}, ...}}

Names of baselines are free; `test.score`, from 0 to 1 and in the runs' metric, is what a report needs.

    SC   majority; naive_bayes (multinomial over lower-cased words, add-one; words that training lacks count too, which
         scikit-learn's leaves out)
    TC   majority (no entity), word_tag (a word's most frequent tag in training)
    QA   no_answer (of use where questions may have none), random_span (a seeded guess of five words)
    IR   bm25 (Okapi, k1 = 1.2, b = 0.75, over the same documents; Robertson and Zaragoza 2009)
"""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_encdec.finetune.config import FinetuneRun
from megatron_encdec.finetune.examples import Examples, Question, Text, Words
from megatron_encdec.finetune.features import SPLITS, Task
from megatron_encdec.finetune.metrics import RANKS
from megatron_encdec.finetune.results_tree import BASELINES
from megatron_encdec.rundir.files import write_json_atomic

K1, B = 1.2, 0.75
Baselines = dict[str, Callable[[list], list]]  # name -> the answers (`Task.grade`) to examples of a split


def ensure_baselines(run: FinetuneRun, task: Task) -> None:
    """Write RESULTS/baselines/<family>/<dataset>.json, unless an earlier run did."""
    path = Path(run.results) / BASELINES / run.family / f"{run.dataset.name}.json"
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {"SC": _classification, "TC": _tagging, "QA": _spans, "IR": _retrieval}[run.family](task.examples)
    write_json_atomic(path, {"metric": task.metric, "baselines": {
        name: {split: {"score": task.grade(split, answers(getattr(task.examples, split)))["score"]}
               for split in SPLITS} for name, answers in made.items()}})


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _classification(examples: Examples) -> Baselines:
    def words(example: Text) -> list[str]:
        return _words(f"{example.text} {example.pair or ''}")

    labels = Counter(example.label for example in examples.train)
    counts: dict[str, Counter] = defaultdict(Counter)
    for example in examples.train:
        counts[example.label].update(words(example))
    priors = {label: math.log(count / len(examples.train)) for label, count in labels.items()}
    known = len({word for of_label in counts.values() for word in of_label})
    totals = {label: of_label.total() + known for label, of_label in counts.items()}

    def likeliest(example: Text) -> str:
        found = words(example)
        return max(sorted(priors), key=lambda label: priors[label] + sum(
            math.log((counts[label][word] + 1) / totals[label]) for word in found))

    return {"majority": lambda rows: [labels.most_common(1)[0][0]] * len(rows),
            "naive_bayes": lambda rows: [likeliest(one) for one in rows]}


def _tagging(examples: Examples) -> Baselines:
    tags: dict[str, Counter] = defaultdict(Counter)
    for example in examples.train:
        for word, tag in zip(example.words, example.tags, strict=True):
            tags[word][tag] += 1
    usual = {word: counts.most_common(1)[0][0] for word, counts in tags.items()}

    def answers(rows: list[Words], tag_of: dict[str, str]) -> list[list[str]]:
        return [[tag_of.get(word, "O") for word in one.words] for one in rows]

    return {"majority": lambda rows: answers(rows, {}), "word_tag": lambda rows: answers(rows, usual)}


def _spans(_: Examples) -> Baselines:
    def random_span(rows: list[Question]) -> list[str]:
        draw, answers = random.Random(0), []
        for words in (one.context.split() for one in rows):
            first = draw.randrange(len(words))
            answers.append(" ".join(words[first : first + 5]))
        return answers

    return {"no_answer": lambda rows: [""] * len(rows), "random_span": random_span}


def _retrieval(examples: Examples) -> Baselines:
    return {"bm25": lambda rows: _bm25([one.query for one in rows], examples.corpus(rows))}


def _bm25(queries: Sequence[str], documents: Sequence[str]) -> list[list[int]]:
    """Numbers of the best documents of each query, by an inverted index; best first, ties by number."""
    postings: dict[str, list[tuple[int, int]]] = defaultdict(list)  # word -> (document, how often)
    lengths_D = np.zeros(len(documents))
    for number, text in enumerate(documents):
        counts = Counter(_words(text))
        lengths_D[number] = counts.total()
        for word, count in counts.items():
            postings[word].append((number, count))
    norm_D = K1 * (1 - B + B * lengths_D / max(lengths_D.mean(), 1e-9))
    ranked = []
    for query in queries:
        scores_D = np.zeros(len(documents))
        for word in _words(query):
            found = postings.get(word, ())
            weight = math.log(1 + (len(documents) - len(found) + 0.5) / (len(found) + 0.5))
            for number, count in found:
                scores_D[number] += weight * count * (K1 + 1) / (count + norm_D[number])
        ranked.append(np.argsort(-scores_D, kind="stable")[:RANKS].tolist())
    return ranked
