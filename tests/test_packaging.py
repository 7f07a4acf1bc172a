"""The wheel and the source archive: built, installed and used without the repository and without a network."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import megatron_encdec

ROOT = Path(__file__).parent.parent
BUILD = "from setuptools import build_meta; print(build_meta.build_{}(OUT))"  # what pip calls, without its isolation


def call(*words, directory: Path, **environment: str) -> str:
    done = subprocess.run([str(word) for word in words], cwd=directory, capture_output=True, text=True,
                          env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    code = BUILD.format(kind).replace("OUT", repr(str(out)))
    return out / call(sys.executable, "-c", code, directory=source).splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """(wheel, source archive) of a copy of what git knows."""
    here = tmp_path_factory.mktemp("build")
    copy = here / "copy"
    for name in call("git", "ls-files", "--cached", "--others", "--exclude-standard", directory=ROOT).splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return build("wheel", copy, here / "wheel"), build("sdist", copy, here / "sdist")


@pytest.mark.slow
def test_the_wheel_works_where_nothing_else_is(built, tmp_path):
    wheel, _ = built
    call(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel,
         directory=tmp_path)
    own = {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}
    where = call(sys.executable, "-c", "import megatron_encdec as it; print(it.__file__)", directory=tmp_path, **own)
    assert where.startswith(str(tmp_path / "site"))
    command = tmp_path / "site/bin/megatron-encdec"
    assert call(command, "--version", directory=tmp_path, **own).strip() == megatron_encdec.__version__
    examples = tmp_path / "site/share/megatron-encdec/examples"
    assert {path.relative_to(examples) for path in examples.rglob("*.yaml")} == {
        path.relative_to(ROOT / "examples") for path in (ROOT / "examples").rglob("*.yaml")}
    planned = call(command, "pretrain", examples / "biphasic_610m.yaml", "--nproc", "64", "--dry-run",
                   directory=tmp_path, **own)
    assert "preset: 610m" in planned and "parameters   755,625,600" in planned
    call(sys.executable, "-c", "from megatron_encdec.study.published import *; from importlib.resources import files; "
         "assert files('megatron_encdec.page').joinpath('page.html').is_file(); "
         "assert files('megatron_encdec.study').joinpath('published.csv').is_file()", directory=tmp_path, **own)


@pytest.mark.slow
def test_the_source_archive_makes_the_same_wheel(built, tmp_path):
    wheel, archive = built
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    assert {"README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "docs", "examples", "tests", "tools"} <= {
        path.name for path in unpacked.iterdir()}
    again = build("wheel", unpacked, tmp_path / "wheel")
    assert zipfile.ZipFile(again).namelist() == zipfile.ZipFile(wheel).namelist()


def test_the_version_is_one():
    version = megatron_encdec.__version__
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()
