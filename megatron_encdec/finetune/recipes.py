"""The four families as recipes of NeMo AutoModel: subclasses of its sequence classification, run by its application.

    torchrun --nproc-per-node 2 -m nemo_automodel.cli.app RUN/nemo.yaml      (`prepare_files` in run.py writes it)

    1. `setup`                         NeMo's: process group, model and DDP, optimizer, schedule, loader, checkpoints;
                                       `model_of` and `training_features` are what the YAML names as `_target_`
    2. `_run_train_optim_step`         sum of losses over number of targets, both of the *global* batch, so ranks and
                                       micro-batches change nothing
    3. `run_train_validation_loop`     all steps, scores (computed in shares among ranks), record.json, results.json

Legend of shapes: B texts of a micro-batch, S tokens, C classes, H hidden size, N documents of the global batch, D of
a rank's share of it.
"""

import contextlib
import importlib.metadata
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from nemo_automodel.components.loggers.metric_logger import MetricsSample
from nemo_automodel.components.training.utils import clip_grad_norm
from nemo_automodel.recipes.llm.train_seq_cls import TrainFinetuneRecipeForSequenceClassification

from megatron_encdec import __version__
from megatron_encdec.finetune import compat
from megatron_encdec.finetune.batches import like_lengths
from megatron_encdec.finetune.card import write_card
from megatron_encdec.finetune.config import MULTI, SINGLE, FinetuneRun
from megatron_encdec.finetune.features import IGNORED, SPLITS, Feature, load_task
from megatron_encdec.finetune.fingerprints import made_of
from megatron_encdec.finetune.models import build_model, check_attention, pool, save_model
from megatron_encdec.finetune.onnx_export import export_onnx
from megatron_encdec.finetune.results_tree import RECORD, write_results
from megatron_encdec.platform.errors import RunFailed
from megatron_encdec.platform.schema import build
from megatron_encdec.rundir.files import write_json_atomic

EVALUATED_TOKENS = 16384  # of a batch without gradients, padding included
PACKAGES = ("torch", "transformers", "tokenizers", "nemo-automodel", "seqeval", "numpy")  # that decide a score


def model_of(settings: str, **_) -> torch.nn.Module:
    """The model of the run whose cell.json is `settings`, with the head of its family."""
    run = _read_run(settings)
    task = load_task(run)
    return build_model(run.model, run.family, task.labels, task.pad,
                       run.dataset.problem_type if run.family == "SC" else None)


def training_features(settings: str, **_) -> list[Feature]:
    """The training set of the run whose cell.json is `settings`."""
    return load_task(_read_run(settings)).train


def _read_run(path: str) -> FinetuneRun:
    return build(FinetuneRun, json.loads(Path(path).read_text(encoding="utf-8")), path)


class EncoderRecipe(TrainFinetuneRecipeForSequenceClassification):
    """What the families share; they say what a batch's loss and a feature's output are."""

    report = None  # called as report(step, total) after each step, and again before the results are written
    per_token = False  # whether an output has a row for each token
    facts: dict[str, int] = {}  # what the family has counted, for record.json

    def __init__(self, cfg):
        self.began = time.perf_counter()
        compat.prepare()
        super().__init__(cfg)
        self.run = _read_run(self.cfg.get("settings"))
        self.task, self.made_of = load_task(self.run), made_of(self.run)

    def setup(self):
        """NeMo's, then what only we know: the device where there is no GPU, that the model sees what it should, and how
        features become batches."""
        super().setup()
        device = self.dist_env.device  # None on a CPU; a number where the group was there already
        if not isinstance(device, torch.device):
            self.dist_env.device = torch.device("cpu") if device is None else torch.device("cuda", device)
        with self._autocast_context():
            check_attention(self.encoder, self.run.model)
        self.dataloader.collate_fn = list  # a rank's features of a step; `_backward` makes batches of them
        scheduler = self.step_scheduler
        self.total_steps = min(scheduler.max_steps, scheduler.num_epochs * scheduler.epoch_len)

    def _autocast_context(self):
        precision = self.run.training.precision or ("bf16" if torch.cuda.is_available() else "fp32")
        return torch.autocast(self.dist_env.device.type, torch.bfloat16, enabled=precision == "bf16")

    def _on_device(self, batch: dict) -> dict:
        return {name: tensor.to(self.dist_env.device, non_blocking=True) for name, tensor in batch.items()}

    def _run_train_optim_step(self, batches: list[list[Feature]]) -> MetricsSample:
        """One step over the global batch; gradients are those of (sum of losses) / (number of targets)."""
        began, ranks = time.perf_counter(), self._get_dp_group_size()
        (features,) = batches
        count = max(int(self._dp_allreduce(torch.tensor(self._targets(features)))), 1)
        total = self._backward(features, ranks / count)
        norm = clip_grad_norm(self.max_grad_norm, self.model_parts, device_mesh=self.device_mesh,
                              use_torch_clip_grad_norm=True)
        rate = self.optimizer[0].param_groups[0]["lr"]
        for optimizer in self.optimizer:
            optimizer.step()
            optimizer.zero_grad()
        for scheduler in self.lr_scheduler or ():
            scheduler.step(1)
        loss = float(self._dp_allreduce(total.detach().float().cpu())) / count
        return MetricsSample(self.step_scheduler.step, self.step_scheduler.epoch, {
            "loss": loss, "grad_norm": float(norm), "lr": rate, "targets": count,
            "seconds": time.perf_counter() - began})

    def _backward(self, features: list[Feature], scale: float) -> torch.Tensor:
        """Gradients of this rank's part of a step, `scale` times the sum of its losses; that sum. Texts of like length
        are a micro-batch; ranks meet at the last one."""
        model, total = self.model_parts[0], torch.zeros((), device=self.dist_env.device)
        batches = like_lengths([len(feature["ids"]) for feature in features], self.run.training.micro_batch_size)
        for place, numbers in enumerate(batches, 1):
            batch = self._on_device(self.task.collate([features[number] for number in numbers]))
            with _meeting(model, place == len(batches)):
                with self._autocast_context():
                    loss = self._loss_sum(model, batch)
                (loss * scale).backward()
            total += loss.detach()
        return total

    def _targets(self, features: list[Feature]) -> int:
        return len(features)

    def _loss_sum(self, model, batch: dict) -> torch.Tensor:
        """Cross-entropy over classes, added up over the texts, or over the tokens that have a label."""
        return F.cross_entropy(_logits(model, batch).float().flatten(0, -2), batch["labels"].flatten(),
                               ignore_index=IGNORED, reduction="sum")

    def log_train_metrics(self, log_data: MetricsSample) -> None:
        """A line of training.jsonl, and the progress of whoever asked for it."""
        if self.dist_env.is_main:
            self.metric_logger_train.log(log_data)
        if self.report is not None:
            self.report(self.step_scheduler.step + 1, self.total_steps)

    def _say_nothing(self, *_, **__) -> None:
        """The run's folder has its settings, NeMo's YAML and the versions; the sweep shows progress."""

    _make_progress_bar = _log_experiment_details = _log_library_versions = _log_model_and_optimizer_details = \
        _say_nothing

    def run_train_validation_loop(self) -> None:
        """Train, then write the scores of validation and test into the run's folder."""
        if self.step_scheduler.step < self.total_steps:
            super().run_train_validation_loop()
        self.results = {split: self.task.score(split, self.outputs(split)) for split in SPLITS}
        total = sum(float(parameter.detach().float().sum()) for parameter in self.encoder.parameters())
        if not math.isfinite(total):  # such weights still give scores
            raise RunFailed(f"training diverged: the weights are not finite after step {self.total_steps}")
        if self.report is not None:
            self.report(self.total_steps, self.total_steps)
        if self.dist_env.is_main:
            self._finish()

    def _finish(self) -> None:
        """The model, if it is kept; the record; results.json last."""
        run, task = self.run, self.task
        if run.training.save_model:
            self._save_model(run.directory / "model", run.directory / ".model.unfinished")
        versions = {name: found.version for name in PACKAGES for found in importlib.metadata.distributions(name=name)}
        write_json_atomic(run.directory / RECORD, {
            "metric": task.metric, "steps": self.total_steps, "ranks": self.dist_env.world_size, **self.facts,
            "seconds": time.perf_counter() - self.began, "train_features": len(task.train),
            "max_length": task.max_length, **task.counts, "labels": list(task.labels),
            "made_of": self.made_of, "versions": {"megatron-encdec": __version__, **versions}})
        write_results(run.directory, self.results)

    def _save_model(self, target: Path, unfinished: Path) -> None:
        """A stock directory, or one for sentence-transformers, whole or not there."""
        shutil.rmtree(unfinished, ignore_errors=True)
        save_model(self.encoder, unfinished, self.run.model, self.run.family, self.task.max_length)
        self.task.tokenizer.model_max_length = self.task.max_length  # what is longer is cut, whoever loads it
        self.task.tokenizer.save_pretrained(unfinished)
        write_card(unfinished, self.run, self.task.metric, self.task.max_length, self.results)
        if self.run.training.onnx:
            longest = sorted(self.task.features("test"), key=lambda feature: -len(feature["ids"]))
            batch = self._on_device(self.task.collate([longest[0], longest[-1]]))
            self.task.counts["onnx_difference"] = export_onnx(self.encoder, unfinished, batch["input_ids"],
                                                              batch["attention_mask"])
        if self.run.family == "IR":
            prompts = dict(zip(("query", "document"), self.run.prefixes, strict=True))
            write_json_atomic(unfinished / "config_sentence_transformers.json", {
                "prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"})
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)

    @property
    def encoder(self) -> torch.nn.Module:
        """The model without DDP."""
        model = self.model_parts[0]
        return getattr(model, "module", model)

    @torch.no_grad()
    def outputs(self, split: str) -> list[np.ndarray]:
        """One for each feature of `split`, on every rank; each computes its share, texts of like length together."""
        features, model = self.task.features(split), self.encoder.eval()
        found: dict[int, np.ndarray] = {}
        batches = like_lengths([len(feature["ids"]) for feature in features], EVALUATED_TOKENS, EVALUATED_TOKENS)
        for numbers in batches[self.dist_env.rank :: self.dist_env.world_size]:
            batch = self._on_device(self.task.collate([features[number] for number in numbers]))
            with self._autocast_context():
                values = self._outputs(model, batch).float().cpu().numpy()
            for row, number in enumerate(numbers):
                found[number] = values[row, : len(features[number]["ids"])] if self.per_token else values[row]
        everywhere = {number: value for share in self._gathered(found) for number, value in share.items()}
        return [everywhere[number] for number in range(len(features))]

    def _gathered(self, value: Any) -> list[Any]:
        """`value` of each rank."""
        if self.dist_env.world_size == 1:
            return [value]
        values = [None] * self.dist_env.world_size
        torch.distributed.all_gather_object(values, value)
        return values

    def _outputs(self, model, batch: dict) -> torch.Tensor:
        return _logits(model, batch).argmax(-1)  # [B], or [B, S] where `per_token`


def _meeting(model, meet: bool) -> contextlib.AbstractContextManager:
    """Ranks add up their gradients in a backward pass only where they `meet`."""
    return contextlib.nullcontext() if meet or not hasattr(model, "no_sync") else model.no_sync()


def _random_state() -> list[torch.Tensor]:
    """Of the CPU's generator, and of the GPU's where there is one."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def _set_random_state(state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state(state[1])


def _logits(model, batch: dict) -> torch.Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


class SequenceClassification(EncoderRecipe):
    """SC: for each text a class, a set of classes (each a target of its own), or a number (squared error). No class
    weighs more than another."""

    def _targets(self, features: list[Feature]) -> int:
        return len(features) * (len(self.task.labels) if self.task.problem == MULTI else 1)

    def _loss_sum(self, model, batch: dict) -> torch.Tensor:
        if self.task.problem == SINGLE:
            return super()._loss_sum(model, batch)
        logits_BC = _logits(model, batch).float()
        if self.task.problem == MULTI:
            return F.binary_cross_entropy_with_logits(logits_BC, batch["labels"], reduction="sum")
        return F.mse_loss(logits_BC.squeeze(-1), batch["labels"], reduction="sum")

    def _outputs(self, model, batch: dict) -> torch.Tensor:
        """[B] classes or numbers, [B, C] truth values of sets."""
        logits_BC = _logits(model, batch).float()
        if self.task.problem == SINGLE:
            return logits_BC.argmax(-1)
        return logits_BC > 0 if self.task.problem == MULTI else logits_BC.squeeze(-1)


class TokenClassification(EncoderRecipe):
    """TC: a class at the first token of each word."""

    per_token = True

    def _targets(self, features: list[Feature]) -> int:
        return sum(label != IGNORED for feature in features for label in feature["labels"])


class SpanExtraction(EncoderRecipe):
    """QA: cross-entropy over positions, of the start and of the end."""

    per_token = True

    def _outputs(self, model, batch: dict) -> torch.Tensor:
        """[B, S, 2]; -inf where no answer can be."""
        return _logits(model, batch).float().masked_fill(~batch["allowed"].unsqueeze(-1), -torch.inf)

    def _loss_sum(self, model, batch: dict) -> torch.Tensor:
        logits_BS2 = self._outputs(model, batch)
        return F.cross_entropy(logits_BS2, batch["labels"], reduction="sum") / 2  # over S, for start and end


class _Masked:
    """How many documents were no negatives so far; kept in NeMo's checkpoints."""

    total = 0

    def state_dict(self) -> dict:
        return {"total": self.total}

    def load_state_dict(self, state: dict) -> None:
        self.total = state["total"]


class Retrieval(EncoderRecipe):
    """IR: a query's own document against all documents of the global batch, hard negatives of all its queries included,
    which never is in memory at once.

    A document of the batch that answers the query too (another of its positives, or the same document beside another
    query) is no negative: it is left out of the query's softmax.

    Gao et al. 2021 (GradCache): embed everything without gradients, take the loss's gradient with respect to the
    embeddings, then run each micro-batch again and carry that gradient on into the encoder. A batch that is one
    micro-batch's size, on one rank, is run once.
    """

    def __init__(self, cfg):
        super().__init__(cfg)
        self.masked, self.masked_in_step = _Masked(), 0

    def _run_train_optim_step(self, batches: list[list[Feature]]) -> MetricsSample:
        done = super()._run_train_optim_step(batches)
        self.masked.total += int(self._dp_allreduce(torch.tensor(self.masked_in_step)))
        self.masked_in_step = 0
        return done

    @property
    def facts(self) -> dict[str, int]:
        return {"masked_negatives": self.masked.total}

    def _embed(self, model, ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
        with self._autocast_context():
            hidden_BSH = model(input_ids=ids_BS, attention_mask=mask_BS).last_hidden_state
        return F.normalize(pool(hidden_BSH.float(), mask_BS, self.run.model.pooling), dim=-1)

    def _backward(self, features: list[Feature], scale: float) -> torch.Tensor:
        model, size = self.model_parts[0], self.run.training.retrieval_micro_batch_size
        batch, chunks, order = self._on_device(self.task.collate(features)), [], []
        for first, prefix in ((0, ""), (len(features), "document_")):  # queries, then documents
            ids_BS, mask_BS = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
            lengths = mask_BS.sum(1).tolist()
            for numbers in like_lengths(lengths, size):
                chunks.append((ids_BS[numbers, : lengths[numbers[0]]], mask_BS[numbers, : lengths[numbers[0]]]))
                order += [first + number for number in numbers]
        once = len(features) <= size and self.dist_env.world_size == 1
        states, parts = [], []  # what dropout draws from, to draw the same again
        with torch.set_grad_enabled(once):
            for chunk in chunks:
                states.append(_random_state())
                parts.append(self._embed(self.encoder, *chunk))
        order = torch.tensor(order, device=parts[0].device)
        embeddings = torch.cat(parts).detach()[order.argsort()]
        loss, gradient = self._loss_and_gradient(embeddings, batch["document"], batch["positives"])
        gradients = (gradient[order] * scale).split([len(part) for part in parts])
        if once:
            torch.autograd.backward(parts, gradients)
            return loss
        with torch.random.fork_rng():
            for number, (chunk, own, state) in enumerate(zip(chunks, gradients, states, strict=True), 1):
                _set_random_state(state)
                with _meeting(model, number == len(chunks)):
                    self._embed(model, *chunk).backward(own)
        return loss

    def _loss_and_gradient(self, embeddings: torch.Tensor, numbers_D: torch.Tensor,
                           positives_BP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of this rank's losses, and the gradient of all ranks' losses at its queries and documents. numbers_D:
        which documents those of this rank are, the queries' own first; positives_BP: which answer each query (P at
        most)."""
        count, device = len(positives_BP), embeddings.device
        queries = embeddings[:count].detach().requires_grad_()
        shares = self._gathered((embeddings[count:].detach().cpu(), numbers_D.cpu()))
        first = sum(len(share) for share, _ in shares[: self.dist_env.rank])
        documents = torch.cat([share for share, _ in shares]).to(device).requires_grad_()
        numbers_N = torch.cat([numbers for _, numbers in shares]).to(device)
        targets_B = torch.arange(count, device=device) + first
        others_BN = (positives_BP.unsqueeze(-1) == numbers_N).any(1).scatter(1, targets_B.unsqueeze(1), False)
        self.masked_in_step += int(others_BN.sum())
        scores_BN = queries @ documents.T / self.run.training.temperature
        loss = F.cross_entropy(scores_BN.masked_fill(others_BN, -torch.inf), targets_B, reduction="sum")
        loss.backward()
        of_documents = self._dp_allreduce(documents.grad).to(device)
        return loss.detach(), torch.cat([queries.grad, of_documents[first : first + len(numbers_D)]])

    def _outputs(self, model, batch: dict) -> torch.Tensor:
        return self._embed(model, batch["input_ids"], batch["attention_mask"])  # [B, H]
