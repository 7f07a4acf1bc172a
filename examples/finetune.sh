#!/usr/bin/env bash
# From the demo's encoder to a report: four tasks, pretrained beside random weights, on a laptop without a download.
#
#   bash examples/pretrain_biphasic.sh                        first, if it has not run yet
#   bash examples/finetune.sh                                 again: only what is missing
#   bash examples/finetune.sh grid.seeds=[0] --workers 2      with other settings
#
# Installs the recipes of NeMo AutoModel into .venv-nemo (or takes MEGATRON_ENCDEC_PYTHON, which has to have them).
# The tasks go to work_dirs/demo/tasks, runs to work_dirs/demo/finetuned, the report to work_dirs/demo/report; the
# config is examples/finetune_tiny.yaml.
set -euo pipefail
unset CDPATH # else `cd` may go elsewhere, and prints where
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' examples/finetune.sh
        exit 0
        ;;
esac

[[ -f tools/setup_env.sh ]] || { # sbatch runs a copy, in a folder of its own
    echo "examples/finetune.sh is no batch script: sbatch examples/slurm/finetune.sbatch CONFIG" >&2
    exit 2
}
ENCDEC_ENV=nemo source tools/setup_env.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
work=work_dirs/demo
"$PYTHON" tools/docstring_tasks.py "$work/corpus.jsonl" "$work/data/docstrings.manifest.json" "$work/tasks"
"$PYTHON" -m megatron_encdec finetune examples/finetune_tiny.yaml "$@"
"$PYTHON" -m megatron_encdec study report "$work/finetuned" --output "$work/report"
