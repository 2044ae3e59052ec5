#!/usr/bin/env bash
# Pretraining of InfiMed-Foundation-1.7B from low to high resolution:   sbatch [--nodes=4 ...] launch/pretrain_1p7b.sh [key=value ...]
#SBATCH --job-name=pretrain_1p7b
#SBATCH --nodes=1 --gpus-per-node=8 --exclusive --mem=0 --time=24:00:00
#SBATCH --output=launch/logs/%x-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
. launch/common.sh || exit

supervise train launch/recipes/pretrain_1p7b.yaml "$@"
