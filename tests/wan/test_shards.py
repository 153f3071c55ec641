"""Captioned latents on disk: every row once an epoch, batches that depend on nothing but their step, broken folders."""

import hashlib
import json
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from minianyflow.objectives import FlowMapLoss
from minianyflow.support.errors import InputError
from minianyflow.wan.data import shards
from minianyflow.wan.data.shards import LatentShards, write_shards

ROWS, SHAPE = 11, (2, 3, 4, 4)
PAIRS = {"diagonal": 0.5, "end": 0.25, "shift": 5.0, "drop": 0.5}


def marked(rows=ROWS, shape=SHAPE):
    """Latents and prompts of which every number says its row."""
    row = torch.arange(rows, dtype=torch.float32)
    return row.view(-1, 1, 1, 1, 1).expand(-1, *shape).clone(), 100 + row.view(-1, 1, 1).expand(-1, 5, 6).clone()


def write(folder, **changes):
    latents, prompts = marked()
    given = {"latents": latents, "prompts": prompts, "null": -torch.ones(1, 5, 6)}
    write_shards(folder, **given | {"captions": [f"clip {row}" for row in range(ROWS)], "size": 4} | changes)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "data")


def prepared(folder, **changes):
    """The same, with the manifest that prepare_latents.py writes."""
    write(folder, **changes)
    entries = {}
    for path in sorted(folder.glob("0*.safetensors")):
        shapes = {name: [*value.shape] for name, value in load_file(path).items()}
        captions = entry(path.with_suffix(".jsonl"))
        entries[path.stem] = entry(path) | shapes | {"captions": captions}
    (folder / "skipped.jsonl").write_text("")
    options = {"rows": ROWS, "options": {"dtype": "fp32"}, "shards": entries, "finished": True}
    options |= {"null": entry(folder / "null.safetensors"), "skipped": entry(folder / "skipped.jsonl")}
    (folder / "manifest.json").write_text(json.dumps(options))
    return folder


def entry(path):
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def rows_of(batch):
    return batch["x"][:, 0, 0, 0, 0].long().tolist()


def test_what_is_written_is_read(folder):
    data = LatentShards(folder)
    assert (len(data), data.shape, len(data.paths)) == (ROWS, SHAPE, 3)
    order = [10, 0, 4, 3, 8, 4]  # over the edges of shards, in any order, one twice
    latents, prompts = data.rows(order)
    assert torch.equal(latents, marked()[0][order])
    assert torch.equal(prompts, marked()[1][order])
    assert data.captions(order) == [f"clip {row}" for row in order]
    assert torch.equal(data.null, -torch.ones(1, 5, 6))


def test_half_precision_stays_so_on_disk_and_is_float32_in_a_batch(tmp_path):
    latents, prompts = (each.to(torch.bfloat16) for each in marked())
    data = LatentShards(write(tmp_path, latents=latents, prompts=prompts, null=prompts[:1]))
    kept = load_file(tmp_path / "00000.safetensors")
    assert kept["latents"].dtype == kept["prompts"].dtype == torch.bfloat16
    batch = data.draw(0, 4, **PAIRS)
    assert {batch[name].dtype for name in ("x", "eps", "t", "r")} == {torch.float32}
    assert batch["condition"]["prompt"].dtype == torch.float32
    assert {each.dtype for each in data.rows([0])} == {torch.float32}


def test_rows_are_read_one_by_one(folder, monkeypatch):
    """Of a shard, only the rows asked for: whole tensors are never taken."""
    data, taken = LatentShards(folder), []
    opened = shards._open

    class Watched:
        def __init__(self, file):
            self.file = file

        def get_slice(self, name):
            return _Slice(self.file.get_slice(name))

    class _Slice:
        def __init__(self, inner):
            self.inner = inner

        def __getitem__(self, rows):
            taken.append(rows)
            return self.inner[rows]

    monkeypatch.setattr(shards, "_open", lambda *given: Watched(opened(*given)))
    data.rows([9, 1])
    assert taken == [slice(1, 2)] * 4


@pytest.mark.parametrize("rows", [1, 3, 4, 11, 25])
def test_every_row_once_an_epoch_whatever_the_batch(folder, rows):
    data = LatentShards(folder)
    drawn = [row for step in range(2 * ROWS // rows + 1) for row in rows_of(data.draw(step, rows, seed=7))]
    first, second = drawn[:ROWS], drawn[ROWS : 2 * ROWS]
    assert sorted(first) == sorted(second[:ROWS]) == list(range(ROWS))
    assert first != second  # another order every epoch
    assert first == rows_of(data.draw(0, ROWS, seed=7))  # the same whatever the batch
    assert first != rows_of(data.draw(0, ROWS, seed=8))


def test_a_batch_depends_on_its_step_alone(folder):
    one, other = LatentShards(folder), LatentShards(folder)
    for step in range(3):
        one.draw(step, 4, seed=3, **PAIRS)
    torch.manual_seed(99)
    again, expected = one.draw(1, 4, seed=3, **PAIRS), other.draw(1, 4, seed=3, **PAIRS)
    drawn = {"x", "eps", "condition", "row", "t", "r", "split", "objective_draw", "dropped"}
    assert again.keys() == expected.keys() == drawn
    assert torch.equal(again["condition"].pop("prompt"), expected["condition"].pop("prompt"))
    assert all(torch.equal(again[name], expected[name]) for name in again if name != "condition")


def test_noise_belongs_to_the_sample(folder):
    """Two batches of 3 have the noise of one of 6, and no two samples share theirs, not even of one row."""
    data = LatentShards(folder)
    halves = torch.cat([data.draw(step, 3)["eps"] for step in (2, 3)])
    assert torch.equal(halves, data.draw(1, 6)["eps"])
    many = torch.cat([data.draw(step, ROWS)["eps"] for step in range(3)]).flatten(1)
    assert len(many.unique(dim=0)) == 3 * ROWS
    assert abs(float(many.mean())) < 0.1
    assert abs(float(many.std()) - 1) < 0.1


def test_noise_times_and_order_use_random_numbers_of_their_own(folder, monkeypatch):
    """Sample 3 and step 3 would share their numbers if the key were (seed, 3)."""
    keys = []
    generator = shards.generator
    monkeypatch.setattr(shards, "generator", lambda *key: keys.append(key) or generator(*key))
    data = LatentShards(folder)
    for step in range(4):
        data.draw(step, 4, seed=5, **PAIRS)
    assert len(set(keys)) == len(keys) == 2 + 16 + 4  # two epochs begun, sixteen samples, four steps


def test_dropped_rows_get_the_null_prompt(folder):
    data = LatentShards(folder)
    batch = data.draw(0, ROWS, **PAIRS)
    dropped = batch["dropped"]
    assert 0 < int(dropped.sum()) < ROWS
    prompt = batch["condition"]["prompt"]
    assert torch.equal(prompt[dropped], data.null.expand(int(dropped.sum()), -1, -1))
    assert torch.equal(prompt[~dropped], marked()[1][rows_of(batch)][~dropped])
    assert "dropped" not in data.draw(0, ROWS)


def test_the_loss_takes_a_batch_as_it_is(folder):
    def u(z, t, r, prompt):
        return z * (t - r).view(-1, 1, 1, 1, 1) + prompt.mean((1, 2)).view(-1, 1, 1, 1, 1)

    losses, raw = FlowMapLoss({"eulerian": 0.5, "semigroup": 0.5})(u, LatentShards(folder).draw(0, 8, **PAIRS))
    assert losses.shape == (8,)
    assert set(raw) == {"tangent", "eulerian", "semigroup"}


# One process's part


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_parts_make_the_batch(folder, parts):
    data = LatentShards(folder)
    whole = data.draw(3, 6, 5, **PAIRS)
    each = [data.draw(3, 6, 5, (index, parts), **PAIRS) for index in range(parts)]
    prompt = whole.pop("condition")["prompt"]
    assert torch.equal(torch.cat([part.pop("condition")["prompt"] for part in each]), prompt)
    assert all(torch.equal(torch.cat([part[name] for part in each]), whole[name]) for name in whole)


def test_a_process_reads_its_part_alone(folder, monkeypatch):
    read, data = [], LatentShards(folder)
    inner = shards._read
    monkeypatch.setattr(
        shards, "_read", lambda path, row, careful: read.append((path.name, row)) or inner(path, row, careful)
    )
    batch = data.draw(0, 8, part=(1, 4))
    assert [(f"{row // 4:05d}.safetensors", row % 4) for row in rows_of(batch)] == read
    assert len(read) == 2


@pytest.mark.parametrize("part", [(0, 3), (2, 2), (-1, 2)])
def test_parts_that_are_none(folder, part):
    with pytest.raises(InputError, match=rf"part {part[0]} of {part[1]} of a batch of 4 rows; expected equal parts"):
        LatentShards(folder).draw(0, 4, part=part)


def test_every_sample_once_an_epoch_at_any_world_size_across_any_resume(folder):
    """Steps of 6 rows on 1, 2, 3 and 6 processes in turn, stopped and resumed in between: exactly three epochs."""
    drawn, noise = Counter(), []
    for start, stop, processes in ((0, 4, 2), (4, 5, 1), (5, 14, 6), (14, 20, 3), (20, 22, 2)):
        data = LatentShards(folder)  # a resumed run reads the folder again
        for step in range(start, stop):
            for index in range(processes):
                batch = data.draw(step, 6, 1, (index, processes))
                drawn.update(rows_of(batch))
                noise.append(batch["eps"])
    assert 12 * ROWS == 22 * 6
    assert drawn == dict.fromkeys(range(ROWS), 12)
    assert len(torch.cat(noise).flatten(1).unique(dim=0)) == 22 * 6
    assert torch.equal(torch.cat(noise), torch.cat([LatentShards(folder).draw(0, 132, 1)["eps"]]))


# Prepared folders, and what breaks in them


def test_prompts_are_kept_without_the_zeros_beyond(tmp_path):
    """L tokens, whatever a shard has of them."""
    _, prompts = marked()
    prompts[:, 3:] = 0
    data = LatentShards(write(tmp_path, prompts=prompts[:, :3], null=torch.ones(1, 5, 6)))
    assert torch.equal(data.rows([7, 2])[1], prompts[[7, 2]])
    assert data.draw(0, 8, **PAIRS)["condition"]["prompt"].shape == (8, 5, 6)


def test_a_manifest_says_what_should_be_there(tmp_path, monkeypatch):
    opened = []
    inner = shards._open
    monkeypatch.setattr(shards, "_open", lambda path, *names: opened.append(path.name) or inner(path, *names))
    data = LatentShards(prepared(tmp_path / "data"))
    assert opened == ["null.safetensors"]  # a thousand shards are not opened before one is needed
    assert (len(data), data.shape, len(data.paths)) == (ROWS, SHAPE, 3)
    assert torch.equal(data.rows([9, 1])[0], marked()[0][[9, 1]])
    assert shards.verify(tmp_path / "data") == []


def grow(folder):
    with (folder / "00001.safetensors").open("ab") as file:
        file.write(b"more")


def gone(folder):
    (folder / "00001.safetensors").unlink()


SPOILT = {
    "cut": (
        lambda folder: cut(folder),
        r"00001\.safetensors has \d+ bytes; expected \d+ bytes, as manifest\.json says",
    ),
    "grown": (grow, r"00001\.safetensors has \d+ bytes; expected \d+ bytes"),
    "gone": (gone, r"00001\.safetensors is missing; expected \d+ bytes, as manifest\.json says: fetch or make it"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_broken_shard_is_named_or_skipped(tmp_path, capsys, how):
    breaks, message = SPOILT[how]
    breaks(prepared(tmp_path / "data"))
    with pytest.raises(InputError, match=message) as problem:
        LatentShards(tmp_path / "data")
    assert "\n" not in str(problem.value)
    assert capsys.readouterr().err == ""
    data = LatentShards(tmp_path / "data", skip=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/data/00001.safetensors ")
    assert line.endswith("; skipped, 1 of at most 1")
    assert [path.stem for path in data.broken] == ["00001"]
    drawn = Counter(rows_of(data.draw(0, ROWS)))
    assert drawn == {row: 1 + (row in (8, 9, 10)) + (row == 8) for row in (0, 1, 2, 3, 8, 9, 10)}
    assert data.captions([8]) == ["clip 8"]  # numbers stay


def test_one_broken_shard_too_many(tmp_path):
    cut(prepared(tmp_path / "data"))
    (tmp_path / "data/00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"00002\.safetensors is missing.* \(1 other broken shards were skipped\)"):
        LatentShards(tmp_path / "data", skip=1)
    assert set(rows_of(LatentShards(tmp_path / "data", skip=2).draw(0, ROWS))) == {0, 1, 2, 3}
    (tmp_path / "data/00000.safetensors").unlink()
    with pytest.raises(InputError, match=r"all 3 shards in .* are broken; fetch or make it again"):
        LatentShards(tmp_path / "data", skip=5)


def test_broken_shards_without_a_manifest_are_skipped_too(folder, capsys):
    cut(folder)
    assert len(LatentShards(folder, skip=1)) == 7
    assert "00001.safetensors is cut short or not a safetensors file" in capsys.readouterr().err


def test_rows_that_break_later_have_one_stand_in_for_every_process(tmp_path, capsys):
    """A number that is none, in a file of the right size: only that row is replaced, by one of the next shard."""
    latents, _ = marked()
    latents[9, 0, 0, 0, 0] = torch.nan
    prepared(tmp_path, latents=latents)
    with pytest.raises(InputError, match=r"row 1 of .*00002\.safetensors holds NaN"):
        LatentShards(tmp_path).draw(0, ROWS)
    data = LatentShards(tmp_path, skip=1)
    drawn = rows_of(data.draw(0, 2 * ROWS))
    assert Counter(drawn) == {row: 2 * (row != 9) + 2 * (row == 1) for row in range(ROWS) if row != 9}
    assert len(capsys.readouterr().err.splitlines()) == 1  # said once
    alone = [LatentShards(tmp_path, skip=1).draw(0, 2 * ROWS, part=(index, ROWS)) for index in range(ROWS)]
    assert [row for batch in alone for row in rows_of(batch)] == drawn


@pytest.mark.parametrize("how", SPOILT)
def test_a_shard_that_breaks_does_not_number_rows_anew_at_a_restart(tmp_path, how):
    """Every good row once an epoch, whether the run that goes on finds it out at once or the first one did."""
    folder = prepared(tmp_path / "data")
    first = LatentShards(folder, skip=1)
    drawn = [*rows_of(first.draw(0, 4)), *rows_of(first.draw(1, 4))]
    SPOILT[how][0](folder)
    went_on, again = (rows_of(data.draw(2, 4)) for data in (first, LatentShards(folder, skip=1)))
    assert again == went_on
    seen = Counter(drawn + again[:3])
    assert {row for row in range(ROWS) if not seen[row]} <= {4, 5, 6, 7}


def test_a_folder_that_is_all_broken_does_not_go_round_for_ever(tmp_path):
    latents, prompts = marked()
    prepared(tmp_path, latents=latents * torch.nan, prompts=prompts)
    with pytest.raises(InputError, match=r"all shards in .* are broken"):
        LatentShards(tmp_path, skip=5).rows([0])


def test_manifests_that_do_not_fit(tmp_path):
    prepared(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"finished": False}))
    with pytest.raises(InputError, match=r"is unfinished; expected all its shards: run prepare_latents\.py again"):
        LatentShards(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json is cut short or no manifest"):
        LatentShards(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    save_file({"latents": marked()[0], "prompts": marked()[1]}, tmp_path / "00007.safetensors")
    with pytest.raises(InputError, match=r"00007\.safetensors is not in manifest\.json; expected only what it lists"):
        LatentShards(tmp_path, skip=1)


def cut(folder):
    path = folder / "00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def other_size(folder):
    latents, prompts = marked(2, (2, 3, 4, 8))
    save_file({"latents": latents, "prompts": prompts}, folder / "00003.safetensors")


def fewer_prompts(folder):
    latents, prompts = marked(2)
    save_file({"latents": latents, "prompts": prompts[:1]}, folder / "00003.safetensors")


BROKEN = {
    "empty": (lambda folder: [path.unlink() for path in folder.glob("0*")], "no shards in .*expected"),
    "no null": (lambda folder: (folder / "null.safetensors").unlink(), r"no null\.safetensors in .*expected the null"),
    "cut": (cut, r"00001\.safetensors is cut short or not a safetensors file; fetch or make it again"),
    "other size": (other_size, r"00003\.safetensors holds rows of \(2, 3, 4, 8\).*expected \(2, 3, 4, 4\)"),
    "fewer prompts": (fewer_prompts, r"latents \(2, .* prompts \(1, .*expected .* the same n > 0"),
    "no prompts": (
        lambda folder: save_file({"latents": marked()[0]}, folder / "00003.safetensors"),
        r"00003\.safetensors lacks prompts; expected",
    ),
    "other null": (
        lambda folder: save_file({"prompt": torch.zeros(1, 4, 6)}, folder / "null.safetensors"),
        r"null prompt in .* has shape \(1, 4, 6\); expected at least \(1, 5, 6\)",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_one_line(folder, how):
    breaks, message = BROKEN[how]
    breaks(folder)
    with pytest.raises(InputError, match=message) as problem:
        LatentShards(folder)
    assert "\n" not in str(problem.value)


def test_rows_that_are_not_there_or_not_finite(folder):
    data = LatentShards(folder)
    for index in (-1, ROWS):
        with pytest.raises(InputError, match=rf"row {index} asked for; .* has rows 0 to 10"):
            data.rows([index])
    latents, prompts = marked(1)
    save_file({"latents": latents * torch.nan, "prompts": prompts}, folder / "00003.safetensors")
    with pytest.raises(InputError, match=r"row 0 of .*00003\.safetensors holds NaN"):
        LatentShards(folder).rows([ROWS])


@pytest.mark.parametrize("listed", [True, False])
def test_a_shard_that_is_made_again_while_it_is_in_use_is_named(tmp_path, listed):
    """Its rows are others, and nothing else would tell: say prepare_latents.py --retry beside a run."""
    data = LatentShards((prepared if listed else write)(tmp_path / "data"))
    data.rows(range(ROWS))
    write(tmp_path / "more", size=5)
    (tmp_path / "more/00000.safetensors").replace(tmp_path / "data/00000.safetensors")
    with pytest.raises(InputError, match=r"00000\.safetensors was changed while it was in use: it has \d+ bytes; exp"):
        data.rows([0])
    assert len(data.rows([4])[0]) == 1


def test_captions_with_all_kinds_of_line_ends(tmp_path):
    """In a line of JSON they may stand as they are."""
    texts = ["a\u2028b", "a\x85b", "a\x0cb\n", *map(str, range(ROWS - 3))]
    write(tmp_path, captions=texts)
    assert LatentShards(tmp_path).captions(range(ROWS)) == texts
    for name in ("00000.safetensors", "00000.jsonl"):
        (tmp_path / name).unlink()
    write_shards(tmp_path / "new", *marked(), -torch.ones(1, 5, 6), [f"new {row}" for row in range(ROWS)], 4)
    for name in ("00000.safetensors", "00000.jsonl"):
        (tmp_path / "new" / name).replace(tmp_path / name)
    assert LatentShards(tmp_path).captions([1, 4]) == ["new 1", texts[4]]  # none of before is remembered


def test_captions_must_fit_their_rows(folder):
    beside = folder / "00000.jsonl"
    beside.write_text(json.dumps({"caption": "alone"}) + "\n")
    with pytest.raises(InputError, match=r"00000\.jsonl has 1 captions; expected 4"):
        LatentShards(folder).captions([0])
    beside.unlink()
    with pytest.raises(InputError, match=r"no captions in .*00000\.jsonl"):
        LatentShards(folder).captions([0])


def test_writing_says_what_does_not_fit(folder, tmp_path):
    with pytest.raises(InputError, match="holds shards already; expected a new folder"):
        write(folder)
    with pytest.raises(InputError, match="11 latents, 11 prompts, 1 captions; expected as many of each"):
        write(tmp_path / "new", captions=["one"])
    with pytest.raises(InputError, match="shards of 0 rows"):
        write(tmp_path / "new", size=0)
    assert not (tmp_path / "new").exists()
