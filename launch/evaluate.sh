#!/usr/bin/env bash
# Answers and scores questions with a trained checkpoint:   sbatch launch/evaluate.sh RECIPE [key=value ...] --questions FILE --images FOLDER --output FOLDER [--gray]
#SBATCH --job-name=evaluate
#SBATCH --nodes=1 --gpus-per-node=8 --exclusive --mem=0 --time=4:00:00
#SBATCH --output=launch/logs/%x-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@60
. launch/common.sh || exit

supervise ranks python -m megatron_infimed evaluate "$@"
