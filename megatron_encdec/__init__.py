"""megatron_encdec: text-encoder pretraining on Megatron-core whose objective changes mid-run.

The data's way through the package, a room a folder, each importing only from the ones before it:

    platform -> rundir -> page -> text -> data -> objectives -> model -> engine -> training -> interop -> inspection
    -> finetune -> study -> cli, api

The verbs as functions (api.py) are here by name, and imported when first asked for:

    from megatron_encdec import preprocess, pretrain, dry_run, export, load_run
"""

__version__ = "0.1.0"
__all__ = ["IntegrityError", "ParityError", "RunFailed", "UserError", "dry_run", "export", "load_run", "preprocess",
           "pretrain"]


def __getattr__(name: str):
    """What api.py has; importing the package alone imports nothing else."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from megatron_encdec import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
