#!/usr/bin/env bash
# The environment that examples/ and tests/run.sh share: a virtual environment in .venv, made when needed.
#
#   bash tools/setup_env.sh      make or update .venv; nothing to do takes well under a second
#   source tools/setup_env.sh    the same, then PYTHON names its interpreter and .venv/bin leads PATH
#
# ENCDEC_ENV=nemo makes .venv-nemo, with the extras of fine-tuning: NeMo AutoModel needs other versions of some packages.
# ENCDEC_ENV=te makes .venv, and beside it .venv-te: the Python of Transformer Engine, a folder that PYTHONPATH names.
# ENCDEC_PYTHON=python3.12 (a name or a path) makes them with that Python, as .venv-python3.12, .venv-python3.12-nemo.
# MEGATRON_ENCDEC_PYTHON=/path/to/python uses that interpreter as it is and installs nothing (Docker, clusters).
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf, ...) apply: the way to a mirror, or to the CPU
# build of torch. Left alone, Linux gets torch's CUDA build, which is several GB.
#
#   1. .venv is up to date if its stamp is the hash of what determines it
#   2. else: one process at a time. An installation that failed or was killed goes on from the packages that are whole
#   3. torch, then this project with its development tools, versions from tools/constraints.txt
#      (for ENCDEC_ENV=nemo: with the extras nemo, mteb, study and reference, tools/constraints_nemo.txt)
#   4. for ENCDEC_ENV=te: what it adds to .venv, versions from tools/constraints_gpu.txt. Not into .venv, whose packages'
#      docstrings are the demo's corpus

if [[ "${BASH_SOURCE[0]}" != "$0" ]]; then # sourced: a child does the work, so that its `exit` cannot end us
    bash "${BASH_SOURCE[0]}" || return 1
    _encdec_root="$(unset CDPATH; cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    if [[ -n "${MEGATRON_ENCDEC_PYTHON:-}" ]]; then
        PYTHON="$(command -v "$MEGATRON_ENCDEC_PYTHON")"
        export PYTHONPATH="$_encdec_root${PYTHONPATH:+:$PYTHONPATH}" # this checkout, installed or not
    else
        _encdec_venv="$_encdec_root/.venv${ENCDEC_PYTHON:+-${ENCDEC_PYTHON##*/}}"
        case "${ENCDEC_ENV:-}" in
            te) export PYTHONPATH="$_encdec_venv-te${PYTHONPATH:+:$PYTHONPATH}" ;;
            *) _encdec_venv="$_encdec_venv${ENCDEC_ENV:+-$ENCDEC_ENV}" ;;
        esac
        PYTHON="$_encdec_venv/bin/python"
        export PATH="${PYTHON%/*}:$PATH"
    fi
    export PYTHON
    unset _encdec_root _encdec_venv
    return 0
fi

set -euo pipefail

root="$(unset CDPATH; cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
kind="${ENCDEC_ENV:-}"
case "$kind" in
    "") extras=dev modules="torch megatron transformers tokenizers yaml rich" ;;
    nemo) extras=nemo,mteb,study,reference,dev modules="torch transformers yaml rich nemo_automodel seqeval matplotlib mteb" ;;
    te) extras=dev modules="torch megatron yaml rich transformer_engine" ;;
    *) echo "setup: ENCDEC_ENV=$kind: no such environment; nothing, nemo or te" >&2 && exit 1 ;;
esac
plain=".venv${ENCDEC_PYTHON:+-${ENCDEC_PYTHON##*/}}"
name="$plain${kind:+-$kind}"
venv="$root/$name"
constraints="tools/constraints${kind:+_$kind}.txt"
python="$venv/bin/python"
depends=(setup.py pyproject.toml)
if [[ "$kind" == te ]]; then
    constraints=tools/constraints_gpu.txt python="$root/$plain/bin/python" depends=(tools/setup_env.sh)
    te_packages=(transformer-engine==2.20.2 einops ml_dtypes onnx onnx-ir onnxscript)
fi
stamp="$venv/.installed"
unfinished="$venv/.unfinished"

say() { echo "setup: $*"; }
fail() {
    echo "setup: $*" >&2
    exit 1
}

# Exit 0 if $1 is Python 3.11 or newer and can make virtual environments.
suits() { "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# What .venv depends on: its interpreter, where it lies, and what is asked for.
fingerprint() {
    (cd "$root" && "$python" -I - "${depends[@]}" "$constraints") 2>/dev/null <<'PYTHON'
import hashlib, os, sys
parts = [sys.version, os.getcwd()] + [open(path, encoding="utf-8").read() for path in sys.argv[1:]]
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PYTHON
}

is_current() { [[ -f "$stamp" && ! -e "$unfinished" ]] && [[ "$(fingerprint)" == "$(cat "$stamp")" ]]; }

use_given_interpreter() {
    local given="$MEGATRON_ENCDEC_PYTHON"
    command -v "$given" >/dev/null || fail "MEGATRON_ENCDEC_PYTHON=$given: there is no such program"
    "$given" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
        || fail "MEGATRON_ENCDEC_PYTHON=$given: Python 3.11 or newer is needed"
    local missing
    missing="$("$given" -c '
import sys
from importlib.util import find_spec
print(*(name for name in sys.argv[1].split() if not find_spec(name)))' "$modules")"
    [[ -z "$missing" ]] || fail "MEGATRON_ENCDEC_PYTHON=$given: not installed there: $missing;" \
        "run  '$given' -m pip install -c '$root/$constraints' -e '$root[$extras]'"
}

make_venv() {
    local candidate
    if [[ -d "$venv/bin" ]] && suits "$python" && "$python" -m pip --version >/dev/null 2>&1; then
        [[ ! -e "$unfinished" ]] || say "going on with the unfinished installation of $name"
        forget_half_packages
        return
    elif [[ -d "$venv/bin" ]]; then
        say "$name does not work (Python 3.11 or newer with pip is needed); starting it over"
    fi
    for candidate in ${ENCDEC_PYTHON:-python3.11 python3.12 python3.13 python3 python}; do
        suits "$candidate" || continue
        say "making $name with $("$candidate" --version)"
        "$candidate" -m venv --clear "$venv"
        return
    done
    [[ -z "${ENCDEC_PYTHON:-}" ]] || fail "ENCDEC_PYTHON=$ENCDEC_PYTHON: no Python 3.11 or newer with its venv module"
    fail "Python 3.11 or newer with its venv module is needed; found: $(python3 --version 2>/dev/null || echo none)." \
        "Install one (on Debian and Ubuntu also python3-venv), or name yours: MEGATRON_ENCDEC_PYTHON=/path/to/python"
}

# What pip was writing when it was killed looks installed to the next pip. The last thing that pip writes of a package is
# a RECORD that names its INSTALLER file, with the size of every file: where that does not hold, the package's entry goes
# and pip installs it anew. What pip had put aside (~name) goes too.
forget_half_packages() {
    "$python" -I - <<'PYTHON'
import csv, shutil, sysconfig
from pathlib import Path

site = Path(sysconfig.get_path("purelib"))
for entry in site.glob("*.dist-info"):
    record = entry / "RECORD"
    rows = list(csv.reader(record.open(encoding="utf-8"))) if record.is_file() else []
    sizes = {site / row[0]: row[2] for row in rows if len(row) == 3}
    if entry / "INSTALLER" not in sizes or not all(
            path.is_file() and path.stat().st_size == int(size) for path, size in sizes.items() if size):
        print(f"setup: {entry.name.removesuffix('.dist-info')} was left half installed", flush=True)
        shutil.rmtree(entry)
for aside in site.glob("~*"):
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
PYTHON
}

# pip with our versions: talking on a terminal, where a download can be watched; else into a log, shown on failure.
pip_install() {
    local command=("$python" -m pip install --constraint "$root/$constraints" "$@")
    local log="$venv/install.log"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    if [[ -t 1 ]]; then
        "${command[@]}" || fail "pip install $* failed, see above; the same call again retries"
    else
        "${command[@]}" >"$log" 2>&1 || {
            tail -n 20 "$log" >&2
            fail "pip install $* failed, see above and $name/install.log; the same call again retries"
        }
    fi
}

install_everything() {
    touch "$unfinished"
    say "installing pip and setuptools"
    pip_install --upgrade pip setuptools
    if command -v nvidia-smi >/dev/null; then
        say "installing torch (an NVIDIA GPU is here: the CUDA build; this can take minutes)"
    else
        say "installing torch (this can take minutes)"
    fi
    pip_install torch==2.13.0
    say "installing megatron-encdec and what it needs"
    pip_install --editable "$root[$extras]" # what comes as a source alone is built with the tools that it names
    fingerprint >"$stamp"
    rm "$unfinished"
}

# A folder of packages: short to make, so it is made anew.
install_te() {
    say "installing the Python of Transformer Engine, beside $plain"
    rm -rf "$venv"
    mkdir "$venv"
    pip_install --no-deps --target "$venv" "${te_packages[@]}"
    fingerprint >"$stamp"
}

if [[ -n "${MEGATRON_ENCDEC_PYTHON:-}" ]]; then
    use_given_interpreter
    exit 0
fi
if [[ "$kind" == te ]]; then
    ENCDEC_ENV="" bash "${BASH_SOURCE[0]}"
fi
if is_current; then
    exit 0
fi
mkdir -p "$venv"
if command -v flock >/dev/null; then # two calls at once: the second waits, then finds the work done
    exec 9>>"${BASH_SOURCE[0]}" # the lock is on this very file; nothing is written to it
    flock 9 || true             # a file system without locks
    if is_current; then
        exit 0
    fi
fi
start=$SECONDS
if [[ "$kind" == te ]]; then
    install_te
else
    make_venv
    install_everything
fi
say "$name is ready after $((SECONDS - start)) s"
