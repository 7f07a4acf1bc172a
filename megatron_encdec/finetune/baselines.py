"""What a dataset gives without an encoder, written once beside the tree of results:

    {"metric": "accuracy", "baselines": {"majority": {"validation": {"score": 0.55}, "test": {"score": 0.51}}, ...}}

Names of baselines are free; `test.score`, from 0 to 1 and in the runs' metric, is what a report needs.

    SC   majority; naive_bayes (multinomial over lower-cased words, add-one; words that training lacks count too, which
         scikit-learn's leaves out)
    TC   majority (no entity), word_tag (a word's most frequent tag in training)
    QA   no_answer (of use where questions may have none), random_span (a seeded guess of five words)
    IR   bm25 (Okapi, k1 = 1.2, b = 0.75, over the same documents)

    1. `ensure_baselines(run, task)`     RESULTS/baselines/<family>/<dataset>.json, if it is not there
"""

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_encdec.finetune import metrics
from megatron_encdec.finetune.config import FinetuneRun
from megatron_encdec.finetune.examples import Examples, positives_of
from megatron_encdec.finetune.features import SPLITS, Task
from megatron_encdec.finetune.results_tree import BASELINES
from megatron_encdec.rundir.files import write_json_atomic

K1, B = 1.2, 0.75
Scorer = Callable[[list], dict]  # examples -> {"score", "scores_i"}


def ensure_baselines(run: FinetuneRun, task: Task) -> None:
    """Compute and write the baselines of the run's dataset, unless an earlier run did."""
    path = Path(run.results) / BASELINES / run.family / f"{run.dataset.name}.json"
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"SC": _classification, "TC": _tagging, "QA": _spans, "IR": _retrieval}[run.family](task.examples)
    write_json_atomic(path, {"metric": task.metric, "baselines": {
        name: {split: {"score": of(getattr(task.examples, split))["score"]} for split in SPLITS}
        for name, of in found.items()}})


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _classification(examples: Examples) -> dict[str, Scorer]:
    def text(example) -> str:
        return f"{example.text} {example.pair or ''}"

    def score(rows: list, label_of: Callable) -> dict:
        return metrics.accuracy([label_of(one) for one in rows], [one.label for one in rows])

    most = Counter(example.label for example in examples.train).most_common(1)[0][0]
    bayes = NaiveBayes([text(one) for one in examples.train], [one.label for one in examples.train])
    return {"majority": lambda rows: score(rows, lambda one: most),
            "naive_bayes": lambda rows: score(rows, lambda one: bayes.label(text(one)))}


class NaiveBayes:
    """Multinomial naive Bayes with add-one smoothing."""

    def __init__(self, texts: Sequence[str], labels: Sequence[str]):
        self._counts: dict[str, Counter] = defaultdict(Counter)
        for text, label in zip(texts, labels, strict=True):
            self._counts[label].update(_words(text))
        self._priors = {label: math.log(count / len(labels)) for label, count in Counter(labels).items()}
        known = len({word for counts in self._counts.values() for word in counts})
        self._totals = {label: counts.total() + known for label, counts in self._counts.items()}

    def label(self, text: str) -> str:
        """The likeliest label."""
        words = _words(text)
        return max(sorted(self._priors), key=lambda label: self._priors[label] + sum(
            math.log((self._counts[label][word] + 1) / self._totals[label]) for word in words))


def _tagging(examples: Examples) -> dict[str, Scorer]:
    tags: dict[str, Counter] = defaultdict(Counter)
    for example in examples.train:
        for word, tag in zip(example.words, example.tags, strict=True):
            tags[word][tag] += 1
    usual = {word: counts.most_common(1)[0][0] for word, counts in tags.items()}

    def score(rows: list, tag_of: Callable[[str], str]) -> dict:
        return metrics.entity_f1([[tag_of(word) for word in one.words] for one in rows], [one.tags for one in rows])

    return {"majority": lambda rows: score(rows, lambda word: "O"),
            "word_tag": lambda rows: score(rows, lambda word: usual.get(word, "O"))}


def _spans(_: Examples) -> dict[str, Scorer]:
    def score(rows: list, guess: Callable) -> dict:
        return metrics.answer_f1([guess(one) for one in rows], [[text for text, _ in one.answers] for one in rows])

    def random_span(rows: list) -> dict:
        draw = random.Random(0)

        def guess(example) -> str:
            words = example.context.split()
            first = draw.randrange(len(words))
            return " ".join(words[first : first + 5])

        return score(rows, guess)

    return {"no_answer": lambda rows: score(rows, lambda one: ""), "random_span": random_span}


def _retrieval(examples: Examples) -> dict[str, Scorer]:
    def score(rows: list) -> dict:
        corpus = examples.corpus(rows)
        numbers = {text: number for number, text in enumerate(corpus)}
        ranked = Bm25(corpus)
        return metrics.ndcg([ranked.best(one.query, metrics.RANKS) for one in rows],
                            [{numbers[text] for text in positives} for positives in positives_of(rows)])

    return {"bm25": score}


class Bm25:
    """Okapi BM25 (Robertson and Zaragoza 2009) by an inverted index."""

    def __init__(self, documents: Sequence[str]):
        self._postings: dict[str, list[tuple[int, int]]] = defaultdict(list)
        lengths = []
        for number, text in enumerate(documents):
            counts = Counter(_words(text))
            lengths.append(counts.total())
            for word, count in counts.items():
                self._postings[word].append((number, count))
        self._lengths_D = np.array(lengths, dtype=float)
        self._norm_D = K1 * (1 - B + B * self._lengths_D / max(self._lengths_D.mean(), 1e-9))

    def best(self, query: str, count: int) -> list[int]:
        """Numbers of the `count` best documents, best first; ties by number."""
        scores_D = np.zeros(len(self._lengths_D))
        for word in _words(query):
            postings = self._postings.get(word, ())
            weight = math.log(1 + (len(scores_D) - len(postings) + 0.5) / (len(postings) + 0.5))
            for number, frequency in postings:
                scores_D[number] += weight * frequency * (K1 + 1) / (frequency + self._norm_D[number])
        return np.argsort(-scores_D, kind="stable")[:count].tolist()
