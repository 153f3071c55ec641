"""Train tiny students and write what came of them; test_trainer.py does this in one process and in two."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from minianyflow.batch import batches
from minianyflow.networks.mlp import MLP
from minianyflow.objectives import FlowMapLoss
from minianyflow.training import Role
from minianyflow.wan.published import Rebalanced
from minianyflow.wan.trainer import train_run
from toy_data import plane

OPTIONS = ("plain", "rebalance", "one row")  # of one row: then processes differ in what they do


def main(folder):
    torch.set_num_threads(1)
    accelerator, mixture = Accelerator(cpu=True), plane.ring8()
    for option in OPTIONS:
        loss = FlowMapLoss({"eulerian": 0.5, "semigroup": 0.5}, lambda z, t, copy: mixture.velocity(z, t))
        student = Role(MLP(seeds=(0, 1)), Rebalanced(loss) if option == "rebalance" else loss, warmup=5)
        draw = batches(mixture.sample, 1 if option == "one row" else 24, (0, 1))
        parts = 6 if option == "rebalance" and accelerator.num_processes == 2 else 1
        history = train_run({"student": student}, draw, 20, parts, accelerator, progress=False)
        if accelerator.is_main_process:
            weights = {name: value.tolist() for name, value in student.average.module.state_dict().items()}
            kind = str(accelerator.distributed_type)
            report = {"processes": accelerator.num_processes, "kind": kind, "history": history, "weights": weights}
            (Path(folder) / f"{option}.json").write_text(json.dumps(report))
    accelerator.end_training()  # a process group that is left to the end of Python may abort it


if __name__ == "__main__":
    main(sys.argv[1])
