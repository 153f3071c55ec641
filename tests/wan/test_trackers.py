"""What trackers show of a run, read back by their own readers: tensorboard, and wandb without a network."""

import io
import json
import os
import subprocess
import sys

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minianyflow.support.cli import run
from minianyflow.wan import guard
from minianyflow.wan.commands import distill
from tests.refused import refused

STEPS = 5
FIGURES = {"seconds_per_step", "memory_gb", "waiting_for_data"}
FIGURES |= {f"student/{name}" for name in ("loss", "tangent", "eulerian", "semigroup", "gradient_norm", "lr")}
CLIPS = {"samples/1 step-0", "samples/1 step-1"}


def words(tiny, output, tracker):
    where = [f"base={tiny}", f"data={tiny}/latents", f"output={output}", f"log.tracker={tracker}"]
    often = [f"steps={STEPS}", "batch=4", "log.every=1", "samples.every=4", "samples.steps=[1]"]
    return ["bidirectional", "forward", "tiny", *where, *often]


def check_figures(shown, output):
    """shown: {name: {step: value}}. Everything is there, and the losses are those of the run's own history."""
    assert shown.keys() >= FIGURES
    history = json.loads((output / "run.json").read_text())["history"]
    for entry in history:
        for name in entry.keys() - {"step"}:
            assert shown[name][entry["step"]] == pytest.approx(entry[name], rel=1e-6), name
    assert [entry["step"] for entry in history] == [*range(STEPS)]
    assert min(shown["memory_gb"].values()) > 0
    assert all(0 <= share <= 1 for share in shown["waiting_for_data"].values())


def check_clip(gif):
    picture = Image.open(io.BytesIO(gif))
    assert (picture.format, picture.n_frames, picture.size) == ("GIF", 17, (64, 64))


@pytest.mark.slow
def test_tensorboard_shows_figures_and_samples(tiny, tmp_path):
    assert run(lambda: distill(["--config", *words(tiny, tmp_path, "tensorboard")])) == 0
    events = EventAccumulator(str(tmp_path / "log"), size_guidance={"scalars": 0, "images": 0}).Reload()
    tags = events.Tags()
    check_figures({tag: {e.step: e.value for e in events.Scalars(tag)} for tag in tags["scalars"]}, tmp_path)
    assert {*tags["images"]} == CLIPS
    for tag in CLIPS:
        assert [event.step for event in events.Images(tag)] == [0, 4, STEPS]
        check_clip(events.Images(tag)[0].encoded_image_string)


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch):
    monkeypatch.setattr(guard.importlib.util, "find_spec", lambda name: None)
    with refused("log.tracker=wandb is not installed here: pip install wandb, or set log.tracker=none"):
        guard.check_tracker("wandb")


READ = """
import json, sys
from wandb.proto import wandb_internal_pb2
data, place, whole, entries = open(sys.argv[1], "rb").read(), 7, b"", []
while place < len(data):  # a log of leveldb: blocks of 32 KiB, parts of records with a checksum, a length and a kind
    if 2**15 - place % 2**15 < 7:
        place += 2**15 - place % 2**15
        continue
    length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
    whole += data[place + 7 : place + 7 + length]
    place += 7 + length
    if kind in (1, 4):  # the whole of a record, or its last part
        record = wandb_internal_pb2.Record.FromString(whole)
        whole = b""
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        entries += [[record.history.step.num, items]] * bool(items)
print(json.dumps(entries))
"""


@pytest.mark.long
def test_wandb_shows_the_same_without_a_network(tiny, tmp_path):
    """By wandb itself, which is no package of this project: pip puts it into a folder of the test."""
    place = tmp_path / "wandb"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(place), "wandb"]
    subprocess.run(pip, check=True, timeout=900)
    start = f"import sys; sys.path.append({str(place)!r}); "

    def python(code, *given, mode="offline"):
        environment = os.environ | {"WANDB_MODE": mode, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
        command = [sys.executable, "-c", start + code, *map(str, given)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)

    main = "from minianyflow.__main__ import main; sys.exit(main(sys.argv[1:]))"
    done = python(main, "distill", "--config", *words(tiny, tmp_path / "run", "wandb"))
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    entries, shown = json.loads(python(READ, file).stdout), {}
    for step, items in entries:
        for name, value in items.items():
            shown.setdefault(name, {})[step] = value
    check_figures(shown, tmp_path / "run")
    for name in CLIPS:
        assert [*shown[f"{name}/path"]] == [0, 4, STEPS]
        check_clip((file.parent / "files" / shown[f"{name}/path"][0]).read_bytes())
    done = python(main, "distill", "--config", *words(tiny, tmp_path / "again", "wandb"), mode="online")  # nobody is
    said = [line for line in done.stderr.splitlines() if line.startswith("warning")]  # logged in
    assert (done.returncode, len(said)) == (0, 1), done.stderr
    assert said[0].startswith("warning: the tracker failed (")
