#!/usr/bin/env bash
# One stage of a chain as a job. `python -m megatron_infimed stages submit CHAIN` submits it: stage.sh CHAIN STAGE [NAME=TEXT ...] [--redo]
#SBATCH --output=launch/logs/%x-%j.log --open-mode=append
#SBATCH --requeue --signal=B:USR1@300
. launch/common.sh || exit

# What the chain's stage runs comes back as a file of `alone ...`, `ranks ...` and `train ...` lines, joined by &&.
# shellcheck disable=SC2317 # supervise calls it
stage() {
  alone python -m megatron_infimed stages begin "$@" || return
  # shellcheck source=/dev/null
  . "$INFIMED_NOTES/commands" || return
  alone python -m megatron_infimed stages end "$@"
}

supervise stage "$@"
