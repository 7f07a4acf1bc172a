#!/usr/bin/env bash
# Everything about a GPU in one script: for a bare machine with one H100 or H200, Python 3.12 and CUDA torch, nothing to
# download from, and little time. docs/gpu.md says what to bring and in which order.
#
#   bash benchmarks/gpu.sh split FILE [DIR]    here: a wheel in pieces of 55 MiB under DIR (wheels), with its checksum
#   bash benchmarks/gpu.sh install             there: wheels and pieces of $WHEELS to $STORE, pieces joined, all installed
#   bash benchmarks/gpu.sh STAGE...            there: see benchmarks/gpu_stages.py; `all` is all of them in order
#   bash benchmarks/gpu.sh --rehearse [STAGE]  anywhere: the same stages at tiny sizes on a CPU, nothing installed
#
#   PYTHON (python3)  WHEELS (wheels)  STORE (/tmp/megatron_encdec_gpu)  RESULTS (work_dirs/gpu)  MINUTES (9)  OUT ()
#
# Exit code 75: not through, the same command goes on. Where OUT names a folder, results are packed into it at the end,
# and where RESULTS lacks them but $RESULTS.tar.gz is there, they are unpacked first: so a later machine goes on too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON="${PYTHON:-python3}"
WHEELS="${WHEELS:-wheels}"
STORE="${STORE:-/tmp/megatron_encdec_gpu}"
RESULTS="${RESULTS:-work_dirs/gpu}"
MINUTES="${MINUTES:-9}"
PIECE_MIB="${PIECE_MIB:-55}"
site="$STORE/site"

say() { echo "gpu: $*"; }
fail() {
    echo "gpu: $*" >&2
    exit 1
}

split_file() {
    local file="$1" folder="${2:-wheels}" name
    name="$(basename "$file")"
    [[ -f "$file" ]] || fail "$file: there is no such file"
    mkdir -p "$folder"
    rm -f "$folder/$name".part-*
    split --bytes="${PIECE_MIB}M" --numeric-suffixes=1 --suffix-length=2 "$file" "$folder/$name.part-"
    (cd "$(dirname "$file")" && sha256sum "$name") >"$folder/$name.sha256"
    ls "$folder/$name".part-* | wc -l >"$folder/$name.pieces"
    say "$name: $(cat "$folder/$name.pieces") pieces in $folder"
}

# Whole wheels and sdists, and pieces that have all come, into $STORE/wheels.
collect() {
    local list name expected
    mkdir -p "$STORE/wheels" "$STORE/pieces"
    find "$WHEELS" -maxdepth 1 -type f \( -name '*.whl' -o -name '*.tar.gz' \) -exec cp -u {} "$STORE/wheels/" \; 2>/dev/null || true
    find "$WHEELS" -maxdepth 1 -type f \( -name '*.part-*' -o -name '*.sha256' -o -name '*.pieces' \) \
        -exec cp -u {} "$STORE/pieces/" \; 2>/dev/null || true
    for list in "$STORE"/pieces/*.pieces; do
        [[ -e "$list" ]] || continue
        name="$(basename "$list" .pieces)"
        expected="$(cat "$list")"
        [[ -e "$STORE/wheels/$name" ]] && continue
        if [[ "$(find "$STORE/pieces" -name "$name.part-*" | wc -l)" -lt "$expected" ]]; then
            say "$name: $(find "$STORE/pieces" -name "$name.part-*" | wc -l) of $expected pieces so far"
            continue
        fi
        cat "$STORE/pieces/$name".part-* >"$STORE/pieces/$name"
        (cd "$STORE/pieces" && sha256sum --check --quiet "$name.sha256") || fail "$name: the pieces do not add up"
        mv "$STORE/pieces/$name" "$STORE/wheels/$name"
        say "$name: joined"
    done
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

# Transformer Engine's binding to torch is C++ that has to be compiled against the torch that is here.
build_binding() {
    local sdist nvidia folder includes=""
    sdist="$(find "$STORE/wheels" -name 'transformer_engine_torch-*.tar.gz' | head -n 1)"
    [[ -n "$sdist" ]] || return 0
    compgen -G "$STORE/wheels/transformer_engine_torch-*.whl" >/dev/null && return 0
    compgen -G "$STORE/wheels/transformer_engine_cu*.whl" >/dev/null || {
        say "$(basename "$sdist") waits for the wheel of Transformer Engine's core"
        return 0
    }
    nvidia="$("$PYTHON" -c 'import nvidia; print(list(nvidia.__path__)[0])' 2>/dev/null || true)"
    for folder in cudnn nccl; do # headers that the toolkit's own folder lacks
        [[ -d "$nvidia/$folder/include" ]] && includes="$includes:$nvidia/$folder/include"
    done
    say "building $(basename "$sdist") with $(nproc) processes"
    env NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_FRAMEWORK=pytorch MAX_JOBS="$(nproc)" NVTE_BUILD_THREADS_PER_JOB=1 \
        CPATH="${includes#:}${CPATH:+:$CPATH}" PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" \
        timeout "$((${MINUTES%.*} * 60 - 30))" \
        "$PYTHON" -m pip wheel --no-index --no-deps --no-build-isolation --wheel-dir "$STORE/wheels" "$sdist" \
        >"$STORE/build.log" 2>&1 || {
        tail -n 30 "$STORE/build.log" >&2
        fail "Transformer Engine's binding could not be built, see above"
    }
    if [[ -n "${OUT:-}" ]]; then # 20 MB or so: bring it along next time instead of the sdist
        PIECE_MIB=15 split_file "$(find "$STORE/wheels" -name 'transformer_engine_torch-*.whl' | head -n 1)" "$OUT"
    fi
}

install() {
    collect
    install_wheels
    build_binding
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
    "" | -h | --help) sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
    split) shift && split_file "$@" ;;
    install) install ;;
    --rehearse)
        shift
        RESULTS="${RESULTS%/}_rehearsal"
        export MEGATRON_ENCDEC_DEVICE=cpu
        run_stages "${@:-all}" --rehearse
        ;;
    *) run_stages "$@" ;;
esac
