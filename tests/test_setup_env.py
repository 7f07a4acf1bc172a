"""tools/setup_env.sh with packages made here, no network: sources are built with their own tools, a killed or failed
installation goes on from what is whole, an environment of its own for each Python and for Transformer Engine's. Its
checkout lies under a path with a blank.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BACKEND = '''
"""A build backend that names what it builds: `pip install` of a source alone needs it, and finds it only if asked."""
import zipfile
from pathlib import Path

def build_wheel(folder, config_settings=None, metadata_directory=None):
    name, version, *needs = Path("built.txt").read_text().split()
    wheel = f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    info = wheel.removesuffix("-py3-none-any.whl") + ".dist-info"
    with zipfile.ZipFile(Path(folder, wheel), "w") as file:
        file.writestr(f"{name.replace('-', '_')}.py", "here = True\\n" * 100)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}",
                 *(f"Requires-Dist: {need}" for need in needs), "Provides-Extra: dev"]
        file.writestr(f"{info}/METADATA", "\\n".join(lines) + "\\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        file.writestr(f"{info}/RECORD", "")
    return wheel

build_editable = build_wheel
'''
PROJECT = '[build-system]\nrequires = ["naming-backend"]\nbuild-backend = "naming_backend"\n'


def wheel(folder, name, version, source="here = True\n" * 100):
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", source)
        info = f"{name}-{version}.dist-info"
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def source_alone(folder, scratch, name, version):
    tree = scratch / f"{name}-{version}"
    tree.mkdir()
    (tree / "pyproject.toml").write_text(PROJECT)
    (tree / "built.txt").write_text(f"{name} {version}")
    (tree / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    shutil.make_archive(str(folder / tree.name), "gztar", scratch, tree.name)


@pytest.fixture
def checkout(tmp_path):
    """(a checkout with a project of its own that needs `source-alone`, a folder of packages that lacks it)."""
    checkout, packages = tmp_path / "my checkout", tmp_path / "packages"
    (checkout / "tools").mkdir(parents=True)
    packages.mkdir()
    shutil.copy(ROOT / "tools" / "setup_env.sh", checkout / "tools")
    (checkout / "tools" / "constraints.txt").write_text("")
    (checkout / "setup.py").write_text("")
    (checkout / "pyproject.toml").write_text(PROJECT)
    (checkout / "built.txt").write_text("the-project 1.0 source-alone")
    wheel(packages, "naming_backend", "1.0", BACKEND)
    for name, version in (("setuptools", "99.0"), ("torch", "2.13.0")):
        wheel(packages, name, version)
    return checkout, packages


def setup(checkout, packages, code=0, **given):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        ["bash", str(checkout / "tools" / "setup_env.sh")], capture_output=True, text=True, timeout=300,
        env={**environment, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(packages), "PIP_NO_CACHE_DIR": "1",
             "PIP_NO_COMPILE": "1", "PIP_CONFIG_FILE": os.devnull, "ENCDEC_ENV": "", "MEGATRON_ENCDEC_PYTHON": "",
             "ENCDEC_PYTHON": "", **given})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_an_installation_goes_on_where_it_ended(checkout, tmp_path):
    checkout, packages = checkout
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    said = setup(checkout, packages, code=1)
    assert "does not work" in said and "source-alone" in said  # the second step fails: nobody has that package
    (site,) = checkout.glob(".venv/lib/python*/site-packages")
    torch_was = (site / "torch.py").stat()
    # As pip leaves it when it is killed: a file that is not whole, a RECORD that is not yet its own.
    wheel(packages, "half", "1.0")
    with zipfile.ZipFile(packages / "half-1.0-py3-none-any.whl") as file:
        file.extractall(site)
    (site / "half.py").write_text("here")
    (site / "~old").mkdir()
    with open(checkout / "built.txt", "a") as file:
        file.write(" half")
    source_alone(packages, tmp_path, "source-alone", "1.0")

    said = setup(checkout, packages)
    assert "going on with the unfinished installation of .venv" in said and "half-1.0 was left half installed" in said
    assert (site / "torch.py").stat() == torch_was  # the first step is not done again
    assert (site / "source_alone.py").exists() and (site / "half.py").read_text().startswith("here = True")
    assert not (site / "~old").exists()
    assert setup(checkout, packages) == ""  # ready: nothing to do, nothing said


def test_another_python_and_what_transformer_engine_needs_have_folders_of_their_own(checkout, tmp_path):
    checkout, packages = checkout
    source_alone(packages, tmp_path, "source-alone", "1.0")
    brought = ["transformer_engine", "einops", "ml_dtypes", "onnx", "onnx_ir", "onnxscript"]
    for name in brought:
        wheel(packages, name, "2.20.2")
    (checkout / "tools" / "constraints_gpu.txt").write_text("onnx==2.20.2\n")
    said = setup(checkout, packages, ENCDEC_PYTHON=sys.executable, ENCDEC_ENV="te")
    name = f".venv-{Path(sys.executable).name}"
    assert f"{name} is ready" in said and f"{name}-te is ready" in said
    assert sorted(path.name for path in checkout.glob(".venv*")) == [name, f"{name}-te"]
    (site,) = checkout.glob(f"{name}/lib/python*/site-packages")
    for module in brought:
        assert (checkout / f"{name}-te" / f"{module}.py").exists() and not (site / f"{module}.py").exists()
    assert setup(checkout, packages, ENCDEC_PYTHON=sys.executable, ENCDEC_ENV="te") == ""
    told = subprocess.run(
        ["bash", "-c", 'source "$1" && "$PYTHON" -c "import onnxscript, source_alone; print(onnxscript.__file__)"',
         "bash", str(checkout / "tools" / "setup_env.sh")], capture_output=True, text=True, timeout=300,
        env={**os.environ, "ENCDEC_PYTHON": sys.executable, "ENCDEC_ENV": "te", "MEGATRON_ENCDEC_PYTHON": ""})
    assert told.stdout.strip() == str(checkout / f"{name}-te" / "onnxscript.py"), told.stderr
    assert "no Python 3.11 or newer" in setup(checkout, packages, code=1, ENCDEC_PYTHON="python9.9")
