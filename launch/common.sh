#!/usr/bin/env bash
# What all launchers share: srun-native ranks, rendezvous, signals, notes, and going on after whatever happens. A launcher sources it and ends with
#     supervise FUNCTION "$@"      FUNCTION runs `alone COMMAND` (one task on the first node) and `ranks COMMAND` (a task for each GPU)
# How a start of the job may end, and what then follows (megatron_infimed/notes.py has the other side):
#     0                      done
#     2, or the note `why`   the user's mistake: final (save after a signal, when anything may be said)
#     the note `bad_nodes`   back into the queue, without those nodes
#     75, or after USR1 or TERM (time limit, pre-emption)   saved: back into the queue
#     anything else          a crash: back into the queue
# Back into the queue means `scontrol requeue`: the job keeps its number, so what waits for it keeps waiting, and its log goes on. It is bounded:
# after INFIMED_MAX_IDLE_STARTS starts from the same checkpoint the job fails. SLURM itself requeues what it pre-empts, and what a lost node ends.
#
# From the environment or the site file (launch/site.sh, or INFIMED_SITE):
#     INFIMED_CONTAINER, INFIMED_MOUNTS   image and mounts for pyxis; --container-image=... among the words of a launcher does the same
#     INFIMED_SRUN                        more options of srun
#     INFIMED_LAUNCHER=ft                 training under nvidia-resiliency-ext's ft_launcher, which restarts processes within the job
#     INFIMED_PREFLIGHT=0                 leaves the preflight out
#     MASTER_ADDR, MASTER_PORT            where rank 0 is to be found, if the first node's address and a free port of it will not do
set -uo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "error: this is a batch script: sbatch [--nodes=N ...] $0 [key=value ...], in the project's folder" >&2
  exit 2
fi
site=${INFIMED_SITE:-launch/site.sh}
if [ -f "$site" ]; then
  set +u # what it sources may not be written for that: modules, conda
  # shellcheck source=/dev/null
  . "$site"
  set -u
elif [ -n "${INFIMED_SITE:-}" ]; then
  echo "error: INFIMED_SITE=$site is not there" >&2
  exit 2
fi

export INFIMED_NOTES=$PWD/launch/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID.notes
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1                                    # a line is in the log when it is said, also of a process that is killed
export PYTHONFAULTHANDLER=1                                  # a crash inside a library leaves a stack
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"               # eight ranks a node with a thread for each core would fight for them
export TOKENIZERS_PARALLELISM=false                          # its threads do not survive a fork
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"                 # tokenizers lie on disk; a node without network would wait for the hub
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"                      # the reason of a failure, without the hundred lines of INFO
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}" # the number of images changes from row to row
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/triton-$UID-$SLURM_JOB_ID}" # on the node: all ranks at once in a shared home break each other's files
# CUDA_DEVICE_MAX_CONNECTIONS depends on the layout: parallel/groups.py sets it. NCCL's network settings are the site's: launch/site.sh.

per_node=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}} # ranks on each node: as many as GPUs asked for, such as h100:8 ...
per_node=${SLURM_NTASKS_PER_NODE:-${per_node##*:}}        # ... unless the job says otherwise
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID} # of an array, this task alone
most_idle=${INFIMED_MAX_IDLE_STARTS:-3}
restart=${SLURM_RESTART_COUNT:-0} front='' stopped='' steps=0
image=${INFIMED_CONTAINER:-} mounts=${INFIMED_MOUNTS:-} container=()

say() { printf '== %s %s\n' "$(date '+%F %T')" "$*"; }

# A port of this node that nobody listens on; each job and each step begins to look at another place, so two jobs on a node do not meet.
free_port() {
  local port=$((20000 + (SLURM_JOB_ID * 16 + steps) % 12000)) # below the ports that the kernel hands out
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
  echo "$port"
}

# in_step SRUN_OPTION ... -- COMMAND: runs it, and passes our signals on to it. After a signal nothing more is begun.
in_step() {
  local options=() code
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  [ -z "$stopped" ] || return 75
  steps=$((steps + 1))
  # --kill-on-bad-exit: when one task fails the others end too, instead of waiting for it in a collective until that times out.
  # --overcommit: ranks need not have a core each; a job that shares its node may have been given fewer.
  # --cpu-bind=none: a task may use any core of the node; without it each could be tied to a single one, decoding threads and all.
  # --export=ALL: also on sites where sbatch itself exports nothing.
  # env: images have their own ideas (NVIDIA's set RANK, WORLD_SIZE, MASTER_ADDR by rules of theirs), which would win over ours.
  # shellcheck disable=SC2086 # INFIMED_SRUN is several words
  srun --export=ALL --kill-on-bad-exit=1 --overcommit --cpu-bind=none ${container[@]+"${container[@]}"} ${INFIMED_SRUN:-} "${options[@]}" \
    env -u RANK -u WORLD_SIZE -u LOCAL_RANK -u MASTER_ADDR ${MASTER_ADDR:+MASTER_ADDR="$MASTER_ADDR"} MASTER_PORT="${MASTER_PORT:-$(free_port)}" \
    INFIMED_NOTES="$INFIMED_NOTES" PYTHONPATH="$PYTHONPATH" OMP_NUM_THREADS="$OMP_NUM_THREADS" "$@" </dev/null &
  front=$!
  [ -z "$stopped" ] || insist & # the signal came before there was anybody to tell
  wait "$front" # a trapped signal ends the waiting, not the step
  while kill -0 "$front" 2>/dev/null; do wait "$front"; done
  wait "$front"
  code=$?
  front=''
  [ -z "$stopped" ] || [ "$code" = 0 ] || return 75
  return "$code"
}

alone() { in_step --nodes=1 --ntasks=1 --ntasks-per-node=1 -- "$@"; }

ranks() { in_step --ntasks="$((SLURM_JOB_NUM_NODES * per_node))" --ntasks-per-node="$per_node" -- "$@"; }

# Training's processes. Under ft_launcher, one a node, which starts again what has failed. What has saved (75) ends with 0 there; what is final (2)
# fails, so that the processes beside it are ended, and the start after that ends at once.
training() {
  if [ "${INFIMED_LAUNCHER:-srun}" = srun ]; then ranks "$@"; return; fi
  local code
  # shellcheck disable=SC2016 # for the shells on the nodes
  in_step --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 -- bash -c '
    trap "" USR1 # the launcher would die of it; the processes have their own way with it
    nodes=$1 per_node=$2; shift 2
    exec ft_launcher --nnodes="$nodes" --nproc-per-node="$per_node" --max-restarts="${INFIMED_FT_RESTARTS:-3}" \
      --rdzv-backend=c10d --rdzv-endpoint="${MASTER_ADDR:-$SLURM_LAUNCH_NODE_IPADDR}:$MASTER_PORT" --rdzv-id="$SLURM_JOB_ID.$SLURM_STEP_ID" \
      --no-python bash -c '\''
        [ ! -e "$INFIMED_NOTES/ended" ] || exit 0 # another process knows that it will not help
        "$@"
        code=$?
        case $code in 2 | 75) echo $code >"$INFIMED_NOTES/ended" ;; esac
        [ $code != 75 ] || exit 0
        exit $code'\'' worker "$@"
  ' launcher "$SLURM_JOB_NUM_NODES" "$per_node" "$@"
  code=$?
  [ ! -e "$INFIMED_NOTES/ended" ] || code=$(cat "$INFIMED_NOTES/ended")
  return "$code"
}

# train RECIPE [key=value ...]
train() {
  if [ "${INFIMED_PREFLIGHT:-1}" != 0 ]; then ranks python -m megatron_infimed preflight "$@" || return; fi
  training python -m megatron_infimed train "$@"
}

stop() {
  stopped=$1
  say "SIG$1: it is asked to save"
  [ -z "$front" ] || insist &
}

# When SLURM will end the job.
ends() { scontrol show job --oneliner "$job" | sed -n 's/.* EndTime=\([^ ]*\).*/\1/p' | grep . || echo unknown; }

# srun passes it on to all tasks. Again and again: a process may not listen yet. One that hangs would keep the job until its time limit, where SLURM
# ends it for good: so shortly before that it goes back into the queue as it is. (After TERM the end that SLURM names is that of the grace time.)
insist() {
  local limit=''
  while kill -USR1 "$front" 2>/dev/null && sleep 15; do
    [ "$stopped" = USR1 ] || continue
    limit=${limit:-$(date -d "$(ends)" +%s)}
    if [ -n "$limit" ] && [ $((limit - $(date +%s))) -le 45 ] && [ "$(idle_starts)" -lt $((3 * most_idle)) ] && kill -0 "$front"; then
      say "it does not end, and the time limit is near: back into the queue from $(progress)"
      ask scontrol requeue "$job"
      return
    fi
  done 2>/dev/null
}

supervise() {
  local words=() word code last
  for word in "$@"; do
    case $word in
      --container-image=*) image=${word#*=} ;;
      --container-mounts=*) mounts=${word#*=} ;;
      --container-*) container+=("$word") ;;
      *) words+=("$word") ;;
    esac
  done
  [ -z "$image" ] || container+=("--container-image=$image")
  [ -z "$mounts" ] || container+=("--container-mounts=$mounts")
  [ -z "$image" ] || [[ " ${container[*]}" == *" --container-workdir="* ]] || container+=("--container-workdir=$PWD")
  trap 'stop USR1' USR1
  trap 'stop TERM' TERM
  mkdir -p "$INFIMED_NOTES"
  rm -f "$INFIMED_NOTES"/{why,crash,commands,ended,bad_nodes}
  echo "$restart $(reached) $(date +%FT%T) $SLURM_JOB_NODELIST" >>"$INFIMED_NOTES/starts"
  [ "$(idle_starts)" -le $((3 * most_idle)) ] || give_up "SLURM itself started it again each time" # a job that takes its node down with it
  say "start $((restart + 1)) of $SLURM_JOB_NAME, job $SLURM_JOB_ID, on $SLURM_JOB_NODELIST, $per_node processes a node, from $(progress)"
  "${words[@]}"
  code=$?
  last=$(sed -n '$s/ .*//p' "$INFIMED_NOTES/starts")
  if [ "${last:-0}" -gt "$restart" ]; then # this node was given up, and the job runs elsewhere
    say "the job has been started again meanwhile"
    exit 75
  elif [ "$code" = 0 ]; then
    say "done"
    exit 0
  elif [ -z "$stopped" ] && { [ -e "$INFIMED_NOTES/why" ] || [ "$code" = 2 ]; }; then # what ends after a signal may say anything
    say "failed: $(cat "$INFIMED_NOTES/why" 2>/dev/null)"
    exit 2
  fi
  start_again "$code"
}

progress() { cat "$INFIMED_NOTES/progress" 2>/dev/null || echo nothing; }

# Where the job stands: what is saved, and how many nodes it does without; a start that changes neither was in vain. Nor is it progress to leave out
# more nodes than it runs on: then it is not the nodes.
reached() {
  local at without
  at=$(progress) without=$(sort -u "$INFIMED_NOTES/left_out" 2>/dev/null | wc -l)
  echo "${at//[[:space:]]/_}/$((without < SLURM_JOB_NUM_NODES ? without : SLURM_JOB_NUM_NODES))" # one word
}

# How many starts, the last ones, have begun where we are now.
idle_starts() {
  awk -v now="$(reached)" '{ n = $2 == now ? n + 1 : 0 } END { print n + 0 }' "$INFIMED_NOTES/starts"
}

give_up() {
  echo "no progress in $(idle_starts) starts, all from $(progress); $1" >"$INFIMED_NOTES/why"
  say "failed: $(cat "$INFIMED_NOTES/why")"
  exit 1
}

# Asks SLURM's controller, for eight minutes and more if it does not answer: it may be starting again itself.
ask() {
  local said wait=1
  until said=$("$@" 2>"$INFIMED_NOTES/answer"); do
    if grep -qi 'invalid job id' "$INFIMED_NOTES/answer" || [ "$wait" -gt 30 ]; then
      cat "$INFIMED_NOTES/answer" >&2
      return 1
    fi
    sleep "$wait"
    wait=$((wait + 1))
  done
  rm -f "$INFIMED_NOTES/answer"
  echo "$said"
}

start_again() {
  local code=$1 state given bad=''
  state=$(ask squeue --noheader --jobs="$job" --format=%T)
  case $state in
    RUNNING | SIGNALING | STOPPED | RESIZING) ;;
    *) # cancelled; or pre-empted or lost a node, and SLURM has already put it back
      say "ends with exit code $code, being ${state:-gone}"
      exit 75
      ;;
  esac
  if [ -s "$INFIMED_NOTES/bad_nodes" ]; then
    cat "$INFIMED_NOTES"/{left_out,bad_nodes} 2>/dev/null | sort -u >"$INFIMED_NOTES/left_out.new"
    mv "$INFIMED_NOTES"/left_out{.new,}
    bad=$(paste -sd, "$INFIMED_NOTES/left_out")
  fi
  # What a signal has ended was nobody's fault: more patience.
  [ -z "$stopped" ] || most_idle=$((3 * most_idle))
  if [ "$(idle_starts)" -ge "$most_idle" ]; then
    give_up "the last ended with exit code $code${stopped:+ after a signal}$(sed '1s/^/: /;1q' "$INFIMED_NOTES/crash" 2>/dev/null)"
  fi
  say "exit code $code${stopped:+ after a signal}, got to $(progress): back into the queue${bad:+, without $bad}"
  if ! ask scontrol requeue "$job" && [ "$(ask squeue --noheader --jobs="$job" --format=%T)" = RUNNING ]; then
    say "SLURM does not requeue it"
    exit 1
  fi
  if [ -n "$bad" ]; then # only a waiting job takes it; SLURM's requeue leaves a while before it can start
    given=$(ask scontrol show job --oneliner "$job" | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    [ "$given" = "(null)" ] && given=''
    ask scontrol update JobId="$job" ExcNodeList="${given:+$given,}$bad" || say "SLURM does not exclude $bad"
  fi
  exit 75
}
