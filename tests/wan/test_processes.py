"""Runs of several processes, with SIGTERM and kills: two processes compute what one does, and nothing saved is lost.

torchrun runs this file itself, twice, for two processes that do several runs one after the other:

    torchrun --nproc_per_node 2 tests/wan/test_processes.py REPORT KIND RUN [-- KIND RUN]...

KIND is plain (one process), ddp, as accelerate has it on a CPU, or shard: accelerate's FSDP2 with the plugin that
eight_gpus_fsdp2.yaml asks for, on a CPU mesh. accelerate ignores that file silently where there is no GPU, so the
plugin is put in its place here; ddp runs come first. A RUN is the arguments of distill, after sigterm=N perhaps: the
last process alone then gets SIGTERM in the N-th step of a role.
"""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from minianyflow.support.cli import run
from minianyflow.support.install import ROOT
from minianyflow.wan import guard, stages, trainer
from minianyflow.wan import run as runs
from minianyflow.wan.commands import distill
from minianyflow.wan.data.latents import LatentSet, write_latents

STEPS, KINDS = 20, ("plain", "ddp", "shard")
RUNS = {  # on-policy with one row per process: then processes differ in how often they evaluate a network
    f"{architecture} {stage}": [architecture, stage]
    for architecture in ("bidirectional", "causal")
    for stage in ("teacher", "forward", "on_policy")
}
RUNS["causal forward"][1] = "forward-published"  # which rebalances: two processes accumulate it
MIXED = "bidirectional forward of buckets"
RUNS[MIXED] = ["bidirectional", "forward"]
RUNS |= {f"{architecture} whole weights": [architecture, "on_policy"] for architecture in ("bidirectional", "causal")}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


class Sharding(Accelerator):
    """What accelerate is on GPUs with the launch file for FSDP2."""

    def __init__(self, **options):
        super().__init__(**options)
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # as the environment says
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def read_launch_file():
    """Put into the environment what `accelerate launch` does for the plugin."""
    file = str(ROOT / "scripts/accelerate/eight_gpus_fsdp2.yaml")
    given, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", file, "script.py"]))
    environment = prepare_multi_gpu_env(given)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    os.environ.update({name: value for name, value in environment.items() if name.startswith("FSDP_")})


def run_once(kind, *words):
    """Run distill in this process: its exit status, what its steps trained, and the rows of the data that it read."""
    seen = {"kinds": set(), "sharded": set(), "processes": int(os.environ.get("WORLD_SIZE", 1)), "rows": []}
    steps, preempt = [], words[0].removeprefix("sigterm=")

    def step(name, role, network, *rest):
        steps.append(name)
        if preempt == str(len(steps)) and PartialState().is_last_process:
            os.kill(os.getpid(), signal.SIGTERM)
        figures = train_step(name, role, network, *rest)
        kinds = {DistributedDataParallel: "ddp", FSDPModule: "shard"}
        seen["kinds"].add(next((kind for wrapper, kind in kinds.items() if isinstance(network, wrapper)), "plain"))
        weights = [weight for group in role.optimizer.param_groups for weight in group["params"]]
        moments = [role.optimizer.state[weight]["exp_avg"] for weight in weights]
        averages = [*role.average.parameters()] if role.average else []
        seen["sharded"].add(all(isinstance(tensor, DTensor) for tensor in (*weights, *moments, *averages)))
        return figures

    def watched_draws(config, data, *part):
        for number, one in enumerate(getattr(data, "sets", [data])):
            one.rows = lambda rows, number=number, read=one.rows: (
                seen["rows"].extend([number, int(row)] for row in rows),
                read(rows),
            )[1]
        return draws(config, data, *part)

    with pytest.MonkeyPatch.context() as patch:
        train_step, draws = trainer._step, stages.draws
        patch.setattr(trainer, "_step", step)
        patch.setattr(stages, "draws", watched_draws)
        patch.setattr(runs, "Accelerator", Sharding if kind == "shard" else Accelerator)
        patch.setattr(guard, "exit_at_once", lambda status: status)  # the next run needs this process
        status = run(lambda: distill(words[preempt.isdecimal() :]))
    return seen | {"kinds": [*seen["kinds"]], "sharded": [*seen["sharded"]], "status": status}


def main(report, *words):
    """Do all runs in this process, and write its report after each."""
    torch.set_num_threads(1)
    read_launch_file()
    PartialState.destroy_process_group = lambda *_: None  # the next run needs it
    reports = []
    for separator, group in groupby(words, lambda word: word == "--"):
        if not separator:
            reports.append(run_once(*group))
            Path(f"{report}.{os.environ['RANK']}").write_text(json.dumps(reports))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as distill does after SIGTERM


def launch(report, *given, count=2):
    """Do runs, (kind, words), in two processes or more; for each run, what the processes report."""
    words = [str(word) for kind, words in given for word in ("--", kind, *words)][1:]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), __file__]
    done = subprocess.run([*command, str(report), *words], capture_output=True, text=True, env=ENVIRONMENT, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(count)]
    for process in reports:
        for (kind, _), seen in zip(given, process, strict=True):
            assert seen["status"] in (0, 143), done.stderr[-3000:]
            assert (seen["processes"], seen["kinds"], seen["sharded"]) == (count, [kind], [kind == "shard"])
    return list(zip(*reports, strict=True))


@pytest.fixture(scope="module")
def students(tiny, tmp_path_factory):
    """A folder with a tiny Wan, two buckets, and runs of the forward stage, for on-policy runs to start from."""
    folder, data = tmp_path_factory.mktemp("students"), LatentSet(tiny / "latents")
    (folder / "wan").symlink_to(tiny)
    latents, prompts = data.rows(range(8))
    for frames, rows in ((5, slice(5)), (3, slice(5, 8))):
        captions = data.captions(range(8))[rows]
        write_latents(folder / f"mixed/{frames}", latents[rows, :frames], prompts[rows], data.null, captions)
    for name in ("bidirectional forward", "causal forward"):
        assert run_once("plain", *arguments(folder, name, folder / name, 2))["status"] == 0
    return folder


def arguments(folder, name, output, steps):
    """Arguments of distill for one of RUNS."""
    architecture, stage = RUNS[name]
    data = "mixed" if name == MIXED else "wan/latents"
    words = [f"runs={folder}", f"base={folder}/wan", f"data={folder}/{data}", f"output={output}", f"steps={steps}"]
    if stage == "on_policy":
        words += ["batch=2", f"student={folder}/{architecture} forward", "teacher=null"]
    if stage == "forward-published":
        words += ["causal.coarse_patches=lora"]  # as on-policy training, which starts from it, has them
    if "whole" in name:
        words += ["trained=full", f"student={folder}/wan"]
    return [
        "--config",
        architecture,
        stage,
        "tiny",
        *words,
        "memory=small",
        "samples.every=0",
        "log.tracker=none",
        "checkpoints.every=100",
    ]


def history(folder):
    return json.loads((folder / "run.json").read_text())["history"]


def difference(one, other):
    """The largest difference of a weight of two runs."""
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors")) for folder in (one, other)]
    assert names[0] == names[1] != []
    pairs = [(load_file(one / name), load_file(other / name)) for name in names[0]]
    return max(float((a[key] - b[key]).abs().max()) for a, b in pairs for key in a)


def assert_same_training(folder, name, kind, plain, halves, steps):
    """Losses, weights and rows of two processes are those of one."""
    entries = [history(folder / "plain" / name), history(folder / kind / name)]
    losses = [[entry[key] for entry in run for key in sorted(entry) if key.endswith("/loss")] for run in entries]
    on_policy = RUNS[name][1] == "on_policy"
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert len(losses[0]) == steps * (1 + on_policy)
    assert difference(folder / "plain" / name, folder / kind / name) < 1e-4
    own = 1 if on_policy else 2  # rows per process and step
    assert [len(half["rows"]) for half in halves] == [own * steps] * 2
    assert [row for pair in zip(*(half["rows"] for half in halves), strict=True) for row in pair] == plain["rows"]


def assert_shared_tokens(folder, name, kind, rows, seen):
    """Processes train as one, and those that share a clip read the same rows."""
    losses = [
        [entry[key] for entry in history(folder / run / name) for key in entry if key.endswith("/loss")]
        for run in ("plain", kind)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert difference(folder / "plain" / name, folder / kind / name) < 1e-5
    assert [process["rows"] for process in seen[::2]] == [process["rows"] for process in seen[1::2]]
    assert sorted(row for process in seen[::2] for row in process["rows"]) == sorted(rows)


@pytest.mark.slow
def test_two_processes_train_as_one_and_resume_after_sigterm(students, tmp_path):
    """SIGTERM reaches one of two processes: both save and stop, then go on, with all offloaded. DDP, and FSDP2.

    The base rests in CPU memory, although they evaluate it unequally often; they share it where jumps are as many.
    """
    name, steps, other = "causal on_policy", 4, tmp_path / "buckets"
    alone, mixed = (arguments(students, MIXED, other / kind / MIXED, STEPS) for kind in KINDS[:2])
    tokens = [*arguments(students, name, tmp_path / "tokens" / name, steps), "sequence_parallel=2"]
    plain = run_once("plain", *arguments(students, name, tmp_path / "plain" / name, steps))
    given = [("ddp", mixed), ("ddp", tokens)]
    alike = ["on_policy.shared_rollout=true", "seed=3"]
    one_base = run_once("plain", *arguments(students, name, tmp_path / "shared" / "plain" / name, steps), *alike)
    for kind in KINDS[1:]:
        whole, again = (arguments(students, name, tmp_path / place / name, steps) for place in (kind, f"{kind}-again"))
        again += ["memory=fast"]
        offload = f"offload=[{'states,' * (kind == 'ddp')}blocks"
        shared = [*arguments(students, name, tmp_path / "shared" / kind / name, steps), *alike, "shard_base=true"]
        given += [
            (kind, whole),
            (kind, ["sigterm=3", *again, f"{offload},base]"]),
            (kind, [*again, f"{offload},halves]"]),
        ]
        given += [(kind, shared)]
    buckets, split, *seen = launch(tmp_path / "report", *given)
    assert_shared_tokens(tmp_path, name, "tokens", plain["rows"], split)
    assert_same_training(other, MIXED, "ddp", run_once("plain", *alone), buckets, STEPS)
    one, two = ([number for number, _ in process["rows"]] for process in buckets)  # of the bucket, two rows per step
    assert one == two == [number for number in one[::2] for _ in range(2)]
    counts = Counter(map(tuple, buckets[0]["rows"] + buckets[1]["rows"]))
    assert len(counts) == 8
    assert {*counts.values()} <= {STEPS * 4 // 8 + more for more in (-1, 0, 1)}
    assert [[process["status"] for process in each] for each in seen] == 2 * [[0, 0], [143, 143], [0, 0], [0, 0]]
    for kind, halves, resumed, shared in zip(KINDS[1:], seen[::4], seen[2::4], seen[3::4], strict=True):
        assert_same_training(tmp_path, name, kind, plain, halves, steps)
        assert_same_training(tmp_path / "shared", name, kind, one_base, shared, steps)
        assert [len(process["rows"]) for process in resumed] == [steps - 2] * 2  # two steps were saved
        assert [entry["step"] for entry in history(tmp_path / f"{kind}-again" / name)] == list(range(steps))
        assert difference(tmp_path / kind, tmp_path / f"{kind}-again") < 1e-5


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "kind", "count", "more"),
    [
        ("causal forward", "ddp", 4, ["shard_base=true"]),
        ("causal forward", "shard", 2, []),
        ("bidirectional on_policy", "shard", 4, []),
        ("bidirectional whole weights", "ddp", 2, []),
    ],
)
def test_two_processes_share_the_tokens_of_a_clip(students, tmp_path, name, kind, count, more):
    """Of four, two and two."""
    plain, own = (arguments(students, name, tmp_path / place / name, 3) for place in ("plain", kind))
    rows = run_once("plain", *plain)["rows"]
    (seen,) = launch(tmp_path / "report", (kind, [*own, "sequence_parallel=2", *more]), count=count)
    assert_shared_tokens(tmp_path, name, kind, rows, seen)


@pytest.mark.slow
def test_what_several_processes_cannot_share_is_one_line(students, tmp_path, capsys):
    words = arguments(students, "causal on_policy", tmp_path / "run", 3)
    for options, message in {
        "sequence_parallel=2": "sequence_parallel=2 with 1 processes; expected a number that divides them",
        "shard_base=true on_policy.shared_rollout=true": "shard_base=true in one process",
    }.items():
        assert run(lambda options=options: distill([*words, *options.split()])) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def twenty(students, tmp_path_factory):
    """20 steps of every stage by one process, by two (DDP) and by two of FSDP2: the folder, and the reports.

    Two processes take a forward step one row at a time, one process takes it at once.
    """
    folder = tmp_path_factory.mktemp("twenty")
    given = {(kind, name): arguments(students, name, folder / kind / name, STEPS) for kind in KINDS for name in RUNS}
    for (kind, name), words in given.items():
        words += ["accumulate=2"] * (kind != "plain" and "forward" in name)
    seen = {key: run_once("plain", *words) for key, words in given.items() if key[0] == "plain"}
    several = {key: (key[0], words) for key, words in given.items() if key[0] != "plain"}
    return folder, seen | dict(zip(several, launch(folder / "report", *several.values()), strict=True))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one_in_every_stage(twenty, name, kind):
    folder, seen = twenty
    assert_same_training(folder, name, kind, seen["plain", name], seen[kind, name], STEPS)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS[1:])
def test_two_processes_resume_as_one_and_back(students, tmp_path, kind):
    """Two, then one, then two again end where two do that were never stopped."""
    names = ("causal forward", "causal on_policy", "bidirectional whole weights")
    whole, again = (
        [arguments(students, name, tmp_path / place / name, 9) for name in names] for place in ("whole", "again")
    )
    stopped = [["sigterm=3", *words] for words in again]
    seen = launch(tmp_path / "first", *((kind, words) for words in (*whole, *stopped)))
    assert [process["status"] for each in seen for process in each] == [0] * 6 + [143] * 6
    assert [run_once("plain", *words)["status"] for words in stopped] == [143] * 3
    launch(tmp_path / "third", *((kind, words) for words in again))
    for name in names:
        assert [entry["step"] for entry in history(tmp_path / "again" / name)] == list(range(9))
        assert difference(tmp_path / "whole" / name, tmp_path / "again" / name) < 1e-5, name


@pytest.mark.long
@pytest.mark.parametrize("by", ["hand", "slurm"])
def test_two_launchers_train_and_sample_as_one_process(students, tmp_path, by):
    """scripts/node.sh as two machines start it: by hand, and as the last line of slurm.sh has it, with srun's words."""
    words = arguments(students, "bidirectional forward", tmp_path / "one", 4)
    words = [word for word in words if not word.startswith("samples.")] + ["samples.every=4", "samples.steps=[1,4]"]
    assert run_once("plain", *words)["status"] == 0
    again = [word.replace(str(tmp_path / "one"), str(tmp_path / "two")) for word in words]
    (line,) = re.findall(r"^srun (bash .*) \"\$@\" --minutes 230$", (ROOT / "scripts/slurm.sh").read_text(), re.M)
    start = ["bash", "scripts/node.sh"] if by == "hand" else shlex.split(line)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = ENVIRONMENT | {"MACHINES": "2", "HOST": "127.0.0.1", "GPUS": "1", "PORT": port}
    shared["PATH"] = f"{Path(sys.executable).parent}:{shared['PATH']}"
    launchers = [
        subprocess.Popen([*start, *again], cwd=ROOT, env=shared | {"NODE": str(rank), "SLURM_NODEID": str(rank)})
        for rank in (0, 1)
    ]
    assert [launcher.wait(300) for launcher in launchers] == [0, 0]
    report = json.loads((tmp_path / "two/run.json").read_text())
    assert (report["processes"], report["distribution"]) == (2, "MULTI_CPU")
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-5
    before = [sorted((tmp_path / run / "samples/000000").iterdir()) for run in ("one", "two")]
    assert len(before[0]) == 5  # two prompts at two step counts, and the sheet
    assert [path.read_bytes() for path in before[0]] == [path.read_bytes() for path in before[1]]
    assert (tmp_path / "two/samples/000004/sheet.png").is_file()


EACH = ["--kills", "2", "--works", "1"]
SOME = ["--kills", "1", "--only", "two runs, one folder", "disk full while saving"]


@pytest.mark.parametrize(
    "options", [pytest.param(SOME, marks=pytest.mark.slow), pytest.param(EACH, marks=pytest.mark.long)]
)
def test_a_run_that_is_broken_loses_nothing_that_was_saved(options):
    """Parts of `make faults`."""
    command = [sys.executable, str(ROOT / "scripts/faults.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


if __name__ == "__main__":
    main(*sys.argv[1:])
