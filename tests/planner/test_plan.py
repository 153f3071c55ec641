"""The plan of a run against real training steps of a tiny one; the plans in the docs; and bad input."""

import json
import re
from dataclasses import astuple, replace
from itertools import chain, product
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minianyflow import training
from minianyflow.batch import deal
from minianyflow.networks.causal_attention import causal_mask
from minianyflow.planner.commands import FLAGS
from minianyflow.planner.commands import plan as plan_command
from minianyflow.planner.counters import LiveBytes, tensors_in
from minianyflow.planner.forward_calls import ForwardCall
from minianyflow.planner.forward_cost import ForwardCosts, attended_pairs
from minianyflow.planner.gpus import GPUS, SPARE, Gpu, find_gpu
from minianyflow.planner.plan import advice, check_split, plan_run, published_plan, shape_of
from minianyflow.planner.report import OUTSIDE, PUBLISHED, as_options, describe, from_row, ways
from minianyflow.support.cli import run
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT
from minianyflow.wan.config import load_config
from minianyflow.wan.data.latents import LatentSet
from minianyflow.wan.data.options import WAN_CLIP
from minianyflow.wan.run_networks import RunNetworks
from minianyflow.wan.stages import STAGES, draws
from tests.refused import refused


@pytest.fixture(scope="module")
def settings(tiny):
    """`settings(architecture, stage, *changes)`: the configuration of a tiny run."""
    where = [f"base={tiny}", f"data={tiny}/latents"]

    def configuration(architecture, stage, *changes):
        quick = ["batch=4", "samples.every=0", "log.tracker=none"]
        config = load_config([architecture, stage, "tiny"], [*where, *quick, *changes])
        return replace(config, student=None, teacher=None)  # as if they were there

    return configuration


# ---- real steps


def attention(query, key, value, *given, attn_mask=None, **options):
    """FLOP of torch's attention on a CPU, over the pairs that the mask keeps, counted one by one."""
    pairs = query.shape[2] * key.shape[2]
    if attn_mask is not None:
        shown = attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0
        pairs = int(shown.expand(1, 1, query.shape[2], key.shape[2]).sum())
    return 4 * query.shape[0] * query.shape[1] * query.shape[3] * pairs


def attention_backward(grad, *inputs, **options):
    return 2 * attention(*inputs, **options)


attention._get_raw = attention_backward._get_raw = True
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
CPU = {KERNEL: attention, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward}


class Step:
    """One real step of `training.train`, to be taken several times; the optimiser has its state already."""

    def __init__(self, config, number):
        data = LatentSet(config.data)
        self.config, self.networks, self.null = config, RunNetworks(config, data.shape[0]), data.null
        self.roles = STAGES[config.stage](config, self.networks, {"prompt": data.null})
        if self.networks.tokens:
            self.networks.tokens.on = True  # both processes take the same rows
        self.batch = draws(config, data)(0)  # which trains every weight
        self.take()
        self.batch = draws(config, data)(number)

    def take(self):
        for role in self.roles.values():
            role.optimizer.zero_grad()
        training.train(self.roles, lambda step: self.batch, 1, self.config.accumulate, progress=False)

    def resident(self):
        """Tensors that are there all the time."""
        tensors = [tensor for role in self.roles.values() for tensor in (*role.network.parameters(), *role._states())]
        for counter in chain(*self.networks.counters.values()):
            transformer = counter.network.transformer
            yield transformer.rope._build_freqs(torch.device("cpu"))
            streamed = "base" in self.config.offload or self.config.shard_base
            for name, weight in transformer.named_parameters():
                if not streamed or "lora_" in name or not name.startswith(("blocks.", "condition_embedder.")):
                    tensors.append(weight)
        tensors += [part for part, _ in self.networks.resting.blocks] if self.config.shard_base else []
        away = {id(state) for role in self.roles.values() if role.offload for state in role._states()}
        yield from (tensor for tensor in tensors if id(tensor) not in away)

    def bytes(self):
        """Bytes that are there all the time, and the peak of those that come and go."""
        storages = [tensor.untyped_storage() for tensor in self.resident()]
        inputs = tensors_in(self.batch)
        live = LiveBytes([*self.resident(), *inputs, self.null])
        with live, live.host_memory():
            self.take()
        resident = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        batch, parts = sum(tensor.nbytes for tensor in inputs), self.config.accumulate
        dealt = batch if parts > 1 else 0  # a copy that `train` makes on the host
        return resident, live.peak - dealt + batch // parts

    def work(self):
        """FLOP, and (forwards, backwards) per sample by role."""
        before = self.networks.counts()
        with FlopCounterMode(display=False, custom_mapping=CPU) as counter:
            self.take()
        rows = {role: zip(counts, before[role], strict=True) for role, counts in self.networks.counts().items()}
        evaluations = {role: tuple((now - then) / self.config.batch for now, then in rows[role]) for role in rows}
        return counter.get_total_flops(), {role: pair for role, pair in evaluations.items() if any(pair)}


def planned(config, **options):
    return plan_run(config, advise=False, **{"steps": [1]} | options)


RESIDENT = ("base weights", "adapters", "trained weights", "averages", "optimiser")
FAST = ["bidirectional forward lora true"]
SLOW = ["causal on_policy lora true", "causal forward full true", "bidirectional on_policy full false"]
SLOW += ["bidirectional teacher lora false", "bidirectional forward lora true accumulate=2"]
SMALL = ["causal on_policy lora true memory=small", "bidirectional on_policy lora true memory=small offload=[states]"]
SMALL += ["bidirectional forward lora true offload=[base]"]
CASES = product(("bidirectional", "causal"), ("teacher", "forward", "on_policy"), ("lora", "full"), ("true", "false"))
CASES = [" ".join(case) for case in CASES] + [SLOW[-1], "bidirectional forward lora false accumulate=4", *SMALL]
CASES += [f"causal on_policy lora true offload=[states,blocks,{more}]" for more in ("base", "halves")]
CASES += ["bidirectional on_policy lora true base_dtype=int8", "causal forward lora true base_dtype=int8"]
CASES += [f"causal on_policy lora true on_policy.context_gradient=true{more}" for more in ("", " offload=[blocks]")]


def marked(cases, slow, fast=()):
    """Cases as parameters, marked as slow or long."""
    marks = {case: () if case in fast else pytest.mark.slow if case in slow else pytest.mark.long for case in cases}
    return [pytest.param(case, marks=mark) for case, mark in marks.items()]


@pytest.mark.parametrize("case", marked(CASES, SLOW + SMALL, FAST))
def test_a_real_step_takes_what_was_planned(settings, case):
    architecture, stage, trained, checkpointing, *more = case.split()
    config = settings(architecture, stage, f"trained={trained}", f"checkpointing={checkpointing}", *more)
    number = 0 if architecture == "causal" else 1  # a causal clip has its longest context at step 0
    step, plan = Step(config, number), planned(config, steps=[number])
    resident, passing = step.bytes()
    expected = sum(plan.memory.get(name, 0) for name in RESIDENT)
    flop, evaluations = step.work()
    assert expected == pytest.approx(resident, rel=0.1)
    assert plan.peak - expected == pytest.approx(passing, rel=0.1)
    assert plan.flop_with_recompute == pytest.approx(flop, rel=0.1)
    assert plan.evaluations == evaluations


@pytest.mark.parametrize("stage", marked(["forward", "on_policy"], ["forward"]))
def test_keep_attention_is_planned(settings, stage):
    """In all, and what it adds to memory and saves of work."""
    plans, steps = [], []
    for keep in ("true", "false"):
        config = settings("bidirectional", stage, f"keep_attention={keep}")
        plans.append(planned(config))
        steps.append(Step(config, 1))
    (kept, recomputed), (more, less) = [sum(step.bytes()) for step in steps], [step.work()[0] for step in steps]
    assert [plan.peak for plan in plans] == pytest.approx([kept, recomputed], rel=0.1)
    if stage == "forward":  # on-policy the two peaks are of other moments
        assert plans[0].peak - plans[1].peak == pytest.approx(kept - recomputed, rel=0.1)
    assert plans[0].flop_with_recompute - plans[1].flop_with_recompute == pytest.approx(more - less, rel=0.1)
    assert kept > recomputed
    assert more < less
    without = planned(settings("bidirectional", stage, "checkpointing=false"))
    assert plans[0].flop == plans[1].flop == without.flop == without.flop_with_recompute
    assert without.peak > plans[0].peak


# ---- the counts


@pytest.mark.slow
def test_two_and_three_blocks_say_what_eight_cost(settings):
    config = settings("bidirectional", "forward", "precision=bf16")
    shape = shape_of(config.base) | {"num_layers": 8}
    costs = ForwardCosts(config, shape, (5, 16, 8, 8), (32, shape["text_dim"]))
    call = ForwardCall("student", 1, True, False, "plain", 5)
    assert len(costs.networks) == 2
    assert astuple(costs(call)) == pytest.approx(astuple(costs.measure(costs.build(8)["student"], call)), rel=1e-3)


def test_attended_pairs_are_those_of_the_mask():
    for clean, mode in ((True, "train"), (False, "train"), (False, "cache")):
        mask = causal_mask((1, 2, 2, 2), 16, 4, 2, clean, mode)
        assert attended_pairs((1, 2, 2, 2), 16, 4, 2, clean, mode) == int(mask.sum())


@pytest.mark.slow
def test_several_gpus_share_the_work(settings):
    config = settings("bidirectional", "on_policy")
    one, two, sharded = (planned(config, gpus=n, sharded=shard) for n, shard in ((1, False), (2, False), (2, True)))
    assert two.flop == pytest.approx(one.flop / 2)
    assert two.seconds() >= one.seconds() / 2
    assert two.memory["optimiser"] == one.memory["optimiser"] == 2 * sharded.memory["optimiser"]
    assert two.memory["base weights"] == sharded.memory["base weights"]
    shared = planned(settings("bidirectional", "on_policy", "shard_base=true", "on_policy.shared_rollout=true"), gpus=2)
    resting = 2 * (two.memory["base weights"] - shared.memory["base weights"])
    assert 0 < resting < two.memory["base weights"]
    assert 0 < shared.memory["base weights of a block"] < resting / 2  # two blocks and the embedder, one at a time
    assert 0 == two.bus["between GPUs"] < shared.bus["between GPUs"]
    assert shared.seconds() > two.seconds()


@pytest.mark.parametrize("kind", marked(["bidirectional forward", "causal on_policy"], ["bidirectional forward"]))
def test_gpus_that_share_a_clip_share_its_work_and_memory(settings, kind):
    """One clip at a time on one GPU, and on two: embedders, and keys and values of the prompt, are computed on both."""
    apart, together = (
        planned(settings(*kind.split(), f"sequence_parallel={n}", f"accumulate={2 * n}"), gpus=2) for n in (1, 2)
    )
    assert apart.flop < together.flop < 1.2 * apart.flop
    parts = ("activations", "rollout jumps", "causal cache")
    passing = [sum(size for part, size in plan.memory.items() if part.startswith(parts)) for plan in (apart, together)]
    assert passing[0] / 2 < passing[1] < 0.97 * passing[0]  # large clips: nearly half
    assert 0 == apart.bus["between GPUs"] < together.bus["between GPUs"]


ARCHITECTURES = ("bidirectional", "causal")
KINDS = [" ".join(kind) for kind in product(ARCHITECTURES, ("forward", "on_policy"))]


def _share(rank, config, number, folder):
    """One process of two that share their clips, or the base: what its step takes."""
    where = {"init_method": f"file://{folder}/found", "rank": rank, "world_size": 2}
    torch.distributed.init_process_group("gloo", **where)
    torch.manual_seed(0)
    step = Step(config, number)
    step.batch = deal(step.batch, rank, 2) if config.shard_base else step.batch
    (resident, passing), (flop, _) = step.bytes(), step.work()
    (folder / str(rank)).write_text(json.dumps([resident, passing, flop]))


TWO = [f"{kind} sequence_parallel=2" for kind in KINDS] + [f"{kind} forward shard_base=true" for kind in ARCHITECTURES]
TWO += [f"{kind} on_policy shard_base=true on_policy.shared_rollout=true" for kind in ARCHITECTURES]


@pytest.mark.long
@pytest.mark.parametrize("case", TWO)
def test_a_real_step_of_two_processes_takes_what_was_planned(settings, tmp_path, case):
    """That share a clip, or the base."""
    config, number = settings(*case.split()), int(case.startswith("bidirectional"))
    torch.multiprocessing.spawn(_share, (config, number, tmp_path), nprocs=2)
    plan = planned(config, gpus=2, steps=[number])
    expected = sum(plan.memory.get(name, 0) for name in RESIDENT)
    passing = plan.peak - expected - plan.memory["several GPUs"]  # buckets, which Step has not
    for rank in "01":
        found = json.loads((tmp_path / rank).read_text())
        assert found == pytest.approx([expected, passing, plan.flop_with_recompute], rel=0.1)


@pytest.mark.long
def test_the_pages_say_what_eight_gpus_save_by_sharing():
    def plan(*options):
        config = load_config(["wan-14b", "bidirectional", "on_policy"], ["memory=fast", *options])
        return plan_run(config, WAN_CLIP, gpus=8, advise=False)

    apart, together = (plan(f"accumulate={2 * n}", f"sequence_parallel={n}") for n in (1, 2))
    shared = plan("accumulate=2", "shard_base=true", "on_policy.shared_rollout=true")
    page, other = ((ROOT / f"docs/{name}.md").read_text() for name in ("plan", "scaling"))
    gb = [f"{plan.peak / 1e9:.0f}" for plan in (together, apart)]
    assert "N = 2 takes {} GB\n  in place of {}, and .1% more work".format(*gb) in page
    assert together.flop / apart.flop == pytest.approx(1.001, abs=5e-4)
    exchanged = together.bus["between GPUs"]
    assert f"exchanged, {exchanged / 1e9:,.0f} GB per step, take 5 of its {together.seconds():.0f} seconds" in page
    assert f"{shared.memory['base weights'] / 1e9:.1f} GB of 14B on each of eight GPUs" in other


@pytest.mark.slow
def test_bytes_that_training_does_not_load():
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    with torch.device("meta"):
        text, vae = UMT5EncoderModel(UMT5Config(**sizes)), AutoencoderKLWan()
    counts = [width * sum(w.numel() for w in module.parameters()) for module, width in ((text, 2), (vae, 4))]
    assert list(OUTSIDE.values()) == counts


# ---- what to change


@pytest.mark.slow
def test_a_run_that_does_not_fit_names_what_to_change(settings):
    def on(memory, *options, **setup):
        config = settings("bidirectional", "forward", *options)
        return plan_run(config, steps=[1], gpu=Gpu("small", memory, 1e12, ""), **setup)

    def names(plan):
        return [changes for changes, _ in plan.changes]

    plan = on(1e12, "checkpointing=false")
    assert plan.fits
    assert plan.changes == []
    none = on(1e3, "checkpointing=false")
    low = on(none.changes[0][1], "checkpointing=false")  # not enough: a part is left for what is not counted
    assert not low.fits
    assert low.changes[0][0] == {"checkpointing": True}
    assert [low.gpu.holds(peak) for _, peak in low.changes][-2:] == [False, True]  # up to the first that fits
    both = {"checkpointing": True, "accumulate": 4}
    moves = [both | {"offload": list(words)} for _, *words in ways("forward")]
    assert names(none)[:3] == [{"checkpointing": True}, both | {"accumulate": 2}, both]
    assert sorted(map(str, names(none)[3:-1])) == sorted(map(str, moves[1:]))
    assert names(none)[-1] == {"gpu": "rtx4080"} | both
    again = settings("bidirectional", "forward", "checkpointing=true", "accumulate=4")
    assert planned(again).peak == none.changes[2][1]  # each is complete: accumulate=4 alone has another peak
    lines = [line for line in describe(none).splitlines() if line.startswith("    ")]
    assert [line.endswith("not enough") for line in lines] == [True] * 8 + [False]
    assert lines[8].startswith("    gpu=rtx4080 checkpointing=true accumulate=4: ")
    keep = on(1e12, "keep_attention=true").peak
    assert names(on(keep * 0.99 / (1 - SPARE), "keep_attention=true")) == [{"keep_attention": False}]
    several = names(on(1e3, "accumulate=2", gpus=2))
    assert several[:2] == [{"shard_base": True}, {"sharded": True, "shard_base": True}]
    assert several[-1] == {"gpu": "rtx4080", "sharded": True, "shard_base": True}


RUNS = {  # {options of a run that does not fit: pairs (number of GPUs, sharded)}
    "checkpointing=false": [(1, False), (2, False), (2, True)],
    "keep_attention=true accumulate=2": [(1, False), (2, False)],
    "compiled=true": [(1, False), (2, True)],
    "offload=[states,base]": [(1, False), (2, False)],
    "offload=[blocks,halves]": [(1, False), (2, True)],
    "memory=small": [(1, False), (2, False)],
    "shard_base=true on_policy.shared_rollout=true": [(2, False)],
    "sequence_parallel=2": [(2, False), (2, True)],
    "trained=full checkpointing=false": [(1, False), (2, True)],
}


@pytest.mark.parametrize("options", marked(RUNS, ["offload=[states,base]", "offload=[blocks,halves]"]))
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_takes_each_set_of_options_that_a_plan_names(settings, monkeypatch, kind, options):
    """As it is printed, after the run's own options."""
    too_large = SimpleNamespace(fits=False, peak=1e15, seconds=lambda: 1.0)
    monkeypatch.setattr("minianyflow.planner.plan._plan", lambda *given, **more: too_large)
    given = [*kind.split(), *options.split()]
    for gpus, sharded in RUNS[options]:
        plan = SimpleNamespace(gpus=gpus, sharded=sharded, gpu=GPUS["rtx4080"])
        named = advice(plan, settings(*given), (), [1])
        assert len(named) > 3
        for changes, _ in named:
            setup = {"gpu": None, "gpus": gpus, "sharded": sharded} | changes
            words = as_options({name: value for name, value in changes.items() if name not in FLAGS}, {}).split()
            config, several = settings(*given, *words), setup["gpus"] > 1
            check_split(config.batch, setup["gpus"], config.accumulate, config.sequence_parallel)
            assert several or not (config.shard_base or setup["sharded"])
            alone = kind.startswith("causal") and "on_policy" not in kind and config.shard_base
            assert not (setup["sharded"] and ("states" in config.offload or alone))  # as the run says


# ---- the command, and bad input


def test_numbers_that_an_error_names_work():
    check_split(16, 8, 2)
    for batch, gpus, accumulate in product((1, 16, 24), range(1, 30), (1, 16)):
        try:
            check_split(batch, gpus, accumulate)
            assert batch % (gpus * accumulate) == 0
        except InputError as problem:
            setups = [(int(number), 1) for number in re.findall(r"(\d+) (?:or|GPUs, or)", str(problem))]
            setups += [(gpus, int(number)) for number in re.findall(r"accumulate=(\d+) is", str(problem))]
            assert setups
            for setup in setups:
                check_split(batch, *setup)


def test_another_gpu_has_another_name():
    own, other = GPUS["a100-80"], find_gpu("a100-80", memory=96)
    assert find_gpu("A100-80") == own
    assert (other.name, other.memory, other.rate) == ("96 GB at a100-80's rate", 96e9, own.rate)
    assert find_gpu("l40s", rate=100).name == "l40s at 100 TFLOP/s"
    assert find_gpu("l40s", 96, 100).name == "96 GB"


BAD = {
    "--gpu h20": "did you mean",
    "--gpus 3": "expected equal parts: 2 or 4 GPUs, or another batch",
    "--gpus 0": "on 0 GPUs; expected equal parts: 1 or 2 GPUs",
    "--gpus 8 batch=16 accumulate=16": "accumulate=2 is one clip at a time on each GPU",
    "--share 2": "a share 2.0 of the GPU's rate",
    "--price nan": "a price of nan per GPU-hour",
    "--frames 10": "frames=10",
    "--memory 0": "a GPU with memory 0.0 GB",
    "--rate inf": "a GPU with rate inf",
    "shard_base=true": "shard_base=true on 1 GPU",
    "--gpus 2 --sharded offload=[states]": "FSDP2, which shards moments and averages",
    "--sharded": "weights sharded over 1 GPU",
    "--config wan-1.3b base=someone/else": "not known here; expected a folder with transformer/config.json, or one of",
    "--config wan-1.3b trained=full": "cannot be planned",
    "--config wan-1.3b rnk=2": "did you mean",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_input_is_one_line(arguments, capsys):
    assert run(lambda: plan_command(arguments.split())) == 2
    error = capsys.readouterr().err
    assert BAD[arguments] in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_broken_description_is_one_line(tmp_path):
    for text, words in (("{", "is not JSON"), ('{"num_layers": "40"}', "num_layers"), ('{"ffn_dim": 0}', "ffn_dim")):
        (tmp_path / "config.json").write_text(text)
        with refused(rf"config.json.* {words}"):
            shape_of(str(tmp_path))


@pytest.mark.slow
def test_the_command_prints_lines_and_json(settings, capsys):
    config = settings("bidirectional", "forward")
    where = ["bidirectional", "forward", "tiny", f"base={config.base}", f"data={config.data}", "batch=4"]
    assert plan_command(["--config", *where, "--price", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["peak"] == sum(report["memory"].values())
    assert report["fits"]
    assert report["money"] == pytest.approx(3 * report["gpu_hours"])
    clip = ["--frames", "9", "--height", "64", "--width", "96"]
    assert plan_command(["--config", *where, "--memory", "1e-6", "--gpus", "2", *clip]) == 0
    out = capsys.readouterr().out
    assert "planned, not measured\nclips of 9 x 64 x 96, 4 per step" in out
    assert "optimiser" in out
    assert "    --gpu rtx4080 --sharded accumulate=2 shard_base=true: " in out  # as the command takes them


RECIPES = [" ".join(pair) for pair in product(["wan-1.3b", "wan-14b"], ["forward", "forward-published"])]


@pytest.mark.parametrize("recipe", marked(RECIPES, ["wan-14b forward"]))
def test_the_busiest_of_eight_gpus_does_little_more_than_the_mean(recipe):
    """Rows are dealt out by kind; over 200 steps of the recipe. The bound is a requirement, not what was read."""
    model, stage = recipe.split()
    config = load_config([model, "bidirectional", stage])
    assert 1 <= plan_run(config, WAN_CLIP, gpus=8, steps=range(200), advise=False).slowest < 1.06


# ---- docs/plan/plans.json, from which `minianyflow docs` makes the tables of docs/plan.md


PUBLISHED_PLANS = json.loads((ROOT / "docs/plan/plans.json").read_text())
SOME = ["1.3B bidirectional forward, 1 x h200, fast", "14B causal forward, 8 x h200 with FSDP2"]


@pytest.mark.parametrize("name", marked(PUBLISHED, SOME))
def test_published_plans_are_what_is_planned(name):
    plan, published = published_plan(name), from_row(PUBLISHED_PLANS[name])
    assert plan.memory == pytest.approx(published.memory, rel=1e-6)
    assert (plan.flop, plan.slowest) == pytest.approx((published.flop, published.slowest), rel=1e-6)
