"""One fine-tuning run: its settings in the forms that it and NeMo's application read, and the run itself.

    1. `run_one(run, report)`          in a process that may do many: what it loads serves the next
    2. `prepare_files(run, ranks)`     cell.json (all settings) and nemo.yaml, which points to it and repeats the run by
                                       `nemo_automodel.cli.app`, on one rank or more
"""

import gc
import math
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from megatron_encdec.finetune import compat
from megatron_encdec.finetune.baselines import ensure_baselines
from megatron_encdec.finetune.config import FinetuneRun
from megatron_encdec.finetune.features import load_task
from megatron_encdec.finetune.results_tree import SETTINGS
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.schema import to_dict
from megatron_encdec.rundir.files import write_atomic, write_json_atomic

NEMO = "nemo.yaml"
_MODULE = "megatron_encdec.finetune.recipes"
RECIPES = {"SC": "SequenceClassification", "TC": "TokenClassification", "QA": "SpanExtraction", "IR": "Retrieval"}


def run_one(run: FinetuneRun, report: Callable[[int, int], None] | None = None) -> dict:
    """Fine-tune; {"validation": {"score", "scores_i"}, "test": {...}}, which results.json holds too.

    `report(step, total)` is called after each step, and again before the results are written. With
    `training.checkpoint_every`, a run that was stopped goes on from its newest checkpoint. Raises `UserError` for what
    the user can mend, `RunFailed` where training diverged.
    """
    recipe = make_recipe(run)
    recipe.report = report
    recipe.run_train_validation_loop()
    results = recipe.results
    del recipe
    gc.collect()
    return results


def make_recipe(run: FinetuneRun):
    """The recipe of `run`, set up to train."""
    compat.prepare()
    from nemo_automodel.components.config.loader import ConfigNode

    from megatron_encdec.finetune import recipes

    ensure_baselines(run, load_task(run))
    config = yaml.safe_load(prepare_files(run).read_text(encoding="utf-8"))
    recipe = getattr(recipes, RECIPES[run.family])(ConfigNode(config))
    recipe.setup()
    return recipe


def prepare_files(run: FinetuneRun, ranks: int = 1) -> Path:
    """Write cell.json and nemo.yaml, for NeMo's application on `ranks`, into the run's folder; the YAML's path."""
    run.directory.mkdir(parents=True, exist_ok=True)
    write_json_atomic(run.directory / SETTINGS, to_dict(run))
    config = _nemo_config(run, run.directory / SETTINGS, len(load_task(run).train), ranks)
    write_atomic(run.directory / NEMO, yaml.safe_dump(config, sort_keys=False))
    return run.directory / NEMO


def _nemo_config(run: FinetuneRun, settings: Path, features: int, ranks: int) -> dict:
    """NeMo's YAML for a training set of `features`; relative paths are taken from where it is run."""
    training = run.training
    if training.batch_size % ranks:
        raise UserError(f"training.batch_size: {training.batch_size} cannot be shared by {ranks} ranks")
    steps = min(training.max_steps, training.epochs * math.ceil(features / training.batch_size))
    return {
        "recipe": f"{_MODULE}.{RECIPES[run.family]}",
        "settings": str(settings),
        "seed": run.seed,
        "step_scheduler": {
            "global_batch_size": training.batch_size, "local_batch_size": training.batch_size // ranks,
            "num_epochs": training.epochs, "max_steps": steps, "ckpt_every_steps": training.checkpoint_every or steps,
            "save_checkpoint_every_epoch": False, "validate_on_checkpoint": False, "preemption_signal": None},
        "dist_env": {"backend": "nccl" if torch.cuda.is_available() else "gloo", "timeout_minutes": 30},
        "model": {"_target_": f"{_MODULE}.model_of", "pretrained_model_name_or_path": run.model.path,
                  "settings": str(settings)},
        "dataset": {"_target_": f"{_MODULE}.training_features", "settings": str(settings), "tokenizer": None},
        "dataloader": {"shuffle": True, "num_workers": 0},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": run.lr, "betas": list(training.betas),
                      "eps": training.eps, "weight_decay": training.weight_decay},
        "lr_scheduler": {"lr_decay_style": "linear", "lr_warmup_steps": int(training.warmup * steps),
                         "lr_decay_steps": max(steps, 1), "init_lr": 0.0, "min_lr": 0.0},
        "clip_grad_norm": {"max_norm": training.clip_grad},
        "checkpoint": {"enabled": training.checkpoint_every is not None,
                       "checkpoint_dir": str(run.directory / "checkpoints"), "model_save_format": "torch_save",
                       "save_consolidated": False},
        "distributed": {"strategy": "ddp", "dp_size": None, "tp_size": 1, "cp_size": 1},
    }
