"""Fill masks with an exported model: `python tools/fill_masks.py MODEL_DIR [TEXT ...]`, as its user would.

Only transformers' own classes and pipeline; nothing is downloaded, and no code of the model is run. Each TEXT
holds one [MASK]; without any, a few sentences from the world of the embedded corpus are filled.
"""

import argparse
import os
import sys

TEXTS = (
    "Returns the number of [MASK] in the list.",
    "If the file does not [MASK], an error is raised.",
    "The default value is [MASK], which means no limit.",
    "Compute the gradient of the loss with respect to the model [MASK].",
    "A string or a list of [MASK] to be encoded.",
)
PLACE = "[MASK]"
GUESSES = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR", help="what `megatron-encdec export` wrote")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="with one [MASK] each")
    arguments = parser.parse_args()
    texts = arguments.texts or list(TEXTS)
    if not os.path.isfile(os.path.join(arguments.model, "config.json")):
        return _mistake(f"{arguments.model}: not an exported model (no config.json)")
    for text in texts:
        if text.count(PLACE) != 1:
            return _mistake(f"{text!r}: write {PLACE} exactly once, in the place of a word")
    print_guesses(arguments.model, texts)
    return 0


def print_guesses(model: str, texts: list[str]) -> None:
    """A table: each text, and the most probable words for its mask with their probabilities."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
    from transformers import pipeline
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    fill = pipeline("fill-mask", model, device="cpu")
    table = Table("text", "guesses", title=Text(f"masks filled by {model}"))
    for text in texts:
        guesses = fill(text.replace(PLACE, fill.tokenizer.mask_token), top_k=GUESSES)
        words = "  ".join(f"{guess['token_str'].strip() or '(blank)'} {guess['score']:.0%}" for guess in guesses)
        table.add_row(Text(text), Text(words))
    Console().print(table)


def _mistake(message: str) -> int:
    print(f"fill_masks: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
