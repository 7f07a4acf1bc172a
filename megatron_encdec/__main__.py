"""`python -m megatron_encdec VERB`, the same as the console script `megatron-encdec VERB`."""

from megatron_encdec.cli import main

if __name__ == "__main__":  # saving a checkpoint spawns processes that import this module again
    raise SystemExit(main())
