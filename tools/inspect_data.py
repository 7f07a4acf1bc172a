"""Statistics and decoded windows of indexed token files.

`python tools/inspect_data.py ARGUMENTS` is `megatron-encdec inspect data ARGUMENTS`.
"""

import sys

from megatron_encdec.cli import main

if __name__ == "__main__":  # workers and ranks are new processes that may import this module again
    raise SystemExit(main(["inspect", "data", *sys.argv[1:]]))
