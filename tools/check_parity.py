"""Before trusting an export: `python tools/check_parity.py RUN_DIR[@STEP] OUT`.

Prints whether every tensor of OUT, mapped back, equals the checkpoint's, the largest difference of logits,
and the loss of both on the run's validation data under each objective. Exit 0 if all agree, 1 if not.
"""

import argparse
import sys

from megatron_encdec.platform import device
from megatron_encdec.platform.errors import UserError


def main() -> int:
    """Parse and compare; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN_DIR[@STEP]", help="run directory; default: newest checkpoint")
    parser.add_argument("out", metavar="OUT", help="what `megatron-encdec export` wrote from it")
    parser.add_argument("--windows", type=int, default=4, help="validation windows for losses (default: 4)")
    arguments = parser.parse_args()
    device.choose("cpu")  # before megatron.core is imported
    from megatron_encdec.interop.hugging_face import ParityError
    from megatron_encdec.interop.parity import compare

    try:
        return 0 if compare(arguments.run, arguments.out, arguments.windows) else 1
    except UserError as error:
        print(f"check_parity: {error}", file=sys.stderr)
        return 2
    except ParityError as error:
        print(f"check_parity: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
