"""benchmarks/gpu.sh without a GPU: wheels made small, stages that go on, the rehearsal goes through."""

import base64
import csv
import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

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
                          env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
                               "STORE": os.devnull, **environment})  # not what somebody has installed there
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
    (packages / "pip").symlink_to(Path(importlib.util.find_spec("pip").origin).parent)
    return str(folder / "bin" / "python")


def test_wheels_are_installed_once(wheel, python, tmp_path):
    environment = {"WHEELS": str(wheel.parent), "STORE": str(tmp_path / "store"), "PYTHON": python}
    assert "installed 1 wheels" in gpu("install", **environment)
    assert (tmp_path / "store" / "site" / "brought" / "noise.bin").stat().st_size == 5 * 2**19
    wheel.unlink()  # another command has brought it
    assert "installed" not in gpu("install", **environment).split("versions")[0]  # nothing is done twice


def fat_library(*kernels) -> bytes:
    """An ELF file whose one section besides its names is .nv_fatbin, with `kernels`: (architecture, code); each in a
    group of its own, eight bytes of padding after it. As slim_wheel.py reads CUDA's."""
    groups = b""
    for arch, code in kernels:
        entry = bytearray(64)
        struct.pack_into("<HHIQ", entry, 0, 2, 0x101, 64, len(code))
        struct.pack_into("<I", entry, 28, arch)
        groups += struct.pack("<IHHQ", 0xBA55ED50, 1, 16, 64 + len(code)) + bytes(entry) + code + bytes(8)
    names, header = b"\0.names\0.nv_fatbin\0", bytearray(64)
    header[:6] = b"\x7fELF\2\1"
    at = 64 + len(names) + len(groups)
    struct.pack_into("<Q", header, 0x28, at)
    struct.pack_into("<HHH", header, 0x3A, 64, 3, 1)
    rows = [(0, 0, 0), (1, 64, len(names)), (8, 64 + len(names), len(groups))]
    table = b"".join(struct.pack("<IIQQQQ24x", name, 1, 0, 0, begin, size) for name, begin, size in rows)
    return bytes(header) + names + groups + table


def test_kernels_of_other_gpus_stay_behind(wheel, tmp_path):
    """What stays is where it was, nothing else changes, the hashes of the wheel's record are those of its files, and
    pip takes it."""
    kept, other = os.urandom(2**20), os.urandom(2**20)
    library = fat_library((80, other), (90, kept), (120, other[::-1]))
    with zipfile.ZipFile(wheel, "a") as file:
        file.writestr("brought/lib.so", library)
    said = gpu("slim", wheel, tmp_path / "slim")
    slimmed = tmp_path / "slim" / wheel.name
    assert slimmed.stat().st_size < wheel.stat().st_size - 2**21 + 2**16 and "MB ->" in said
    with zipfile.ZipFile(slimmed) as file, zipfile.ZipFile(wheel) as before:
        found = file.read("brought/lib.so")
        assert found == library.replace(other, bytes(2**20)).replace(other[::-1], bytes(2**20))
        assert found.count(kept) == 1 and file.read("brought/noise.bin") == before.read("brought/noise.bin")
        rows = list(csv.reader(file.read("brought-1.0.dist-info/RECORD").decode().splitlines()))
        assert {row[0] for row in rows} == set(file.namelist())
        for name, digest, size in rows[:-1]:
            data = file.read(name)
            assert int(size) == len(data)
            assert digest == "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def test_a_wheel_without_kernels_for_the_gpu_is_refused(wheel, tmp_path):
    with zipfile.ZipFile(wheel, "a") as file:
        file.writestr("brought/lib.so", fat_library((80, b"code")))
    said = gpu("slim", wheel, tmp_path / "slim", code=2)
    assert "brought/lib.so: no machine code for sm_90, only for [80]" in said
    assert not list((tmp_path / "slim").iterdir())
    assert gpu("slim", wheel, tmp_path / "slim", "--arch", "80")


def test_what_the_plan_carries_fits(tmp_path):
    """Each row of the page's plan under the limit that it names."""
    plan = (ROOT / "docs" / "gpu_bare.md").read_text()
    rows = [row.split("|") for row in plan.splitlines() if re.match(r"\| \d+ \|", row)]
    assert rows and all(float(row[3]) < LIMIT for row in rows)


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
    for name in ("specs.clm", "specs.torch"):
        (folder / f"{name}.json").write_text(json.dumps(kept))
    (folder / "specs.mlm.json").write_text(json.dumps({"error": "it broke"}))
    said = gpu("--rehearse", "specs", "report", MINUTES="3", **environment)
    found = json.loads((folder / "all.json").read_text())["cells"]
    assert found["specs.clm"] == kept and "specs.clm:" not in said  # done already
    assert found["specs.mlm"]["torch"]["gradient_error"] < 0.05  # what had failed was tried again
    assert found["specs.mlm"]["reference"]["gradient_error"] == 0
    assert (out / "gpu.tar.gz").exists()


def test_without_a_gpu_nothing_is_measured(tmp_path):
    results = {"RESULTS": str(tmp_path / "results")}
    said = gpu("facts", "throughput", code=1, CUDA_VISIBLE_DEVICES="", **results)
    assert "torch can use no GPU here" in said and "--rehearse" in said
    facts = tmp_path / "results" / "facts.json"
    assert not facts.exists()  # a later machine does not take it over
    facts.write_text(json.dumps({"gpu": True, "te": True, "flash_attn": False}))  # of a machine before this one
    assert "no GPU here" in gpu("throughput", code=1, CUDA_VISIBLE_DEVICES="", **results)
    assert "facts" in gpu("report", CUDA_VISIBLE_DEVICES="", **results)


@pytest.mark.slow
def test_the_rehearsal_goes_through(tmp_path):
    said = gpu("--rehearse", RESULTS=str(tmp_path / "results"), MINUTES="20")
    cells = json.loads((tmp_path / "results_rehearsal" / "all.json").read_text())["cells"]
    stages = {name.split(".")[0] for name in cells}
    assert stages == {"facts", "tests", "throughput", "peer", "largest", "head", "specs", "curves", "resume", "costs"}
    assert not [name for name, cell in cells.items() if "error" in cell], said
    assert cells["resume.torch"]["bit_equal"]
