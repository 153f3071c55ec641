"""Run scripts/distill.py in this process, one of several, and report how; test_checkpoints.py launches it.

    python -m torch.distributed.run --nproc_per_node 2 tests/wan/distil_parallel.py KIND REPORT [RUN [-- RUN]...]

KIND is ddp, as accelerate has it on a CPU, or shard: accelerate's FSDP2 with the plugin that eight_gpus_fsdp2.yaml asks
for, on a CPU mesh. accelerate ignores that file silently where there is no GPU, so the plugin is put in its place here.
A RUN is distill.py's arguments, after preempt=N perhaps: SIGTERM after so many questions of `faults.any_process`.
"""

import json
import os
import signal
import sys
from itertools import groupby
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from minianyflow.support.cli import run
from minianyflow.wan import guard as faults
from minianyflow.wan import run as runs
from minianyflow.wan import trainer as training
from minianyflow.wan.commands import distill
from minianyflow.wan.data.latents import LatentSet

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
RANK = int(os.environ.get("RANK", 0))
SEEN = {}


class Sharding(Accelerator):
    """What accelerate is on GPUs with the launch file for FSDP2."""

    def __init__(self, **options):
        super().__init__(**options)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # as the environment says
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def read_launch_file():
    """Put into the environment what `accelerate launch` would, of the plugin."""
    file = str(SCRIPTS / "accelerate" / "eight_gpus_fsdp2.yaml")
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", file, "script.py"]))
    told = prepare_multi_gpu_env(arguments)
    assert told["ACCELERATE_USE_FSDP"] == "true"
    os.environ.update({name: value for name, value in told.items() if name.startswith("FSDP_")})


def main(kind, report, *arguments):
    torch.set_num_threads(1)
    if kind == "shard" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        read_launch_file()
        runs.Accelerator = Sharding
    watch_steps()
    watch_reads()
    PartialState.destroy_process_group = lambda *_: None  # the next run needs it
    faults.exit_at_once = lambda: faults.EXIT_SIGTERM  # or there would be no report
    told = []
    for again, group in groupby(arguments, lambda each: each == "--"):
        if not again:
            told.append(one(*group))
            Path(f"{report}.{RANK}").write_text(json.dumps(told))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as distill.py's own last lines


def one(*arguments):
    """Run once: what was seen."""
    SEEN.update(kinds=set(), sharded=set(), calls=0, processes=None, reads=[])
    preempt = [each for each in arguments if each.startswith("preempt=")]
    SEEN["preempt"] = int(preempt[0].partition("=")[2]) if preempt else None
    status = run(lambda: distill(arguments[len(preempt) :]))
    sets = {name: sorted(value) for name, value in SEEN.items() if isinstance(value, set)}
    return SEEN | sets | {"status": status}


def watch_steps():
    """What every step works on; and SIGTERM to the last process alone, in the middle of one: all have to stop."""
    step, any_process = training._step, faults.any_process

    def looked_at(name, role, network, optimizer, *rest):
        out = step(name, role, network, optimizer, *rest)
        SEEN["kinds"].add("ddp" if isinstance(network, DistributedDataParallel) else "plain")
        if isinstance(network, FSDPModule):
            SEEN["kinds"] = {"shard"}
        optimised = [each for group in role.optimizer.param_groups for each in group["params"]]
        averaged = [*role.average.parameters()] if role.average else []
        moments = [role.optimizer.state[each]["exp_avg"] for each in optimised]
        SEEN["processes"] = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        SEEN["sharded"].add(all(isinstance(each, DTensor) for each in (*optimised, *moments, *averaged)))
        return out

    def counted(flag, accelerator):
        SEEN["calls"] += 1
        if SEEN["calls"] == SEEN["preempt"] and accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGTERM)
        return any_process(flag, accelerator)

    training._step, faults.any_process, training.any_process = looked_at, counted, counted


def watch_reads():
    """Which rows this process takes from disk."""
    read = LatentSet.read_clip

    def noted(self, path):
        SEEN["reads"].append(path.name)
        return read(self, path)

    LatentSet.read_clip = noted


if __name__ == "__main__":
    main(*sys.argv[1:])
