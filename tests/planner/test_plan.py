"""The plan of a run against real steps of a tiny one, instrumented; what it says of Wan2.1; and what it refuses."""

import importlib.util
import json
import re
from dataclasses import astuple
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minianyflow import training
from minianyflow.networks.causal_attention import causal_mask
from minianyflow.planner.call_costs import Prices
from minianyflow.planner.costs import Live, kept_pairs
from minianyflow.planner.forward_calls import Question
from minianyflow.planner.gpus import GPUS, Gpu, find_gpu
from minianyflow.planner.plan import LARGEST, SPARE, check_split, plan_run, shape_of
from minianyflow.planner.report import MODELS, RUNS, bills, describe, table
from minianyflow.support.cli import run
from minianyflow.support.errors import InputError
from minianyflow.support.install import ROOT
from minianyflow.wan.config import load_config
from minianyflow.wan.data.shards import LatentShards
from minianyflow.wan.folders import make_tiny_wan
from minianyflow.wan.run_networks import RunNetworks
from minianyflow.wan.stages import STAGES, draws


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


planning = script("plan")


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
        self.config, self.networks = config, RunNetworks(config, data.shape[0])
        self.null = {"prompt": data.null}
        self.roles = STAGES[config.stage](config, self.networks, self.null)
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
                transformer = each.network.transformer
                yield from [*transformer.parameters(), transformer.rope._build_freqs(torch.device("cpu"))]

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


STAYS = ("base weights", "adapters", "trained weights", "averages", "optimiser")
QUICK = (("bidirectional", "forward", "lora", "true"), ("causal", "forward", "lora", "false"))
CASES = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in product(
        ("bidirectional", "causal"), ("teacher", "forward", "on_policy"), ("lora", "full"), ("true", "false")
    )
]


@pytest.mark.parametrize(("architecture", "stage", "trained", "checkpointing"), CASES)
def test_a_real_step_takes_what_was_planned(folder, architecture, stage, trained, checkpointing):
    changes = [f"trained={trained}", f"checkpointing={checkpointing}"]
    config = settings(folder, architecture, stage, *changes)
    number = 0 if architecture == "causal" else 1  # a causal clip has its longest context at step 0
    step, plan = Step(config, number), plan_run(config, steps=[number], advise=False)
    kept, passing = step.bytes()
    said = sum(plan.memory.get(name, 0) for name in STAYS)
    again = step.flop()
    print(
        f"kept {said / kept:.3f} passing {(plan.peak - said) / passing:.3f} flop {plan.flop_with_recompute / again:.3f}"
    )
    assert said == pytest.approx(kept, rel=0.1)
    assert plan.peak - said == pytest.approx(passing, rel=0.1)
    assert plan.flop_with_recompute == pytest.approx(again, rel=0.1)


@pytest.mark.parametrize("stage", ["forward", pytest.param("on_policy", marks=pytest.mark.slow)])
def test_attention_that_is_kept_is_planned(folder, stage):
    """In all, and what it adds to memory and spares of work."""
    planned, real, model = [], [], []
    for said in ("true", "false"):
        config = settings(folder, "bidirectional", stage, f"keep_attention={said}")
        step, plan = Step(config, 1), plan_run(config, steps=[1], advise=False)
        planned.append((plan.peak, plan.flop_with_recompute))
        model.append(plan.flop)
        real.append((sum(step.bytes()), step.flop()))
    assert planned[0] == pytest.approx(real[0], rel=0.1)
    (more, done), (true_more, true_done) = (
        [kept - not_kept for kept, not_kept in zip(*each, strict=True)] for each in (planned, real)
    )
    print(f"bytes {more / true_more:.4f} flop {done / true_done:.4f}")
    assert more == pytest.approx(true_more, rel=0.1)
    assert done == pytest.approx(true_done, rel=0.1)
    assert more > 0 > done
    assert model[0] == model[1]


@pytest.mark.slow
def test_attention_that_does_not_fit_is_computed_again(folder):
    config = settings(folder, "bidirectional", "forward", "keep_attention=true")
    room = plan_run(config, steps=[1], advise=False).peak * 0.99 / (1 - SPARE)
    assert list(plan_run(config, steps=[1], gpu=Gpu("small", room, 1e12, "")).short) == ["keep_attention=false"]


@pytest.mark.slow
@pytest.mark.parametrize("changes", [["accumulate=2"], ["accumulate=4", "checkpointing=false"]])
def test_parts_of_a_batch_are_planned(folder, changes):
    config = settings(folder, "bidirectional", "forward", *changes)
    step, plan = Step(config, 1), plan_run(config, steps=[1], advise=False)
    kept, passing = step.bytes()
    assert plan.peak == pytest.approx(kept + passing, rel=0.1)
    assert plan.flop_with_recompute == pytest.approx(step.flop(), rel=0.1)


@pytest.mark.slow
def test_three_blocks_say_what_eight_cost(folder):
    """What is counted of two and three blocks, and taken further, is what the whole transformer has."""
    config = settings(folder, "bidirectional", "forward", "precision=bf16")
    shape = shape_of(config.base) | {"num_layers": 8}
    prices = Prices(config, shape, (5, 16, 8, 8), 32, shape["text_dim"])
    question = Question("student", 1, True, False, "all", 5)
    whole = prices._measure(prices._build(shape, 8)["student"], question)
    said, counted = astuple(prices(question)), astuple(whole)
    assert said == pytest.approx(counted, rel=1e-3)
    assert len(prices.networks) == 2


@pytest.mark.slow
def test_evaluations_are_those_that_a_real_step_counts(folder):
    config = settings(folder, "causal", "on_policy")
    step = Step(config, 0)
    before = step.networks.counts()
    step.take()
    rows = {
        role: [n - b for n, b in zip(each, before[role], strict=True)] for role, each in step.networks.counts().items()
    }
    plan = plan_run(config, steps=[0], advise=False)
    assert {role: tuple(n / config.batch for n in each) for role, each in rows.items()} == plan.evaluations


@pytest.mark.slow
def test_model_flop_do_not_depend_on_checkpointing(folder):
    one, other = (
        plan_run(settings(folder, "bidirectional", "forward", f"checkpointing={said}"), steps=[1], advise=False)
        for said in ("true", "false")
    )
    assert one.flop == other.flop == other.flop_with_recompute < one.flop_with_recompute
    assert one.peak < other.peak


def test_the_pairs_that_are_counted_are_those_of_the_mask():
    for clean, mode in ((True, "train"), (False, "train"), (False, "cache")):
        mask = causal_mask((1, 2, 2, 2), 16, 4, 2, clean, mode)
        assert kept_pairs((1, 2, 2, 2), 16, 4, 2, clean, mode) == int(mask.sum())


@pytest.mark.slow
def test_what_does_not_fit_is_told_what_to_change(folder):
    config = settings(folder, "bidirectional", "forward", "checkpointing=false")
    plan = plan_run(config, steps=[1], gpu=Gpu("small", 1e12, 1e12, ""))
    assert plan.fits
    assert plan.short == {}
    low = plan_run(config, steps=[1], gpu=Gpu("small", plan.peak * 0.7, 1e12, ""))
    assert not low.fits
    assert next(iter(low.short)) == "checkpointing=true"
    assert min(low.short.values()) <= (1 - SPARE) * low.gpu.memory
    none = plan_run(config, steps=[1], gpu=Gpu("small", 1e3, 1e12, ""))
    both = "checkpointing=true accumulate=4"  # each is whole: alone accumulate=4 would not lead to that peak
    assert list(none.short) == ["checkpointing=true", both, f"--gpu rtx4090 {both}"]
    changed = settings(folder, "bidirectional", "forward", *both.split())
    assert plan_run(changed, steps=[1]).peak == none.short[both]
    said = [line for line in describe(none).splitlines() if line.startswith("    ")]
    assert [line.endswith("not enough") for line in said] == [True, True, False]


@pytest.mark.slow
def test_several_gpus_without_room_are_told_of_fsdp2(folder, monkeypatch):
    """Where only sharding makes one clip at a time fit a larger GPU; and with no such GPU it is said."""
    config = settings(folder, "bidirectional", "forward", "accumulate=2")
    whole, sharded = (plan_run(config, steps=[1], gpus=2, sharded=each, advise=False).peak for each in (False, True))
    assert sharded < whole
    room = (whole + sharded) / 2 / (1 - SPARE)
    for large, last in ((room, "--gpu large --sharded"), (2e3, LARGEST)):
        monkeypatch.setattr("minianyflow.planner.plan.GPUS", {"large": Gpu("large", large, 1e12, "")})
        short = plan_run(config, steps=[1], gpus=2, gpu=Gpu("small", 1e3, 1e12, "")).short
        assert list(short)[-1] == last


def test_numbers_that_an_error_names_work():
    check_split(16, 8, 2)
    for batch, gpus in product((1, 16, 24), range(1, 30)):
        for accumulate in (1, 16):
            try:
                check_split(batch, gpus, accumulate)
                assert batch % (gpus * accumulate) == 0
            except InputError as problem:
                named = [int(each) for each in re.findall(r"(?<=--gpus )\d+|(?<=or )\d+", str(problem))]
                for number in named:
                    check_split(batch, number, 1)
                parts = [int(each) for each in re.findall(r"accumulate=(\d+) is", str(problem))]
                for number in parts:
                    check_split(batch, gpus, number)
                assert named or parts


@pytest.mark.slow
def test_several_gpus_share_the_work(folder):
    config = settings(folder, "bidirectional", "on_policy")
    one, two, sharded = (
        plan_run(config, steps=[1], gpus=gpus, sharded=sharded, advise=False)
        for gpus, sharded in ((1, False), (2, False), (2, True))
    )
    assert two.flop == pytest.approx(one.flop / 2)
    assert two.seconds() >= one.seconds() / 2
    assert two.memory["optimiser"] == one.memory["optimiser"] == 2 * sharded.memory["optimiser"]
    assert two.memory["base weights"] == sharded.memory["base weights"]


def test_another_gpu_has_no_others_name():
    own, other = GPUS["a100-80"], find_gpu("a100-80", memory=96)
    assert find_gpu("A100-80") == own
    assert (other.name, other.memory, other.rate) == ("96 GB at a100-80's rate", 96e9, own.rate)
    assert find_gpu("l40s", rate=100).name == "l40s at 100 TFLOP/s"
    assert find_gpu("l40s", 96, 100).name == "96 GB"


BAD = {
    "gpu": (["--gpu", "h20"], "did you mean"),
    "gpus": (["--gpus", "3"], "expected equal parts: --gpus 2 or 4, or another batch"),
    "no gpus": (["--gpus", "0"], "--gpus 0; expected at least 1"),
    "parts": (["--gpus", "8", "batch=16", "accumulate=16"], "accumulate=2 is one clip at a time on each GPU"),
    "share": (["--share", "2"], "--share 2.0"),
    "price": (["--price", "-1"], "--price -1.0"),
    "no price": (["--price", "nan"], "--price nan"),
    "memory": (["--memory", "0"], "--memory 0.0"),
    "rate": (["--rate", "inf"], "--rate inf"),
    "sharded": (["--sharded"], "--sharded with --gpus 1"),
    "base": (["--config", "wan-1.3b", "base=someone/else"], "the size of someone/else is not known here"),
    "no folder": (["--config", "wan-1.3b", "base=./nowhere"], "the size of ./nowhere is not known here"),
    "cast": (["--config", "wan-1.3b", "trained=full"], "cannot be planned"),
    "option": (["--config", "wan-1.3b", "rnk=2"], "did you mean"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, capsys):
    arguments, words = BAD[case]
    assert run(lambda: planning.main(arguments)) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_a_broken_description_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"no transformer/config\.json"):
        shape_of(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="does not describe a transformer"):
        shape_of(str(tmp_path))


def test_the_script_prints_lines_and_json(folder, capsys):
    where = ["bidirectional", "forward", "tiny", f"base={folder}/wan", f"data={folder}/wan/latents"]
    assert planning.main(["--config", *where, "--price", "3", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["peak"] == sum(said["memory"].values())
    assert said["fits"]
    assert said["money"] == pytest.approx(3 * said["gpu_hours"])
    assert planning.main(["--config", *where]) == 0
    out = capsys.readouterr().out
    assert "planned, not measured" in out
    assert "optimiser" in out


def rows_of(name):
    """Of a table of docs/plan.md."""
    return (ROOT / "docs/plan.md").read_text().split(f"<!-- {name} -->\n")[1].split("\n<!-- end -->")[0].splitlines()


@pytest.mark.parametrize(
    ("name", "made"),
    [  # what is counted for the first is not counted again; all rows are `plan.py --table`, two minutes
        ("plan", lambda: table(runs=RUNS[1:2])),
        pytest.param("plan", lambda: table(runs=[*RUNS[6:9], RUNS[4]]), marks=pytest.mark.slow),
        pytest.param("bill", lambda: bills(models=MODELS[4:6]), marks=pytest.mark.slow),
    ],
)
def test_the_tables_of_the_docs_are_what_is_planned(name, made):
    head, line, *made = made().splitlines()
    assert rows_of(name)[:2] == [head, line]
    assert len(rows_of(name)) == 2 + len(RUNS if name == "plan" else MODELS)
    assert made
    for row in made:
        assert row in rows_of(name)
