"""Run the phases of a config, or continue them.

`python tools/pretrain.py ARGUMENTS` is `megatron-encdec pretrain ARGUMENTS`.
"""

import sys

from megatron_encdec.cli import main

if __name__ == "__main__":  # workers and ranks are new processes that may import this module again
    raise SystemExit(main(["pretrain", *sys.argv[1:]]))
