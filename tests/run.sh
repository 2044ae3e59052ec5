#!/usr/bin/env bash
# Every test, after all of its own set-up: lint, format, types, unit, parity, distributed, cli, slurm.   usage: run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(tools/bootstrap.sh dev,quickstart)
if ! command -v slurmctld >/dev/null 2>&1; then # tests/slurm starts a SLURM of its own; without it those tests fail and say so
  echo "== installing SLURM"
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge; } \
    >"$venv/slurm-install.log" 2>&1 || { tail -n 5 "$venv/slurm-install.log" >&2; echo "SLURM could not be installed: tests/slurm will fail" >&2; }
fi
export CUDA_VISIBLE_DEVICES= # on a machine with GPUs too: this is the CPU path
export PATH="$venv/bin:$PATH" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
echo "== ruff"; ruff check . && ruff format --check .
echo "== pyright"; pyright --pythonpath "$venv/bin/python"
echo "== pytest"; python -m pytest "$@"
