"""What a dataset gives without an encoder, written once beside the tree of results:

    {"metric": "accuracy", "baselines": {"majority": {"validation": {"score": 0.55}, "test": {"score": 0.51}}, ...}}

Names of baselines are free; `test.score`, from 0 to 1 and in the runs' metric, is what a report needs.

    SC   majority; naive_bayes (scikit-learn's, multinomial over lower-cased words, add-one)
         sets of classes: the same for each class; numbers: mean, and of pairs tfidf_cosine, of single texts tfidf_ridge
    TC   majority (no entity), word_tag (a word's most frequent tag in training)
    QA   no_answer (of use where questions may have none), random_span (a seeded guess of five words)
    IR   bm25 (by bm25s, as Lucene has it, k1 = 1.2, b = 0.75, over the same documents)
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from megatron_encdec.finetune.bm25 import WORD, best_by_bm25
from megatron_encdec.finetune.config import MULTI, REGRESSION, FinetuneRun
from megatron_encdec.finetune.examples import Examples, Question, Text, Words, load_examples
from megatron_encdec.finetune.features import SPLITS, Task
from megatron_encdec.finetune.fingerprints import set_made_of
from megatron_encdec.finetune.metrics import RANKS
from megatron_encdec.finetune.results_tree import BASELINES, read_json
from megatron_encdec.platform.optional import require
from megatron_encdec.rundir.files import write_json_atomic

Baselines = dict[str, Callable[[list], list]]  # name -> the answers (`Task.grade`) to examples of a split


def ensure_baselines(run: FinetuneRun, task: Task) -> None:
    """Write RESULTS/baselines/<family>/<dataset>.json, unless it is there: of the same set, or of others' making."""
    path = Path(run.results) / BASELINES / run.family / f"{run.dataset.name}.json"
    made = set_made_of(run.dataset)
    if path.is_file() and read_json(path).get("made_of", made) == made:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    examples = task.examples if run.dataset.shots is None else load_examples(run.dataset)  # whichever run is first
    kind = {"SC": _classification, "TC": _tagging, "QA": _spans, "IR": _retrieval}[run.family]
    if run.family == "SC":
        kind = {MULTI: _sets, REGRESSION: _numbers}.get(run.dataset.problem_type, kind)
    answers_of = kind(examples)
    write_json_atomic(path, {"metric": task.metric, "made_of": made, "baselines": {
        name: {split: {"score": task.grade(split, answers(getattr(task.examples, split)))["score"]}
               for split in SPLITS} for name, answers in answers_of.items()}})


def _text(example: Text) -> str:
    return f"{example.text} {example.pair or ''}"


def _naive_bayes(examples: Examples, targets: Sequence) -> Callable[[list[Text]], np.ndarray]:
    """Texts -> targets. Words that training lacks say nothing."""
    bayes = require("sklearn.naive_bayes", "the baseline naive_bayes")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(CountVectorizer(token_pattern=WORD), bayes.MultinomialNB())
    model.fit([_text(one) for one in examples.train], targets)
    return lambda rows: model.predict([_text(one) for one in rows])


def _classification(examples: Examples) -> Baselines:
    labels = [example.label for example in examples.train]
    usual, bayes = Counter(labels).most_common(1)[0][0], _naive_bayes(examples, labels)
    return {"majority": lambda rows: [usual] * len(rows), "naive_bayes": lambda rows: bayes(rows).tolist()}


def _sets(examples: Examples) -> Baselines:
    marks = np.array([[label in example.label for label in examples.labels] for example in examples.train])
    of_label = [_naive_bayes(examples, column) for column in marks.T]

    def named(rows_NC: np.ndarray) -> list[tuple[str, ...]]:
        return [tuple(label for label, here in zip(examples.labels, row, strict=True) if here) for row in rows_NC]

    return {"majority": lambda rows: named(np.tile(marks.mean(0) > 0.5, (len(rows), 1))),
            "naive_bayes": lambda rows: named(np.stack([predict(rows) for predict in of_label], axis=1))}


def _numbers(examples: Examples) -> Baselines:
    require("sklearn.linear_model", "the baseline tfidf")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline

    numbers = [example.label for example in examples.train]
    words = TfidfVectorizer(token_pattern=WORD).fit([_text(one) for one in examples.train])

    def cosine(rows: list[Text]) -> list[float]:
        first, second = (words.transform(side) for side in ([one.text for one in rows], [one.pair for one in rows]))
        return np.asarray(first.multiply(second).sum(1)).ravel().tolist()

    found = {"mean": lambda rows: [float(np.mean(numbers))] * len(rows)}
    if examples.train[0].pair is not None:
        return {**found, "tfidf_cosine": cosine}
    ridge = make_pipeline(words, Ridge()).fit([_text(one) for one in examples.train], numbers)
    return {**found, "tfidf_ridge": lambda rows: ridge.predict([_text(one) for one in rows]).tolist()}


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
    return {"bm25": lambda rows: best_by_bm25([one.query for one in rows], examples.corpus(rows), RANKS)}
