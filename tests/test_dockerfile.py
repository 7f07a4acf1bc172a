"""The Dockerfile says what it installs to the last digit, copies what is there, and runs as nobody special.

What can be checked without a linter (hadolint 2.15.1 has nothing to say of it); building it takes a registry.
"""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def instructions():
    """(instruction, arguments), continued lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


def of(instructions, name):
    return [arguments for instruction, arguments in instructions if instruction == name]


def constraints(*names):
    files = [ROOT / "tools" / name for name in names or ("constraints.txt", "constraints_gpu.txt")]
    lines = [line.split("#")[0].strip() for file in files for line in file.read_text().splitlines()]
    return [Requirement(line) for line in filter(None, lines)]


def pip_requirements(instructions):
    """What is asked of pip, by RUN."""
    for command in re.split(r"&&|;|then", " && ".join(of(instructions, "RUN"))):
        words = command.replace('"', "").split()
        if "pip" in words and "install" in words:
            words = words[words.index("install") + 1:]
            skip = {index + 1 for index, word in enumerate(words) if word == "--constraint"}
            yield [word for index, word in enumerate(words) if not word.startswith("-") and index not in skip]


def test_known_instructions_only(instructions):
    assert {instruction for instruction, _ in instructions} <= {
        "ARG", "FROM", "RUN", "ENV", "COPY", "WORKDIR", "USER", "ENTRYPOINT", "CMD"}


def test_the_base_is_pinned_and_of_the_cuda_that_torch_is_built_for(instructions):
    given = dict(value.split("=", 1) for value in of(instructions, "ARG") if "=" in value)
    assert re.fullmatch(r"nvidia/cuda:13\.0\.\d+-cudnn-devel-ubuntu24\.04", given["BASE_GPU"])
    assert given["BASE_CPU"] == "ubuntu:24.04" and given["DEVICE"] == "gpu"
    assert of(instructions, "FROM") == ["${BASE_GPU} AS gpu", "${BASE_CPU} AS cpu", "${DEVICE}"]


def test_no_failure_hides_in_a_pipe(instructions):
    """OCI images keep no SHELL, and sh has no `pipefail`."""
    assert not [run for run in of(instructions, "RUN") if re.search(r"[^|]\|[^|]", run)]


def test_every_package_has_one_version(instructions):
    pinned = {requirement.name for requirement in constraints()}
    asked = [word for words in pip_requirements(instructions) for word in words]
    assert any(word.startswith("transformer-engine[") for word in asked) and ".[dev]" in asked
    for word in asked:
        if word != ".[dev]":
            (clause,) = Requirement(word).specifier
            assert clause.operator == "==" and "*" not in clause.version, word
    same = {requirement.name: str(requirement.specifier) for requirement in constraints()}
    for word in asked:
        if word != ".[dev]" and Requirement(word).name in pinned:
            assert str(Requirement(word).specifier) == same[Requirement(word).name], word


def test_what_packages_bring_along_has_one_version_too(instructions):
    """Transformer Engine's binding asks for these without a version, or with a lowest one."""
    (given,) = [value for value in of(instructions, "ENV") if value.startswith("PIP_CONSTRAINT=")]
    files = [Path(path).name for path in given.partition("=")[2].strip('"').split()]
    assert files == ["constraints.txt", "constraints_gpu.txt"]
    copied = " ".join(of(instructions, "COPY"))
    assert all(f"tools/{name}" in copied for name in files)
    pinned = {canonicalize_name(one.name): str(one.specifier) for one in constraints(*files)}
    brought = {"einops", "onnx", "onnxscript", "onnx-ir", "ml-dtypes", "pydantic", "packaging", "nvdlfw-inspect",
               "nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "apache-tvm-ffi", "importlib-metadata", "triton"}
    assert brought <= pinned.keys() and all(version.startswith("==") for version in pinned.values())
    assert not {one.name for one in constraints("constraints.txt")} & {
        one.name for one in constraints("constraints_gpu.txt")}


def test_tests_over_transformer_engines_python_have_the_images_version(instructions):
    (engine,) = [word for words in pip_requirements(instructions) for word in words if word.startswith("transformer-e")]
    assert f"transformer-engine{Requirement(engine).specifier} " in (ROOT / "tools" / "setup_env.sh").read_text()


def test_only_what_needs_torch_to_be_built_is_built_beside_it(instructions):
    for command in re.split(r"&&", " && ".join(of(instructions, "RUN"))):
        assert ("--no-build-isolation" in command) == ("transformer-engine[" in command), command


def test_apt_leaves_nothing_behind(instructions):
    for run in of(instructions, "RUN"):
        if "apt-get" in run:
            assert "apt-get update" in run and "--no-install-recommends" in run
            assert run.rstrip().endswith("rm -rf /var/lib/apt/lists/*")
        assert "sudo" not in run and "curl" not in run and "wget" not in run


def test_what_is_copied_is_there_and_not_ignored(instructions):
    for copied in of(instructions, "COPY"):
        source = [word for word in copied.split() if not word.startswith("--")][0]
        assert (ROOT / source).exists()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", "runs", "models", "data"} <= set(ignored)


def test_it_ends_as_an_ordinary_user_who_may_write_where_it_works(instructions):
    assert of(instructions, "USER")[-1] not in ("root", "0")
    last_run = max(index for index, (name, _) in enumerate(instructions) if name == "RUN")
    assert max(index for index, (name, _) in enumerate(instructions) if name == "USER") > last_run
    assert of(instructions, "WORKDIR")[-1] == "/workspace" and "chown -R 1000:1000 /workspace" in "".join(
        of(instructions, "RUN"))


def test_signals_reach_the_command(instructions):
    assert of(instructions, "ENTRYPOINT") == ['["tini", "--", "megatron-encdec"]']
    assert of(instructions, "CMD") == ['["doctor"]']
