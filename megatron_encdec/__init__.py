"""megatron_encdec: text-encoder pretraining on Megatron-core whose objective changes mid-run.

The data's way through the package, a room a folder, each importing only from the ones before it:

    platform -> rundir -> text -> data -> objectives -> model -> engine -> training -> interop -> inspection
    -> finetune -> study -> cli
"""

__version__ = "0.1.0"
