"""Optional packages: imported when first needed, and missed in one line with the command that helps.

    1. `is_available(name)`        it can be found: enough to say what is not installed
    2. `why_unusable(module)`      it was tried: installed is not usable where a library or another package is missing
    3. `require(name, why)`        the module, or one line that says what needs it
    4. `keep_out_unusable(...)`    before megatron.core is imported; `out_of_sight(...)` while it is
    5. `has_gpu_driver()`          a question about the machine that needs no package
"""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from types import ModuleType

from megatron_encdec.platform.errors import UserError

# The pairs that the tests are run with: Python, megatron.core. 0.16.1 is the last that Python 3.11 can have; 0.19.2,
# which the GPU image has, is also what later ones than 3.12 get.
TESTED = {(3, 11): "0.16.1", (3, 12): "0.19.2"}
# Commands that are more than `pip install NAME`.
INSTALL = {
    "torch": "pip install 'torch==2.13.0'  (the CUDA or the CPU build: see torch's installation page)",
    "megatron.core": f"pip install 'megatron-core=={TESTED[min(sys.version_info[:2], max(TESTED))]}'",
    "yaml": "pip install PyYAML",
    "transformers": "pip install 'transformers==5.18.0'",
    "transformer_engine": "pip install --no-build-isolation 'transformer-engine[pytorch]==2.20.*'  (needs CUDA)",
    "apex": "build NVIDIA Apex from source with --cuda_ext (optional: Transformer Engine replaces it)",
    "flash_attn": "pip install --no-build-isolation flash-attn  (needs CUDA)",
    "nemo_automodel": "pip install -e '.[nemo]'",
    "seqeval": "pip install -e '.[nemo]'",
    "mteb": "pip install -e '.[mteb]'",
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "pip install -e '.[onnx]'"),
    "sklearn": "pip install -e '.[nemo]'",
    "bm25s": "pip install -e '.[nemo]'",
    "matplotlib": "pip install 'megatron_encdec[study]'",
    "submitit": "pip install 'megatron_encdec[study]'",
}
# Packages of CUDA kernels that megatron.core imports where it finds them, and the module that shows if they work. They
# are linked to libraries that torch brings and loads: torch is imported first.
CUDA_PACKAGES = {"transformer_engine": "transformer_engine.pytorch", "apex": "apex", "flash_attn": "flash_attn"}


def has_gpu_driver() -> bool:
    """Whether torch could find a GPU here, told without it: it loads the driver's library (ROCm: opens a device)."""
    try:
        ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    except OSError:
        return os.path.exists("/dev/kfd")
    return True


def install_command(name: str) -> str:
    """What to type to get the package that is imported as `name`."""
    return INSTALL.get(name, f"pip install {name}")


def is_available(name: str) -> bool:
    """Whether a package of that name is there, in whatever state (nothing of it is imported)."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # it lies in something that is broken
        return True


@functools.cache
def why_unusable(module: str) -> str | None:
    """None where `import module` works in this process, else "missing" or "broken (its error)"; tried once."""
    package = module.partition(".")[0]
    if not is_available(package):
        return "missing"
    try:
        if package in CUDA_PACKAGES:
            importlib.import_module("torch")
        importlib.import_module(module)
    except (Exception, SystemExit) as error:  # a broken package raises what it likes
        return f"broken ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    return None


def keep_out_unusable(on_gpu: bool) -> None:
    """Before megatron.core is imported: those of `CUDA_PACKAGES` that do not work here are as if not installed.
    megatron.core takes each where it finds it, catches nothing but ImportError, and would update weights on a CPU with
    the optimizer of Transformer Engine or Apex, whose kernels need a GPU. One that is imported already stays."""
    for name, module in CUDA_PACKAGES.items():
        if why_unusable(module) if on_gpu else module not in sys.modules:
            for loaded in [one for one in sys.modules if one.startswith(f"{name}.")]:
                del sys.modules[loaded]
            sys.modules[name] = None  # Python's own way to say: not there, do not look


@contextlib.contextmanager
def out_of_sight(*modules: str) -> Iterator[None]:
    """Meanwhile those of `modules` that nobody has imported yet are as if not installed."""
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def require(name: str, why: str) -> ModuleType:
    """Import `name`, or raise a `UserError` that says what needs it and how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{why} needs the package {name}, which is not usable here ({error}); "
                        f"install it: {install_command(name.partition('.')[0])}") from None
