"""Videos as files: what is written can be read again, in full, in order, at Wan's speed, or is refused in one line."""

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from PIL import Image

from minianyflow.support.errors import InputError
from minianyflow.times import generator
from minianyflow.wan.data.videos import COLUMNS, read_video, stills, write_clips
from minianyflow.wan.folders import moving_shapes

CAPTIONS, VIDEO = moving_shapes(2, generator(0))  # (2, 17, 3, 64, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("movies")
    write_clips(folder / "clips", {"4 steps": VIDEO, "32 steps": VIDEO.flip(1)}, CAPTIONS)
    return folder / "clips"


def apart(one, other):
    return float((one - other).abs().mean())


def refused(message, function, *arguments):
    with pytest.raises(InputError, match=message) as problem:
        function(*arguments)
    assert "\n" not in str(problem.value)


def test_clips_are_named_after_labels_and_prompts(folder):
    clips = {f"{steps}_steps-{number}.mp4" for steps in (4, 32) for number in (0, 1)}
    assert {file.name for file in folder.iterdir()} == clips | {"sheet.png"}


@pytest.mark.parametrize("number", [0, 1])
def test_a_clip_comes_back_frame_by_frame(folder, number):
    expected = VIDEO[number : number + 1]
    clip = read_video(folder / f"4_steps-{number}.mp4", 17, 64, 64)
    assert clip.shape == (1, 17, 3, 64, 64)
    assert clip.dtype == torch.float32
    each = [apart(clip[:, k], expected[:, k]) for k in range(17)]
    assert max(each) < 0.02  # H.264 loses something
    moved = [apart(clip[:, k], expected[:, k + 1]) for k in range(16)]
    assert min(other / own for other, own in zip(moved, each, strict=False)) > 1.5  # so much that one frame shows
    backwards = read_video(folder / f"32_steps-{number}.mp4", 17, 64, 64)
    assert apart(backwards, expected.flip(1)) < 0.02
    assert torch.equal(read_video(folder / f"4_steps-{number}.mp4", 5, 64, 64), clip[:, :5])


def test_clips_are_h264_at_16_frames_a_second(folder):
    told = imageio.get_reader(folder / "4_steps-0.mp4").get_meta_data()
    assert (told["codec"], told["fps"], told["size"]) == ("h264", 16.0, (64, 64))


@pytest.mark.parametrize(("fps", "count"), [(32, 9), (24, 12), (8, 34), (16, 17)])
def test_other_speeds_are_read_at_16(tmp_path, fps, count):
    write_clips(tmp_path, {"x": VIDEO}, CAPTIONS, fps=fps)
    shown = [k * fps // 16 for k in range(count)]
    clip = read_video(tmp_path / "x-0.mp4", count, 64, 64)
    assert max(apart(clip[:, k], VIDEO[:1, frame]) for k, frame in enumerate(shown)) < 0.02
    message = f"has {count} frames at 16 a second; expected at least {count + 4}"
    refused(message, read_video, tmp_path / "x-0.mp4", count + 4, 64, 64)


def test_odd_sizes_are_kept_but_for_an_edge(tmp_path, recwarn):
    video = VIDEO[:1, :5, :, :33, :47] * 0.7 + 0.3  # bright at its edges
    write_clips(tmp_path, {"odd": video}, ["odd"])
    assert not [each for each in recwarn if issubclass(each.category, UserWarning)]
    read = imageio.mimread(tmp_path / "odd-0.mp4")
    assert read[0].shape == (34, 48, 3)
    back = torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2)[None].float() / 255
    assert apart(back[..., :33, :47], video) < 0.02  # nothing was scaled
    assert apart(back[..., -1, :], back[..., -2, :]) < 0.02


def test_what_is_outside_is_clipped(tmp_path):
    write_clips(tmp_path, {"a": torch.full((1, 5, 3, 16, 16), 1.5), "b": torch.full((1, 5, 3, 16, 16), -0.5)}, ["x"])
    assert float(read_video(tmp_path / "a-0.mp4", 5, 16, 16).min()) > 0.98
    assert float(read_video(tmp_path / "b-0.mp4", 5, 16, 16).max()) < 0.02


def columns_of(sheet, colour):
    """How many separate runs of columns have pixels near a colour."""
    near = (np.abs(sheet.astype(int) - colour).max(-1) < 30).any(0)
    return int((np.diff(near.astype(int), prepend=0) == 1).sum())


def test_the_sheet_shows_every_label_of_every_prompt(tmp_path):
    colours = {"1 step": (255, 0, 0), "4 steps": (0, 0, 255)}
    clips = {
        label: torch.tensor(colour).div(255).view(1, 1, 3, 1, 1).expand(3, 17, 3, 32, 48)
        for label, colour in colours.items()
    }
    write_clips(tmp_path, clips, ["short", "a long prompt " * 40, "two\nlines"])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    for colour in colours.values():
        assert columns_of(sheet, colour) == COLUMNS
        assert columns_of(sheet.transpose(1, 0, 2), colour) == 3  # a row for each prompt
    assert sheet.shape[1] < 1500  # the long prompt is wrapped
    assert columns_of(sheet[:, -4:], (0, 0, 0)) == 0  # and not cut


def test_each_prompt_has_its_own_clip_on_the_sheet(tmp_path):
    colours = [(255, 0, 0), (0, 0, 255)]
    video = torch.tensor(colours).div(255).view(2, 1, 3, 1, 1).expand(2, 5, 3, 32, 48)
    write_clips(tmp_path, {"x": video}, ["red", "blue"])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    tops = [int((np.abs(sheet.astype(int) - colour).max(-1) < 30).any(1).argmax()) for colour in colours]
    assert 0 < tops[0] < tops[1]


def test_the_stills_are_spread_over_the_clip(tmp_path):
    levels = torch.linspace(0, 1, 17).view(1, 17, 1, 1, 1).expand(1, 17, 3, 48, 48)
    write_clips(tmp_path, {"x": levels}, ["p"])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))
    row = sheet[sheet.shape[0] - 100]
    assert [int(each) for each in (0, 64, 128, 191, 255) if each not in row] == []
    write_clips(tmp_path / "one", {"x": levels[:, :1]}, ["p"])  # an image has one still


def test_stills_have_a_row_for_every_label_and_prompts_side_by_side():
    colours = {("1 step", 0): (255, 0, 0), ("1 step", 1): (0, 255, 0), ("4\nsteps", 0): (0, 0, 255)}
    clips = {label: torch.zeros(2, 5, 3, 32, 48) for label, _ in colours}
    for (label, number), colour in colours.items():
        clips[label][number] = torch.tensor(colour).div(255).view(3, 1, 1)
    sheet = np.asarray(stills(clips, ["short", "a long prompt " * 20]))
    for colour in colours.values():
        assert columns_of(sheet, colour) == 3
        assert columns_of(sheet.transpose(1, 0, 2), colour) == 1
    left, right, below = ((np.abs(sheet.astype(int) - each).max(-1) < 30).nonzero() for each in colours.values())
    assert left[0].min() == right[0].min() < left[0].max() < below[0].min()
    assert left[1].min() == below[1].min() < left[1].max() < right[1].min()
    assert sheet[:, -2:].min() == 255  # the long prompt is wrapped
    apart = np.asarray(stills(clips, ["short", "long"], group=2))
    assert len(apart) < len(np.asarray(stills(clips, ["short", "long"])))
    for each in (sheet, apart):  # the last row is at the bottom
        assert len(each) - 8 < (each < 250).any((1, 2)).nonzero()[0].max() < len(each)


def test_pictures_are_one_frame(tmp_path):
    picture = np.zeros((30, 60, 3), np.uint8)
    picture[:, 15:45] = (255, 128, 0)  # the centre, which is what is kept
    Image.fromarray(picture).save(tmp_path / "wide.png")
    frame = read_video(tmp_path / "wide.png", 1, 20, 20)
    assert frame.shape == (1, 1, 3, 20, 20)
    assert apart(frame, torch.tensor([1, 128 / 255, 0]).view(1, 1, 3, 1, 1).expand_as(frame)) < 0.02
    refused("wide.png has 1 frame; expected at least 5", read_video, tmp_path / "wide.png", 5, 20, 20)


def test_files_that_cannot_be_read_are_one_line(folder, tmp_path):
    refused("no file .*nothing.mp4; expected a video or a picture", read_video, tmp_path / "nothing.mp4", 1, 16, 16)
    refused("no file", read_video, tmp_path, 1, 16, 16)
    for name, data in (
        ("text.mp4", b"hello"),
        ("empty.mp4", b""),
        ("cut.mp4", (folder / "4_steps-0.mp4").read_bytes()[:1500]),
        ("cut.png", (folder / "sheet.png").read_bytes()[:2000]),
    ):
        (tmp_path / name).write_bytes(data)
        refused(f"{name} cannot be read", read_video, tmp_path / name, 1, 16, 16)


def test_videos_that_do_not_fit_are_one_line_and_leave_nothing(tmp_path):
    for clips, prompts, message in (
        ({"a": VIDEO}, ["one"], r"'a' is \(2, 17, 3, 64, 64\); expected .* each of 1"),
        ({"a": VIDEO[:, :, :1]}, CAPTIONS, r"expected \(B, T, 3, H, W\)"),
        ({"a": VIDEO / 0}, CAPTIONS, "not finite"),
        ({"a b": VIDEO, "a_b": VIDEO}, CAPTIONS, "labels a b, a_b make the same file names"),
        ({}, CAPTIONS, "0 labels and 2 prompts"),
    ):
        refused(message, write_clips, tmp_path / "out", clips, prompts)
    (tmp_path / "file").write_text("")
    refused("cannot write", write_clips, tmp_path / "file" / "in", {"a": VIDEO}, CAPTIONS)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minianyflow.wan.data.videos._sheet", full)  # the last thing written
    refused("No space left on device", write_clips, tmp_path, {"a": VIDEO}, CAPTIONS)
    assert list(tmp_path.iterdir()) == []
