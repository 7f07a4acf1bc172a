"""One fine-tuning run, in a process that may do many: what it loads serves the next.

    1. `run_one(cell, report)`     the files of the run, NeMo's recipe, its scores
    2. `prepare_files(cell, ranks)`    its folder with NeMo's YAML, for `nemo_automodel.cli.app`
"""

import gc
import math
from collections.abc import Callable
from pathlib import Path

import yaml

from megatron_encdec.finetune import compat
from megatron_encdec.finetune.config import Cell
from megatron_encdec.finetune.record import write_cell
from megatron_encdec.platform.errors import UserError
from megatron_encdec.rundir.files import write_atomic

NEMO = "nemo.yaml"
RECIPES = {"SC": "SequenceClassification", "TC": "TokenClassification", "QA": "SpanExtraction", "IR": "Retrieval"}


def run_one(cell: Cell, report: Callable[[int, int], None] | None = None) -> dict:
    """Fine-tune `cell`; {"validation": {"score", "scores_i"}, "test": {...}}, which results.json holds too.

    `report(step, total)` is called after each step. With `training.checkpoint_every`, a run that was stopped goes on
    from its newest checkpoint. Raises `UserError` for what the user can mend, `RunFailed` where training diverged.
    """
    compat.prepare()
    from nemo_automodel.components.config.loader import ConfigNode

    from megatron_encdec.finetune import recipes
    from megatron_encdec.finetune.baselines import ensure_baselines
    from megatron_encdec.finetune.features import load_task

    ensure_baselines(cell, load_task(cell))
    config = yaml.safe_load(prepare_files(cell).read_text(encoding="utf-8"))
    recipe = getattr(recipes, RECIPES[cell.family])(ConfigNode(config))
    recipe.report = report
    recipe.setup()
    recipe.run_train_validation_loop()
    results = recipe.results
    del recipe
    gc.collect()
    return results


def prepare_files(cell: Cell, ranks: int = 1) -> Path:
    """Write cell.json and nemo.yaml, for NeMo's application on `ranks`, into the run's folder; the YAML's path."""
    from megatron_encdec.finetune.features import load_task

    config = nemo_config(cell, write_cell(cell), len(load_task(cell).train), ranks)
    write_atomic(cell.directory / NEMO, yaml.safe_dump(config, sort_keys=False))
    return cell.directory / NEMO


def nemo_config(cell: Cell, cell_file: Path, features: int, ranks: int = 1) -> dict:
    """NeMo's YAML for `cell`, whose training set has `features`; relative paths are taken from where it is run."""
    import torch

    training = cell.training
    if training.batch_size % ranks:
        raise UserError(f"training.batch_size: {training.batch_size} cannot be shared by {ranks} ranks")
    steps = min(training.max_steps, training.epochs * math.ceil(features / training.batch_size))
    micro = training.batch_size // ranks
    if cell.family != "IR":  # retrieval cuts its batch itself, after it has seen all of it
        micro = math.gcd(micro, training.micro_batch_size)
    return {
        "recipe": f"megatron_encdec.finetune.recipes.{RECIPES[cell.family]}",
        "cell": str(cell_file),
        "seed": cell.seed,
        "step_scheduler": {
            "global_batch_size": training.batch_size, "local_batch_size": max(micro, 1), "num_epochs": training.epochs,
            "max_steps": steps, "ckpt_every_steps": training.checkpoint_every or steps,
            "save_checkpoint_every_epoch": False, "validate_on_checkpoint": False, "preemption_signal": None},
        "dist_env": {"backend": "nccl" if torch.cuda.is_available() else "gloo", "timeout_minutes": 30},
        "model": {"_target_": "megatron_encdec.finetune.recipe_parts.model_of",
                  "pretrained_model_name_or_path": cell.model.path, "cell": str(cell_file)},
        "dataset": {"_target_": "megatron_encdec.finetune.recipe_parts.training_features", "cell": str(cell_file),
                    "tokenizer": None},
        "dataloader": {"shuffle": True, "num_workers": 0},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": cell.lr, "betas": list(training.betas),
                      "eps": training.eps, "weight_decay": training.weight_decay},
        "lr_scheduler": {"lr_decay_style": "linear", "lr_warmup_steps": int(training.warmup * steps),
                         "lr_decay_steps": max(steps, 1), "init_lr": 0.0, "min_lr": 0.0},
        "clip_grad_norm": {"max_norm": training.clip_grad},
        "checkpoint": {"enabled": training.checkpoint_every is not None,
                       "checkpoint_dir": str(cell.directory / "checkpoints"), "model_save_format": "torch_save",
                       "save_consolidated": False},
        "distributed": {"strategy": "ddp", "dp_size": None, "tp_size": 1, "cp_size": 1},
    }
