"""The image for a CPU is built from the Dockerfile, in OCI format and without Docker, and does its work.

Its base is this machine's own Debian or Ubuntu, made by debootstrap, with pip's settings of this machine. Where that
has another Python than the image's base, one of this machine may be put into it: IMAGE_PYTHON=~/.pyenv/versions/3.12.1
(with it comes torch's CUDA build, several GB, where no other is to be had).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from small_run import PATIENCE

ROOT = Path(__file__).parents[1]
lacking = [name for name in ("buildah", "debootstrap") if not shutil.which(name)]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    os.geteuid() != 0 or bool(lacking), reason=f"needs root and {' and '.join(lacking) or 'nothing else'}")]


def call(*words, seconds: float, **options) -> str:
    """What the command says, which ends well."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=seconds, **options)
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def pip_settings(etc: Path) -> list[Path]:
    """Write pip's settings of this machine to `etc`/pip.conf; the local folders of packages that they name. An index in
    a folder stays out: its files may lie elsewhere."""
    listed = call(sys.executable, "-m", "pip", "config", "list", seconds=60)
    found = {name.rpartition(".")[2]: value.strip("'") for name, _, value in
             (line.partition("=") for line in listed.splitlines())}
    if "cert" in found:
        shutil.copy(found["cert"], etc / "pip-ca.crt")
        found["cert"] = "/etc/pip-ca.crt"
    kept = {name: found[name] for name in ("index-url", "extra-index-url", "find-links", "cert")
            if name in found and not ("index" in name and "file://" in found[name])}
    (etc / "pip.conf").write_text("\n".join(["[global]", *(f"{name} = {value}" for name, value in kept.items()), ""]))
    words = " ".join(value for name, value in kept.items() if name != "cert").split()
    return sorted({Path(word.removeprefix("file://")) for word in words if word.startswith(("/", "file:///"))})


def put_python(prefix: Path, base: Path) -> None:
    """Copy what is installed at `prefix` to /usr/local of `base`, where it goes before the distribution's own."""
    shutil.copytree(prefix, base / "usr/local", symlinks=True, dirs_exist_ok=True)
    (base / "etc/ld.so.conf.d/local.conf").write_text("/usr/local/lib\n")
    call("chroot", base, "ldconfig", seconds=60)


@pytest.fixture(scope="module")
def buildah(tmp_path_factory):
    """A function: `buildah WORDS`, with images of its own that are gone after the module."""
    store = tmp_path_factory.mktemp("images")

    def buildah(*words, seconds: float = PATIENCE) -> str:
        return call("buildah", "--root", store / "root", "--runroot", store / "run", "--storage-driver", "vfs",
                    *words, seconds=seconds)

    yield buildah
    buildah("rm", "--all")
    buildah("rmi", "--all", "--force")
    shutil.rmtree(store)


@pytest.fixture(scope="module")
def container(buildah, tmp_path_factory):
    """The name of a container of the image, and what the build said."""
    release = dict(re.findall(r'^(\w+)="?(.*?)"?$', Path("/etc/os-release").read_text(), re.MULTILINE))
    base = tmp_path_factory.mktemp("base")
    call("debootstrap", "--variant=minbase", release["VERSION_CODENAME"], base, seconds=PATIENCE)
    if python := os.environ.get("IMAGE_PYTHON"):
        put_python(Path(python), base)
    folders = pip_settings(base / "etc")
    empty = buildah("from", "scratch").strip()
    buildah("add", empty, base, "/")
    buildah("commit", "--format", "oci", empty, "localhost/base")
    shutil.rmtree(base)
    volumes = [word for folder in folders for word in ("--volume", f"{folder}:{folder}:ro")]
    said = buildah("build", "--isolation", "chroot", "--network", "host", "--format", "oci", "--build-arg",
                   "DEVICE=cpu", "--build-arg", "BASE_CPU=localhost/base", *volumes, "--tag", "encdec", ROOT,
                   seconds=4 * PATIENCE)
    return buildah("from", "--pull-never", "localhost/encdec").strip(), said


def test_nothing_of_the_dockerfile_is_lost_in_oci_format(container):
    assert "not supported for OCI" not in container[1] and "will be ignored" not in container[1]


def run(buildah, container, *words) -> str:
    """As the entry point would, by user 1000."""
    return buildah("run", "--isolation", "chroot", "--user", "1000", container[0], "--", "tini", "-s", "--", *words)


def test_every_package_in_it_has_the_pinned_version(buildah, container):
    said = run(buildah, container, "bash", "-c", "python --version; pip freeze --all --exclude-editable")
    lines = [line.partition("#")[0].strip() for name in ("constraints.txt", "constraints_gpu.txt")
             for line in (ROOT / "tools" / name).read_text().splitlines()]
    version = re.search(r"Python (\d+\.\d+)", said)[1]
    pinned = {canonicalize_name(one.name): str(one.specifier) for one in map(Requirement, filter(None, lines))
              if one.marker is None or one.marker.evaluate({"python_version": version})}
    there = dict(re.findall(r"^([\w.-]+)(==[^+\s]+)", said, re.MULTILINE))  # torch==2.13.0+cpu too
    assert "torch" in there and "megatron-core" in there
    assert {name: clause for name, clause in there.items() if pinned.get(canonicalize_name(name)) != clause} == {}


def test_it_can_train_as_an_ordinary_user(buildah, container):
    assert "training can start here" in run(buildah, container, "megatron-encdec", "doctor")
    lines = "import json, pathlib; [print(json.dumps({'text': line})) for path in pathlib.Path('docs').glob('*.md') " \
            "for line in path.read_text().splitlines()]"
    said = run(buildah, container, "bash", "-c", f"id -u && python -c {shlex.quote(lines)} >lines.jsonl && "
               "megatron-encdec preprocess --input lines.jsonl --tokenizer work_dirs/demo/tokenizer --train-tokenizer "
               "1000 --output work_dirs/demo/data/docstrings --validation-percent 20 && megatron-encdec pretrain "
               "examples/biphasic_tiny.yaml batch.micro_size=4 run.total.steps=4 schedule.warmup_steps=1 "
               "schedule.decay_steps=1 --nproc 2 && megatron-encdec inspect run work_dirs/demo/run")
    assert said.startswith("1000\n") and re.search(r"^ clm +clm +1 .*\n mlm +mlm:0.4 +3 ", said, re.MULTILINE), said
    config = buildah("inspect", "--type", "image", "--format", "{{.OCIv1.Config.Entrypoint}} {{.OCIv1.Config.User}}",
                     "localhost/encdec")
    assert config.strip() == "[tini -- megatron-encdec] 1000"


def test_sigterm_reaches_the_command_through_tini(buildah, container):
    said = run(buildah, container, "bash", "-c", "tini -s -- megatron-encdec pretrain examples/biphasic_tiny.yaml "
               "run.dir=work_dirs/second & until [[ -s work_dirs/second/metrics.jsonl ]]; do sleep 1; done; "
               "kill -TERM $!; wait $!; echo code $?")
    assert "stopped by SIGTERM" in said and "\ncode 0\n" in said, said
