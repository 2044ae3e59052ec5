#!/usr/bin/env bash
# Every test, after all of its own set-up: lint, format, types, unit, parity, distributed, cli, slurm.   usage: run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$(tools/bootstrap.sh dev,quickstart)
need=() # Debian packages: a SLURM of the tests' own with a plugin built for it, clocks that differ, a browser, the shell scripts' linter
for pair in slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client munged:munge gcc:gcc faketime:faketime chromium:chromium shellcheck:shellcheck; do
  command -v "${pair%%:*}" >/dev/null 2>&1 || need+=("${pair#*:}")
done
[[ " ${need[*]} " != *" gcc "* ]] || need+=(libc6-dev)
if [ "${#need[@]}" -gt 0 ]; then
  echo "== installing ${need[*]}"
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${need[@]}"; } >"$venv/apt.log" 2>&1 ||
    { tail -n 5 "$venv/apt.log" >&2; echo "${need[*]} could not be installed: the tests that need them FAIL" >&2; }
fi
export CUDA_VISIBLE_DEVICES= # on a machine with GPUs too: this is the CPU path
export PATH="$venv/bin:$PATH" TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
echo "== ruff"; ruff check . && ruff format --check .
echo "== pyright"; pyright --pythonpath "$venv/bin/python"
echo "== pytest"; python -m pytest "$@"
