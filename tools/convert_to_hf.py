"""A checkpoint to a Hugging Face model directory.

`python tools/convert_to_hf.py ARGUMENTS` is `megatron-encdec export ARGUMENTS`.
"""

import sys

from megatron_encdec.cli import main

if __name__ == "__main__":  # workers and ranks are new processes that may import this module again
    raise SystemExit(main(["export", *sys.argv[1:]]))
