"""The codec between grey videos and latents: a small AutoencoderKLWan, the class that Wan2.1 has, trained here.

Shapes:
    video    (B, T, 16 h, 16 w) in [0, 1], T = 4 n + 1 frames
    latents  (B, F, 4, 4 h, 4 w) with F = n + 1: the first latent frame is one frame of video, every other is four
Latents are normalised by the mean and spread in the codec's own configuration, as diffusers pipelines do.
"""

from types import SimpleNamespace

import torch
from diffusers import AutoencoderKLWan
from torch import nn

from minianyflow.support.errors import InputError
from minianyflow.times import generator
from minianyflow.training import Role, train

PIECE = 256  # clips that go through together


class Codec(nn.Module):
    """encode and decode between video and normalised latents; `vae` is what a pipeline saves."""

    def __init__(self, vae=None):
        super().__init__()
        self.vae = vae or AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        )

    def moments(self, video):
        """The posterior over raw latents, (B, C, F, h, w); raises InputError for a video that does not fit."""
        if video.ndim != 4 or video.shape[1] % 4 != 1 or video.shape[2] % 16 or video.shape[3] % 16:
            raise InputError(
                f"a video of shape {tuple(video.shape)}; expected (B, T, H, W) with T = 4 n + 1 frames, "
                "H and W multiples of 16"
            )
        colour = (2 * video - 1)[:, None].expand(-1, 3, -1, -1, -1)  # three equal channels, in [-1, 1]
        return self.vae.encode(colour).latent_dist

    def pixels(self, raw):
        """Raw latents (B, C, F, h, w) to grey video, not clipped."""
        return (self.vae.decode(raw).sample.mean(1) + 1) / 2

    @torch.no_grad()
    def encode(self, video):
        """Video (B, T, H, W) to normalised latents (B, F, C, h, w)."""
        mean, std = self._scale()
        pieces = [self.moments(piece).mode() for piece in video.split(PIECE)]
        return ((torch.cat(pieces) - mean) / std).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode(self, latents):
        """Normalised latents (B, F, C, h, w) to video (B, T, H, W), clipped to [0, 1]."""
        if latents.ndim != 5 or latents.shape[2] != self.vae.config.z_dim:
            raise InputError(f"latents {tuple(latents.shape)}; expected (B, F, {self.vae.config.z_dim}, h, w)")
        mean, std = self._scale()
        return torch.cat([self.pixels(each.transpose(1, 2) * std + mean) for each in latents.split(PIECE)]).clamp(0, 1)

    def _scale(self):
        config = self.vae.config
        where = self.vae.quant_conv.weight
        return (where.new_tensor(each).view(1, -1, 1, 1, 1) for each in (config.latents_mean, config.latents_std))

    @torch.no_grad()
    def normalise(self, video):
        """Set the mean and spread of the latents of `video` in the configuration."""
        raw = torch.cat([self.moments(piece).mode() for piece in video.split(PIECE)])
        mean, std = raw.mean((0, 2, 3, 4)).tolist(), raw.std((0, 2, 3, 4)).tolist()
        self.vae.register_to_config(latents_mean=mean, latents_std=std)


class _Autoencoder(nn.Module):
    """What the training loop trains: video through the codec and back, the latents a little blurred on the way."""

    def __init__(self, blur):
        super().__init__()
        self.codec, self.blur = Codec(), blur

    def forward(self, batch):
        """Raw latents and the video that comes back."""
        mean = self.codec.moments(batch["x"]).mode()
        return mean, self.codec.pixels(mean + self.blur * batch["eps"].reshape(mean.shape))


def reconstruction_loss(network, batch, size=1e-4):
    """Losses (B,): squared error of the pixels, over .01, and `size` half the square of raw latents, lest they grow."""
    latents, video = network(batch)
    error = (video - batch["x"]).square().flatten(1).mean(1)
    return 100 * error + 0.5 * size * latents.square().flatten(1).mean(1), {"pixels": error.detach().mean()}


def codec_batches(sample, steps, seed=0):
    """`draw(step)`: short clips first (5 frames, then 9, then 17), which teach the codec to see at all, and quickly."""

    def draw(step):
        frames, rows = _size(step, steps)
        source = generator(seed, step)
        video = sample(rows, source, frames)
        size = (rows, 4 * (frames // 4 + 1) * video.shape[2] * video.shape[3] // 16)
        return {"x": video, "eps": torch.randn(size, generator=source)}

    return draw


def _size(step, steps):
    """Frames and rows of the batch at `step`."""
    return (5, 16) if step < 0.45 * steps else (9, 8) if step < 0.6 * steps else (17, 8)


def codec_cost(steps):
    """Rows that went through codec and back in training, forwards and backwards, as an EvaluationCounter has them."""
    rows = sum(_size(step, steps)[1] for step in range(steps))
    return SimpleNamespace(rows=rows, with_grad=rows)


def train_codec(sample, steps=1000, seed=0, lr=6e-3, blur=0.02, progress=True):
    """A codec for the videos that `sample(count, generator, frames)` draws; returns it and the training history."""
    torch.manual_seed(seed)
    role = Role(_Autoencoder(blur), reconstruction_loss, lr=lr, ema=0.98, clip=1.0)
    history = train({"codec": role}, codec_batches(sample, steps, seed), steps, progress=progress)
    codec = role.average.module.codec.eval().requires_grad_(False)
    codec.normalise(sample(1024, generator(seed, steps), 17))
    return codec, history
