"""The embedded corpus: `python tools/build_docstring_corpus.py OUT.jsonl`, nothing to download.

The docstrings of the packages installed in this environment, one JSON line each; see
`megatron_encdec/text/docstrings.py`. An OUT.jsonl that is there already is complete, and is kept.
"""

import argparse
import sys
from pathlib import Path

from megatron_encdec.platform.errors import UserError
from megatron_encdec.text.docstrings import build_docstring_corpus


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="OUT.jsonl")
    parser.add_argument("--workers", type=int, metavar="N", help="reading processes (default: one a core)")
    arguments = parser.parse_args()
    if Path(arguments.output).exists():
        print(f"{arguments.output}: is there already")
        return 0
    try:
        counts = build_docstring_corpus(arguments.output, workers=arguments.workers)
    except UserError as error:
        print(f"build_docstring_corpus: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {counts.documents:,} docstrings, {counts.characters:,} characters, from "
          f"{counts.files:,} files ({counts.unreadable:,} not readable, {counts.repeated:,} repeats dropped)")
    return 0


if __name__ == "__main__":  # its workers are new processes that import this module again
    raise SystemExit(main())
