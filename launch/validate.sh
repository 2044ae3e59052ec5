#!/usr/bin/env bash
# The held-out loss of a trained checkpoint:   sbatch launch/validate.sh RECIPE [key=value ...] --data PREFIX [--data PREFIX] --output FILE
#SBATCH --job-name=validate
#SBATCH --nodes=1 --gpus-per-node=8 --exclusive --mem=0 --time=4:00:00
#SBATCH --output=launch/logs/%x-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@60
. launch/common.sh || exit

supervise ranks python -m megatron_infimed validate "$@"
