#!/usr/bin/env bash
# A controlled study from one file: plan, runs that share what they have in common, scores, a page. Minutes on two
# cores, nothing to download; the same command goes on where it was stopped.
#
#   bash examples/study.sh                                a few models of examples/study_tiny.yaml
#   bash examples/study.sh --jobs 2                       options of `megatron-encdec study run`
#   WHOLE=1 bash examples/study.sh --jobs 2               all of examples/study_tiny.yaml: an hour or two
#   STUDY=examples/study_mask.yaml bash examples/study.sh      another study on the same data: docs/recipes.md has a list
#
# Text and tokenizer are the demo's, in work_dirs/demo, made with .venv if they are not there; tasks and study go to
# work_dirs/study_tiny. Trains and fine-tunes in .venv-nemo, which has the recipes of NeMo AutoModel, or with
# MEGATRON_ENCDEC_PYTHON, which has to have them.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' examples/study.sh
        exit 0
        ;;
esac

source tools/setup_env.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
work=work_dirs/demo

"$PYTHON" tools/build_docstring_corpus.py "$work/corpus.jsonl"
"$PYTHON" -m megatron_encdec preprocess --input "$work/corpus.jsonl" --tokenizer "$work/tokenizer" \
    --train-tokenizer 4096 --validation-percent 10 --output "$work/data/docstrings"
ENCDEC_ENV=nemo source tools/setup_env.sh
"$PYTHON" tools/docstring_tasks.py "$work/corpus.jsonl" "$work/data/docstrings.manifest.json" \
    work_dirs/study_tiny/tasks --most-bytes 126  # what a window of 128 holds

study="${STUDY:-examples/study_tiny.yaml}" cut=()
if [[ -z "${WHOLE:-}${STUDY:-}" ]]; then
    cut=(output=../work_dirs/study_tiny/cut "models=[mlm40-100, 'clm-{25,50}-mlm40-100', clm-100]"
        seeds=[] checkpoints=[] "finetune.grid={learning_rates: [3.0e-3], seeds: [0, 1]}"
        "finetune.training={batch_size: 16, micro_batch_size: 16, max_steps: 20}")
fi
"$PYTHON" -m megatron_encdec study plan "$study" ${cut[@]+"${cut[@]}"}
"$PYTHON" -m megatron_encdec study run "$study" "$@" ${cut[@]+"${cut[@]}"}
