#!/usr/bin/env bash
# Everything about a GPU in one script: `all` where everything is installed, as in the image (docs/gpu.md); in pieces on a
# bare machine with Python 3.12 and CUDA torch, nothing to download from, and little time (docs/gpu_bare.md).
#
#   bash benchmarks/gpu.sh slim WHEEL [DIR]    here: a wheel without kernels for other GPUs (slim_wheel.py), in DIR (wheels)
#   bash benchmarks/gpu.sh binding             anywhere with that machine's torch: its binding compiled, the wheel in $OUT
#   bash benchmarks/gpu.sh install             there: the wheels of $WHEELS installed under $STORE
#   bash benchmarks/gpu.sh STAGE...            there: see benchmarks/gpu_stages.py; `all` is all of them in order
#   bash benchmarks/gpu.sh --rehearse [STAGE]  anywhere: the same stages at tiny sizes on a CPU, nothing installed
#
#   PYTHON (python3)  WHEELS (wheels)  STORE (/tmp/megatron_encdec_gpu)  RESULTS (work_dirs/gpu)  MINUTES (9)  OUT ()
#
# Exit code 75: not through, the same command goes on. Where OUT names a folder, results are packed into it at the end,
# and where RESULTS lacks them but $RESULTS.tar.gz is there, they are unpacked first: so a later machine goes on too.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
WHEELS="${WHEELS:-wheels}"
STORE="${STORE:-/tmp/megatron_encdec_gpu}"
RESULTS="${RESULTS:-work_dirs/gpu}"
MINUTES="${MINUTES:-9}"
site="$STORE/site"

say() { echo "gpu: $*"; }
fail() {
    echo "gpu: $*" >&2
    exit 1
}

# Wheels and sdists into $STORE/wheels, so that a later command need not bring them again.
collect() {
    mkdir -p "$STORE/wheels"
    find "$WHEELS" -maxdepth 1 -type f \( -name '*.whl' -o -name '*.tar.gz' \) -exec cp -u {} "$STORE/wheels/" \; 2>/dev/null || true
}

# All wheels at once into a folder of its own, without anybody's requirements: what the machine has is not touched. One
# after another would not do: pip replaces folders that two of them share.
install_wheels() {
    local now
    compgen -G "$STORE/wheels/*.whl" >/dev/null || return 0
    now="$(ls "$STORE"/wheels/*.whl)"
    [[ -f "$STORE/installed" && "$now" == "$(cat "$STORE/installed")" ]] && return 0
    rm -rf "$site" "$STORE/installed"
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" \
        "$STORE"/wheels/*.whl
    echo "$now" >"$STORE/installed"
    say "installed $(echo "$now" | wc -l) wheels"
}

# Folders $1 in the packages of CUDA that torch brings, a line each.
of_torch() {
    "$PYTHON" - "$1" <<'PYTHON'
import sys
from pathlib import Path
try:
    import nvidia
except ImportError:
    sys.exit()
print(*(folder for place in nvidia.__path__ for folder in sorted(Path(place).glob(sys.argv[1]))), sep="\n")
PYTHON
}

# The folder of a CUDA toolkit with the headers of its compiler, which torch's packages may lack; nothing where there is
# none. Where nvcc lies does not say it: nvcc may be a shim.
cuda_home() {
    local nvcc folder torchs
    nvcc="$(readlink -f "$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)")"
    mapfile -t torchs < <(of_torch 'cu[0-9]*')
    for folder in "${CUDA_HOME:-}" "${nvcc%/bin/nvcc}" /usr/local/cuda /usr/local/cuda-* "${torchs[@]}"; do
        if [[ -f "$folder/include/cuda_runtime.h" && -f "$folder/include/crt/host_config.h" ]]; then
            echo "$folder"
            return
        fi
    done
}

# Transformer Engine's binding to torch is C++ that has to be compiled against the torch that is here.
build_binding() {
    local sdist home folder includes torchs torchs_headers=0 code=0
    sdist="$(find "$STORE/wheels" -name 'transformer_engine_torch-*.tar.gz' | head -n 1)"
    [[ -n "$sdist" ]] || return 0
    compgen -G "$STORE/wheels/transformer_engine_torch-*.whl" >/dev/null && return 0
    home="$(cuda_home)"
    [[ -n "$home" ]] || fail "$(basename "$sdist") cannot be compiled: no headers of CUDA are here (CUDA_HOME, nvcc," \
        "torch's packages, /usr/local/cuda*); bring the binding as a wheel that was built beforehand, see docs/gpu_bare.md"
    includes="$home/include:$home/include/cccl"
    mapfile -t torchs < <(of_torch '*/include') # cuDNN and NCCL; cuBLAS and others where the toolkit is a small one
    for folder in "${torchs[@]}"; do
        [[ -z "$folder" ]] || includes="$includes:$folder"
    done
    [[ -f "$home/include/cublas_v2.h" ]] || torchs_headers=1
    say "building $(basename "$sdist") with $(nproc) processes and the headers of $home"
    env CUDA_HOME="$home" NVTE_BUILD_USE_NVIDIA_WHEELS="$torchs_headers" NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch MAX_JOBS="$(nproc)" NVTE_BUILD_THREADS_PER_JOB=1 \
        CPATH="$includes${CPATH:+:$CPATH}" PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" \
        timeout "$((${MINUTES%.*} * 60 - 30))" \
        "$PYTHON" -m pip wheel --no-index --no-deps --no-build-isolation --wheel-dir "$STORE/wheels" "$sdist" \
        >"$STORE/build.log" 2>&1 || code=$?
    [[ "$code" -ne 124 ]] || fail "Transformer Engine's binding was not through in MINUTES=$MINUTES and is lost; give it" \
        "more, or bring it as a wheel that was built beforehand, see docs/gpu_bare.md"
    [[ "$code" -eq 0 ]] || {
        tail -n 30 "$STORE/build.log" >&2
        fail "Transformer Engine's binding could not be built, see above"
    }
    if [[ -n "${OUT:-}" ]]; then # about 1 MB: bring it along next time instead of the sdist
        cp "$STORE"/wheels/transformer_engine_torch-*.whl "$OUT/"
    fi
}

binding() {
    collect
    install_wheels # its headers of cuDNN's frontend
    build_binding
}

install() {
    binding
    install_wheels
    PYTHONPATH="$PWD:$site" "$PYTHON" -m megatron_encdec doctor || true
}

run_stages() {
    local code=0
    if [[ ! -d "$RESULTS" && -f "$RESULTS.tar.gz" ]]; then
        mkdir -p "$RESULTS"
        tar -xzf "$RESULTS.tar.gz" -C "$RESULTS"
    fi
    export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
    "$PYTHON" benchmarks/gpu_stages.py "$@" --results "$RESULTS" --minutes "$MINUTES" || code=$?
    if [[ -n "${OUT:-}" ]]; then
        tar -czf "$OUT/gpu.tar.gz" -C "$RESULTS" --exclude ./runs --exclude ./data .
    fi
    return "$code"
}

case "${1:-}" in
    "" | -h | --help) sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
    slim)
        shift
        [[ $# -gt 0 ]] || fail "slim WHEEL [DIR] [--arch 90]"
        "$PYTHON" benchmarks/slim_wheel.py "$1" "${2:-$WHEELS}" "${@:3}"
        ;;
    binding) binding ;;
    install) install ;;
    --rehearse)
        shift
        RESULTS="${RESULTS%/}_rehearsal"
        export MEGATRON_ENCDEC_DEVICE=cpu
        run_stages "${@:-all}" --rehearse
        ;;
    *) run_stages "$@" ;;
esac
