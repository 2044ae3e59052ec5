#!/usr/bin/env bash
# One of the three SFT stages of InfiMed-Foundation-1.7B:   sbatch [--nodes=4 ...] launch/sft_1p7b.sh general|medical|cross [key=value ...]
#SBATCH --job-name=sft_1p7b
#SBATCH --nodes=1 --gpus-per-node=8 --exclusive --mem=0 --time=24:00:00
#SBATCH --output=launch/logs/%x-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
. launch/common.sh || exit

case ${1:-} in
  general | medical | cross) ;;
  *) echo "error: which stage? sbatch launch/sft_1p7b.sh general|medical|cross [key=value ...]" >&2; exit 2 ;;
esac
supervise train "launch/recipes/sft_$1_1p7b.yaml" "${@:2}"
