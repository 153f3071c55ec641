"""Run scripts/distill.py in this process, one of several, and report how; test_checkpoints.py launches it.

    python -m torch.distributed.run --nproc_per_node 2 tests/distil_parallel.py KIND REPORT [distill.py's arguments]

KIND is ddp, as accelerate has it on a CPU, or shard: torch's fully_shard on a CPU mesh, put where accelerate's FSDP2
would put it. accelerate's own plugin is silently ignored on a CPU.
"""

import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from minianyflow import faults, runs, training
from minianyflow.__main__ import run

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "distill.py"
SEEN = {"kinds": set(), "sharded": set(), "calls": 0, "processes": None}


class Sharding(Accelerator):
    """Shards a network in place and gives its optimiser the shards, as accelerate does on GPUs."""

    def prepare(self, network, optimizer):
        fully_shard(network, reshard_after_forward=False)
        weights = dict(network.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [weights[name] for name in group["param_names"]]
        return network, optimizer


def main(kind, report, *arguments):
    torch.set_num_threads(1)
    if kind == "shard" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        runs.Accelerator = Sharding
    step = training._step

    def looked_at(name, role, network, optimizer, *rest):
        out = step(name, role, network, optimizer, *rest)
        SEEN["kinds"].add("ddp" if isinstance(network, DistributedDataParallel) else "plain")
        if isinstance(network, FSDPModule):
            SEEN["kinds"] = {"shard"}
        optimised = [each for group in role.optimizer.param_groups for each in group["params"]]
        averaged = [*role.average.parameters()] if role.average else []
        SEEN["processes"] = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        SEEN["sharded"].add(all(isinstance(each, DTensor) for each in (*optimised, *averaged)))
        return out

    training._step = looked_at
    spec = importlib.util.spec_from_file_location("distill", SCRIPT)
    distill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(distill)
    if "PREEMPT_AFTER" in os.environ:
        preempt_after(int(os.environ["PREEMPT_AFTER"]))
    status = run(lambda: distill.main(arguments))
    if int(os.environ.get("RANK", 0)) == 0:
        told = {"processes": SEEN["processes"], "kinds": sorted(SEEN["kinds"])}
        told |= {"sharded": sorted(SEEN["sharded"]), "status": status}
        Path(report).write_text(json.dumps(told))
    if status == faults.TERMINATED:
        os._exit(0)  # as distill.py's own last lines
    return 0


def preempt_after(count):
    """SIGTERM to the last process alone, in the middle of a step: all of them have to stop."""
    on_any = faults.on_any

    def counted(flag, accelerator):
        SEEN["calls"] += 1
        if SEEN["calls"] == count and accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGTERM)
        return on_any(flag, accelerator)

    faults.on_any = training.on_any = counted


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
