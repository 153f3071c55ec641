"""Training of the small codec between blob videos and latents (networks/codec.py has the shapes)."""

from types import SimpleNamespace

import torch
from torch import nn

from minianyflow.networks.codec import Codec
from minianyflow.times import generator
from minianyflow.training import Role, train
from toy_data import blobs


class Autoencoder(nn.Module):
    """Video through the codec and back, with `blur` times noise on the latents in between."""

    def __init__(self, blur):
        super().__init__()
        self.codec, self.blur = Codec(), blur

    def forward(self, batch: dict):
        """Raw latents, and the reconstructed video."""
        raw = self.codec.encode_raw(batch["x"])
        return raw, self.codec.decode_raw(raw + self.blur * batch["eps"].reshape(raw.shape))


def reconstruction_loss(network: Autoencoder, batch: dict, size: float = 1e-4):
    """Losses (B,): the pixels' squared error over .01, and `size` half the square of raw latents, lest they grow."""
    raw, video = network(batch)
    error = (video - batch["x"]).square().flatten(1).mean(1)
    return 100 * error + 0.5 * size * raw.square().flatten(1).mean(1), {"pixels": error.detach().mean()}


def clip_size(step: int, steps: int) -> tuple[int, int]:
    """Frames and rows of the batch at `step`: short clips first, from which the codec learns images quickly."""
    return (5, 16) if step < 0.45 * steps else (9, 8) if step < 0.6 * steps else (17, 8)


def train_codec(steps: int = 1000, seed: int = 0, lr: float = 6e-3, blur: float = 0.02, progress=True):
    """A codec, the history of its training, and the rows that this took, in the form of an EvaluationCounter."""

    def draw(step):
        (frames, rows), source = clip_size(step, steps), generator(seed, step)
        video = blobs.sample(rows, source, frames).video
        size = (rows, 4 * (frames // 4 + 1) * video.shape[2] * video.shape[3] // 16)
        return {"x": video, "eps": torch.randn(size, generator=source)}

    torch.manual_seed(seed)
    role = Role(Autoencoder(blur), reconstruction_loss, lr=lr, ema=0.98, clip=1.0)
    history = train({"codec": role}, draw, steps, progress=progress)
    codec = role.average.module.codec.eval().requires_grad_(False)
    codec.normalise(blobs.sample(1024, generator(seed, steps), 17).video)
    rows = sum(clip_size(step, steps)[1] for step in range(steps))
    return codec, history, SimpleNamespace(rows=rows, with_grad=rows)
