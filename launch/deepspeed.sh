#!/usr/bin/env bash
# One run on the machines of a hostfile with DeepSpeed's launcher, which reaches them by pdsh over ssh.
#
#   HOSTFILE=hosts bash launch/deepspeed.sh vit_adamw data=photos out=runs/first
#
# A hostfile has a line for each machine, the first of which runs rank 0:
#   node0 slots=8
#   node1 slots=8
# Variables that the other machines need (NCCL_SOCKET_IFNAME=..., PATH=...) go into a file .deepspeed_env here.
# pdsh hands the settings to a shell on every machine: `mooring launch --hostfile` does not, and knows when a
# machine is lost.
set -euo pipefail

HOSTFILE=${HOSTFILE:?a file with lines like: node0 slots=8}
PORT=${PORT:-29500}
PYTHON=${PYTHON:-python3}
first=${FIRST:-$(awk '{ sub(/#.*/, "") } NF && !found { print $1; found = 1 }' "$HOSTFILE")}

case " $* " in
*" out="*) ;;
*)
    echo "give out=FOLDER: all machines must name the same run folder" >&2
    exit 2
    ;;
esac

exec "$PYTHON" -m deepspeed.launcher.runner --hostfile="$HOSTFILE" --launcher=pdsh --force_multi \
    --master_addr="$first" --master_port="$PORT" --no_local_rank --module mooring.cli train "$@"
