"""Trained here, sampled there: stock diffusers loads the folders, and its samples are ours."""

import copy
import json
import re
import shutil
from unittest.mock import Mock

import pytest
import torch
from diffusers import AnyFlowFARPipeline, AnyFlowPipeline, DiffusionPipeline
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowCausalAttnProcessor
from diffusers.utils import dynamic_modules_utils
from PIL import Image

from minianyflow.networks.causal import CausalNetwork, causal_rollout
from minianyflow.networks.codec import Codec
from minianyflow.networks.pipelines import save_pipeline
from minianyflow.networks.wan import PROMPT_LENGTH, TINY_TIMESTEPS, TextEncoder, WanNetwork, tiny_transformer
from minianyflow.samplers import sample_flow_map
from minianyflow.times import time_grid
from tests.networks.inputs import clip, tiny_causal
from tests.refused import refused

Z, PROMPTS = clip(5), ["one ball", "two balls"]
CLIP = {"height": 16, "width": 16, "num_frames": 17, "max_sequence_length": PROMPT_LENGTH}
MADE = {"command": "make weights", "seeds": [7]}


@pytest.fixture(scope="module")
def parts():
    """Codec and text encoder; the codec's latents have a mean and a spread, which decoding must undo."""
    torch.manual_seed(0)
    codec = Codec().eval().requires_grad_(False)
    codec.vae.register_to_config(latents_mean=[0.3, -0.2, 0.1, 0.0], latents_std=[1.5, 0.7, 1.1, 0.9])
    return codec, TextEncoder()


@pytest.fixture(scope="module")
def network():
    return trained(WanNetwork(tiny_transformer()))  # time to 1000, as Wan's; the causal one to 5


@pytest.fixture(scope="module")
def causal():
    return trained(CausalNetwork(tiny_causal(), timesteps=TINY_TIMESTEPS))


def trained(network):
    """As after training: the target time has an embedder of its own."""
    with torch.no_grad():
        for weight in network.transformer.condition_embedder.delta_embedder.parameters():
            weight.add_(0.05)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def folder(network, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "blobs"
    save_pipeline(folder, network, *parts, provenance=MADE)
    return folder


@pytest.fixture(scope="module")
def causal_folder(causal, parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "causal"
    save_pipeline(folder, causal, *parts, shift=5.0, provenance=MADE)
    return folder


def stock(kind, folder):
    """As anybody loads it, without a line of ours."""
    return quiet(kind.from_pretrained(folder))


def whole(folder):
    """With the attention that is part of the folder, as its README says."""
    return quiet(DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True))


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, z, steps, output_type="latent", **options):
    options = CLIP | {"num_inference_steps": steps, "output_type": output_type} | options
    out = pipeline(PROMPTS, latents=z.transpose(1, 2), **options).frames
    return out.transpose(1, 2) if output_type == "latent" else out


def distance(one, other):
    assert one.shape == other.shape
    return float((one - other).abs().max())


def test_stock_diffusers_samples_what_our_sampler_does(folder, network, parts, tmp_path):
    """Along even steps, and along a grid shifted towards noise."""
    save_pipeline(tmp_path / "shifted", network, *parts, shift=5)
    pipelines, prompt = [stock(AnyFlowPipeline, path) for path in (folder, tmp_path / "shifted")], parts[1](PROMPTS)
    for steps in (1, 3, 8):
        ends = [sample_flow_map(network, Z, time_grid(steps, shift), prompt=prompt)[-1] for shift in (1, 5)]
        for pipeline, expected in zip(pipelines, ends, strict=True):
            assert distance(sample(pipeline, Z, steps), expected) < 1e-5
        assert steps == 1 or distance(*ends) > 1e-3
        assert distance(ends[0][:1], ends[0][1:]) > 0.1


def test_frames_are_what_the_codec_decodes(folder, network, parts):
    codec, text = parts
    pipeline = stock(AnyFlowPipeline, folder)
    expected = codec.decode(sample_flow_map(network, Z, time_grid(3), prompt=text(PROMPTS))[-1])  # (B, T, H, W)
    colour = torch.as_tensor(sample(pipeline, Z, 3, "np"))  # (B, T, H, W, 3)
    assert colour.shape == (2, 17, 16, 16, 3)
    inside = ((colour > 0) & (colour < 1)).all(-1)  # a clipped channel no longer counts in the mean
    assert float(inside.float().mean()) > 0.9
    assert distance(colour.mean(-1)[inside], expected[inside]) < 1e-4
    clips = sample(pipeline, Z, 3, "pil")
    assert [len(clip) for clip in clips] == [17, 17]
    assert isinstance(clips[0][0], Image.Image)
    assert clips[0][0].size == (16, 16)


@pytest.mark.slow
def test_the_causal_pipeline_is_our_rollout(causal_folder, causal, parts):
    """With the folder's attention; untouched, with diffusers' padding; from an image on; for longer clips."""
    padded = CausalNetwork(copy.deepcopy(causal.transformer), timesteps=TINY_TIMESTEPS, padded=True)
    prompt, untouched, ours = parts[1](PROMPTS), stock(AnyFlowFARPipeline, causal_folder), whole(causal_folder)
    for steps in (1, 3):
        ends = [causal_rollout(chunks, Z, time_grid(steps, 5), prompt)[-1] for chunks in (padded, causal)]
        for pipeline, expected in zip((untouched, ours), ends, strict=True):
            assert distance(sample(pipeline, Z, steps), expected) < 1e-5
        assert distance(*ends) > 1e-3  # the padding is seen
    prefix = Z[:, :1].flip(0)
    expected = causal_rollout(causal, Z, time_grid(3, 5), prompt, prefix=prefix)[-1]
    continued = sample(ours, Z, 3, video_latents=prefix)
    assert distance(continued, expected) < 1e-5
    assert torch.equal(continued[:, :1], prefix)
    longer, options = clip(9, seed=1), {"num_frames": 33, "chunk_partition": [1, 2, 2, 2, 2]}
    expected = causal_rollout(causal, longer, time_grid(2, 5), prompt)[-1]
    assert distance(sample(ours, longer, 2, **options), expected) < 1e-5
    assert {type(block.attn1.processor) for block in untouched.transformer.blocks} == {AnyFlowCausalAttnProcessor}
    assert not [file for file in causal_folder.rglob("*.json") if "minianyflow" in file.read_text()]


def test_a_causal_folder_without_its_attention_is_one_line(causal_folder, tmp_path, monkeypatch):
    """In stock diffusers, by the README's own loading: nothing is sampled with another attention."""
    shutil.copytree(causal_folder, tmp_path / "lacking", ignore=shutil.ignore_patterns("pipeline.py"))
    monkeypatch.chdir(tmp_path)
    said = []
    monkeypatch.setattr(dynamic_modules_utils.logger, "error", said.append)
    monkeypatch.setattr(dynamic_modules_utils, "hf_hub_download", Mock(side_effect=OSError("not on the hub")))
    with pytest.raises(OSError, match="not on the hub"):
        whole("lacking")
    assert said == ["Could not locate the pipeline.py inside lacking."]


def test_the_networks_own_chunks_are_saved(parts, tmp_path):
    network = trained(CausalNetwork(tiny_causal(), first=2, rest=3))
    save_pipeline(tmp_path / "chunks", network, *parts)
    assert tuple(network.transformer.config.chunk_partition) == (1, 2, 2)  # left as it was
    pipeline = whole(tmp_path / "chunks")
    assert tuple(pipeline.transformer.config.chunk_partition) == (2, 3)
    expected = causal_rollout(network, Z, time_grid(2), parts[1](PROMPTS), first=2, rest=3)[-1]
    assert distance(sample(pipeline, Z, 2), expected) < 1e-5
    # chunks that five frames do not make: those of the next longer clip
    save_pipeline(tmp_path / "pairs", trained(CausalNetwork(tiny_causal(), first=2, rest=2)), *parts)
    assert json.loads((tmp_path / "pairs/transformer/config.json").read_text())["chunk_partition"] == [2, 2, 2]


def python_in(folder):
    """The lines of its README."""
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "causal_folder"])
def test_the_readme_samples_as_it_says(request, kind, monkeypatch):
    folder = request.getfixturevalue(kind)
    monkeypatch.chdir(folder.parent)
    names = {}
    exec(python_in(folder), names)
    assert names["video"].shape == (17, 16, 16, 3)
    attention = names["pipeline"].transformer.blocks[0].attn1.processor
    assert (type(attention).__name__ == "CachedAttention") == (kind == "causal_folder")  # of the folder's own file
    made = re.search(r"```json\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    assert json.loads(made) == MADE


def test_whole_or_not_at_all(network, parts, tmp_path, monkeypatch):
    target = tmp_path / "new"
    for shift in (0, -1):
        with refused("time shift .* expected a positive number"):
            save_pipeline(target, network, *parts, shift=shift)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("minianyflow.networks.pipelines.write_readme", full)  # the last thing written
    with refused(r"cannot write .*new \(No space left on device\)"):
        save_pipeline(target, network, *parts)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    target.mkdir()
    save_pipeline(target, network, *parts)  # an empty folder is welcome
    assert [file.name for file in tmp_path.iterdir()] == ["new"]
    assert len({file.stat().st_mode for file in target.rglob("*") if file.is_file()}) == 1  # others may read all of it
    before = sorted(target.rglob("*"))
    with refused("new exists and is not an empty folder; expected a new one"):
        save_pipeline(target, network, *parts)
    assert sorted(target.rglob("*")) == before
    (tmp_path / "file").write_text("")
    with refused("file exists and is not an empty folder"):
        save_pipeline(tmp_path / "file", network, *parts)
    with refused("cannot write"):
        save_pipeline(tmp_path / "file/inside", network, *parts)


def test_parts_that_do_not_fit_are_one_line(network, parts, tmp_path):
    codec, text = parts
    with refused("a Sequential; expected a WanNetwork"):
        save_pipeline(tmp_path / "a", torch.nn.Sequential(network), codec, text)
    other = WanNetwork(tiny_transformer(in_channels=8))
    with refused("for 8 latent channels; expected 4"):
        save_pipeline(tmp_path / "a", other, codec, text)
    other = WanNetwork(tiny_transformer(text_dim=32))
    with refused("for 32 wide prompt embeddings; expected 16"):
        save_pipeline(tmp_path / "a", other, codec, text)
    with refused(r"time counted to 2\.5; expected a whole number"):  # by a scheduler
        save_pipeline(tmp_path / "a", WanNetwork(tiny_transformer(), timesteps=2.5), codec, text)
    assert list(tmp_path.iterdir()) == []
