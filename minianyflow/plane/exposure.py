"""Exposure bias where it is exact: a causal student of the circle process, trained on true pasts or on its own.

A causal student u(z, t, r, past, frame) is the average velocity of one frame, given the frames before it. Trained on
true pasts (teacher forcing) it meets its own errors only when it runs free. On-policy training (Self-Forcing,
arXiv 2506.08009; AnyFlow, section 4) lets it make whole clips, each frame by three jumps, and matches their joint law.
Shapes: B clips, F frames, S seeds; z, x of one frame (B, 2), clips and their noise (B, F, 2), frame (B,) from 0.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minianyflow.batch import batches
from minianyflow.measures import sliced_w2, sobol_noise
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss
from minianyflow.on_policy import FakeScoreLoss, OnPolicyLoss, draw_on_policy
from minianyflow.plane.circle_student import (
    WINDOW,
    CausalMLP,
    ClipScore,
    FrameLoss,
    conditional_velocity,
    sample_clips,
    simulate,
)
from minianyflow.support.errors import InputError, choose
from minianyflow.support.files import staging_folder
from minianyflow.support.jobs import run_jobs
from minianyflow.times import generator, stratified_uniform
from minianyflow.training import Role, train
from toy_data import circle
from toy_data.circle import CircleProcess

STUDENTS = Path(circle.__file__).parent / "exposure" / "students.safetensors"  # of the committed run
FRESH = 1_000_000  # where the batches of an arm begin: it must not see those of the start again


FORCING = {"teacher forcing": False, "teacher forcing, exact velocity": True}  # whether the velocity is the exact one
ON_POLICY = {  # weight of the forward loss, whether the past is detached
    "on-policy": (1.0, False),
    "on-policy, detached": (1.0, True),
    "on-policy, forward x 4": (4.0, False),
}
KEPT = ("teacher forcing", "on-policy", "on-policy, detached")  # what a scene shows
ARMS = tuple(FORCING | ON_POLICY)  # each goes on from the same start, until it has cost the same
COLOURS = ("#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7")
NFE, CLIPS, TRUE = (1, 4, 16), 4096, 1024  # of the measure: step counts, clips made, clips that give a true context
LOST = 0.3  # a clip whose last radius is six sigmas off


@dataclass(frozen=True)
class Budget:
    """What a seed spends: evaluations (see `spent`) on the start, teacher forcing, and on every arm after it.

    rows, clips: of a batch, for each seed, of teacher forcing and of on-policy training. simulated: the rollouts.
    """

    start: int = 1_280_000
    after: int = 2_560_000
    rows: int = 128
    clips: int = 32
    simulated: tuple[int, ...] = (1, 2, 4, 16)
    lr: float = 1e-2
    lr_on_policy: float = 1e-3
    lr_fake: float = 3e-3
    width: int = 64
    points: int = 3  # of a curve


BUDGET = Budget()


def draw_clips(process, rows, seeds, simulated=None):
    """`draw(step)` for `train`: clips, a frame of each, and with `simulated` what on-policy training draws.

    Frames, times and rollouts are shared by the seeds, as `training.batches` does it; data and noise are not.
    """
    data, shape = batches(process.clips.sample, rows, seeds), (process.frames, 2)

    def draw(step):
        drawn = {"frame": (process.frames * stratified_uniform(rows, generator(step, 1))).long()}
        if simulated is None:
            return data(step) | {"frame": drawn["frame"].repeat_interleave(len(seeds))}
        each = [draw_on_policy(shape, rows, generator(seed, step, 2), simulated) for seed in seeds]
        own = {name: torch.stack([one.pop(name) for one in each], 1).flatten(0, 1) for name in ("noise", "score_eps")}
        shared = {name: value.repeat_interleave(len(seeds)) for name, value in (drawn | each[0]).items()}
        return data(step) | own | shared

    return draw


def counted(velocity):
    """An exact velocity(z, t, **condition) that counts its evaluations, and the counter."""
    counter = EvaluationCounter(lambda z, t, r, **condition: velocity(z, t, **condition))
    return lambda z, t, **condition: counter(z, t, t, **condition), counter


def teacher_forcing(network, process, seeds, budget, exact=False):
    """The roles, the draws and the evaluation counters of teacher forcing, on the data velocity or the exact one."""
    velocity, counter = counted(conditional_velocity(process)) if exact else (None, None)
    student = EvaluationCounter(network)
    loss = FrameLoss(FlowMapLoss(FLOW_MAPS["mixed"], velocity, adaptive=0.5 if exact else 0.0))
    role = Role(student, loss, lr=budget.lr)
    counters = {"student": student, "exact": counter} if exact else {"student": student}
    return {"student": role}, draw_clips(process, budget.rows, seeds), counters


def on_policy(network, process, seeds, budget, forward_weight=1.0, detach=False):
    """The same for on-policy training: student and fake score; the real score is that of the joint law, exact."""
    real, counter = counted(lambda z, t, copy=None: process.clips.velocity(z, t))
    student, make = EvaluationCounter(network), simulate(detach)
    fake = EvaluationCounter(ClipScore(real, (process.frames, 2), seeds=seeds))
    loss = OnPolicyLoss(real, fake, FrameLoss(FlowMapLoss(FLOW_MAPS["mixed"])), forward_weight, simulate=make)
    options = {"betas": (0.0, 0.999), "warmup": 50}
    roles = {
        "student": Role(student, loss, lr=budget.lr_on_policy, ema=0.99, **options),
        "fake_score": Role(fake, FakeScoreLoss(student, simulate=make), lr=budget.lr_fake, **options),
    }
    draw = draw_clips(process, budget.clips, seeds, budget.simulated)
    return roles, draw, {"student": student, "fake_score": fake, "exact": counter}


def make_arm(arm, *arguments):
    """`teacher_forcing` or `on_policy`, by the name of the arm."""
    choose("arm", arm, dict.fromkeys(ARMS))
    return teacher_forcing(*arguments, FORCING[arm]) if arm in FORCING else on_policy(*arguments, *ON_POLICY[arm])


def spent(counters):
    """What was evaluated so far, for all seeds: by name, and the sum, where a backward counts as two forwards."""
    by_name = {name: {"forwards": each.rows, "backwards": each.with_grad} for name, each in counters.items()}
    total = sum(each["forwards"] + 2 * each["backwards"] for each in by_name.values())
    return {"evaluations": total, **by_name}


def step_cost(roles, draw, counters, probes=8):
    """The mean evaluations of a step, from the losses of a few; the counters start again at zero."""
    for role in roles.values():
        for step in range(probes):
            role.loss(role.network, draw(step))
    cost = spent(counters)["evaluations"] / probes
    for each in counters.values():
        each.rows = each.with_grad = 0
    return cost


@torch.no_grad()
def measure(network, process, copies, nfe=NFE):
    """By NFE: radius errors free-running and with true context, (copies, F); share of clips lost; sliced W2 of clips.

    A clip is lost if its last radius is six sigmas off, or more. The copies start from the same noises.
    """
    z = sobol_noise(CLIPS, (process.frames, 2)).repeat_interleave(copies, 0)
    truth = process.clips.sample(TRUE, generator(1)).repeat_interleave(copies, 0)
    reference = process.clips.sample_stratified(CLIPS, generator(0))

    def made(z, count, truth=None):  # (clips, copies, F, 2)
        condition = {"copy": torch.arange(len(z)) % copies} if copies > 1 else {}
        return sample_clips(network, z, count, truth, **condition).reshape(-1, copies, process.frames, 2)

    figures = {}
    for count in nfe:
        free, true = made(z, count), made(z[: len(truth)], count, truth)
        figures[str(count)] = {
            "free_running": rounded(radius_error(free).mean(0)),
            "true_context": rounded(radius_error(true).mean(0)),
            "lost": rounded((radius_error(free)[..., -1] > LOST).float().mean(0)),
            "sliced_w2": [round(sliced_w2(free[:, copy], reference), 4) for copy in range(copies)],
        }
    return figures


def radius_error(clips):
    """| |x| - 1 | of every frame: (..., 2) to (...)."""
    return (clips.norm(dim=-1) - 1).abs()


def rounded(values):
    """A tensor as nested lists of four decimals."""
    return [rounded(each) for each in values] if values.ndim else round(float(values), 4)


def train_arm(arm, start, evaluations, seeds, budget, quiet, position=0):
    """Train one arm from the weights `start` (None: from scratch) until it has cost so many `evaluations` a seed.

    Returns its curve, [{"cost", "nfe"}] at equal distances, and the averaged weights at the end.
    """
    torch.set_num_threads(1)
    process, network = CircleProcess(), CausalMLP(budget.width, seeds=seeds)
    if start is not None:
        network.load_state_dict(start)
    roles, draw, counters = make_arm(arm, network, process, seeds, budget)
    steps = max(1, round(evaluations * len(seeds) / step_cost(roles, draw, counters)))
    stops = {round(steps * (point + 1) / budget.points) for point in range(budget.points)}
    average, curve, spare, began = roles["student"].average.module.network, [], 0.0, time.process_time()

    def look(step):
        nonlocal spare
        if step + 1 in stops:
            now = time.process_time()
            cost = {"steps": step + 1, "cpu_seconds": round(now - began - spare, 1), **spent(counters)}
            nfe = NFE if step + 1 == steps else NFE[:-1]
            curve.append({"cost": cost, "nfe": measure(average, process, len(seeds), nfe)})
            spare += time.process_time() - now

    bar = {"desc": arm, "position": position, "disable": quiet or None}
    fresh = 0 if start is None else FRESH
    train(roles, lambda step: draw(fresh + step), steps, progress=bar, on_step=look)
    return curve, average.state_dict()


def run(seeds=(0, 1, 2), budget=BUDGET, arms=ARMS, output="outputs/exposure", workers=2, quiet=False):
    """The whole experiment; writes `exposure.json` and `exposure.png`, whole or not at all, and returns the report.

    With them go the students of the arms KEPT, `students.safetensors`, in half precision, which `load_student` opens.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(budget.start, budget.after, budget.points) < 1:
        raise InputError(f"seeds {list(seeds)}, {budget}; expected different seeds, one at least, and positive numbers")
    for arm in arms:
        choose("arm", arm, dict.fromkeys(ARMS))
    process, common = CircleProcess(), (tuple(seeds), budget, quiet)
    reference, other = (process.clips.sample_stratified(CLIPS, generator(seed)) for seed in range(2))
    with staging_folder(output) as folder:
        first = (train_arm, ("teacher forcing", None, budget.start, *common))
        start, weights = run_jobs({"start": first}, workers)["start"]
        results = run_jobs({arm: (train_arm, (arm, weights, budget.after, *common)) for arm in reversed(arms)}, workers)
        report = {
            "seeds": list(seeds),
            "budget": asdict(budget),
            "measure": {"clips": CLIPS, "true_contexts": TRUE, "lost": LOST, "window": WINDOW},
            "data": {
                "radius_error": rounded(radius_error(reference).mean()),
                "sliced_w2": round(sliced_w2(other, reference), 4),
                "sliced_w2_fresh": round(sliced_w2(process.clips.sample(CLIPS, generator(2)), reference), 4),
            },
            "start": start,
            "arms": {arm: results[arm][0] for arm in arms},
        }
        made = {"budget": json.dumps(report["budget"]), "seeds": json.dumps(report["seeds"])}
        trained = {arm: results[arm][1] for arm in KEPT if arm in arms}
        halves = {f"{arm}/{name}": value.half() for arm, each in trained.items() for name, value in each.items()}
        save_file(halves, folder / STUDENTS.name, made)
        from minianyflow.plane.exposure_figure import exposure_figure
        from minianyflow.support.figures import save_figure

        save_figure(exposure_figure(report), folder / "exposure.png")
        (folder / "exposure.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def load_student(arm, copy=0, path=STUDENTS):
    """The trained CausalMLP of one of the arms KEPT and one seed, from what `run` wrote; by default in toy_data/."""
    path = Path(path)
    if not path.exists():
        raise InputError(f"no {path.name} in {path.parent}; make it: python -m minianyflow exposure --output FOLDER")
    with safe_open(path, "pt") as file:
        made, names = file.metadata(), list(file.keys())
        arms = dict.fromkeys(name.split("/")[0] for name in names)
        choose("arm", arm, arms)
        weights = {n.split("/")[1]: file.get_tensor(n).float() for n in names if n.startswith(f"{arm}/")}
    seeds, budget = json.loads(made["seeds"]), json.loads(made["budget"])
    if not 0 <= copy < len(seeds):
        raise InputError(f"copy {copy} of a student with {len(seeds)} copies; expected 0 to {len(seeds) - 1}")
    network = CausalMLP(budget["width"], seeds=seeds[copy : copy + 1])
    network.load_state_dict({name: value[copy : copy + 1] for name, value in weights.items()})
    return network.eval().requires_grad_(False)
