"""What sentence-transformers reads beside an encoder: mean pooling over the tokens, padding left out.

    1. `write_pooling(...)`        its files
    2. `about_empty_texts(...)`    what a user has to know where an empty text has no token, so no mean
"""

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


def about_empty_texts(directory: Path) -> list[str]:
    """A remark where the tokenizer in `directory` gives an empty text no token.

    Nothing in the files can give it one without changing other texts: tokenizers skip normalisation of an empty text,
    and a post-processor puts its tokens around every text.
    """
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError):  # there is none, or one that transformers cannot read: said elsewhere
        return []
    if tokenizer("")["input_ids"]:
        return []
    instead = next((f"; put {text!r} in its place, or leave it out" for text in (" ", ".")
                    if tokenizer(text)["input_ids"]), "; leave it out")
    return ["an empty text has no token, so it has no embedding: sentence-transformers gives zeros for it in a batch "
            f"and an error for it alone{instead}"]
