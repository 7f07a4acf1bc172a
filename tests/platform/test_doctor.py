"""doctor: what it says of this machine, of broken packages, and its exit code."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megatron_encdec.platform import doctor
from megatron_encdec.platform.device import bf16_is_native, device_type
from megatron_encdec.platform.optional import install_command


def write_module(directory, name, source):
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.py").write_text(source)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """`examine()` of this machine with flash_attn, a broken nemo_automodel and an nvidia-smi."""
    directory = tmp_path_factory.mktemp("packages")
    write_module(directory, "flash_attn", "")
    for name in ("datasets", "matplotlib"):  # only to be quick
        write_module(directory, name, "")
    write_module(directory, "nemo_automodel", "raise OSError('libcudart.so:\\ncannot open')")
    smi = directory / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 999.1\n")
    smi.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(directory))
        patch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
        yield doctor.examine()


def test_this_machine_can_train(report):
    assert report["can_train"] and report["problems"] == []
    assert report["versions"]["torch"] == torch.__version__
    assert report["packages"]["megatron.core"]["state"] == "usable"
    assert report["device"]["type"] == device_type()
    assert report["device"]["bf16_native"] == bf16_is_native()
    assert report["device"]["cores"] >= 1 and report["device"]["memory_bytes"] > 2**28
    assert report["backends"]["communication"] == ("nccl" if device_type() == "cuda" else "gloo")
    assert report["backends"]["fp8"].startswith("not possible: ")
    json.dumps(report)


def test_a_pair_of_versions_that_was_not_tested_is_named(report):
    assert doctor.untested((3, 11), "0.16.1") is None and doctor.untested((3, 12), "0.19.2") is None
    assert doctor.untested((3, 12), None) is None  # that it is missing is said elsewhere
    said = doctor.untested((3, 13), "0.19.2")
    assert said.startswith("Python 3.13 with megatron-core 0.19.2 may work; tested are Python 3.11 with")
    assert f"note: {said}" in doctor.report_lines({**report, "untested": said})
    setup = (Path(__file__).parents[2] / "setup.py").read_text()  # the same stands there
    for (major, minor), core in doctor.TESTED.items():
        assert f"megatron-core=={core}; " in setup and f'"Programming Language :: Python :: {major}.{minor}"' in setup


def test_optional_packages_are_looked_at_but_not_imported(report):
    assert report["packages"]["flash_attn"]["state"] == "usable"
    assert report["packages"]["flash_attn"]["version"] is None
    assert report["packages"]["nemo_automodel"]["state"] == "broken"
    assert not sys.modules.get("flash_attn") and not sys.modules.get("nemo_automodel")


def test_lines_name_the_command_for_what_is_missing_and_why_something_is_broken(report):
    lines = doctor.report_lines(report)
    assert lines[-1] == "training can start here"
    text = "\n".join(lines)
    assert "OSError: libcudart.so: cannot open" in text and "Traceback" not in text
    for package in report["packages"].values():
        assert (package["install"] in text) == (package["state"] != "usable" or package["name"] == "torch"
                                                and "for a build that fits the driver" in text)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the GPU is used")
def test_a_driver_that_torch_does_not_see_is_pointed_out(report):
    text = "\n".join(doctor.report_lines(report))
    assert "not used: driver 999.1 is here, but this torch is" in text


@pytest.mark.parametrize(("source", "why"), [
    ("raise RuntimeError('no\\n kernel image')", "RuntimeError: no kernel image"),
    ("import not_a_module", "ModuleNotFoundError: No module named 'not_a_module'"),
    ("import os; os.abort()", "its import was killed by SIGABRT"),
    ("import sys; print('noise', file=sys.stderr); sys.exit(7)", "SystemExit: 7"),
])
def test_a_broken_package_is_one_line(tmp_path, monkeypatch, source, why):
    write_module(tmp_path, "frail", source)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = doctor.examine_package(doctor.Package("frail", "a test"))
    assert found == {"version": None, "state": "broken", "why": why}


def test_kernels_are_tried_beside_torch_whose_libraries_they_need(tmp_path, monkeypatch):
    (tmp_path / "transformer_engine").mkdir()
    write_module(tmp_path / "transformer_engine", "__init__", "")
    write_module(tmp_path / "transformer_engine", "pytorch", "import sys\nif 'torch' not in sys.modules:\n"
                 "    raise ImportError('libnccl.so.2: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (engine,) = [package for package in doctor.PACKAGES if package.name == "transformer_engine"]
    assert doctor.examine_package(engine)["state"] == "usable"


def test_a_missing_package_has_a_command():
    package = doctor.Package("a_module_that_is_not_there", "a test")
    assert doctor.examine_package(package)["state"] == "missing"
    assert install_command("a_module") == "pip install a_module" and "[nemo]" in install_command("nemo_automodel")


def test_without_torch_it_says_what_to_install_and_exits_1(tmp_path):
    write_module(tmp_path, "torch", "raise ImportError('libtorch.so is gone')")
    for name in ("transformers", "tensorboard", "datasets"):  # only to be quick
        write_module(tmp_path, name, "")
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-m", "megatron_encdec", "doctor"], capture_output=True, text=True,
                          timeout=120, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == 1
    assert "training cannot start here: torch is broken (ImportError: libtorch.so is gone)" in done.stdout
    assert "megatron.core fails with torch" in done.stdout
    assert "pip install 'torch==" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_json_and_exit_code_follow_the_report(report, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: {**report, "can_train": False})
    assert doctor.run(Namespace(json=True, nodes=False)) == 1
    assert json.loads(capsys.readouterr().out)["versions"] == report["versions"]
    monkeypatch.setattr(doctor, "examine", lambda: report)
    assert doctor.run(Namespace(json=False, nodes=False)) == 0
    assert capsys.readouterr().out.splitlines() == doctor.report_lines(report)


def machine(kind, *capabilities, cuda="13.0"):
    return {"type": kind, "cuda": cuda, "gpus": [{"capability": list(one)} for one in capabilities]}


@pytest.mark.parametrize(("device", "engine", "reasons"), [
    (machine("cpu", cuda=None), "missing", ["no CUDA GPU", "Transformer Engine is missing"]),
    (machine("cuda", (8, 0)), "usable", ["older than compute capability 8.9"]),
    (machine("cuda", (9, 0), (8, 0)), "usable", ["older than compute capability 8.9"]),
    (machine("cuda", (9, 0)), "broken", ["Transformer Engine is broken"]),
])
def test_why_there_is_no_fp8(device, engine, reasons):
    refusal = doctor.fp8_recipes(device, engine)
    assert refusal.startswith("not possible: ") and refusal.count(" and ") >= len(reasons) - 1
    assert all(reason in refusal for reason in reasons)


@pytest.mark.parametrize(("device", "recipes"), [
    (machine("cuda", (9, 0)), "delayed, current, blockwise"),
    (machine("cuda", (9, 0), cuda="12.8"), "delayed, current"),
    (machine("cuda", (8, 9)), "delayed, current")])
def test_fp8_recipes_that_are_possible(device, recipes):
    assert doctor.fp8_recipes(device, "usable") == f"precision.fp8: {recipes}"
