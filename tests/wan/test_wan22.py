"""A tiny Wan2.2-TI2V-5B: its codec and channels through every stage, both architectures, and out to stock."""

import json

import imageio.v2 as imageio
import pytest
import torch
from diffusers import AnyFlowFARPipeline, AnyFlowPipeline, AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file

from minianyflow.planner.plan import plan_run
from minianyflow.support.cli import run
from minianyflow.wan.commands import distill, export, sample
from minianyflow.wan.config import load_config
from minianyflow.wan.data.prepare import fps_of_base
from minianyflow.wan.data.read_video import read_video
from minianyflow.wan.folders import decode_latents, encode_video, load_parts, make_tiny_wan, stream_decoder
from minianyflow.wan.shapes import SHAPES, build_transformer, latent_shape
from tests.refused import refused

ARCHITECTURES = {"bidirectional": AnyFlowPipeline, "causal": AnyFlowFARPipeline}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan22") / "tiny"
    make_tiny_wan(folder, clips=4, wan22=True)
    return folder


def test_its_folder_is_the_layout_of_the_model(tiny):
    """48 channels, 4 x 16 x 16 pixels a latent; frames go through the codec, whole and piece by piece."""
    assert WanPipeline.from_pretrained(tiny).config.expand_timesteps
    assert fps_of_base(tiny) == 24  # as prepare-latents takes its videos
    (vae,) = load_parts(tiny, "vae")
    video = torch.rand(1, 9, 3, 64, 96)
    latents = encode_video(vae, video)
    assert latents.shape == (1, 3, 48, 4, 6)
    whole, decode = decode_latents(vae, latents), stream_decoder(vae)
    assert whole.shape == video.shape
    pieces = torch.cat([decode(part) for part in latents.split([1, 2], 1)], 1)
    assert float((pieces.clamp(0, 1) - whole).abs().max()) < 1e-5
    with refused("multiples of 16"):
        encode_video(vae, video[..., :72])


def test_its_size_is_a_configuration_alone():
    transformer = build_transformer("5b", "bidirectional")
    count = sum(weight.numel() for weight in transformer.parameters())
    assert 4.9e9 < count < 5.2e9
    assert (transformer.config.in_channels, SHAPES["5b"]["num_attention_heads"] * 128) == (48, 3072)
    config = load_config(["wan-5b", "bidirectional", "forward"])
    assert (config.shift, config.i2v_prob) == (5.0, 0.5)
    assert latent_shape(121, 704, 1280, 48) == (31, 48, 44, 80)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_stage_runs_and_stock_loads_it(tiny, tmp_path, architecture, capsys):
    """Half of the rows know their first frame; its tokens are at time 0 in stock, too."""
    where = [f"base={tiny}", f"data={tiny}/latents", f"runs={tmp_path}", "log.tracker=none", "samples.every=0"]
    short = ["steps=2", "batch=2", "i2v_prob=0.5", "checkpoints.every=9"]
    before = []
    for stage in ("teacher", "forward", "on_policy"):
        output = tmp_path / stage
        argv = ["--config", architecture, stage, "tiny", *where, *short, f"output={output}", *before]
        assert run(lambda argv=argv: distill(argv)) == 0, capsys.readouterr().err
        made = json.loads((output / "run.json").read_text())
        assert (made["clip"]["height"], made["clip"]["frames"]) == (64, 17)
        before = {
            "teacher": [f"teacher={output}"],
            "forward": [f"student={output}", f"teacher={tmp_path}/teacher"],
        }.get(stage)
    assert run(lambda: export([str(output), str(tmp_path / "out")])) == 0
    pipeline = ARCHITECTURES[architecture].from_pretrained(tmp_path / "out")
    assert isinstance(pipeline.vae, AutoencoderKLWan)
    assert "fps=24" in (tmp_path / "out/README.md").read_text()
    pipeline.set_progress_bar_config(disable=True)
    start, times = torch.rand(1, 1, 3, 64, 64), []
    seen = lambda network, arguments, options: times.append(options["timestep"])  # noqa: E731
    pipeline.transformer.register_forward_pre_hook(seen, with_kwargs=True)
    options = {"height": 64, "width": 64, "num_frames": 17, "max_sequence_length": 32, "num_inference_steps": 2}
    latents = pipeline("a disc", video=start, output_type="latent", **options).frames
    assert latents.shape == (1, 48, 5, 4, 4)
    assert not times[0][:, 0].any()
    assert architecture == "causal" or times[0][:, 1:].all()
    assert float((latents[:, :, 0] - encode_video(pipeline.vae, start)[:, 0]).abs().max()) < 1e-5
    argv = [str(output), "--prompt", "a disc", "--steps", "1", "--output", str(tmp_path / "samples")]
    assert run(lambda: sample(argv)) == 0
    assert imageio.get_reader(tmp_path / "samples/1_step-0.mp4").get_meta_data()["fps"] == 24
    known = read_video(tmp_path / "samples/1_step-0.mp4", 9, 64, 64, 24)
    argv += ["--video", str(tmp_path / "samples/1_step-0.mp4"), "--context", "9", "--write", "latents"]
    assert run(lambda: sample(argv)) == 0
    made = load_file(tmp_path / "samples/1_step-0.safetensors")["latents"]
    assert float((made[:3] - encode_video(pipeline.vae, known)[0]).abs().max()) < 1e-5


@pytest.mark.slow
def test_it_is_planned_with_known_frames():
    """At the clip of the model, 121 frames of 704 x 1280: on 80 GB, and not on 24."""
    config = load_config(["wan-5b", "causal", "forward"], ["accumulate=32"])
    for gpu, fits in (("h100", True), ("rtx4090", False)):
        assert plan_run(config, gpu=gpu, advise=False).fits == fits
