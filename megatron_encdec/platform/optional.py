"""Optional packages: imported when first needed, and missed in one line with the command that helps."""

import importlib
import importlib.util
from types import ModuleType

from megatron_encdec.platform.errors import UserError

INSTALL = {
    "transformer_engine": "pip install --no-build-isolation 'transformer-engine[pytorch]==2.20.*'  (needs CUDA)",
    "apex": "build NVIDIA Apex from source with --cuda_ext (optional: Transformer Engine replaces it)",
    "flash_attn": "pip install --no-build-isolation flash-attn  (needs CUDA)",
    "tensorboard": "pip install tensorboard",
    "datasets": "pip install datasets",
    "nemo_automodel": "pip install -e '.[nemo]'",
    "seqeval": "pip install -e '.[nemo]'",
    "matplotlib": "pip install 'megatron_encdec[study]'",
    "sentencepiece": "pip install sentencepiece",
}


def is_available(name: str) -> bool:
    """Whether `import name` would find a package (nothing is imported)."""
    return importlib.util.find_spec(name) is not None


def require(name: str, why: str) -> ModuleType:
    """Import `name`, or raise a `UserError` that says what needs it and how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f"{why} needs the package {name}, which is not usable here ({error}); "
                        f"install it: {INSTALL.get(package, 'pip install ' + package)}") from None
