#!/bin/bash
# Uptrain a converted model on several machines over ssh; the first one is where they meet:
#
#     examples/several-machines/ssh.sh MODEL OUT RECIPE MACHINE MACHINE ...
#
# Run it in the environment, and in a folder, that all machines have under the same path. OUT lies on a file system that
# they share. Ctrl-C saves a checkpoint; the same line resumes.
set -euo pipefail

if [ $# -lt 4 ]; then
    sed -n '2,7s/^# \?//p' "$0" >&2
    exit 2
fi
model=$1 out=$2 recipe=$3
machines=("${@:4}")
pid_file=/tmp/cla-convert-$$.pid # on each machine

torchrun=(
    torchrun --nnodes "${#machines[@]}" --nproc-per-node gpu --max-restarts 3
    --rdzv-backend c10d --rdzv-endpoint "${machines[0]}:29500" --rdzv-id "$$"
    -m cla_convert uptrain "$model" "$out" --recipe "$recipe" --set train.shard_degree=node
)
line=$(printf 'cd %q && echo $$ >%q && PATH=%q exec env' "$PWD" "$pid_file" "$PATH")$(printf ' %q' "${torchrun[@]}")

stop() {
    for machine in "${machines[@]}"; do
        ssh "$machine" "kill -INT \$(cat $pid_file)" || true
    done
}
trap stop INT TERM

pids=()
for machine in "${machines[@]}"; do
    ssh "$machine" "$line" &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
    while kill -0 "$pid" 2>/dev/null; do # a signal ends `wait` before its time
        wait "$pid" || code=$?
    done
done
exit "$code"
