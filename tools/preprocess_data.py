"""Text to indexed token files.

`python tools/preprocess_data.py ARGUMENTS` is `megatron-encdec preprocess ARGUMENTS`.
"""

import sys

from megatron_encdec.cli import main

if __name__ == "__main__":  # workers and ranks are new processes that may import this module again
    raise SystemExit(main(["preprocess", *sys.argv[1:]]))
