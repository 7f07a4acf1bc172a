"""benchmarks/gpu.sh without a GPU: pieces add up or are refused, stages go on, the rehearsal goes through."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.sh"


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


def test_pieces_that_come_one_by_one_are_joined_and_installed(wheel, tmp_path):
    every, some, store = tmp_path / "every", tmp_path / "some", tmp_path / "store"
    assert "3 pieces" in gpu("split", wheel, every, PIECE_MIB="1")
    names = sorted(path.name for path in every.iterdir())
    assert names == [f"{wheel.name}.{end}" for end in ("part-01", "part-02", "part-03", "pieces", "sha256")]
    assert all((every / name).stat().st_size <= 2**20 for name in names)
    some.mkdir()
    environment = {"WHEELS": str(some), "STORE": str(store)}
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


def test_pieces_that_do_not_add_up_are_refused(wheel, tmp_path):
    pieces = tmp_path / "pieces"
    gpu("split", wheel, pieces, PIECE_MIB="1")
    with open(pieces / f"{wheel.name}.part-02", "r+b") as file:
        file.write(b"another")
    assert "the pieces do not add up" in gpu("install", code=1, WHEELS=str(pieces), STORE=str(tmp_path / "store"))


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
