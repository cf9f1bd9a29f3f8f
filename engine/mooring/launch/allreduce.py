"""A small all-reduce over all processes of a launch: ``python -m mooring.launch.allreduce SECONDS``.

Started in the very way that the training will be. Every process checks the sum; rank 0 prints one line of
JSON with the world size, the backend and the rate.
"""

from __future__ import annotations

import json
import os
import sys
import time
from datetime import timedelta

_BYTES = 4 << 20
_REPEATS = 5


def main(arguments: list[str]) -> int:
    import torch
    from torch import distributed

    backend = "nccl" if torch.cuda.is_available() else "gloo"
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    distributed.init_process_group(backend, timeout=timedelta(seconds=float(arguments[0])))
    rank, world = distributed.get_rank(), distributed.get_world_size()
    seconds = []
    for repeat in range(_REPEATS):
        values = torch.full((_BYTES // 4,), float(rank + 1 + repeat), device=device)
        distributed.barrier()
        begin = time.perf_counter()
        distributed.all_reduce(values)
        got, expected = values[-1].item(), world * (world + 1) / 2 + world * repeat
        seconds.append(time.perf_counter() - begin)
        if not bool((values == expected).all()):
            print(
                f"rank {rank}: the sum over {world} processes is {got}, expected {expected}", file=sys.stderr
            )
            return 1
    if rank == 0:
        # a ring sends 2 (P - 1) / P of the bytes through every link
        rate = 2 * (world - 1) / world * _BYTES / min(seconds) / 1e9
        print(json.dumps({"world": world, "backend": backend, "gigabytes_per_second": rate}), flush=True)
    distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
