#!/usr/bin/env bash
# One run on several machines with torchrun: start this on every machine.
#
#   NODES=2 NODE_RANK=0 FIRST=node0 bash launch/torchrun.sh vit_adamw data=photos out=runs/first   # on node0
#   NODES=2 NODE_RANK=1 FIRST=node0 bash launch/torchrun.sh vit_adamw data=photos out=runs/first   # on node1
#
# With RENDEZVOUS=c10d no NODE_RANK is needed, MIN_NODES may be smaller than NODES, and RESTARTS failures are
# survived: the run then goes on from its newest checkpoint.
set -euo pipefail

NODES=${NODES:-1}                    # machines
PROCESSES=${PROCESSES:-1}            # on each of them: one a GPU
FIRST=${FIRST:-127.0.0.1}            # the machine that runs rank 0, as the others reach it
PORT=${PORT:-29500}                  # free there
RENDEZVOUS=${RENDEZVOUS:-static}     # static, or c10d
PYTHON=${PYTHON:-python3}

case " $* " in
*" out="*) ;;
*)
    echo "give out=FOLDER: all machines must name the same run folder" >&2
    exit 2
    ;;
esac

if [ "$RENDEZVOUS" = static ]; then
    meeting=(--nnodes="$NODES" --node-rank="${NODE_RANK:?the number of this machine, 0 for the first}"
        --master-addr="$FIRST" --master-port="$PORT")
else
    meeting=(--nnodes="${MIN_NODES:-$NODES}:$NODES" --max-restarts="${RESTARTS:-3}"
        --rdzv-backend=c10d --rdzv-endpoint="$FIRST:$PORT" --rdzv-id="${JOB:-mooring}")
    set -- "$@" resume=auto
fi

exec "$PYTHON" -m torch.distributed.run --nproc-per-node="$PROCESSES" "${meeting[@]}" -m mooring.cli train "$@"
