"""Captioned latents on disk: every row once per epoch, batches that depend on their step alone, broken files."""

import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map

from minianyflow.wan.config import load_config
from minianyflow.wan.data import latents as module
from minianyflow.wan.data.latents import LatentSet, clip_name, verify, write_latents
from minianyflow.wan.stages import drop_prompts
from tests.refused import refused

ROWS, SHAPE = 11, (2, 3, 4, 4)
PAIRS = {"diagonal": 0.5, "end": 0.25, "shift": 5.0, "drop": 0.5}


def marked(rows=ROWS, shape=SHAPE):
    """Latents and prompts in which every number says its row."""
    row = torch.arange(rows, dtype=torch.float32)
    return row.view(-1, 1, 1, 1, 1).expand(-1, *shape).clone(), 100 + row.view(-1, 1, 1).expand(-1, 5, 6).clone()


def write(folder, **changes):
    latents, prompts = marked()
    given = {"latents": latents, "prompts": prompts, "null": -torch.ones(1, 5, 6)}
    write_latents(folder, **given | {"captions": [f"clip {row}" for row in range(ROWS)]} | changes)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data")


def rows_of(batch):
    return batch["x"][:, 0, 0, 0, 0].long().tolist()


def as_drawn(*parts):
    """The whole batch of a step, from its parts, in the order of its samples."""
    order = torch.cat([part["place"] for part in parts]).argsort()
    return tree_map(lambda *values: torch.cat(values)[order], *parts)


def test_what_is_written_is_read(folder):
    data, order = LatentSet(folder), [10, 0, 4, 3, 8, 4]  # in any order, one twice
    assert (len(data), data.shape, data.null_text) == (ROWS, SHAPE, None)
    latents, prompts = data.rows(order)
    assert torch.equal(latents, marked()[0][order])
    assert torch.equal(prompts, marked()[1][order])
    assert data.captions(order) == [f"clip {row}" for row in order]
    assert data.files([3]) == ["00000/00000003.safetensors"]
    assert torch.equal(data.null, -torch.ones(1, 5, 6))
    assert LatentSet(write(folder.parent / "text", null_text="ugly")).null_text == "ugly"
    assert clip_name(1_234_567) == "01234/01234567.safetensors"
    texts = ["a\u2028b", "a\x85b", "a\x0cb\n", "", '"', *map(str, range(ROWS - 5))]
    assert LatentSet(write(folder.parent / "texts", captions=texts)).captions(range(ROWS)) == texts


def test_half_precision_without_padding_on_disk_is_float32_with_padding_in_a_batch(tmp_path):
    latents, prompts = (tensor.to(torch.bfloat16) for tensor in marked())
    prompts[:, 3:] = 0
    prompts[5] = 0
    data = LatentSet(write(tmp_path, latents=latents, prompts=prompts, null=prompts[:1]))
    for row, length in ((4, 3), (5, 1)):
        stored = load_file(data.path(row))
        assert stored["latents"].dtype == stored["prompt"].dtype == torch.bfloat16
        assert len(stored["prompt"]) == length
    rows = data.rows([7, 5])
    assert rows[0].dtype == rows[1].dtype == torch.float32
    assert torch.equal(rows[1], prompts[[7, 5]].float())


# Batches


@pytest.mark.parametrize("rows", [1, 3, 11, 25])
def test_every_row_once_per_epoch_whatever_the_batch(folder, rows):
    data = LatentSet(folder)
    drawn = [row for step in range(2 * ROWS // rows + 1) for row in rows_of(as_drawn(data.draw(step, rows, seed=7)))]
    first, second = drawn[:ROWS], drawn[ROWS : 2 * ROWS]
    assert sorted(first) == sorted(second[:ROWS]) == list(range(ROWS))
    assert first != second  # another order per epoch
    assert first == rows_of(as_drawn(data.draw(0, ROWS, seed=7)))  # the same whatever the batch
    assert first != rows_of(as_drawn(data.draw(0, ROWS, seed=8)))


def test_noise_times_and_order_use_random_numbers_of_their_own(folder, monkeypatch):
    """Sample 3 and step 3 would share their numbers if the key were (seed, 3)."""
    keys = []
    generator = module.generator
    monkeypatch.setattr(module, "generator", lambda *key: keys.append(key) or generator(*key))
    module._order.cache_clear()
    data = LatentSet(folder)
    for step in range(4):
        data.draw(step, 4, seed=5, **PAIRS)
    assert len(set(keys)) == len(keys) == 2 + 16 + 4  # two epochs begun, sixteen samples, four steps


def test_dropped_rows_get_the_null_prompt_and_others_keep_theirs(folder):
    data = LatentSet(folder)
    batch = data.draw(0, ROWS, **PAIRS)
    dropped = batch["dropped"]
    assert 0 < int(dropped.sum()) < ROWS
    prompt = drop_prompts(batch, data.null, load_config())["condition"]["prompt"]
    assert torch.equal(prompt[dropped], data.null.expand(int(dropped.sum()), -1, -1))
    assert torch.equal(prompt[~dropped], marked()[1][rows_of(batch)][~dropped])
    assert "dropped" not in data.draw(0, ROWS)


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_a_batch_depends_on_its_step_alone_and_parts_read_only_their_rows(folder, monkeypatch, parts):
    read, read_clip = [], LatentSet.read_clip
    monkeypatch.setattr(LatentSet, "read_clip", lambda self, path: read.append(path.stem) or read_clip(self, path))
    data = LatentSet(folder)
    whole = data.draw(3, 6, 5, **PAIRS)
    assert read == [f"{row:08d}" for row in rows_of(whole)]
    torch.manual_seed(99)
    batches = [LatentSet(folder).draw(3, 6, 5, (index, parts), **PAIRS) for index in range(parts)]
    assert read[6:] == [row for index in range(parts) for row in read[:6][index::parts]]
    assert whole.keys() >= {"x", "eps", "condition", "row", "t", "r", "split", "dropped", "place"}
    tree_map(torch.testing.assert_close, as_drawn(*batches), as_drawn(whole))
    for part in ((0, 4), (parts, parts), (-1, parts)):
        with refused(rf"part {part[0]} of {part[1]} of a batch of 6 rows; expected equal parts"):
            data.draw(0, 6, part=part)


def test_every_sample_once_per_epoch_at_any_number_of_processes_across_any_resume(folder):
    """Steps of 6 rows on 1, 2, 3 and 6 processes in turn, stopped and resumed in between: exactly twelve epochs.

    Noise belongs to the sample, and no two share theirs, not even of one row.
    """
    drawn, noise = Counter(), {}
    for start, stop, processes in ((0, 4, 2), (4, 5, 1), (5, 14, 6), (14, 20, 3), (20, 22, 2)):
        data = LatentSet(folder)  # a resumed run reads the folder again
        for step in range(start, stop):
            for index in range(processes):
                batch = data.draw(step, 6, 1, (index, processes))
                drawn.update(rows_of(batch))
                noise |= zip((6 * step + batch["place"]).tolist(), batch["eps"], strict=True)
    assert drawn == dict.fromkeys(range(ROWS), 12)
    noise = torch.stack([noise[number] for number in range(132)])
    assert torch.equal(noise, as_drawn(LatentSet(folder).draw(0, 132, 1))["eps"])
    assert len(noise.flatten(1).unique(dim=0)) == 132
    assert abs(float(noise.mean())) < 0.05  # 12672 numbers: 0.009 by chance
    assert abs(float(noise.std()) - 1) < 0.05


# Broken files


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def other(**changes):
    """A function that writes other tensors in a file's place."""
    latents, prompts = marked(1)
    tensors = {"latents": latents[0], "prompt": prompts[0]} | changes
    return lambda path: save_file({name: value for name, value in tensors.items() if value is not None}, path)


BROKEN = {
    "cut": (cut, "cannot be read .*fetch or make it again"),
    "grown": (lambda path: path.write_bytes(path.read_bytes() + b"more"), "cannot be read"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "gone": (lambda path: path.unlink(), "is missing; fetch or make it again"),
    "no prompt": (other(prompt=None), "cannot be read .*prompt"),
    "other size": (
        other(latents=torch.zeros(2, 3, 4, 8)),
        r"holds latents \(2, 3, 4, 8\) and .*; expected \(2, 3, 4, 4\)",
    ),
    "long prompt": (other(prompt=torch.zeros(6, 6)), r"and a prompt \(6, 6\); expected .* at most \(5, 6\)"),
    "wide prompt": (other(prompt=torch.zeros(5, 7)), r"and a prompt \(5, 7\); expected .* at most \(5, 6\)"),
    "not a number": (other(latents=torch.full(SHAPE, torch.nan)), "latents in .* holds NaN"),
    "infinite": (other(prompt=torch.full((5, 6), torch.inf)), "prompt in .* holds NaN or infinite"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_clip_is_named_or_skipped(folder, capsys, how):
    """The next row stands in for it; all others keep their numbers, for every process, before and after a resume."""
    breaks, message = BROKEN[how]
    before = rows_of(as_drawn(LatentSet(folder).draw(0, ROWS)))
    breaks(LatentSet(folder).path(4))
    with refused(rf"^(?=.*00000004\.safetensors).*{message}"):
        LatentSet(folder).rows([4])
    assert len(verify(folder)) == 1
    assert capsys.readouterr().err == ""
    data = LatentSet(folder, skip=1)
    drawn = rows_of(as_drawn(data.draw(0, 2 * ROWS)))
    (line,) = capsys.readouterr().err.splitlines()  # once
    assert line.startswith("warning: ")
    assert line.endswith("; skipped, 1 of at most 1")
    assert data.broken == [data.path(4)]
    assert drawn[:ROWS] == [row + (row == 4) for row in before]
    parts = [LatentSet(folder, skip=1).draw(0, 2 * ROWS, part=(index, ROWS)) for index in range(ROWS)]
    assert rows_of(as_drawn(*parts)) == drawn


def test_one_broken_clip_too_many(folder):
    data = LatentSet(folder, skip=1)
    for row in (0, 10):
        cut(data.path(row))
    with refused(r"00000000\.safetensors .* \(1 other broken clips were skipped\)"):
        data.rows([10, 0])
    assert LatentSet(folder, skip=2).rows([10])[0].unique().tolist() == [1]  # 0 follows on 10, 1 on 0
    for row in range(1, 10):
        cut(data.path(row))
    with refused(r"all 11 clips in .* are broken; fetch or make it again"):
        LatentSet(folder, skip=ROWS).rows([3])


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


FOLDERS = {
    "empty": (lambda folder: (folder / "manifest.json").unlink(), "no latents in .*; expected a folder that"),
    "unfinished": (lambda folder: change_manifest(folder, finished=False), "is unfinished; .* again, it goes on"),
    "cut manifest": (lambda folder: cut(folder / "manifest.json"), "manifest.json is not JSON .*make it again"),
    "earlier": (lambda folder: change_manifest(folder, format=1), "written by an earlier version; prepare .* again"),
    "no null": (lambda folder: (folder / "null.safetensors").unlink(), "null.safetensors is missing"),
}


@pytest.mark.parametrize("how", FOLDERS)
def test_a_folder_that_does_not_fit_is_one_line(folder, how):
    breaks, message = FOLDERS[how]
    breaks(folder)
    with refused(message):
        LatentSet(folder)


def test_skipped_clips_have_no_row_and_change_the_identity(folder):
    before = LatentSet(folder).identity
    change_manifest(folder, skipped=[0, 4])
    data = LatentSet(folder)
    assert len(data) == ROWS - 2
    assert rows_of({"x": data.rows(range(9))[0]}) == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert data.identity != before
    assert verify(folder) == [f"{folder}/{clip_name(number)} is not in manifest.json" for number in (0, 4)]


@pytest.mark.parametrize("name", [clip_name(3), "null.safetensors"])
def test_verify_finds_a_number_that_changed_into_another(folder, name):
    assert verify(folder) == []
    data = bytearray((folder / name).read_bytes())
    data[-7] ^= 1
    (folder / name).write_bytes(data)
    assert verify(folder) == [f"{folder / name} has another SHA-256 than when it was written"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"captions": ["one"]}, r"latents \(11, 2, 3, 4, 4\), .*, 1 captions; expected .* and N captions"),
        ({"null": torch.zeros(1, 4, 6)}, r"null \(1, 4, 6\), .*; expected .* \(1, L, D\)"),
    ],
)
def test_writing_says_what_does_not_fit(tmp_path, changes, message):
    with refused(message):
        write(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def test_a_set_is_never_written_over(folder):
    with refused("holds latents already; expected a new folder"):
        write(folder)
