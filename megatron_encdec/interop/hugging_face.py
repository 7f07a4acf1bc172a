"""Hugging Face model directories: written from a state dict, loaded through the Auto classes, nothing remote.

    1. `hugging_face_config`   the config of a class for a trunk
    2. `build_model`           a stock class around given tensors, no initial weights
    3. `write_model`           config.json, safetensors, generation_config.json
    4. `write_pooling`         what sentence-transformers reads beside an encoder
    5. `load_model`            back through the Auto class, with every key
    6. `check_logits`          whether it computes what the trunk computes (tools/check_parity.py asks more)

All classes of a shape compute the same function up to the attention: causal in decoders; bidirectional in encoders, and
in a decoder's class with `is_causal: false`, which transformers 5.18 honours on every attention path that
tests/interop/test_attention_of_exports.py can reach on a CPU.

Legend: B windows, S tokens of a window, V vocabulary, N positions.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_encdec.interop.families.family import Target
from megatron_encdec.interop.names import tied_names
from megatron_encdec.model.config import ModelConfig
from megatron_encdec.objectives.base import AttentionKind
from megatron_encdec.platform.device import device
from megatron_encdec.platform.errors import ParityError
from megatron_encdec.rundir.files import write_json_atomic
from megatron_encdec.text.tokenizer import Tokenizer

FILE_SIZE = "5GB"  # of a safetensors file, at most
TOLERANCE = 1e-3  # on logits in fp32: two orders above what rounding does, far below what any mistake does
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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


def hugging_face_config(target: Target, model: ModelConfig, positions: int, tokenizer: Tokenizer | None,
                        special: Mapping[str, int | None] | None = None):
    """An instance of the class's config; pad is always set (EuroBERT's default lies beyond small tables).

    positions: how many the weights have been trained for; the more of it and `model.max_positions` is named.
    """
    import transformers

    special = dict(special or {})
    if tokenizer is not None:
        special |= {"pad": tokenizer.pad_id, "eos": tokenizer.eod_id}
    if target.is_encoder:
        special["mask"] = tokenizer.mask_id
    family = target.family
    said = family.write(model) | ({} if target.is_native else family.turned(model))
    return getattr(transformers, family.config_class)(
        **said, **family.ids(special), max_position_embeddings=max(positions, model.max_positions or 0),
        attention_dropout=0.0, architectures=[target.model_class])


def build_model(target: Target, config, weights: dict[str, torch.Tensor]):
    """An instance of the class that holds `weights` themselves; `ParityError` if the names do not match."""
    import transformers
    from transformers.initialization import no_init_weights

    with no_init_weights():  # no time for weights that are replaced
        model = getattr(transformers, target.model_class)(config)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    missing = set(missing) - ({tied_names(target.family.rows)[0]} if config.tie_word_embeddings else set())
    if missing or unexpected:
        raise ParityError(f"{target.model_class}: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    model.tie_weights()
    return model.eval()


def write_model(target: Target, config, weights: dict[str, torch.Tensor], directory: Path,
                file_size: str = FILE_SIZE) -> None:
    """config.json, safetensors of at most `file_size` each and, for a causal model, generation_config.json."""
    config.dtype = next(iter(weights.values())).dtype
    model = build_model(target, config, weights)
    generation = getattr(model, "generation_config", None)
    if generation is not None and isinstance(generation.pad_token_id, int) and generation.pad_token_id < 0:
        generation.pad_token_id = None  # Llama's -1, which transformers reads and does not write
    with quiet():
        model.save_pretrained(directory, max_shard_size=file_size)
    if target.is_encoder:
        (directory / "generation_config.json").unlink(missing_ok=True)


def write_pooling(directory: Path, hidden_size: int, positions: int, pooling: str | None = "mean",
                  head: Sequence[torch.nn.Linear] = ()) -> None:
    """What sentence-transformers reads: mean pooling (arXiv 2507.00994, retrieval), or `cls` or `last`, padding left
    out, or None; then the layers of `head`, with GELU between them."""
    modules = [("", "Transformer"), *([("1_Pooling", "Pooling")] if pooling else [])]
    for number, layer in enumerate(head, start=1):
        folder = f"{len(modules)}_Dense"
        modules.append((folder, "Dense"))
        (directory / folder).mkdir()
        activation = "linear.Identity" if number == len(head) else "activation.GELU"
        name = "sentence_embedding" if pooling else "token_embeddings"
        write_json_atomic(directory / folder / "config.json", {
            "in_features": layer.in_features, "out_features": layer.out_features, "bias": True,
            "activation_function": f"torch.nn.modules.{activation}", "module_input_name": name,
            "module_output_name": name})
        save_file({f"linear.{key}": tensor.detach().cpu().contiguous() for key, tensor in layer.state_dict().items()},
                  directory / folder / "model.safetensors")
    write_json_atomic(directory / "modules.json", [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(modules)])
    if pooling:
        (directory / "1_Pooling").mkdir()
        write_json_atomic(directory / "1_Pooling" / "config.json", {
            "word_embedding_dimension": hidden_size, "pooling_mode_cls_token": pooling == "cls",
            "pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            **({"pooling_mode_lasttoken": True} if pooling == "last" else {})})
    write_json_atomic(directory / "sentence_bert_config.json", {"max_seq_length": positions, "do_lower_case": False})


def load_model(target: Target, directory: Path):
    """The model in `directory`, in fp32, through its Auto class; `ParityError` unless every key fits."""
    import transformers

    path = {"attn_implementation": "eager"} if target.family.eager else {}
    with quiet():
        model, info = getattr(transformers, target.auto_class).from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, local_files_only=True, **path)
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    faults = {kind: sorted(info[kind]) for kind in kinds if info[kind]}
    if faults or type(model).__name__ != target.model_class:
        raise ParityError(f"{directory} loads as {type(model).__name__} with {faults or 'all keys'}; "
                          f"expected {target.model_class} with every key")
    return model.eval()


@torch.no_grad()
def trunk_logits(trunk: torch.nn.Module, tokens_BS: torch.Tensor, kind: AttentionKind) -> torch.Tensor:
    """Logits [B, S, V] on the CPU of whole windows, vocabulary padding cut off; `trunk` is a whole `Trunk`."""
    windows, length = tokens_BS.shape
    starts = torch.arange(0, windows * length + 1, length, dtype=torch.int32, device=device())
    context = trunk.attention_context(kind, starts, length, False, windows, length)
    hidden = trunk.hidden_states(tokens_BS.to(device()), context)
    positions_N = torch.arange(windows * length, device=device())
    logits_NV = trunk.logits(hidden, positions_N, windows)[:, : trunk.model.vocabulary_size]
    return logits_NV.view(windows, length, -1).cpu()


@torch.no_grad()
def logits_difference(trunk: torch.nn.Module, hugging_face, kind: AttentionKind, windows: int = 2,
                      length: int = 64, apart: int | None = None) -> float:
    """max |trunk - HF| over all logits of `windows` x `length` random tokens; NaN if one is.

    Windows are no longer than the model's positions. The token `apart` is neither read nor predicted: a mask whose
    rows an import replaced.
    """
    length = min(length, hugging_face.config.max_position_embeddings, trunk.max_sequence_length)
    rows = min(trunk.model.vocabulary_size, hugging_face.config.vocab_size)  # without a mask that an import added
    generator = torch.Generator().manual_seed(0)
    read = torch.tensor([token for token in range(rows) if token != apart])
    tokens_BS = read[torch.randint(0, len(read), (windows, length), generator=generator)]
    ours_BSV, theirs_BSV = trunk_logits(trunk, tokens_BS, kind), hugging_face(tokens_BS).logits
    return (ours_BSV[..., read] - theirs_BSV[..., read]).abs().max().item()


def check_logits(trunk: torch.nn.Module, hugging_face, kind: AttentionKind, apart: int | None = None) -> float:
    """`logits_difference`; raises `ParityError` where it is above `TOLERANCE` or NaN."""
    felt = (trunk.model.sliding_window or 0) + 32  # a sliding window bounds something there, if that is not too long
    difference = logits_difference(trunk, hugging_face, kind, length=min(max(64, felt), 256), apart=apart)
    if not difference <= TOLERANCE:
        cause = "the weights hold NaN or infinity" if difference != difference else "the conversion is wrong"
        raise ParityError(f"logits of {type(hugging_face).__name__} and of the trunk differ by "
                          f"{difference:.3g} (allowed {TOLERANCE}): {cause}")
    return difference
