"""The plan of a run against real steps of a tiny one, instrumented; what it says of Wan2.1; and what it refuses."""

import importlib.util

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minianyflow import training
from minianyflow.config import load_config
from minianyflow.costs import Live
from minianyflow.install import ROOT
from minianyflow.plan import plan_run
from minianyflow.runs import Networks, draws
from minianyflow.shards import LatentShards
from minianyflow.wan_folders import make_tiny_wan


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


distill = script("distill")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    make_tiny_wan(folder / "wan")
    return folder


def settings(folder, architecture, stage, *changes):
    where = [f"runs={folder}", f"base={folder}/wan", f"data={folder}/wan/latents"]
    quick = ["batch=4", "samples.every=0", "log.tracker=none"]
    config = load_config([architecture, stage, "tiny"], [*where, *quick, *changes])
    config.student = config.teacher = None  # as if these were there
    return config


def attention(query, key, value, *given, attn_mask=None, out_val=None, **options):
    """FLOP of torch's attention on a CPU, of the pairs that the mask keeps, counted one by one."""
    pairs = query.shape[2] * key.shape[2]
    if attn_mask is not None:
        shown = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
        pairs = int(shown.expand(1, 1, query.shape[2], key.shape[2]).sum())
    return 4 * query.shape[0] * query.shape[1] * query.shape[3] * pairs


attention._get_raw = True


def attention_back(grad, query, key, value, *given, attn_mask=None, **options):
    return 2 * attention(query, key, value, attn_mask=attn_mask)


attention_back._get_raw = True
CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_back,
}


class Step:
    """One real step, of training.train, as often as asked; the optimiser has its numbers already."""

    def __init__(self, config, number):
        data = LatentShards(config.data)
        self.config, self.networks = config, Networks(config, data.shape[0])
        self.null = {"prompt": data.null}
        self.roles = distill.STAGES[config.stage](config, self.networks, self.null)
        self.batch = draws(config, data)(0)  # which trains every weight
        self.take()
        self.batch = draws(config, data)(number)

    def take(self):
        for role in self.roles.values():
            role.optimizer.zero_grad()
        training.train(self.roles, lambda step: self.batch, 1, self.config.accumulate, progress=False)

    def kept(self):
        """Tensors that are there all the time."""
        for role in self.roles.values():
            for module in (role.network, role.average):
                if module is not None:
                    yield from [*module.parameters(), *module.buffers()]
            for state in role.optimizer.state.values():
                yield from state.values()
        for counters in self.networks.counters.values():
            for each in counters:
                yield from (
                    each.network.network.transformer.parameters()
                    if self.config.trained == "lora"
                    else each.parameters()
                )

    def given(self):
        for value in self.batch.values():
            yield from value.values() if isinstance(value, dict) else [value]

    def bytes(self):
        """What is there all the time, and the peak of what comes and goes beside."""
        kept = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in self.kept()}
        live = Live([*self.kept(), *self.given(), self.null["prompt"]])
        with live:
            self.take()
        return sum(kept.values()), live.peak + sum(each.nbytes for each in self.given()) // self.config.accumulate

    def flop(self):
        with FlopCounterMode(display=False, custom_mapping=CPU) as counter:
            self.take()
        return counter.get_total_flops()


CASES = [
    (architecture, stage, trained, checkpointing)
    for architecture in ("bidirectional", "causal")
    for stage in ("teacher", "forward", "on_policy")
    for trained in ("lora", "full")
    for checkpointing in ("true", "false")
]


@pytest.mark.parametrize(("architecture", "stage", "trained", "checkpointing"), CASES)
def test_a_real_step_takes_what_was_planned(folder, architecture, stage, trained, checkpointing):
    changes = [f"trained={trained}", f"checkpointing={checkpointing}"]
    config = settings(folder, architecture, stage, *changes)
    number = 0 if architecture == "causal" else 1  # a causal clip has its longest context at step 0
    step, plan = Step(config, number), plan_run(config, steps=[number], advise=False)
    kept, passing = step.bytes()
    said = sum(
        plan.memory.get(name, 0) for name in ("base weights", "adapters", "trained weights", "averages", "optimiser")
    )
    print(
        f"{architecture} {stage} {trained} {checkpointing} kept {said / kept:.3f} passing {(plan.peak - said) / passing:.3f} "
        f"flop {plan.flop_with_recompute / step.flop():.3f}",
        {k: round(v / 1e3) for k, v in plan.memory.items()},
        kept / 1e3,
        passing / 1e3,
    )
    assert said == pytest.approx(kept, rel=0.1)
    assert plan.peak - said == pytest.approx(passing, rel=0.1)
    assert plan.flop_with_recompute == pytest.approx(step.flop(), rel=0.1)
