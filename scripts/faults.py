"""Break commands on a tiny Wan in every way we know, and check that nothing saved is lost.

Every command is a process of its own that is really killed; what it leaves in the end is compared byte for byte with
what an undisturbed one left. Prints a table; takes about six minutes on two cores.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import psutil  # which accelerate needs
import torch

from minianyflow.support.cli import Parser, run
from minianyflow.wan.commands import distill, evaluate, export, sample
from minianyflow.wan.data.commands import prepare_latents

SCRIPT = Path(__file__).resolve().with_name("distill.py")
ONE = SCRIPT.parent / "accelerate/one_gpu.yaml"
STEPS = 8
LINES = ("error:", "warning:", "going on", "SIGTERM")  # the beginnings of a run's messages


class Bench:
    """A tiny Wan, the options of the runs on it, and the weights of an undisturbed one."""

    def __init__(self, folder):
        from minianyflow.wan.folders import make_tiny_wan

        self.folder, self.count, self.undisturbed = Path(folder), 0, {}
        self.make(lambda: make_tiny_wan(self.folder / "wan", videos=True))
        where = [f"base={folder}/wan", f"data={folder}/wan/latents", "log.tracker=none", "samples.every=0"]
        some = [f"steps={STEPS}", "checkpoints.every=2", "checkpoints.keep=2", "causal.bidirectional=0.5"]
        self.options = ["--config", "causal", "forward", "tiny", *where, *some]
        for _ in range(2):  # the first finds a cold disk
            start, self.whole = time.perf_counter(), self.new()
            status, _ = self.run(self.whole)
            if status:
                raise RuntimeError("the undisturbed run failed")
        self.seconds, self.weights = time.perf_counter() - start, weights(self.whole)

    def new(self):
        """A folder for another run."""
        self.count += 1
        return self.folder / f"run-{self.count}"

    def make(self, action):
        """action() in a process of its own. This one never computes with torch, whose threads no fork would have."""
        status, said = self.run(self.new(), command=lambda: action() or 0)
        if status:
            raise RuntimeError(f"exit {status}: {said}")

    def start(self, output, *options, before=None, command=None):
        """The process id of a run, or of another command(); before() is called in it first."""
        log = self.folder / f"{output.name}.log"
        number = os.fork()
        if number:
            return number, log
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 70
        try:
            torch.set_num_threads(1)
            if before:
                before()
            status = run(command or (lambda: distill([*self.options, f"output={output}", *options])))
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def run(self, output, *options, before=None, command=None):
        """Run to its end: (exit status, its messages)."""
        return self.end(*self.start(output, *options, before=before, command=command))

    def end(self, number, log):
        """Wait for a run: (exit status, negative for a signal, its messages)."""
        _, status = os.waitpid(number, 0)
        text = log.read_text().replace("\r", "\n").splitlines()
        return os.waitstatus_to_exitcode(status), [line for line in text if line.startswith(LINES)]

    def same(self, output):
        """Whether a run left what the undisturbed one did: every weight file, byte for byte."""
        return weights(output) == self.weights

    def preparing(self, output):
        """The command that prepares the videos of the tiny Wan."""
        wan = self.folder / "wan"
        where = [f"--videos={wan}/videos", f"--captions={wan}/captions.jsonl", f"--base={wan}", f"--output={output}"]
        return [prepare_latents, *where, "--length=32", "--device=cpu"]

    def buckets(self):
        """A folder of latents of two sizes."""
        from minianyflow.wan.data.latents import LatentSet, write_latents

        folder = self.folder / "buckets"

        def write():
            data = LatentSet(self.folder / "wan/latents")
            latents, prompts = data.rows(range(len(data)))
            for name, frames in (("short", 3), ("long", 5)):
                texts = ["x"] * len(data), data.null_text
                write_latents(folder / name, latents[:, :frames], prompts, data.null, *texts)

        if not folder.exists():
            self.make(write)
        return folder

    def prompts(self):
        """A file of two prompts."""
        path = self.folder / "prompts.txt"
        path.write_text("a red square moves left\na blue disc moves up\n")
        return path

    def stopped_at_six(self):
        """A run that was killed once its checkpoint of step 6 stood."""
        output = self.new()
        number, log = self.start(output, before=lambda: change_batch(6, lambda batch: time.sleep(60)))
        wait_for(output / "checkpoints/000006")
        os.kill(number, signal.SIGKILL)
        self.end(number, log)
        return output

    def refused(self, words, output, *options, change=None, lines=1):
        """Whether a run is refused, in the last of `lines` lines, and then resumes. change: a context."""
        with change or contextlib.nullcontext():
            status, said = self.run(output, *options)
        again, _ = self.run(output)
        return said[-1], (status, again, len(said)) == (2, 0, lines) and words in said[-1] and self.same(output)


def weights(output):
    """{name: (header, bytes)} of the weight files in a run folder; safetensors shuffles its header's entries."""
    found = {}
    for path in sorted(Path(output).glob("*.safetensors")):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        found[path.name] = (json.loads(data[8:end]), data[end:])
    return found


def checkpoints(output):
    """The whole checkpoints of a run, newest first."""
    from minianyflow.wan.checkpoints import Broken, Checkpoints, check

    whole = []
    for folder in Checkpoints(output / "checkpoints").folders():
        with contextlib.suppress(Broken):
            check(folder)
            whole.append(folder)
    return whole


def saved_steps(output):
    """The steps of the whole checkpoints of a run, newest first."""
    return [int(folder.name) for folder in checkpoints(output)]


def wait_for(path, seconds=60):
    """Wait until a path exists."""
    end = time.perf_counter() + seconds
    while not path.exists():
        if time.perf_counter() > end:
            raise RuntimeError(f"{path} did not come")
        time.sleep(0.002)


# Injections: each returns (what happened, whether that is right)


def killed(bench, seed):
    """SIGKILL at a random moment; every other one in the middle of a save."""
    draw, output = random.Random(seed), bench.new()
    number, log = bench.start(output)
    if seed % 2:
        wait_for(output / "checkpoints" / f".unfinished-{draw.choice(range(2, STEPS + 1, 2)):06}")
        time.sleep(draw.uniform(0, 0.02))
    else:
        time.sleep(draw.uniform(0.05, 0.9) * bench.seconds)
    saving = bool(list(output.glob("checkpoints/.unfinished-*")))
    os.kill(number, signal.SIGKILL)
    status, _ = bench.end(number, log)
    saved = saved_steps(output)
    where = "while saving" if saving else "between saves"
    if status == 0 or (output / "run.json").exists():  # it was done before the kill, and so it must be whole: try again
        return killed(bench, seed + 100) if bench.same(output) else ("killed when it was done, and not whole", False)
    again, _ = bench.run(output)
    what = f"killed {where}, went on after {max(saved, default=0)} steps"
    return what, (status, again) == (-signal.SIGKILL, 0) and bench.same(output)


def contents(output):
    """{file: bytes} of a folder: weights by tensor, reports and manifests without seconds and places."""
    found = weights(output)
    for path in sorted(path for path in Path(output).rglob("*") if path.is_file()):
        name = str(path.relative_to(output))
        if path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.suffix in (".jsonl", ".mp4") or (path.suffix == ".safetensors" and name not in found):
            found[name] = path.read_bytes()
        elif name not in found:
            found[name] = None  # pictures and configurations: that they are there
    return found


TIMES = ("seconds", "waiting_for_data", "history", "output", "source", "base", "stages", "run")


def timeless(value):
    """JSON without what two undisturbed runs do not share."""
    if isinstance(value, dict):
        return {name: timeless(inner) for name, inner in value.items() if name not in TIMES}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


# Each returns a command of what it writes to. The last weights of an on-policy run need the run that it starts from.
WORKS = {
    "offload": lambda bench, out: [distill, *bench.options, "offload=[states,blocks,base]", f"output={out}"],
    "memory=small": lambda bench, out: on_policy(bench, out, "memory=small"),
    "on-policy, offload": lambda bench, out: on_policy(bench, out, "offload=[states,base]", "memory=small"),
    "int8": lambda bench, out: [distill, *bench.options, "base_dtype=int8", f"output={out}"],
    "image to video": lambda bench, out: [distill, *bench.options, "i2v_prob=0.5", f"output={out}"],
    "buckets": lambda bench, out: [distill, *bench.options, f"data={bench.buckets()}", f"output={out}"],
    "prepare": lambda bench, out: [*bench.preparing(out), "--frames=9", "--height=32", "--width=48"],
    "prepare --bucket": lambda bench, out: [*bench.preparing(out), "--bucket", "9x32x48", "17x32x32"],
    "stream": lambda bench, out: [sample, bench.whole, *PROMPT, "--stream=4", f"--output={out}"],
    "sample": lambda bench, out: [sample, bench.whole, *PROMPT, "--write", "latents", f"--output={out}"],
    "evaluate": lambda bench, out: [evaluate, bench.whole, f"--prompts={bench.prompts()}", f"--output={out}", *SIZE],
    "export": lambda bench, out: [export, bench.whole, out],
}
PROMPT = ("--prompt", "a red square moves left", "--steps", "1", "2")
SIZE = ("--steps", "1", "2", "--videos", "2")


def on_policy(bench, output, *options):
    """The on-policy stage, from the undisturbed run."""
    given = [option for option in bench.options if option != "forward"]
    stage = given.index("causal") + 1
    starts = [f"student={bench.whole}", "teacher=null", f"output={output}"]
    return [distill, *given[:stage], "on_policy", *given[stage:], *starts, *options]


def killed_work(bench, name, seed):
    """SIGKILL to a command at a random moment; run again, it leaves what an undisturbed one leaves, and no more."""

    def work(output):
        command, *arguments = WORKS[name](bench, output)
        return lambda: command([*map(str, arguments)])

    if name not in bench.undisturbed:
        start, output = time.perf_counter(), bench.new()
        if bench.run(output, command=work(output))[0]:
            raise RuntimeError((bench.folder / f"{output.name}.log").read_text()[-300:])
        bench.undisturbed[name] = time.perf_counter() - start, contents(output)
    seconds, expected = bench.undisturbed[name]
    draw = random.Random(f"{name} {seed}")
    for _ in range(5):
        output = bench.new()
        number, log = bench.start(output, command=work(output))
        time.sleep(seconds * draw.uniform(0.05, 0.95))
        os.kill(number, signal.SIGKILL)
        status, _ = bench.end(number, log)
        left = sorted(path.name for path in output.glob("*")) if output.exists() else []
        if status == -signal.SIGKILL:
            break
    if name == "export" and output.exists():  # it was whole before the kill
        again = 0
    else:
        again, _ = bench.run(output, command=work(output))
    found = contents(output)
    wrong = sorted(file for file in expected | found if expected.get(file, 0) != found.get(file, 0))
    stale = [path.name for path in output.parent.glob(".unfinished-*")] if name != "export" else []
    what = f"killed when it had {len(left)} files and folders" + f"; differs: {', '.join(wrong[:3])}" * bool(wrong)
    return what, (status, again, wrong, stale) == (-signal.SIGKILL, 0, [], [])


def out_of_minutes(bench):
    """Ends again and again because its minutes are over, and is whole in the end."""
    output, ends = bench.new(), 0
    while (status := bench.run(output, "--minutes=0.005")[0]) == 143:
        ends += 1
    return f"ended {ends} times by --minutes", (status, ends > 1) == (0, True) and bench.same(output)


def terminated(bench):
    """SIGTERM in the middle of a step: saved, one line, exit status 143."""
    output = bench.new()
    number, log = bench.start(output)
    wait_for(output / "checkpoints" / "000002")
    os.kill(number, signal.SIGTERM)
    status, said = bench.end(number, log)
    again, _ = bench.run(output)
    return f"exit {status}, {said[0]}", (status, again, len(said)) == (143, 0, 1) and bench.same(output)


def launch(bench, output, processes, *options):
    """Start a run with `accelerate launch`: the launcher, and the log."""
    log = bench.folder / f"{output.name}.log"
    several = [f"--num_processes={processes}", *(["--multi_gpu"] if processes > 1 else ["--config_file", ONE])]
    command = [sys.executable, "-m", "accelerate.commands.launch", *several, SCRIPT, *bench.options]
    with log.open("a") as file:
        process = subprocess.Popen(
            [*map(str, command), f"output={output}", *options],
            stdout=file,
            stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )
    return process, log


def ran_as(path, processes):
    """Whether a run.json or state.json has this number of processes and their kind: launchers may start one alone."""
    made = json.loads(path.read_text())
    return (made["processes"], made["distribution"]) == (processes, "MULTI_CPU" if processes > 1 else "NO")


def one_of_two_killed(bench, *options):
    """SIGKILL to one of two processes in the middle of a save; two go on, and end as two that nothing disturbed."""
    output, whole = bench.new(), bench.new()
    undisturbed, _ = launch(bench, whole, 2, *options)
    status = undisturbed.wait()
    process, _ = launch(bench, output, 2, *options)
    wait_for(output / "checkpoints" / ".unfinished-000004", 120)
    workers = psutil.Process(process.pid).children()
    workers[-1].kill()
    killed = process.wait()
    wait_for_lock(output / "checkpoints")
    saved = saved_steps(output)
    two = ran_as(checkpoints(output)[0] / "state.json", 2) and not (output / "run.json").exists()
    again, _ = launch(bench, output, 2, *options)
    right = (status, killed, again.wait(), len(workers)) == (0, 1, 0, 2) and saved[0] in (2, 4)
    right = right and two and all(ran_as(folder / "run.json", 2) for folder in (whole, output))
    return f"launcher: exit {killed}, {saved[0]} steps were saved", right and weights(output) == weights(whole)


def launched(processes):
    """SIGTERM to `accelerate launch`, which passes it on only to several processes: saved all the same, one line."""

    def inject(bench):
        output = bench.new()
        process, log = launch(bench, output, processes)
        wait_for(output / "checkpoints" / "000002", 120)
        process.terminate()
        status = process.wait()
        wait_for_lock(output / "checkpoints")
        said = [line for line in log.read_text().splitlines() if "saved after" in line]
        unfinished = ran_as(checkpoints(output)[0] / "state.json", processes) and not (output / "run.json").exists()
        again, _ = bench.run(output)
        right = (status, again, len(said)) == (1 if processes > 1 else -signal.SIGTERM, 0, 1) and unfinished
        return f"launcher: exit {status}; {said[0]}", right and (processes > 1 or bench.same(output))

    return inject


def wait_for_lock(folder, seconds=60):
    """Until no run holds this folder."""
    from minianyflow.support.errors import InputError
    from minianyflow.support.files import lock_folder

    end = time.perf_counter() + seconds
    while True:
        try:
            return lock_folder(folder).close()
        except InputError:
            if time.perf_counter() > end:
                raise
            time.sleep(0.02)


def interrupted(bench):
    """Ctrl-C in the middle of a save."""
    output = bench.new()
    number, log = bench.start(output, before=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    wait_for(output / "checkpoints" / ".unfinished-000004")
    os.kill(number, signal.SIGINT)
    status, said = bench.end(number, log)
    saved = saved_steps(output)
    again, _ = bench.run(output)
    what = f"exit {status}, {saved[0]} steps were saved"
    return what, (status, again, said) == (130, 0, []) and saved[0] in (4, 5) and bench.same(output)


def killed_at_the_end(bench):
    """SIGKILL after training, when half of the run folder is written: no half of a file stays."""
    output = bench.new()

    def before():
        from minianyflow.wan import run as runs

        runs.as_yaml = lambda config: os.kill(os.getpid(), signal.SIGKILL)

    status, _ = bench.run(output, before=before)
    half = (output / "student.safetensors").is_file() and not (output / "run.json").exists()
    half = half and list(output.glob(".unfinished-*"))
    again, said = bench.run(output)
    right = (status, again) == (-signal.SIGKILL, 0) and not list(output.rglob(".*"))
    return said[0], half and right and bench.same(output)


def two_at_once(bench):
    """A second run into the same folder: one line, and the first is not disturbed."""
    output = bench.new()
    number, log = bench.start(output, before=lambda: change_batch(6, lambda batch: wait_for(output / "go")))
    wait_for(output / "checkpoints/000006")
    second, said = bench.run(output)
    (output / "go").touch()
    first, _ = bench.end(number, log)
    return said[0], (first, second, len(said)) == (0, 2, 1) and "is at work" in said[0] and bench.same(output)


def broken(damage):
    """The newest checkpoint is damaged: the run resumes from the one before."""

    def inject(bench):
        output = bench.stopped_at_six()
        damage(output / "checkpoints" / "000006")
        status, said = bench.run(output)
        right = status == 0 and "is not whole" in said[0] and "after 4 steps" in said[1]
        return said[0], right and bench.same(output)

    return inject


def truncate(folder):
    """A file cut short."""
    path = next(folder.glob("*.distcp"))
    os.truncate(path, path.stat().st_size // 2)


def flip(folder):
    """One bit of the largest tensor flipped; one of the padding between tensors may be, and changes nothing."""
    from torch.distributed.checkpoint import FileSystemReader

    place = max(FileSystemReader(folder).read_metadata().storage_data.values(), key=lambda place: place.length)
    path = folder / place.relative_path
    data = bytearray(path.read_bytes())
    data[place.offset + place.length // 2] ^= 1
    path.write_bytes(data)


def lose(folder):
    """A file gone."""
    next(folder.glob("*.distcp")).unlink()


def all_broken(bench):
    """No checkpoint is whole: the run begins anew, and prints so."""
    output = bench.stopped_at_six()
    for folder in checkpoints(output):
        truncate(folder)
    status, said = bench.run(output)
    return said[-1], status == 0 and "beginning anew" in said[-1] and bench.same(output)


def change_batch(step, change):
    """In this process, change the batch of `step`."""
    from minianyflow.wan import stages

    draws = stages.draws

    def changed(*given):
        draw = draws(*given)

        def drawn(at):
            batch = draw(at)
            if at == step:
                change(batch)
            return batch

        return drawn

    stages.draws = changed


def full_disk(bench):
    """No room for the checkpoint of step 8: one line, those before intact, and it goes on once there is room."""
    output = bench.stopped_at_six()
    before = {path: path.read_bytes() for path in (output / "checkpoints").rglob("*") if path.is_file()}
    limit = 100_000  # bytes a file may have: the system itself refuses more
    status, said = bench.run(
        output, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    )
    after = {path: path.read_bytes() for path in (output / "checkpoints").rglob("*") if path.is_file()}
    again, _ = bench.run(output)
    right = (status, again, len(said)) == (2, 0, 2) and "cannot save a checkpoint after 8 steps" in said[1]
    return said[-1], right and before == after and bench.same(output)


def not_finite(skip):
    """A batch whose loss is not a number: the run stops, or leaves it out; the batch's samples are written down."""

    def spoil(batch):
        batch["eps"][batch["place"].tolist().index(2)] = float("nan")

    def inject(bench):
        output = bench.new()
        status, said = bench.run(output, f"on_nan.skip={skip}", before=lambda: change_batch(3, spoil))
        told = json.loads((output / "bad_batch.json").read_text())
        right = (told["step"], 14 in told["numbers"], len(said)) == (3, True, 1)  # rebalancing spreads it
        files = [f"00000/{row:08}.safetensors" for row in told["rows"]]
        right = right and len(told["rows"]) == len(told["numbers"]) and told["files"] == files
        return said[0], right and (status == 0 if skip else status == 2 and saved_steps(output) == [2])

    return inject


def exploding(bench):
    """A learning rate that is far too high."""
    output = bench.new()
    status, said = bench.run(output, "lr=1e18", "warmup=0")
    return said[0], (status, len(said)) == (2, 1) and (output / "bad_batch.json").is_file()


def no_tracker(bench):
    """The tracker cannot write: one warning, the same weights."""
    output = bench.new()
    output.mkdir()
    (output / "log").write_text("not a folder")
    status, said = bench.run(output, "log.tracker=tensorboard")
    return said[0], (status, len(said)) == (0, 1) and bench.same(output)


def failing_tracker(bench):
    """The tracker fails while training."""
    output = bench.new()

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    def before():
        from accelerate.tracking import TensorBoardTracker

        TensorBoardTracker.log = fail

    status, said = bench.run(output, "log.tracker=tensorboard", before=before)
    return said[0], (status, len(said)) == (0, 1) and bench.same(output)


def refused(words, *options):
    """An unfinished run with other options: one line, before anything starts, and it can still resume."""
    return lambda bench: bench.refused(words, bench.stopped_at_six(), *options)


def cut_clip(bench):
    """The latents of a clip cut short while the run was away."""
    from minianyflow.wan.data.latents import LatentSet

    latents = LatentSet(bench.folder / "wan/latents")
    path = latents.path(latents.draw(6, 4)["row"][0])  # the next batch of 4 reads it
    change = rewritten(path, path.read_bytes()[:-100])
    return bench.refused(path.name, bench.stopped_at_six(), change=change, lines=2)


def skipped_clip(bench):
    """The latents of a clip cut short, and the run may leave one out: it is named, the others are trained on."""
    data, output = bench.folder / "cut", bench.new()
    shutil.copytree(bench.folder / "wan/latents", data)
    path = data / "00000/00000001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    status, said = bench.run(output, f"data={data}", "data_skip=1")
    right = status == 0 and len(said) == 1 and str(path) in said[0] and "1 of at most 1" in said[0]
    return said[0], right and (output / "run.json").is_file()


def other_data(bench):
    """A clip less while the run was away: samples would come twice, or never."""
    path = bench.folder / "wan/latents/manifest.json"
    change = rewritten(path, json.dumps(json.loads(path.read_text()) | {"skipped": [3]}).encode())
    return bench.refused("what data holds was manifest", bench.stopped_at_six(), change=change)


def other_weights(bench):
    """Another base in the place of the first: named. The same one elsewhere: it goes on."""
    from minianyflow.wan.folders import make_tiny_wan

    output, wan = bench.stopped_at_six(), bench.folder / "wan"
    away = wan.with_name("away")
    bench.make(lambda: make_tiny_wan(bench.folder / "other", seed=1))
    (wan / "transformer").rename(away)
    (bench.folder / "other/transformer").rename(wan / "transformer")
    status, said = bench.run(output)
    again, _ = bench.run(output, f"base={away}", "samples.every=0")
    shutil.rmtree(wan / "transformer")
    away.rename(wan / "transformer")
    right = (status, again, len(said)) == (2, 0, 1) and "base was weights" in said[0]
    return said[0], right and bench.same(output)


def other_null(bench):
    """Another null prompt under the same name."""
    path = bench.folder / "wan/latents/null.safetensors"
    data = path.read_bytes()
    change = rewritten(path, data[:-1] + bytes([data[-1] ^ 1]))
    return bench.refused("the null prompt was", bench.stopped_at_six(), change=change)


@contextlib.contextmanager
def rewritten(path, data):
    """A file with other contents for a while. Nothing is written before the context begins."""
    before = path.read_bytes()
    path.write_bytes(data)
    yield
    path.write_bytes(before)


def full_at_the_end(bench):
    """No room for what a run leaves: one line; its last checkpoint is there, and it ends once there is room."""
    output = bench.new()

    def before():
        from minianyflow.wan import run as runs

        save = runs.save_role

        def refuse(path, *given):
            if path.name == "student.safetensors":
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            save(path, *given)

        runs.save_role = refuse

    status, said = bench.run(output, before=before)
    saved = saved_steps(output)
    again, _ = bench.run(output)
    right = (status, again, len(said)) == (2, 0, 1) and saved[0] == STEPS
    return said[0], right and bench.same(output)


INJECTIONS = {
    "SIGTERM": terminated,
    "minutes": out_of_minutes,
    "SIGTERM to a launcher": launched(1),
    "the same, two processes": launched(2),
    "SIGKILL to one of two": one_of_two_killed,
    "the same, shard_base": lambda bench: one_of_two_killed(bench, "shard_base=true"),
    "the same, sequence_parallel": lambda bench: one_of_two_killed(bench, "sequence_parallel=2"),
    "Ctrl-C while saving": interrupted,
    "SIGKILL at the very end": killed_at_the_end,
    "disk full at the end": full_at_the_end,
    "two runs, one folder": two_at_once,
    "checkpoint cut short": broken(truncate),
    "one bit flipped": broken(flip),
    "file of it gone": broken(lose),
    "all cut short": all_broken,
    "disk full while saving": full_disk,
    "NaN, stop": not_finite(0),
    "NaN, skip one": not_finite(1),
    "exploding": exploding,
    "tracker cannot begin": no_tracker,
    "tracker fails": failing_tracker,
    "lr changed": refused("lr was 0.001, is 0.002", "lr=0.002"),
    "resume=never": refused("resume=never", "resume=never"),
    "latents cut short": cut_clip,
    "the same, skip one": skipped_clip,
    "other latents": other_data,
    "another base": other_weights,
    "another null prompt": other_null,
}


def inject(folder, kills, works, names):
    """Rows (injection, what happened, whether that is right)."""
    bench = Bench(folder)
    cases = {f"SIGKILL {seed + 1}": (lambda seed=seed: killed(bench, seed)) for seed in range(kills)}
    for seed, work in product(range(works), [name for name in WORKS if name in names]):
        cases[f"{work}, SIGKILL {seed + 1}"] = lambda work=work, seed=seed: killed_work(bench, work, seed)
    cases |= {name: (lambda name=name: INJECTIONS[name](bench)) for name in names if name in INJECTIONS}
    for name, case in cases.items():
        try:
            what, right = case()
        except Exception as problem:  # the table says what failed, and goes on
            what, right = f"{type(problem).__name__}: {problem}", False
        what = what.replace(str(folder), "FOLDER")
        print(f"{name:30} {'ok  ' if right else 'FAIL'} {what}", flush=True)
        yield name, what, right


def main(argv=None):
    """Make a tiny Wan, break runs on it, print the table; returns the exit status."""
    parser = Parser("faults.py", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25, help="runs killed at a random moment (default: 25)")
    parser.add_argument("--works", type=int, default=5, help="kills of each other command and option (default: 5)")
    known = [*WORKS, *INJECTIONS]
    names = "of: " + ", ".join(map(repr, known))
    parser.add_argument("--only", nargs="*", default=known, choices=known, metavar="INJECTION", help=names)
    arguments = parser.parse_args(argv)
    from minianyflow.wan import trainer  # noqa: F401 (before any run is forked)

    folder, start = Path(tempfile.mkdtemp(prefix="faults-")), time.perf_counter()
    try:
        rows = list(inject(folder, arguments.kills, arguments.works, arguments.only))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    wrong = [name for name, _, right in rows if not right]
    print(f"\n{len(rows) - len(wrong)} of {len(rows)} as they should be, in {time.perf_counter() - start:.0f} seconds")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run(main))
