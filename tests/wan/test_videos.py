"""Videos as files: a written clip is read again, in full, in order, at Wan's speed; what does not fit is one line."""

import subprocess

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from minianyflow.times import generator
from minianyflow.wan.data import write_video
from minianyflow.wan.data.read_video import read_frames, read_video, to_float
from minianyflow.wan.data.write_video import clip_sheet, write_clips
from minianyflow.wan.folders import moving_shapes
from tests.refused import refused

CAPTIONS, VIDEO = moving_shapes(2, generator(0))  # (2, 17, 3, 64, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_clips(folder / "clips", {"4 steps": VIDEO, "32 steps": VIDEO.flip(1)}, CAPTIONS)
    return folder / "clips"


def distance(one, other):
    return float((one - other).abs().mean())


def test_a_clip_comes_back_frame_by_frame(folder):
    clips = {f"{steps}_steps-{number}.mp4" for steps in (4, 32) for number in (0, 1)}
    assert {file.name for file in folder.iterdir()} == clips | {"sheet.png"}
    clip = read_video(folder / "4_steps-1.mp4", 17, 64, 64)
    assert clip.shape == (1, 17, 3, 64, 64)
    assert clip.dtype == torch.float32
    errors = [distance(clip[:, k], VIDEO[1:, k]) for k in range(17)]
    assert max(errors) < 0.02  # H.264 loses something
    next_frames = [distance(clip[:, k], VIDEO[1:, k + 1]) for k in range(16)]
    assert all(other > 1.5 * error for other, error in zip(next_frames, errors, strict=False))
    assert distance(read_video(folder / "32_steps-1.mp4", 17, 64, 64), VIDEO[1:].flip(1)) < 0.02
    assert torch.equal(read_video(folder / "4_steps-1.mp4", 5, 64, 64), clip[:, :5])
    about = imageio.get_reader(folder / "4_steps-0.mp4").get_meta_data()
    assert (about["codec"], about["fps"], about["size"]) == ("h264", 16.0, (64, 64))


@pytest.mark.slow
@pytest.mark.parametrize(("fps", "count"), [(32, 9), (24, 12), (8, 34)])
def test_other_speeds_are_read_at_16(tmp_path, fps, count):
    write_clips(tmp_path, {"x": VIDEO[:1]}, CAPTIONS[:1], fps=fps)
    shown = [k * fps // 16 for k in range(count)]
    clip = read_video(tmp_path / "x-0.mp4", count, 64, 64)
    assert max(distance(clip[:, k], VIDEO[:1, frame]) for k, frame in enumerate(shown)) < 0.02
    with refused(f"is too short .{count} frames at 16 per second.; expected at least {count + 4}"):
        read_video(tmp_path / "x-0.mp4", count + 4, 64, 64)


def test_another_speed_takes_other_frames(folder):
    frames = read_frames(folder / "4_steps-0.mp4", 17, 32, 48)
    assert torch.equal(read_frames(folder / "4_steps-0.mp4", 5, 32, 48, 8.0), frames[:9:2])


@pytest.mark.slow
def test_a_video_on_its_side_is_read_upright(tmp_path):
    """As a telephone films it: the file says how it is to be turned."""
    turned = tmp_path / "turned.mp4"
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation", "90"]
    write_clips(tmp_path, {"x": VIDEO[:1, ..., :48]}, ["x"])
    subprocess.run([*ffmpeg, "-i", str(tmp_path / "x-0.mp4"), "-c", "copy", str(turned)], check=True)
    upright = read_frames(tmp_path / "x-0.mp4", 17, 64, 48)
    apart = (read_frames(turned, 17, 48, 64).float() - upright.rot90(1, (1, 2)).float()).abs()
    assert float(apart.mean()) < 1  # colours have half as many samples, and lie at the left of theirs


@pytest.mark.slow
def test_an_odd_size_grows_by_its_edge(tmp_path, recwarn):
    video = VIDEO[:1, :5, :, :33, :47] * 0.7 + 0.3  # bright at its edges
    write_clips(tmp_path, {"odd": video}, ["odd"])
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]
    frames = imageio.mimread(tmp_path / "odd-0.mp4")
    assert frames[0].shape == (34, 48, 3)
    back = to_float(torch.from_numpy(np.stack(frames)))
    assert distance(back[..., :33, :47], video) < 0.02  # nothing was scaled
    assert distance(back[..., -1, :], back[..., -2, :]) < 0.02


def test_values_outside_are_clipped(tmp_path):
    write_clips(tmp_path, {"a": torch.full((1, 5, 3, 16, 16), 1.5), "b": torch.full((1, 5, 3, 16, 16), -0.5)}, ["x"])
    assert float(read_video(tmp_path / "a-0.mp4", 5, 16, 16).min()) > 0.98
    assert float(read_video(tmp_path / "b-0.mp4", 5, 16, 16).max()) < 0.02


def test_a_picture_is_one_frame(tmp_path):
    picture = np.zeros((30, 60, 3), np.uint8)
    picture[:, 15:45] = (255, 128, 0)  # the centre, which is what is read
    Image.fromarray(picture).save(tmp_path / "wide.png")
    frame = read_video(tmp_path / "wide.png", 1, 20, 20)
    assert frame.shape == (1, 1, 3, 20, 20)
    assert distance(frame, torch.tensor([1, 128 / 255, 0]).view(1, 1, 3, 1, 1).expand_as(frame)) < 0.02
    with refused("wide.png has 1 frame; expected at least 5"):
        read_video(tmp_path / "wide.png", 5, 20, 20)


@pytest.mark.slow
def test_the_sheet_has_a_block_per_prompt_and_in_it_a_row_per_label(tmp_path, monkeypatch):
    write_clips(tmp_path, {"1 step": VIDEO, "4 steps": VIDEO}, ["short", "a long prompt " * 40])
    width, height = Image.open(tmp_path / "sheet.png").size
    assert width < 1600  # the long prompt is wrapped
    assert height > 4 * 240
    monkeypatch.setattr(write_video, "LARGEST", 500)
    write_clips(tmp_path, {"1 step": VIDEO}, ["", "$"])
    assert max(Image.open(tmp_path / "sheet.png").size) <= 500
    stills = [axes.images[0].get_array() for axes in clip_sheet({"x": VIDEO, "y": VIDEO}, CAPTIONS).axes]
    assert len(stills) == 4
    assert all(np.abs(stills[3][:, -64:] - np.moveaxis(VIDEO[1, 16].numpy(), 0, 2)).max(axis=(0, 1)) < 0.01)


# What cannot be read or written


def test_files_that_cannot_be_read_are_one_line(folder, tmp_path):
    clip, sheet = ((folder / name).read_bytes() for name in ("4_steps-1.mp4", "sheet.png"))
    broken = {"text.mp4": b"hello", "empty.mp4": b"", "cut.mp4": clip[:1500], "cut.png": sheet[:2000]}
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
    Image.new("F", (9, 9)).save(tmp_path / "float.tif")
    messages = dict.fromkeys((*broken, "float.tif"), "cannot be read") | {
        "nothing.mp4": "no file .*; expected a video or a picture"
    }
    for name, message in (messages | {".": "no file"}).items():
        with refused(message):
            read_video(tmp_path / name, 1, 16, 16)


def test_videos_that_do_not_fit_are_one_line_and_leave_nothing(tmp_path, monkeypatch):
    for clips, prompts, message in (
        ({"a": VIDEO}, ["one"], r"'a' is \(2, 17, 3, 64, 64\); expected .* one clip per prompt, 1"),
        ({"a": VIDEO[:, :, :1]}, CAPTIONS, r"expected \(B, T, 3, H, W\)"),
        ({"a": VIDEO / 0}, CAPTIONS, "not finite"),
        ({"a b": VIDEO, "a_b": VIDEO}, CAPTIONS, "labels a b, a_b make the same file names"),
        ({}, CAPTIONS, "0 labels and 2 prompts"),
    ):
        with refused(message):
            write_clips(tmp_path / "out", clips, prompts)
    (tmp_path / "file").write_text("")
    with refused("cannot write"):
        write_clips(tmp_path / "file" / "in", {"a": VIDEO}, CAPTIONS)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write_video, "clip_sheet", full)  # the last file
    with refused("No space left on device"):
        write_clips(tmp_path, {"a": VIDEO[:, :1]}, CAPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
