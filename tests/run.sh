#!/usr/bin/env bash
# Lint, then every test that needs neither minutes nor a GPU. Arguments go to pytest:
#
#   bash tests/run.sh                      all of them, on two processes
#   bash tests/run.sh -k order             some
#   bash tests/run.sh -m slow              the long ones (a later -m replaces ours); also -m gpu, -m te
#   bash tests/run.sh -m slurm tests/cluster  several hosts and a real Slurm on this machine, by root
#   ENCDEC_ENV=te bash tests/run.sh -n 0 -m te_python tests/test_te_python.py    over Transformer Engine's own Python
#   ENCDEC_PYTHON=python3.12 bash tests/run.sh       as the GPU image has it: Python 3.12, megatron-core 0.19.2
#   ENCDEC_ENV=nemo bash tests/run.sh -m "nemo and not slow" tests/finetune      NeMo's, in .venv-nemo
#   bash tests/run.sh -n 0 --pdb tests/data/test_order.py
#
# Where CI is set, the slowest tests are listed at the end.
set -euo pipefail
unset CDPATH
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh

# Ranks of a multi-process test share the machine: one thread each. Nothing here may reach for a network.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
unset PYTHONDONTWRITEBYTECODE # hundreds of processes start: each would compile the package again

"$PYTHON" -c "import pytest, xdist, hypothesis, ruff" 2>/dev/null || { # a given interpreter may lack them
    echo "tests: pytest, pytest-xdist, hypothesis and ruff are needed: $PYTHON -m pip install -e '.[dev]'" >&2
    exit 1
}
"$PYTHON" -m ruff check .

extra=()
if [[ -n "${CI:-}" ]]; then
    extra+=(--durations=15 -p no:cacheprovider)
fi
# A file's tests stay in one process: they share what its fixtures build. Hypothesis' profile "ci" draws the same
# examples each time and sets no deadline.
exec "$PYTHON" -m pytest -n 2 --dist loadfile --hypothesis-profile ci -m "not slow and not gpu and not te and not slurm" \
    ${extra[@]+"${extra[@]}"} "$@"
