#!/usr/bin/env bash
# The whole chain on real medical pictures, on a CPU, in minutes: corpus -> tokenizer -> preprocess -> plan -> pretrain (low, then high
# resolution) -> three SFT stages -> evaluation -> export to Hugging Face -> report. chain.yaml says what runs; it is what `stages submit`
# puts on a cluster. Run again, it skips what is done. Everything is written under runs/quickstart.
# usage: run.sh [--dev] [option of `stages run` ...]      (--dev: evaluate on the dev split)
set -euo pipefail
cd "$(dirname "$0")/../.."
split="test"
[ "${1:-}" = --dev ] && split=dev && shift

venv=$(tools/bootstrap.sh quickstart)
export CUDA_VISIBLE_DEVICES= # on a machine with GPUs too: this is the CPU path
export PATH="$venv/bin:$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
python -m megatron_infimed stages run examples/quickstart/chain.yaml split=$split "$@"
echo "see runs/quickstart/report.html, runs/quickstart/summary.json, runs/quickstart/hf"
