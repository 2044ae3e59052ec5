#!/usr/bin/env bash
# Every test, after all of its own set-up: lint, format, types, unit, parity, distributed, cli.   usage: run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(tools/bootstrap.sh dev,quickstart)
export CUDA_VISIBLE_DEVICES= # on a machine with GPUs too: this is the CPU path
export PATH="$venv/bin:$PATH" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
echo "== ruff"; ruff check . && ruff format --check .
echo "== pyright"; pyright --pythonpath "$venv/bin/python"
echo "== pytest"; python -m pytest "$@"
