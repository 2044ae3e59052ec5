#!/usr/bin/env bash
# Image-text data to a shard, on many CPU nodes:   sbatch --array=0-63 launch/preprocess_array.sh --input FILE ... --tokenizer FOLDER --output PREFIX
# The array's tasks share the pieces, whoever comes last merges them. What is killed goes on from the finished pieces; so does the same command.
#SBATCH --job-name=preprocess
#SBATCH --nodes=1 --ntasks=1 --cpus-per-task=4 --mem-per-cpu=4G --time=12:00:00
#SBATCH --output=launch/logs/%x-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@60
. launch/common.sh || exit

supervise alone python tools/preprocess_multimodal.py --engine ranks --threads "${SLURM_CPUS_PER_TASK:-1}" "$@"
