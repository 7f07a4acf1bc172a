"""What is fine-tuned on what, and how: the YAML of `megatron-encdec finetune`, and its runs.

    1. `load_config(path, overrides)`     YAML -> `FinetuneConfig`, mistakes named by their key
    2. `FinetuneConfig.runs()`            one `FinetuneRun` for each model x dataset x learning rate x seed
    3. `FinetuneRun.directory`            RESULTS/<model>/<SC|TC|QA|IR>/<dataset>/[<train set>_]lr<LR>_sd<seed>

Defaults are the protocol of arXiv 2507.00994 (fine-tuning): its rates and seeds, batch 32, at most 1000 steps or one
epoch, 10 % warm-up then linear decay, betas .9/.95, eps 1e-5, weight decay 0.1, round(0.99 * 2048) tokens.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_encdec.finetune.results_tree import BASELINES, name_of_run
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.schema import above, apply_override, at_least, build, load_yaml

MAX_LENGTH = round(0.99 * 2048)
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
METRICS = {SINGLE: ("accuracy", "f1", "macro_f1", "mcc"), MULTI: ("micro_f1", "macro_f1", "accuracy"),
           REGRESSION: ("pearson_spearman", "pearson", "spearman")}

BM25 = "bm25"

COLUMNS = {"SC": ("text", "text_pair", "label"), "TC": ("tokens", "tags"),
           "QA": ("question", "context", "answers", "is_impossible"),
           "IR": ("query", "positive", "negatives", "document")}


def _is_folder_name(name: str) -> bool:
    """Whether `name` names one folder of a results tree, and one that `study report` reads."""
    return bool(name) and "/" not in name and not name.startswith((".", "_"))


@dataclass(frozen=True)
class ModelSource:
    """A Hugging Face directory. `weights: random` keeps its shape and tokenizer and draws new weights. series: names of
    the curves that its scores are points of, in reports. Prefixes of retrieval: null is `training`'s."""

    path: str
    name: str | None = None
    weights: Literal["pretrained", "random"] = "pretrained"
    series: tuple[str, ...] = ()
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    pooling: Literal["mean", "cls", "last"] = "mean"  # of SC and IR
    query_prefix: str | None = None
    document_prefix: str | None = None

    def __post_init__(self):
        if not _is_folder_name(self.label) or self.label == BASELINES:
            raise ValueError(f"name: {self.label!r} cannot be the model's folder in the results tree, where `study "
                             f"report` passes over names that start with . or _, and {BASELINES}; give it another "
                             "`name`")

    @property
    def label(self) -> str:
        """The model's folder in the results tree: `name`, or made from `path` and what is not the default."""
        settings = ((self.weights, "pretrained"), (self.attention, "bidirectional"), (self.pooling, "mean"))
        return self.name or "-".join([Path(os.path.abspath(self.path)).name,
                                      *(value for value, default in settings if value != default)])


@dataclass(frozen=True)
class NegativesConfig:
    """Hard negatives of retrieval that are mined: of each query `count` documents that do not answer it, the best by
    BM25 or by the encoder in the directory `mined_by`, in the order of the cross-encoder in `reranked_by`. The others
    are limits on ranks and scores, as `mine_hard_negatives` of sentence-transformers has them."""

    mined_by: str = BM25
    count: int = 4
    reranked_by: str | None = None
    range_min: int = 0  # so many of the best are passed over
    range_max: int | None = None  # of so many of the best they are taken
    max_score: float | None = None  # by the cross-encoder, where there is one
    min_score: float | None = None
    absolute_margin: float | None = None  # by so much, at least, an answer of the query has a higher score
    relative_margin: float | None = None  # by such a share of the answer's

    def __post_init__(self):
        at_least(self, 1, "count")
        at_least(self, 0, "range_min", "absolute_margin", "relative_margin")
        if self.range_max is not None and self.range_max < self.range_min + self.count:
            raise ValueError(f"range_max: {self.range_max} leaves no {self.count} documents after the first "
                             f"{self.range_min}; raise it, or lower count")

    @property
    def models(self) -> list[str]:
        """Directories of the models that take part."""
        return [model for model in (self.mined_by, self.reranked_by) if model not in (BM25, None)]

    @property
    def is_plain(self) -> bool:
        """Whether they are the best by BM25, and nothing else."""
        return self == NegativesConfig(count=self.count)


@dataclass(frozen=True)
class DatasetConfig:
    """A labelled set (docs/finetune.md)."""

    name: str
    family: Literal["SC", "TC", "QA", "IR"]
    train: str  # a file, or a split of `hub`, as the next three
    test: str
    validation: str | None = None  # else 5 % of train, drawn with seed 42, as the paper's
    documents: str | None = None  # of retrieval: further texts to search
    hub: str | None = None  # NAME[:CONFIG]
    train_hub: str | None = None  # where training is on another set, which may have its own `train_columns`
    documents_hub: str | None = None  # where `documents` are another set, or another of its configurations
    beir: str | None = None  # of retrieval: a BEIR folder, whose splits train, validation and test then name
    local: str | None = None  # a folder with <split>.parquet (or .jsonl, .csv) in place of the hub
    # our names (text, text_pair, label | tokens, tags | question, context, answers | query, positive) -> the file's
    columns: dict[str, str] = field(default_factory=dict)
    train_columns: dict[str, str] | None = None
    labels: tuple[str | int, ...] | None = None  # all of SC or TC in order; else those of the whole training set
    # of SC, as transformers calls it: one class, a set of classes, or a number for each text
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] = SINGLE
    metric: str | None = None  # of SC, one of METRICS of its problem; null: the first of them
    positive_label: str | int | None = None  # of metric f1; null: "1" or "true" where that is a class
    # examples to train on, drawn with a run's seed; of SC with one class for each text: of each class
    shots: int | None = None
    negatives: NegativesConfig | None = None  # of retrieval: mined ones, beside those of the rows
    train_set: str | None = None  # of retrieval: the name of what was trained on
    max_train: int | None = None
    max_eval: int | None = None

    def __post_init__(self):
        for key, name in (("name", self.name), ("train_set", self.train_set)):
            if name is not None and not _is_folder_name(name):
                raise ValueError(f"{key}: {name!r} cannot be the name of a folder")
        if not self.train or not self.test:
            raise ValueError("train: give `train` and `test` (files, or splits of `hub`)")
        if self.labels is not None:  # 0 and "0" name one class
            object.__setattr__(self, "labels", tuple(map(str, self.labels)))
            if len(set(self.labels)) != len(self.labels):
                raise ValueError("labels: one is given twice")
        at_least(self, 1, "max_train", "max_eval", "shots")
        for key in ("columns", "train_columns"):
            for name in getattr(self, key) or ():
                if name not in COLUMNS[self.family]:
                    raise ValueError(f"{key}: {name!r} is no column of {self.family}; they are "
                                     f"{', '.join(COLUMNS[self.family])} (ours: the file's)")
        if self.negatives is not None and self.family != "IR":
            raise ValueError(f"negatives: a key of retrieval (IR), not of {self.family}")
        if self.beir is not None and (self.family != "IR" or self.local or self.hub or self.documents):
            raise ValueError("beir: a folder of retrieval (IR), which has its documents; without local, hub, documents")
        if self.family != "SC":
            for key, default in (("problem_type", SINGLE), ("metric", None), ("positive_label", None)):
                if getattr(self, key) != default:
                    raise ValueError(f"{key}: a key of SC; {self.family} has one metric")
        elif self.metric is not None and self.metric not in METRICS[self.problem_type]:
            raise ValueError(f"metric: {self.metric!r} is none of {self.problem_type}: "
                             f"{', '.join(METRICS[self.problem_type])}")
        if self.problem_type == "regression" and self.labels is not None:
            raise ValueError("labels: regression has numbers, and no classes")
        if self.positive_label is not None and self.metric != "f1":
            raise ValueError("positive_label: only metric f1 has one")


@dataclass(frozen=True)
class TrainingConfig:
    """One run's protocol."""

    batch_size: int = 32  # of all ranks: texts, in retrieval pairs
    micro_batch_size: int = 32  # of a rank
    retrieval_micro_batch_size: int = 4
    max_steps: int = 1000
    epochs: int = 1  # or max_steps, whichever ends first
    warmup: float = 0.1  # share of the steps in which the rate rises from 0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    max_length: int | None = None  # tokens; null: 0.99 of the model's positions, at most the paper's 2028
    precision: Literal["bf16", "fp32"] | None = None  # null: bf16 on a GPU, else fp32
    temperature: float = 0.05  # divides the cosines of retrieval
    hard_negatives: int | None = None  # of each query, of those that its row gives; null: all
    mined_negatives: int = 0  # short for `negatives: {count: K}` of all sets of retrieval
    query_prefix: str = "Query: "
    document_prefix: str = "Document: "
    doc_stride: int = 128  # tokens that two windows of a question's context share
    max_answer_length: int = 30  # tokens
    checkpoint_every: int | None = None  # steps; null: a run that was killed begins again
    save_model: bool = False
    onnx: bool = False  # with save_model: as ONNX too, checked

    def __post_init__(self):
        at_least(self, 1, "batch_size", "micro_batch_size", "retrieval_micro_batch_size", "max_steps", "epochs",
                 "max_answer_length", "checkpoint_every", "max_length")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup: a share of the steps from 0 to below 1, found {self.warmup}")
        above(self, 0, "temperature")
        if self.onnx and not self.save_model:
            raise ValueError("onnx: goes with save_model: true")
        at_least(self, 0, "hard_negatives", "mined_negatives")


@dataclass(frozen=True)
class GridConfig:
    """The sweep: learning rates x seeds."""

    learning_rates: tuple[float, ...] = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def __post_init__(self):
        if not self.learning_rates or any(rate <= 0 for rate in self.learning_rates):
            raise ValueError(f"learning_rates: expected rates above 0, found {list(self.learning_rates)}")
        names = [f"{rate:g}" for rate in self.learning_rates]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"learning_rates: two of them would have the folder lr{twice[0]}; give rates that differ "
                             "in their first six digits")
        if not self.seeds or any(seed < 0 for seed in self.seeds) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected different numbers from 0, found {list(self.seeds)}")


@dataclass(frozen=True)
class SweepConfig:
    """How runs are spread."""

    workers: int | None = None  # null: one for each GPU, else for each core, up to 8
    retry_failed: bool = False

    def __post_init__(self):
        at_least(self, 1, "workers")


@dataclass(frozen=True)
class FinetuneRun:
    """One run: a model on a dataset with a learning rate and a seed. Its cell.json is this."""

    model: ModelSource
    dataset: DatasetConfig
    lr: float
    seed: int
    results: str
    training: TrainingConfig = field(default_factory=TrainingConfig)

    @property
    def family(self) -> str:
        """SC, TC, QA or IR."""
        return self.dataset.family

    @property
    def prefixes(self) -> tuple[str, str]:
        """What stands before the queries and the documents of retrieval."""
        model, training = self.model, self.training
        return (training.query_prefix if model.query_prefix is None else model.query_prefix,
                training.document_prefix if model.document_prefix is None else model.document_prefix)

    @property
    def negatives(self) -> NegativesConfig | None:
        """How hard negatives are mined, if they are."""
        count = self.training.mined_negatives
        return self.dataset.negatives or (NegativesConfig(count=count) if count else None)

    @property
    def directory(self) -> Path:
        """The run's folder, as the paper's published runs are laid out."""
        train_set = (self.dataset.train_set or self.dataset.name) if self.family == "IR" else ""
        return (Path(self.results) / self.model.label / self.family / self.dataset.name
                / name_of_run(self.lr, self.seed, train_set))


@dataclass(frozen=True)
class FinetuneConfig:
    """All of a fine-tuning config. `model` is short for `models` with one of them."""

    results: str
    datasets: tuple[DatasetConfig, ...]
    models: tuple[ModelSource, ...] = ()
    model: str | None = None
    grid: GridConfig = field(default_factory=GridConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self):
        if bool(self.models) == bool(self.model):
            raise ValueError("models: give either `models` or one `model`")
        if not self.datasets:
            raise ValueError("datasets: at least one is needed")
        if self.training.mined_negatives and any(dataset.negatives for dataset in self.datasets):
            raise ValueError("training.mined_negatives: a dataset has `negatives`, which says it too; leave one out")
        labels = [model.label for model in self.all_models]
        if len(set(labels)) != len(labels):
            raise ValueError(f"models: two have the same name ({', '.join(labels)}); give each a `name`")
        folders = [run.directory for run in self.runs()]
        if twice := [folder for place, folder in enumerate(folders) if folder in folders[:place]]:
            raise ValueError(f"datasets: two of one family have the same name, and {twice[0]} would hold both")

    @property
    def all_models(self) -> tuple[ModelSource, ...]:
        """`models`, or the one `model`."""
        return self.models or (ModelSource(self.model),)

    def runs(self) -> list[FinetuneRun]:
        """Every run: datasets within models, so that what one has loaded serves the next."""
        return [FinetuneRun(model, dataset, rate, seed, self.results, self.training)
                for model in self.all_models for dataset in self.datasets
                for rate in self.grid.learning_rates for seed in self.grid.seeds]


def load_config(path: str | Path, overrides: list[str] = ()) -> FinetuneConfig:
    """The config in the YAML file at `path` with `dotted.key=value` overrides; `UserError` names a wrong key."""
    data = load_yaml(path)
    for override in overrides:
        apply_override(data, override, FinetuneConfig)
    config = build(FinetuneConfig, data)
    for model in config.all_models:
        if not (Path(model.path) / "config.json").is_file():
            raise UserError(f"{model.path}: no Hugging Face model (no config.json there); "
                            "make one with `megatron-encdec export`")
    for number, dataset in enumerate(config.datasets):
        for model in dataset.negatives.models if dataset.negatives else ():
            if not os.path.isdir(model):
                raise UserError(f"datasets.{number}.negatives: {model}: no such folder; name one that holds a model "
                                "of sentence-transformers or transformers (mined_by: also bm25)")
    if os.path.isfile(config.results):
        raise UserError(f"results: {config.results} is a file; name a folder for the results tree")
    return config
