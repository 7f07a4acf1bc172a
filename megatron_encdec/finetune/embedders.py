"""Models of sentence-transformers in directories: those that embed, and those that score a query and a document."""

from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_encdec.finetune.results_tree import read_json
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.optional import require


@lru_cache(maxsize=1)
def load_embedder(path: str, _revision: str):
    """The `SentenceTransformer` in `path`: with its pooling and prompts, of a bare encoder the mean. `_revision`: of
    its files (`revision_of`), for a process that meets others under the same name."""
    return _load("SentenceTransformer", path)


@lru_cache(maxsize=1)
def load_cross_encoder(path: str, _revision: str):
    """The `CrossEncoder` in `path`. Raises `UserError` where there is none, or one with several outputs."""
    config = Path(path) / "config.json"
    named = read_json(config).get("architectures") if config.is_file() else None
    if not any("ForSequenceClassification" in str(name) for name in named or ()) and \
            not (Path(path) / "modules.json").is_file():  # it would get a head of random weights
        raise UserError(f"{path}: no cross-encoder (its config.json names {', '.join(named or ['no class'])}); one is "
                        "a model for sequence classification of pairs")
    model = _load("CrossEncoder", path)
    if model.num_labels != 1:
        raise UserError(f"{path}: a cross-encoder that orders documents has one output, this one has "
                        f"{model.num_labels}")
    return model


def _load(kind: str, path: str) -> Any:
    library = require("sentence_transformers", "models that embed")
    try:
        return getattr(library, kind)(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"{path}: sentence-transformers cannot load it ({' '.join(str(error).split())[:300]}); code "
                        "that comes with a model is never run") from None
