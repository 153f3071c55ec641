"""Clips without end: a causal network chunk by chunk, frames written as they come."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import imageio.v2 as imageio
import torch
from torch import Tensor, nn
from tqdm import tqdm

from minianyflow.networks.causal import causal_stream
from minianyflow.support.errors import InputError
from minianyflow.times import generator, time_grid
from minianyflow.wan.data.write_video import GrowingClip
from minianyflow.wan.folders import embed, encode_video, load_parts, stream_decoder
from minianyflow.wan.sample import open_source
from minianyflow.wan.sources import LONGEST, NoPrompts, check_numbers


def stream_frames(
    u: Callable,
    vae: nn.Module,
    shape: Sequence[int],
    jobs: Iterable[tuple[Tensor, Tensor]],
    seed: int,
    window: int,
    first: int = 1,
    rest: int = 2,
    prefix: Tensor | None = None,
) -> Iterator[Tensor]:
    """The frames (T, 3, H, W) in [0, 1] of one chunk per job; arguments as of `causal_stream`, `shape` of a latent."""
    source, decode = generator(seed), stream_decoder(vae)

    def draw(frames):
        return torch.randn(1, frames, *shape, generator=source).to(vae.device)

    if prefix is not None:
        yield decode(prefix)[0]
    for latents in causal_stream(u, draw, jobs, window, first, rest, prefix):
        yield decode(latents)[0]


class Stream:
    """The frames of a clip without end. Options as of `sample_clips`; the frames of its clip are the window.

    texts: prompts that are known before: the text encoder is loaded once for them all, and once for any other.
    Raises InputError for a bidirectional source, and as `sample_clips`.
    """

    def __init__(
        self,
        source: str,
        texts: Sequence[str] = (),
        clip: dict[str, int] | None = None,
        start: str | Path | None = None,
        context: int | None = None,
        device: str = "auto",
        precision: str | None = None,
        base: str | None = None,
    ):
        found = open_source(source, clip, start, context, device, precision, base)
        self.source, self.clip, frames, self.device, self.dtype = found
        self.config = self.source.config
        if self.config.architecture != "causal":
            raise InputError(f"{source} is bidirectional; a stream is made chunk by chunk: name a causal source")
        length, *self.shape = self.source.shape(self.clip)
        self.first, self.rest = self.config.causal.first, self.config.causal.rest
        self.window = self.first + (length - self.first) // self.rest * self.rest
        self.vae, self.prompts = load_parts(self.config.base, "vae")[0].to(self.device), {}
        self.prefix = None if frames is None else encode_video(self.vae, frames.to(self.device))
        self._embed(dict.fromkeys(texts))

    def frames(self, jobs: Iterable[tuple[str, int]], seed: int = 0) -> Iterator[Tensor]:
        """The frames (T, 3, H, W) in [0, 1] of one chunk per job: a prompt and a number of steps, asked for in turn.

        Raises InputError for a prompt that is no text, and for less than one step.
        """

        def conditions():
            for prompt, steps in jobs:
                check_numbers([steps])
                self._embed([prompt])
                yield time_grid(steps, self.config.shift, self.device), self.prompts[prompt]

        chunks = self.window, self.first, self.rest, self.prefix
        return stream_frames(self.source.network, self.vae, self.shape, conditions(), seed, *chunks)

    def _embed(self, texts):
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"the next prompt of the stream is {text!r}; expected a text that is not empty")
        if new := [text for text in texts if text not in self.prompts]:
            made = embed(self.config.base, new, self.clip["length"], self.dtype, self.device)
            self.prompts |= dict(zip(new, made.split(1), strict=True))


def stream_clip(
    source: str,
    prompts: Callable[[], list[str]],
    steps: list[int],
    seconds: float,
    output: str | Path,
    seed: int = 0,
    write: Sequence[str] = (),
    **options: object,
) -> dict[str, float]:
    """Write `stream.mp4`, which can be played while it grows, and with write=["png"] every frame without loss.

    seconds: of video. prompts, steps: take turns, each in an equal part. prompts() is called before each chunk, so that
    they may change on the way; while it raises NoPrompts, as an editor writes its file, the last ones go on. options:
    of `Stream`. Returns seconds to the first frame, frames per second, and the number of frames. Raises InputError as
    `Stream`.
    """
    if not 0 < seconds <= LONGEST:
        raise InputError(f"a stream of {seconds:g} seconds; expected more than 0, at most {LONGEST}")
    if "latents" in write:
        raise InputError("--write latents of a stream; they are not kept: expected png, or nothing")
    check_numbers(steps)
    stream = Stream(source, texts := prompts(), **options)
    wanted = round(seconds * stream.source.fps)
    latents = (wanted + 2) // 4 + 1  # the first is one frame, each other four
    chunks = max(0, -((stream.first - latents) // stream.rest)) + 1

    def jobs():
        now = texts
        for k in range(chunks):
            with contextlib.suppress(NoPrompts):
                now = prompts()
            yield tuple(each[k * len(each) // chunks] for each in (now, steps))

    folder = Path(output)
    try:
        (folder / "stream").mkdir(parents=True, exist_ok=True) if "png" in write else folder.mkdir(
            parents=True, exist_ok=True
        )
        start, count, first = time.perf_counter(), 0, None
        with (
            GrowingClip(folder / "stream.mp4", stream.source.fps) as film,
            tqdm(total=wanted, unit="frame", desc="streaming") as bar,
        ):
            for frames in stream.frames(jobs(), seed):
                made = film.add(frames[: wanted - count])
                first = first or time.perf_counter() - start
                for number, frame in enumerate(made, count) if "png" in write else ():
                    imageio.imwrite(folder / f"stream/{number:06}.png", frame)
                count += len(made)
                bar.update(len(made))
                if count == wanted:
                    break
    except OSError as problem:
        raise InputError(f"cannot write to {output} ({problem.strerror}); make room, or name another folder") from None
    return {"first_frame": first, "per_second": count / (time.perf_counter() - start), "frames": count}
