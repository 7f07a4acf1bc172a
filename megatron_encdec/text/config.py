"""The `tokenizer:` section of a config; the same three values are the `preprocess` command's options."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer is and which of its tokens mask and end a document.

    `path`: a Hugging Face `tokenizer.json`, a directory that holds one, or a SentencePiece `.model`.
    `mask_token`, `eod_token`: names of existing tokens; needed only where the tokenizer does not say itself
    (a reserved token such as `<|reserved_special_token_0|>` makes a good mask).
    """

    path: str
    mask_token: str | None = None
    eod_token: str | None = None
