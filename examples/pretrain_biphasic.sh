#!/usr/bin/env bash
# Biphasic pretraining: causal language modelling (CLM), then masked (MLM), in one run.
#
# THE DEMO, from nothing to a Hugging Face encoder, on a laptop and without a download of data:
#
#   bash examples/pretrain_biphasic.sh                        minutes on two cores; again: only what is missing
#   bash examples/pretrain_biphasic.sh run.total.steps=2000 run.dir=work_dirs/demo/longer     with other settings
#
# Everything goes to work_dirs/demo; remove that folder to start over. The config is examples/biphasic_tiny.yaml.
#
# THE REAL THING, with CONFIG: this script is then the launcher of `megatron-encdec pretrain`, and nothing else.
# The same command again resumes. Relative paths are taken from the repository's root.
#
#   CONFIG=examples/biphasic_610m.yaml bash examples/pretrain_biphasic.sh            one node, all its GPUs
#   CONFIG=... NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 bash examples/pretrain_biphasic.sh    on each of four nodes
#   CONFIG=... srun --ntasks-per-node 1 --gpus-per-node 8 bash examples/pretrain_biphasic.sh      a task a node,
#                                                                       or --ntasks-per-node 8: a task a GPU
#
#   GPUS_PER_NODE (default: all), MASTER_PORT (29500; under srun by the job's number), MEGATRON_ENCDEC_PYTHON (an
#   interpreter that has everything, instead of .venv)
#
# Arguments are passed on to `pretrain`: dotted.key=value, --until STEP, --dry-run, ...; --help prints this.
set -euo pipefail
unset CDPATH # else `cd` may go elsewhere, and prints where
script="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
cd "$(dirname "$script")/.."

run_directory=work_dirs/demo/run
ends_early=false # with --until or --dry-run there is no finished run to export
for argument in "$@"; do
    case "$argument" in
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$script"
            exit 0
            ;;
        run.dir=*) run_directory="${argument#run.dir=}" ;;
        --until | --until=* | --dry-run) ends_early=true ;;
    esac
done

launch() {
    local nodes=()
    # Under srun its numbers say how many nodes there are; in a job of several nodes without it they refuse.
    if [[ -n "${NNODES:-}" || -z "${SLURM_STEP_ID:-}" && "${SLURM_JOB_NUM_NODES:-1}" -eq 1 ]]; then
        nodes=(--nnodes "${NNODES:-1}")
    fi
    # Megatron overlaps communication with computation on the assumption of one hardware queue.
    export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    exec "$PYTHON" -m megatron_encdec pretrain "$CONFIG" "${nodes[@]}" ${GPUS_PER_NODE:+--nproc "$GPUS_PER_NODE"} "$@"
}

# Step at which the first phase, CLM, ended; nothing while it has not.
boundary() {
    "$PYTHON" - "$run_directory/metrics.jsonl" <<'PYTHON'
import json, sys
for record in map(json.loads, open(sys.argv[1], encoding="utf-8")):
    if record["kind"] == "phase" and record["objective"] == "clm":
        print(record["step"])
        break
PYTHON
}

step() { printf '\n== %s\n' "$*"; }

demo() {
    local work=work_dirs/demo encdec=("$PYTHON" -m megatron_encdec) models clm_end
    models="$run_directory"
    if [[ "$run_directory" == "$work/run" ]]; then models="$work"; fi

    step "1/6 text: the docstrings of the installed packages"
    "$PYTHON" tools/build_docstring_corpus.py "$work/corpus.jsonl"

    step "2/6 tokens: train a tokenizer, write .bin and .idx"
    "${encdec[@]}" preprocess --input "$work/corpus.jsonl" --tokenizer "$work/tokenizer" --train-tokenizer 4096 \
        --validation-percent 10 --output "$work/data/docstrings"

    step "3/6 pretraining: CLM, then MLM"
    "${encdec[@]}" pretrain examples/biphasic_tiny.yaml "$@"
    if $ends_early; then exit 0; fi

    step "4/6 export to Hugging Face: the encoder, and the causal model it was at the switch"
    export HF_HUB_OFFLINE=1
    # --force: an export of an earlier demo run makes way; one of this very run is kept.
    "${encdec[@]}" export "$run_directory" "$models/hf" --force
    clm_end="$(boundary)"
    if [[ -n "$clm_end" ]]; then
        "${encdec[@]}" export "$run_directory@$clm_end" "$models/hf_clm" --force
    fi

    step "5/6 the encoder at work"
    "$PYTHON" tools/fill_masks.py "$models/hf"

    step "6/6 the run"
    "${encdec[@]}" inspect run "$run_directory" --model "$models/hf" ${clm_end:+"$models/hf_clm"}
}

[[ -f tools/setup_env.sh ]] || { # sbatch runs a copy, in a folder of its own
    echo "examples/pretrain_biphasic.sh is no batch script: sbatch examples/slurm/pretrain.sbatch CONFIG" >&2
    exit 2
}
source tools/setup_env.sh
if [[ -n "${CONFIG:-}" ]]; then
    launch "$@"
else
    demo "$@"
fi
