"""Examples as tokens, and what a model answers as scores: one `Task` for each family.

    1. `load_task(run)`               examples, tokenizer, features; the last ones are kept for the next run
    2. `Task.train`                   a list of features, each a dict of lists; `collate` makes a batch
    3. `Task.features(split)`         what to run the model on; `Task.score(split, outputs)` its scores

A feature: `ids` (tokens) and `labels` (SC: one class, 0 or 1 for each class, or a number; TC: a label a token, -100
where none; QA: start, end). Retrieval has a feature for each query and positive in training (`ids`, `document_ids`, the
numbers of the document and of all the query's positives, its hard negatives), `ids` alone when texts are embedded. Of
what is longer than `max_length` tokens, a text of classification or retrieval is cut, a context goes into windows, and
a sentence of token classification is refused, for its last words would have no tags. What happened to texts stands in
`Task.counts`, and in record.json.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from megatron_encdec.finetune import metrics
from megatron_encdec.finetune.config import MAX_LENGTH, METRICS, MULTI, REGRESSION, DatasetConfig, FinetuneRun
from megatron_encdec.finetune.examples import Examples, Pair, Question, Text, Words, load_examples
from megatron_encdec.finetune.mining import FOLDER as NEGATIVES
from megatron_encdec.finetune.mining import mine
from megatron_encdec.finetune.models import positions_of
from megatron_encdec.finetune.rows import files_of
from megatron_encdec.finetune.token_cache import FOLDER, TokenCache
from megatron_encdec.platform.errors import UserError

IGNORED = -100
SPLITS = ("validation", "test")
KEPT = 2  # tasks
_TASKS: dict[str, "Task"] = {}
Feature = dict[str, Any]


def load_task(run: FinetuneRun) -> "Task":
    """The task of `run`; runs that differ in learning rate alone share it, and in seed unless that draws examples."""
    changed = [path.stat().st_mtime_ns for path in files_of(run.dataset).values() if path.is_file()]
    seed = run.seed if run.dataset.shots is not None else 0
    key = repr((run.model.path, run.results, seed, run.prefixes, run.dataset, run.training, changed))
    if key not in _TASKS:
        kinds = {"SC": Classification, "TC": Tagging, "QA": Spans, "IR": Retrieval}
        _TASKS[key] = kinds[run.family](run, load_examples(run.dataset, seed))
    _TASKS[key] = _TASKS.pop(key)  # the newest is the last
    for old in list(_TASKS)[:-KEPT]:
        del _TASKS[old]
    return _TASKS[key]


class Task:
    """What a family does with examples. `labels` are those of the model's head."""

    metric = ""

    def __init__(self, run: FinetuneRun, examples: Examples):
        self.run, self.training, self.examples, self.labels = run, run.training, examples, examples.labels
        self.query_prefix, self.document_prefix = run.prefixes
        self.numbers = {label: number for number, label in enumerate(self.labels)}
        self.tokenizer = _load_tokenizer(run.model.path)
        self._tokens = TokenCache(self.tokenizer, Path(run.results) / FOLDER)
        self.pad = self.tokenizer.pad_token_id
        self.ends = [one for one in (self.tokenizer.sep_token_id, self.tokenizer.eos_token_id) if one is not None]
        self.separator = (self.ends or [self.pad])[0]
        positions, asked = positions_of(run.model), run.training.max_length
        if asked is not None and asked > positions:
            raise UserError(f"training.max_length: {asked} tokens, but {run.model.path} has {positions} positions")
        self.max_length = asked or min(MAX_LENGTH, round(0.99 * positions))
        self.counts: Counter[str] = Counter(cut_texts=0)
        if examples.unlabelled:
            self.counts["rows_without_label"] = sum(examples.unlabelled.values())
        self.train: list[Feature] = self._train()
        self._evaluated: dict[str, list[Feature]] = {}

    def features(self, split: str) -> list[Feature]:
        """Of `validation` or `test`, made once."""
        if split not in self._evaluated:
            self._evaluated[split] = self._features(getattr(self.examples, split))
        return self._evaluated[split]

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Tokens of each text, cut at `max_length` (the tokenizer's token at the end stays); a text that it makes
        nothing of is a token of padding."""
        rows = self._uncut(texts, special)
        self.counts["cut_texts"] += sum(len(row) > self.max_length for row in rows)
        return [self._cut(row) for row in rows]

    def _uncut(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        rows = self._tokens(texts, special)["input_ids"]
        if empty := sum(not row for row in rows):
            self.counts["texts_without_tokens"] += empty
        return [row or [self.pad] for row in rows]

    def _cut(self, row: list[int]) -> list[int]:
        end = row[-1:] if len(row) > self.max_length and row[-1] in self.ends else []
        return [*row[: self.max_length - len(end)], *end]

    def collate(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        """A batch, padded on the right: input_ids and attention_mask [B, S], and `labels` where there are some."""
        batch = self._padded(features, "ids")
        if "labels" in features[0]:
            labels = [torch.tensor(feature["labels"]) for feature in features]
            batch["labels"] = (pad_sequence(labels, batch_first=True, padding_value=IGNORED) if labels[0].dim()
                               else torch.stack(labels))
        return batch

    def score(self, split: str, outputs: list) -> dict:
        """{"score", "scores_i"} by `metric` of the model's outputs, one for each of `features(split)`."""
        raise NotImplementedError

    def grade(self, split: str, answers: list) -> dict:
        """The same of answers, one for each example of `split`, whoever gave them."""
        raise NotImplementedError

    def _train(self) -> list[Feature]:
        return self._features(self.examples.train)

    def _features(self, examples: list) -> list[Feature]:
        raise NotImplementedError

    def _padded(self, features: Sequence[Feature], key: str) -> dict[str, torch.Tensor]:
        rows = [torch.tensor(feature[key]) for feature in features]
        return {"input_ids": pad_sequence(rows, batch_first=True, padding_value=self.pad),
                "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)}


def _load_tokenizer(path: str):
    """The tokenizer of the model in `path`, with something to pad with."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer there ({str(error).splitlines()[0]})") from None
    if not tokenizer.is_fast:
        raise UserError(f"{path}: its tokenizer has no tokenizer.json, which spans need for their offsets")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    tokenizer.padding_side = "right"
    return tokenizer


def _positive_label(dataset: DatasetConfig, labels: Sequence[str]) -> str:
    """The class that metric f1 is about."""
    asked = None if dataset.positive_label is None else str(dataset.positive_label)
    found = asked or next((label for label in ("1", "true") if label in labels), None)
    if len(labels) != 2 or found not in labels:
        raise UserError(f"{dataset.name}: metric f1 is about one of two classes; here are {', '.join(labels)}: "
                        + ("name one of them as `positive_label`" if len(labels) == 2 else "take macro_f1"))
    return found


class Classification(Task):
    """SC: outputs are class numbers, answers class names. With several classes for a text outputs are a truth value for
    each class, of regression numbers."""

    def __init__(self, run: FinetuneRun, examples: Examples):
        self.problem = run.dataset.problem_type
        self.metric = run.dataset.metric or METRICS[self.problem][0]
        self.positive = _positive_label(run.dataset, examples.labels) if self.metric == "f1" else None
        super().__init__(run, examples)

    def _features(self, examples: list[Text]) -> list[Feature]:
        texts = [example.text for example in examples]
        if any(example.pair is not None for example in examples):
            pairs = self._uncut([example.pair or "" for example in examples], special=False)
            rows = [self._two(row, pair) for row, pair in zip(self._uncut(texts), pairs, strict=True)]
        else:
            rows = self.encode(texts)
        return [{"ids": row, "labels": self._target(example.label)}
                for row, example in zip(rows, examples, strict=True)]

    def _target(self, label) -> int | float | list[float]:
        if self.problem == MULTI:
            return [float(one in label) for one in self.labels]
        return label if self.problem == REGRESSION else self.numbers[label]

    def _two(self, first: list[int], second: list[int]) -> list[int]:
        """first, separator, second; of both, the longer is cut until they fit."""
        room, lengths = self.max_length - 1, (len(first), len(second))
        first, second = self._cut(first), self._cut(second)
        keep = max(min(len(first), room - len(second)), min(len(first), room // 2))
        first, second = first[:keep], second[: room - keep]
        self.counts["cut_texts"] += sum(len(row) < length for row, length in zip((first, second), lengths, strict=True))
        return [*first, self.separator, *second]

    def score(self, split: str, outputs: list) -> dict:
        if self.problem == MULTI:
            return self.grade(split, [tuple(label for label, here in zip(self.labels, one, strict=True) if here)
                                      for one in outputs])
        if self.problem == REGRESSION:
            return self.grade(split, [float(one) for one in outputs])
        return self.grade(split, [self.labels[int(one)] for one in outputs])

    def grade(self, split: str, answers: list) -> dict:
        gold = [example.label for example in getattr(self.examples, split)]
        if self.problem == MULTI:
            return metrics.of_sets(self.metric, answers, gold, self.labels)
        if self.problem == REGRESSION:
            return metrics.of_numbers(self.metric, answers, gold)
        return metrics.of_classes(self.metric, answers, gold, self.positive)


class Tagging(Task):
    """TC: a word's tag stands at its first token (arXiv 2507.00994 follows CoNLL); outputs are a label a token,
    answers a tag a word."""

    metric = "entity F1 (seqeval)"

    def _features(self, examples: list[Words]) -> list[Feature]:
        words = [(" " if place else "") + word for example in examples for place, word in enumerate(example.words)]
        tokens = iter(self._tokens(words, special=False)["input_ids"])
        features = []
        for example in examples:
            ids, labels = [], []
            for tag in example.tags:
                word = next(tokens) or [self.pad]
                ids += word
                labels += [self.numbers[tag]] + [IGNORED] * (len(word) - 1)
            if len(ids) > self.max_length:
                raise UserError(f"{example.where}: {len(ids)} tokens, more than the {self.max_length} that the model "
                                "takes; split the sentence")
            features.append({"ids": ids, "labels": labels})
        return features

    def score(self, split: str, outputs: list) -> dict:
        return self.grade(split, [
            [self.labels[int(one)] for one, label in zip(output, feature["labels"], strict=True) if label != IGNORED]
            for output, feature in zip(outputs, self.features(split), strict=True)])

    def grade(self, split: str, answers: list[list[str]]) -> dict:
        return metrics.entity_f1(answers, [example.tags for example in getattr(self.examples, split)])


class Spans(Task):
    """QA: question, separator, a window of the context. Position 0 stands for "no answer here".

    Outputs are (start, end) logits, a row for each token. The answer is the best pair over all windows of a question;
    none ("") where the training set has questions without answers and position 0 beats it (SQuAD 2.0).
    """

    metric = "answer F1 (SQuAD)"
    BEST = 20  # starts and ends that are paired

    def _train(self) -> list[Feature]:
        """Without the questions whose answer no window holds (it is longer than what windows share, or the tokenizer
        makes nothing of it): they would be learnt as questions without an answer. They are counted."""
        features, examples = super()._train(), self.examples.train
        held = {feature["example"] for feature in features if feature["labels"] != [0, 0]}
        if lost := {number for number, example in enumerate(examples) if example.answers} - held:
            self.counts["answers_in_no_window"] = len(lost)
        if len(lost) == len(examples):
            raise UserError(f"{examples[0].where}: no window of {self.max_length} tokens holds the answer, of this or "
                            "any other question; raise training.max_length or training.doc_stride")
        return [feature for feature in features if feature["example"] not in lost]

    def _features(self, examples: list[Question]) -> list[Feature]:
        questions = self._tokens([example.question for example in examples], special=False)["input_ids"]
        contexts = self._tokens([example.context for example in examples], special=False, offsets=True)
        return [window for number, each in enumerate(zip(examples, questions, contexts["input_ids"],
                                                         contexts["offset_mapping"], strict=True))
                for window in self._windows(number, *each)]

    def _windows(self, number: int, example: Question, question: list[int], context: list[int],
                 offsets: list[tuple[int, int]]) -> list[Feature]:
        prefix = [*question[: self.max_length // 2], self.separator]
        room = self.max_length - len(prefix)
        step = max(1, room - min(self.training.doc_stride, room // 2))
        text, start = example.answers[0] if example.answers else ("", 0)
        touched = [place for place, (first, last) in enumerate(offsets) if first < start + len(text) and last > start]
        windows = []
        for begin in range(0, max(len(context), 1), step):
            end = min(begin + room, len(context))
            inside = bool(touched) and begin <= touched[0] and touched[-1] < end
            labels = [place - begin + len(prefix) for place in (touched[0], touched[-1])] if inside else [0, 0]
            windows.append({"ids": prefix + context[begin:end], "labels": labels, "example": number,
                            "prefix": len(prefix), "offsets": offsets[begin:end]})
            if end == len(context):
                break
        return windows

    def collate(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        """With `allowed` [B, S]: where an answer may start and end (the context, and position 0)."""
        batch = super().collate(features)
        allowed = batch["attention_mask"].bool()
        for row, feature in enumerate(features):
            allowed[row, 1 : feature["prefix"]] = False
        return {**batch, "allowed": allowed}

    def score(self, split: str, outputs: list) -> dict:
        examples = getattr(self.examples, split)
        may_be_none = any(not example.answers for example in self.examples.train)
        best = [(-np.inf, "") for _ in examples]
        null = np.full(len(examples), np.inf)
        for feature, output in zip(self.features(split), outputs, strict=True):
            number = feature["example"]
            null[number] = min(null[number], float(output[0, 0] + output[0, 1]))
            value, first, last = self._best_span(output[feature["prefix"] :])
            if value > best[number][0]:
                offsets = feature["offsets"]
                best[number] = value, examples[number].context[offsets[first][0] : offsets[last][1]]
        return self.grade(split, ["" if may_be_none and null[number] > value else text
                                  for number, (value, text) in enumerate(best)])

    def grade(self, split: str, answers: list[str]) -> dict:
        gold = [[text for text, _ in example.answers] for example in getattr(self.examples, split)]
        return metrics.answer_f1(answers, gold)

    def _best_span(self, logits_T2: np.ndarray) -> tuple[float, int, int]:
        starts = np.argsort(-logits_T2[:, 0])[: self.BEST]
        ends = np.argsort(-logits_T2[:, 1])[: self.BEST]
        pairs = [(float(logits_T2[first, 0] + logits_T2[last, 1]), int(first), int(last))
                 for first in starts for last in ends if first <= last < first + self.training.max_answer_length]
        return max(pairs, default=(-np.inf, 0, 0))


class Retrieval(Task):
    """IR: outputs are embeddings of unit length, answers the best documents' numbers in the corpus: every positive of
    the split and all `documents` are searched."""

    metric = "NDCG@10"

    def _train(self) -> list[Feature]:
        """A feature for each positive of each query, with the query's hard negatives. Documents are told apart by what
        the model sees of them."""
        examples = self.examples.train
        queries, answers = self._queries(examples), self.examples.answers("train")
        negatives = self._negatives(examples, answers)
        texts = list(dict.fromkeys(text for example, more in zip(examples, negatives, strict=True)
                                   for text in (*example.positives, *more)))
        documents = dict(zip(texts, self._documents(texts), strict=True))
        numbers: dict[tuple, int] = {}
        number_of = {text: numbers.setdefault(tuple(ids), len(numbers)) for text, ids in documents.items()}
        features = []
        for example, query, positives, more in zip(examples, queries, answers, negatives, strict=True):
            own = sorted({number_of[text] for text in positives if text in number_of})
            features += [{"ids": query, "document_ids": documents[text], "document": number_of[text], "positives": own,
                          "negatives": [(number_of[one], documents[one]) for one in more]}
                         for text in dict.fromkeys(example.positives)]
        self.counts["queries"], self.counts["positives"] = len(examples), len(features)
        self.counts["hard_negatives"] = sum(map(len, negatives))
        return features

    def _negatives(self, examples: list[Pair], answers: list[list[str]]) -> list[list[str]]:
        """Of each query: those that its row gives, then mined ones; none that answers it."""
        given = [[text for text in dict.fromkeys(example.negatives) if text not in own][: self.training.hard_negatives]
                 for example, own in zip(examples, map(set, answers), strict=True)]
        if (how := self.run.negatives) is None:
            return given
        own = {example.query: documents for example, documents in zip(examples, answers, strict=True)}
        mined = mine(own, self.examples.corpus(examples), how, how.count + max(map(len, given)),
                     Path(self.run.results) / NEGATIVES)
        return [first + [text for text in mined[example.query] if text not in first][: how.count]
                for example, first in zip(examples, given, strict=True)]

    def _features(self, examples: list[Pair]) -> list[Feature]:
        return [{"ids": ids} for ids in
                [*self._queries(examples), *self._documents(self.examples.corpus(examples))]]

    def _queries(self, examples: list[Pair]) -> list[list[int]]:
        return self.encode([self.query_prefix + example.query for example in examples])

    def _documents(self, texts: list[str]) -> list[list[int]]:
        return self.encode([self.document_prefix + text for text in texts])

    def collate(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        """In training the documents stand beside the queries, their own first, then all hard negatives:
        `document_input_ids` and its mask [D, S], `document` [D] their numbers, `positives` [B, P] the numbers of
        all the query's positives, -1 after the last."""
        batch = super().collate(features)
        if "document_ids" in features[0]:
            documents = [(feature["document"], feature["document_ids"]) for feature in features]
            documents += [one for feature in features for one in feature["negatives"]]
            padded = self._padded([{"ids": ids} for _, ids in documents], "ids")
            batch |= {f"document_{name}": tensor for name, tensor in padded.items()}
            batch["document"] = torch.tensor([number for number, _ in documents])
            batch["positives"] = pad_sequence([torch.tensor(feature["positives"]) for feature in features],
                                              batch_first=True, padding_value=-1)
        return batch

    def score(self, split: str, outputs: list) -> dict:
        count = len(getattr(self.examples, split))
        queries, documents = np.stack(outputs[:count]), np.stack(outputs[count:])
        ranked = []
        for begin in range(0, count, 256):
            scores = queries[begin : begin + 256] @ documents.T
            ranked += np.argsort(-scores, axis=1, kind="stable")[:, : metrics.RANKS].tolist()
        return self.grade(split, ranked)

    def grade(self, split: str, answers: list[list[int]]) -> dict:
        examples = getattr(self.examples, split)
        numbers = {text: number for number, text in enumerate(self.examples.corpus(examples))}
        return metrics.ndcg(answers, [{numbers[text] for text in known if text in numbers}
                                      for known in self.examples.answers(split)])
