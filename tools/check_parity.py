"""Before trusting a conversion: `python tools/check_parity.py RUN_DIR[@STEP] OUT [--text FILE]`.

OUT is what `megatron-encdec export` wrote from that checkpoint, or, for an imported run, the Hugging Face directory
that it came from. Prints whether every tensor, mapped back, equals the checkpoint's; the largest difference of
logits; the loss of both on the run's validation data under each objective; and the loss of both on each of some texts:
by default the docstrings of this package's own modules. Exit 0 if all agree, 1 if not.
"""

import argparse
import ast
import json
import sys
from pathlib import Path

from megatron_encdec.platform import device
from megatron_encdec.platform.errors import UserError

TEXTS = 20


def main() -> int:
    """Parse and compare; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN_DIR[@STEP]", help="run directory; default: newest checkpoint")
    parser.add_argument("out", metavar="OUT", help="what `export` wrote from it, or what `import` read")
    parser.add_argument("--windows", type=int, default=4, help="validation windows for losses (default: 4)")
    parser.add_argument("--text", metavar="FILE", help=f"one text a line, or JSON lines with the key text; the first "
                        f"{TEXTS} are compared")
    arguments = parser.parse_args()
    device.choose("cpu")  # before megatron.core is imported
    from megatron_encdec.interop.hugging_face import ParityError
    from megatron_encdec.interop.parity import compare

    try:
        texts = read_texts(arguments.text)
        return 0 if compare(arguments.run, arguments.out, arguments.windows, texts=texts) else 1
    except UserError as error:
        print(f"check_parity: {error}", file=sys.stderr)
        return 2
    except ParityError as error:
        print(f"check_parity: {error}", file=sys.stderr)
        return 1


def read_texts(path: str | None) -> list[str]:
    """Up to `TEXTS` texts of a file, or of this package."""
    if path is None:
        import megatron_encdec

        files = sorted(Path(megatron_encdec.__file__).parent.rglob("*.py"))
        found = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "" for file in files)
        return [text for text in found if len(text) > 200][:TEXTS]
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        return [json.loads(line)["text"] if path.endswith(".jsonl") else line for line in lines[:TEXTS]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot read texts from it: {error}") from None


if __name__ == "__main__":
    raise SystemExit(main())
