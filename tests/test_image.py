"""The image for a CPU is built from the Dockerfile, in OCI format and without Docker, and does its work.

Its base is this machine's own Debian or Ubuntu, made by debootstrap; pip's settings of this machine apply.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS")
lacking = [name for name in ("buildah", "debootstrap") if not shutil.which(name)]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    os.geteuid() != 0 or bool(lacking), reason=f"needs root and {' and '.join(lacking) or 'nothing else'}")]


def call(*words, seconds: float, **options) -> str:
    """What the command says, which ends well."""
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=seconds, **options)
    assert done.returncode == 0, f"{words}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def buildah(tmp_path_factory):
    """A function: `buildah WORDS`, with images of its own that are gone after the module."""
    store = tmp_path_factory.mktemp("images")

    def buildah(*words, seconds: float = 120) -> str:
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
    call("debootstrap", "--variant=minbase", release["VERSION_CODENAME"], base, seconds=600)
    empty = buildah("from", "scratch").strip()
    buildah("add", empty, base, "/", seconds=600)
    buildah("commit", "--format", "oci", empty, "localhost/base", seconds=600)
    shutil.rmtree(base)
    given = [word for name in PIP if name in os.environ for word in ("--build-arg", f"{name}={os.environ[name]}")]
    paths = {path for name in PIP for path in os.environ.get(name, "").split() if path.startswith("/")}
    volumes = [word for path in sorted(paths) for word in ("--volume", f"{path}:{path}:ro")]
    said = buildah("build", "--isolation", "chroot", "--network", "host", "--format", "oci", "--build-arg",
                   "DEVICE=cpu", "--build-arg", "BASE_CPU=localhost/base", *given, *volumes, "--tag", "encdec", ROOT,
                   seconds=3000)
    return buildah("from", "--pull-never", "localhost/encdec").strip(), said


def test_nothing_of_the_dockerfile_is_lost_in_oci_format(container):
    assert "not supported for OCI" not in container[1] and "will be ignored" not in container[1]


def run(buildah, container, *words) -> str:
    """As the entry point would, by user 1000."""
    return buildah("run", "--isolation", "chroot", "--user", "1000", container[0], "--", "tini", "-s", "--", *words)


def test_it_can_train_as_an_ordinary_user(buildah, container):
    assert "training can start here" in run(buildah, container, "megatron-encdec", "doctor")
    said = run(buildah, container, "bash", "-c", "id -u && touch made && python tools/build_docstring_corpus.py "
               "corpus.jsonl --workers 2 >/dev/null && head -n 2000 corpus.jsonl >small.jsonl && megatron-encdec "
               "preprocess --input small.jsonl --tokenizer work_dirs/demo/tokenizer --train-tokenizer 4096 --output "
               "work_dirs/demo/data/docstrings --validation-percent 10 && megatron-encdec pretrain "
               "examples/biphasic_tiny.yaml --nproc 2 --until 2 evaluation.every=0")
    assert said.startswith("1000\n") and "step" in said
    config = buildah("inspect", "--type", "image", "--format", "{{.OCIv1.Config.Entrypoint}} {{.OCIv1.Config.User}}",
                     "localhost/encdec")
    assert config.strip() == "[tini -- megatron-encdec] 1000"


def test_sigterm_reaches_the_command_through_tini(buildah, container):
    said = run(buildah, container, "bash", "-c", "tini -s -- megatron-encdec pretrain examples/biphasic_tiny.yaml "
               "run.dir=work_dirs/second & sleep 25; kill -TERM $!; wait $!; echo code $?")
    assert "stopped by SIGTERM" in said and said.rstrip().endswith("code 0")
