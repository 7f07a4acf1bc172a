"""Optional packages that are installed but do not work, as real packages in a directory of their own: megatron.core is
imported without them, and the reason is kept. Each process decides once, so these are processes of their own.
"""

import importlib
import json
import os
import subprocess
import sys

import pytest

from megatron_encdec.platform.optional import is_available, out_of_sight, why_unusable

HALF = """
import json, sys
from megatron_encdec.platform import megatron
from megatron_encdec.platform.errors import UserError
from megatron_encdec.platform.device import Fp8Facts, fp8_refusal
from megatron_encdec.platform.optional import why_unusable
from megatron_encdec.model.config import choose_layers
from megatron_encdec.model.performance import kernel_notes
import torch
try:
    choose_layers("transformer_engine", torch.bfloat16)
except UserError as error:
    refusal = str(error)
print(json.dumps({
    "layers": choose_layers("auto", torch.bfloat16), "refusal": refusal,
    "fp8": fp8_refusal("current", Fp8Facts((9, 0), "13.0", why_unusable("transformer_engine.pytorch"))),
    "notes": kernel_notes("torch"),
    "left": [name for name, one in sys.modules.items() if one and name.startswith(("transformer_engine", "apex"))]}))
"""
ON_A_CPU = """
import logging
from megatron_encdec.platform import megatron
import megatron.core.optimizer as optimizer
import torch.utils.cpp_extension
print("True" if optimizer.USING_PYTORCH_OPTIMIZER else optimizer.Adam)
"""


def package(directory, files):
    for name, source in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)


def run(directory, code, device, **environment):
    paths = os.pathsep.join([str(directory), *(path or os.getcwd() for path in sys.path)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": paths, "MEGATRON_ENCDEC_DEVICE": device, **environment})
    assert done.returncode == 0, done.stderr
    return done


def test_packages_that_break_are_out_of_the_way_of_megatron_core_and_their_reason_is_told(tmp_path):
    package(tmp_path, {
        "transformer_engine/__init__.py": "import transformer_engine.common\n",
        "transformer_engine/common.py": "",
        "transformer_engine/pytorch/__init__.py": "raise FileNotFoundError('no libtransformer_engine.so')\n",
        "apex/__init__.py": "raise RuntimeError('built for another torch')\n"})
    found = json.loads(run(tmp_path, HALF, "cuda").stdout.splitlines()[-1])
    why = "broken (FileNotFoundError: no libtransformer_engine.so)"
    assert found["layers"] == "torch" and found["left"] == []
    assert f"which is {why}: pip install" in found["refusal"]
    assert found["fp8"].startswith(f"Transformer Engine is {why}: pip install")
    assert found["notes"] == [f"Transformer Engine is installed, but {why}: torch's layers are used"]


def test_on_a_cpu_the_optimizer_is_torchs_and_nothing_is_said(tmp_path):
    """A Transformer Engine that works, an Apex that works, and a CUDA toolkit beside a torch that finds no GPU."""
    adam = "class FusedAdam:\n    pass\nclass FusedSGD:\n    pass\n"
    package(tmp_path, {"transformer_engine/__init__.py": "", "transformer_engine/pytorch/__init__.py": "",
                       "transformer_engine/pytorch/optimizers.py": adam,
                       "apex/__init__.py": "", "apex/optimizers.py": adam, "toolkit/bin/nvcc": ""})
    done = run(tmp_path, ON_A_CPU, "cpu", CUDA_HOME=str(tmp_path / "toolkit"))
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.parametrize(("source", "why"), [
    ("", None),
    ("raise RuntimeError('an empty\\nmeta package')", "broken (RuntimeError: an empty meta package)"),
    ("import a_module_that_is_not_there",
     "broken (ModuleNotFoundError: No module named 'a_module_that_is_not_there')")])
def test_installed_is_not_usable(tmp_path, monkeypatch, source, why):
    name = f"frail_{len(source)}"
    package(tmp_path, {f"{name}/__init__.py": "", f"{name}/kernels.py": source})
    monkeypatch.syspath_prepend(str(tmp_path))
    assert is_available(name) and why_unusable(f"{name}.kernels") == why
    assert why_unusable("a_module_that_is_not_there") == "missing"


def test_out_of_sight(tmp_path, monkeypatch):
    """A module is not found meanwhile, and afterwards as before; one that is imported already stays."""
    (tmp_path / "a_tracker.py").write_text("found = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with out_of_sight("a_tracker", "json"):
        with pytest.raises(ImportError):
            importlib.import_module("a_tracker")
        assert importlib.import_module("json") is json
    assert importlib.import_module("a_tracker").found


def test_megatron_core_imports_no_tracker():
    """A process that starts without one is a third of a second quicker, and ranks are many."""
    code = ("import sys, megatron_encdec.platform.megatron; found = [name for name in ('tensorboard', 'wandb') "
            "if sys.modules.get(name)]; import torch.utils.tensorboard; print(found)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
