"""What sentence-transformers reads beside an encoder: mean pooling over the tokens, padding left out."""

from pathlib import Path

from megatron_encdec.rundir.files import write_json_atomic

_MODULES = (("", "Transformer"), ("1_Pooling", "Pooling"))


def write_pooling(directory: Path, hidden_size: int, positions: int) -> None:
    """modules.json, 1_Pooling/config.json and sentence_bert_config.json: mean pooling (arXiv 2507.00994, retrieval)."""
    (directory / "1_Pooling").mkdir()
    write_json_atomic(directory / "modules.json", [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (path, kind) in enumerate(_MODULES)])
    write_json_atomic(directory / "1_Pooling" / "config.json", {
        "word_embedding_dimension": hidden_size, "pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False, "pooling_mode_mean_sqrt_len_tokens": False})
    write_json_atomic(directory / "sentence_bert_config.json", {"max_seq_length": positions, "do_lower_case": False})
