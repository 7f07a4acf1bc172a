"""benchmarks/gpu.sh without a GPU: pieces add up or are refused, stages go on, the rehearsal goes through."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pip
import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
LIMIT = 64  # MiB that travel with one command
BINDING = """
import os
from pathlib import Path
from setuptools import setup
names = {"home": "CUDA_HOME", "path": "CPATH", "torchs": "NVTE_BUILD_USE_NVIDIA_WHEELS"}
Path("built_with.py").write_text("\\n".join(f"{name} = {os.environ[names[name]]!r}" for name in names))
setup(name="transformer_engine_torch", version="1.0", py_modules=["built_with"])
"""


def gpu(*arguments, code=0, **environment):
    done = subprocess.run(["bash", str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, timeout=1500,
                          env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def wheel(tmp_path):
    """A wheel of 2.5 MiB that pip takes."""
    path, noise = tmp_path / "large" / "brought-1.0-py3-none-any.whl", os.urandom(5 * 2**19)
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("brought/__init__.py", "here = True\n")
        file.writestr("brought/noise.bin", noise)
        file.writestr("brought-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
        file.writestr("brought-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("brought-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter with pip alone: each `install` ends with doctor, which has little to import there."""
    folder = tmp_path_factory.mktemp("python")
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "pip").symlink_to(Path(pip.__file__).parent)
    return str(folder / "bin" / "python")


def test_pieces_that_come_one_by_one_are_joined_and_installed(wheel, python, tmp_path):
    every, some, store = tmp_path / "every", tmp_path / "some", tmp_path / "store"
    assert "3 pieces" in gpu("split", wheel, every, PIECE_MIB="1")
    names = sorted(path.name for path in every.iterdir())
    assert names == [f"{wheel.name}.{end}" for end in ("part-01", "part-02", "part-03", "pieces", "sha256")]
    assert all((every / name).stat().st_size <= 2**20 for name in names)
    some.mkdir()
    environment = {"WHEELS": str(some), "STORE": str(store), "PYTHON": python}
    for name in (names[0], *names[3:]):
        (every / name).rename(some / name)
    assert "1 of 3 pieces so far" in gpu("install", **environment)
    for name in names[1:3]:  # the first one does not come again: another command has brought it
        (every / name).rename(some / name)
    (some / names[0]).unlink()
    said = gpu("install", **environment)
    assert f"{wheel.name}: joined" in said and "installed 1 wheels" in said
    assert (store / "wheels" / wheel.name).read_bytes() == wheel.read_bytes()
    assert (store / "site" / "brought" / "noise.bin").stat().st_size == 5 * 2**19
    assert "installed" not in gpu("install", **environment).split("versions")[0]  # nothing is done twice


def test_pieces_that_do_not_add_up_are_refused(wheel, python, tmp_path):
    pieces = tmp_path / "pieces"
    gpu("split", wheel, pieces, PIECE_MIB="1")
    with open(pieces / f"{wheel.name}.part-02", "r+b") as file:
        file.write(b"another")
    assert "the pieces do not add up" in gpu("install", code=1, WHEELS=str(pieces), STORE=str(tmp_path / "store"),
                                                    PYTHON=python)


def test_pieces_fit_what_a_command_may_carry_and_so_does_every_row_of_the_plan(tmp_path):
    core = tmp_path / "core.whl"
    with open(core, "wb") as file:
        file.truncate(70 * 2**20)
    gpu("split", core, tmp_path / "pieces")
    largest = max(path.stat().st_size for path in (tmp_path / "pieces").glob("*.part-*")) / 2**20
    plan = (ROOT / "docs" / "gpu_bare.md").read_text()
    rows = [row.split("|") for row in plan.splitlines() if re.match(r"\| \d+ \|", row)]
    sizes = {row[2].strip(): float(row[3]) for row in rows if row[3].strip() != "–"}
    assert len(sizes) == 5 and max(sizes.values()) < LIMIT
    pieces = {carried: size for carried, size in sizes.items() if re.fullmatch(r"piece \d\d", carried)}
    assert len(pieces) == 4 and min(pieces.values()) >= largest + 2  # the checkout travels with each
    assert f"{largest:.0f} MiB" in plan


@pytest.fixture
def machine(tmp_path):
    """A machine whose nvcc is a shim far from any header, and a binding to compile."""
    brought, tree, shim = tmp_path / "brought", tmp_path / "transformer_engine_torch-1.0", tmp_path / "bin" / "nvcc"
    for folder in (brought, tree, shim.parent):
        folder.mkdir()
    (tree / "setup.py").write_text(BINDING)
    (tree / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: transformer_engine_torch\nVersion: 1.0\n")
    shutil.make_archive(str(brought / tree.name), "gztar", tmp_path, tree.name)
    shim.write_text("#!/bin/sh\necho release 13.0\n")
    shim.chmod(0o755)
    return {"WHEELS": str(brought), "STORE": str(tmp_path / "store"), "OUT": str(tmp_path),
            "PATH": f"{shim.parent}{os.pathsep}{os.environ['PATH']}"}


def headers(home, *names):
    for name in names:
        (home / "include" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "include" / name).write_text("")


@pytest.mark.parametrize("toolkit", ["small", "whole"])
def test_the_binding_is_compiled_with_the_headers_that_are_there(machine, tmp_path, toolkit):
    """Torch brings no headers of the compiler, a small toolkit none of cuBLAS, none has cuDNN's."""
    home, torchs = tmp_path / "toolkit 13", tmp_path / "site packages" / "nvidia"
    headers(home, "cuda_runtime.h", "crt/host_config.h", *(["cublas_v2.h"] if toolkit == "whole" else []))
    headers(torchs / "cu13", "cuda_runtime.h", "cublas_v2.h")
    headers(torchs / "cudnn", "cudnn.h")
    gpu("binding", **machine, CUDA_HOME=str(home), PYTHONPATH=str(torchs.parent))
    (built,) = tmp_path.glob("transformer_engine_torch-1.0-*.whl")  # in OUT, for the next time
    found = {}
    exec(zipfile.ZipFile(built).read("built_with.py"), found)
    assert found["home"] == str(home) and found["torchs"] == ("1" if toolkit == "small" else "0")
    path = found["path"].split(":")
    assert path[0] == f"{home}/include" and {f"{torchs}/cu13/include", f"{torchs}/cudnn/include"} <= set(path)


def test_a_stage_goes_on_where_its_time_was_over(tmp_path):
    results, out = tmp_path / "results", tmp_path / "out"
    out.mkdir()
    environment = {"RESULTS": str(results), "OUT": str(out)}
    assert "not begun" in gpu("--rehearse", "specs", code=75, MINUTES="0", **environment)
    folder = tmp_path / "results_rehearsal"
    kept = {"torch": {"loss": 1.0}}
    for name in ("specs.clm", "specs.checkpoints"):
        (folder / f"{name}.json").write_text(json.dumps(kept))
    (folder / "specs.mlm.json").write_text(json.dumps({"error": "it broke"}))
    said = gpu("--rehearse", "specs", "report", MINUTES="3", **environment)
    found = json.loads((folder / "all.json").read_text())["cells"]
    assert found["specs.clm"] == kept and "specs.clm:" not in said  # done already
    assert found["specs.mlm"]["torch"]["gradient_error"] < 0.05  # what had failed was tried again
    assert found["specs.mlm"]["reference"]["gradient_error"] == 0
    assert (out / "gpu.tar.gz").exists()


@pytest.mark.slow
def test_the_rehearsal_goes_through(tmp_path):
    said = gpu("--rehearse", RESULTS=str(tmp_path / "results"), MINUTES="20")
    cells = json.loads((tmp_path / "results_rehearsal" / "all.json").read_text())["cells"]
    stages = {name.split(".")[0] for name in cells}
    assert stages == {"facts", "tests", "throughput", "peer", "largest", "head", "specs", "curves", "resume", "costs"}
    assert not [name for name, cell in cells.items() if "error" in cell], said
    assert cells["resume.torch"]["bit_equal"]
