"""Streams of a tiny causal Wan: the plain rollout while the clip is within the window, and no more memory after it."""

import gc
import itertools
import re

import imageio.v2 as imageio
import pytest
import torch

from minianyflow.networks.causal import CausalNetwork, causal_rollout, causal_stream
from minianyflow.support.cli import run
from minianyflow.times import generator, time_grid
from minianyflow.wan.commands import sample
from minianyflow.wan.folders import decode_latents, encode_prompts, load_parts, stream_decoder
from minianyflow.wan.stream import Stream, stream_clip
from tests.networks.inputs import clip, tiny_causal
from tests.refused import refused

Z, PROMPT = clip(9), torch.randn(2, 4, 16, generator=generator(3))


@pytest.fixture(scope="module")
def network():
    return CausalNetwork(tiny_causal(num_layers=2)).eval().requires_grad_(False)


def pieces(z):
    """What draws the frames of z in turn."""
    frames = iter(z.split(1, 1))
    return lambda count: torch.cat([*itertools.islice(frames, count)], 1)


@pytest.mark.parametrize("known", [0, 1, 3])
def test_it_is_the_plain_rollout_within_the_window(network, known):
    prefix = Z[:, :known].flip(0) if known else None
    expected = causal_rollout(network, Z, time_grid(2), PROMPT, prefix=prefix)[-1][:, known:]
    jobs = itertools.repeat((time_grid(2), PROMPT), 5 - (known + 1) // 2)
    made = torch.cat([*causal_stream(network, pieces(Z[:, known:]), jobs, 9, prefix=prefix)], 1)
    assert float((made - expected).abs().max()) < 1e-5


def test_beyond_it_each_chunk_is_the_last_of_a_clip_of_the_window(network):
    jobs = itertools.repeat((time_grid(2), PROMPT), 5)
    made = torch.cat([*causal_stream(network, pieces(Z), jobs, 5)], 1)
    last = causal_rollout(network, torch.cat([made[:, 4:7], Z[:, 7:]], 1), time_grid(2), PROMPT, prefix=made[:, 4:7])
    assert float((made[:, 7:] - last[-1][:, 3:]).abs().max()) < 1e-5
    whole = causal_rollout(network, Z, time_grid(2), PROMPT)[-1]
    assert float((made[:, 7:] - whole[:, 7:]).abs().max()) > 1e-4  # which a longer window would have been
    with refused("a window of 4 frames; expected 3, 5, ...: whole chunks, two or more"):
        next(causal_stream(network, pieces(Z), jobs, 4))


def test_prompts_and_steps_may_change_on_the_way(network):
    """A chunk follows the prompt and the steps of its own job; those before stay as they were."""
    other = PROMPT.flip(0)
    one, two = (time_grid(1), PROMPT), (time_grid(2), other)
    first = [*causal_stream(network, pieces(Z), [one] * 5, 9)]
    changed = [*causal_stream(network, pieces(Z), [one, one, two, one, one], 9)]
    assert torch.equal(torch.cat(first[:2], 1), torch.cat(changed[:2], 1))
    expected = causal_rollout(network, Z[:, :5], time_grid(2), other, prefix=torch.cat(first[:2], 1))[-1][:, 3:]
    assert float((changed[2] - expected).abs().max()) < 1e-5


# ---- the command


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """Exports of both architectures on a tiny Wan."""
    from diffusers import AnyFlowFARPipeline, AnyFlowPipeline, FlowMapEulerDiscreteScheduler

    from minianyflow.wan.folders import load_transformer

    folder = tmp_path_factory.mktemp("stream")
    (folder / "wan").symlink_to(tiny)
    tokenizer, text, vae = load_parts(folder / "wan", "tokenizer", "text_encoder", "vae")
    for name, kind in (("causal", AnyFlowFARPipeline), ("bidirectional", AnyFlowPipeline)):
        chunks = {"full_chunk_limit": 2, "partition": (1, 2, 2)} if name == "causal" else {}
        transformer = load_transformer(folder / "wan", name, **chunks)
        kind(tokenizer, text, transformer, vae, FlowMapEulerDiscreteScheduler(1000, 5.0)).save_pretrained(folder / name)
    return folder


CLIP = {"frames": 17, "height": 32, "width": 32, "length": 16}


def test_the_codec_goes_on_where_it_stopped(folders):
    (vae,) = load_parts(folders / "wan", "vae")
    latents = torch.randn(1, 5, 16, 4, 4, generator=generator(0))
    decode = stream_decoder(vae)
    made = torch.cat([decode(latents[:, :1]), decode(latents[:, 1:3]), decode(latents[:, 3:])], 1)
    made = made.clamp(0, 1)
    assert float((made - decode_latents(vae, latents)).abs().max()) < 1e-5


def test_frames_are_those_of_the_plain_sample(folders):
    stream = Stream(str(folders / "causal"), clip=CLIP)
    made = torch.cat([*stream.frames([("x", 2)] * 3, seed=4)])
    source = generator(4)
    noise = torch.cat([torch.randn(1, count, 16, 4, 4, generator=source) for count in (1, 2, 2)], 1)
    prompt = encode_prompts(*load_parts(folders / "wan", "tokenizer", "text_encoder"), ["x"], 16)
    latents = causal_rollout(stream.source.network, noise, time_grid(2, 5.0), prompt, ragged=True)[-1]
    assert float((made - decode_latents(stream.vae, latents)[0]).abs().max()) < 1e-4


@pytest.mark.slow
def test_memory_is_flat_over_a_hundred_chunks(folders):
    """Bytes of the cache, and of all tensors that are alive, codec's included, at every chunk of a stream."""
    stream, caches, alive = Stream(str(folders / "causal"), ["x"], CLIP), [], []
    network = stream.source.network

    def spy(*arguments, **options):
        if options.get("cache"):
            caches.append(sum(part.nbytes for layer in options["cache"] for part in layer))
        return network(*arguments, **options)

    stream.source.network = spy
    with torch.no_grad():  # as causal_stream has it, but where a check of types stands between
        for number, _ in enumerate(stream.frames([("x", 1)] * 100)):
            if number in (10, 99):
                gc.collect()
                kinds = torch.Tensor, torch.nn.Parameter
                alive.append(sum(each.nbytes for each in gc.get_objects() if type(each) in kinds))
    assert len(caches) == 99
    assert max(caches[4:]) == min(caches[4:]) > caches[0]
    assert alive[1] < 1.01 * alive[0]


def test_the_file_grows_and_can_be_played_meanwhile(folders, tmp_path, capsys, monkeypatch):
    seen = []

    def asked(stream, jobs, seed):
        for frames in real(stream, jobs, seed):
            if (tmp_path / "out/stream.mp4").exists():
                seen.append((tmp_path / "out/stream.mp4").stat().st_size)
                if len(seen) == 2:  # by hand, on the way, with an editor that empties the file, or takes it away
                    texts.unlink()
                else:
                    texts.write_text("" if len(seen) == 1 else "a square\n")
            yield frames

    def spied(stream, texts):
        embedded.extend(text for text in texts if text not in stream.prompts)
        return real_embed(stream, texts)

    embedded, real, real_embed = [], Stream.frames, Stream._embed
    monkeypatch.setattr(Stream, "frames", asked)
    monkeypatch.setattr(Stream, "_embed", spied)
    texts = tmp_path / "prompts.txt"
    texts.write_text("a disc\n")
    size = [f"--{name}={value}" for name, value in CLIP.items()]
    argv = [
        str(folders / "causal"),
        "--stream",
        "2.5",
        "--prompts",
        str(tmp_path / "prompts.txt"),
        "--steps",
        "1",
        "2",
        *size,
    ]
    assert run(lambda: sample([*argv, "--write", "png", "--output", str(tmp_path / "out")])) == 0
    assert embedded == ["a disc", "a square"]
    said = capsys.readouterr().out
    assert re.search(r"first frame after \d+\.\d\d s, \d+\.\d frames per second", said)
    assert "stream.mp4, 40 frames" in said
    assert len(imageio.mimread(tmp_path / "out/stream.mp4")) == 40
    assert len([*(tmp_path / "out/stream").glob("*.png")]) == 40
    assert seen[-1] > seen[0]
    part = tmp_path / "part.mp4"  # as it lay there before the end
    part.write_bytes((tmp_path / "out/stream.mp4").read_bytes()[: seen[-1]])
    assert len(imageio.mimread(part)) > 8


def test_bad_input_is_one_line(folders, tmp_path):
    where = {"output": tmp_path / "out", "clip": CLIP}
    causal = str(folders / "causal")
    with refused("bidirectional is bidirectional; a stream is made chunk by chunk: name a causal source"):
        stream_clip(str(folders / "bidirectional"), lambda: ["x"], [1], 1, **where)
    for seconds in (0, -1, float("nan"), float("inf")):
        with refused("a stream of .* seconds; expected more than 0, at most"):
            stream_clip(causal, lambda: ["x"], [1], seconds, **where)
    with refused("--write latents of a stream"):
        stream_clip(causal, lambda: ["x"], [1], 1, write=["latents"], **where)
    stream = Stream(causal, ["x"], clip=CLIP)
    for prompt in (None, 7, " "):
        frames = stream.frames([("x", 1), (prompt, 1)])
        next(frames)
        with refused("the next prompt of the stream is .*; expected a text that is not empty"):
            next(frames)
    with refused("0 steps; expected whole numbers, at least 1"):
        next(stream.frames([("x", 0)]))
    assert not (tmp_path / "out").exists()
    texts = iter([["x"], ["x"], [b"x"]])
    with refused("the next prompt of the stream is b'x'; expected a text that is not empty"):
        stream_clip(causal, lambda: next(texts), [1], 1, **where)
    assert (tmp_path / "out/stream.mp4").exists()  # what was made until then
