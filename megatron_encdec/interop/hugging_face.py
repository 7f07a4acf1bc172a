"""Hugging Face model directories: written from a state dict, loaded through the Auto classes, nothing remote.

    1. `build_model`   a stock class around given tensors, no initial weights
    2. `write_model`   config.json, safetensors, generation_config.json
    3. `load_model`    back through the Auto class, with every key
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_encdec.interop.families import Target

SHARD = "5GB"  # at most, of a safetensors file


class ParityError(Exception):
    """The Hugging Face model is not the trunk: a fault of the conversion, never the user's."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars and warnings; they would stand between the verb's lines."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def build_model(target: Target, config, weights: dict[str, torch.Tensor]):
    """An instance of the class that holds `weights` themselves; `ParityError` if the names do not match."""
    import transformers
    from transformers.initialization import no_init_weights

    with no_init_weights():  # no time for weights that are replaced
        model = getattr(transformers, target.model_class)(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    missing = set(missing) - ({target.family.names.tied[0]} if config.tie_word_embeddings else set())
    if missing or unexpected:
        raise ParityError(f"{target.model_class}: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    model.tie_weights()
    return model.eval()


def write_model(target: Target, config, weights: dict[str, torch.Tensor], directory: Path,
                shard_size: str = SHARD) -> None:
    """config.json, safetensors of at most `shard_size` and, for a causal model, generation_config.json."""
    config.dtype = next(iter(weights.values())).dtype
    with quiet():
        build_model(target, config, weights).save_pretrained(directory, max_shard_size=shard_size)
    if target.is_encoder:
        (directory / "generation_config.json").unlink(missing_ok=True)


def load_model(target: Target, directory: Path):
    """The model in `directory`, in fp32, through its Auto class; `ParityError` unless every key fits."""
    import transformers

    with quiet():
        model, info = getattr(transformers, target.auto_class).from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    faults = {kind: sorted(info[kind]) for kind in kinds if info[kind]}
    if faults or type(model).__name__ != target.model_class:
        raise ParityError(f"{directory} loads as {type(model).__name__} with {faults or 'all keys'}; "
                          f"expected {target.model_class} with every key")
    return model.eval()
