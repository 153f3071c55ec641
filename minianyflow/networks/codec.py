"""The codec between grey videos and latents: a small AutoencoderKLWan, the class that Wan2.1 has.

Shapes:
    video    (B, T, 16 h, 16 w) in [0, 1], T = 4 n + 1 frames
    latents  (B, F, 4, 4 h, 4 w) with F = n + 1: the first latent frame is one frame of video, each other is four
    raw      (B, 4, F, 4 h, 4 w), latents before normalisation, channels first as in diffusers
Latents are normalised by the mean and standard deviation in the codec's configuration, as in diffusers' pipelines.
video/codec_training.py trains it.
"""

import torch
from diffusers import AutoencoderKLWan
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from minianyflow.networks.video import Latents
from minianyflow.support.errors import InputError

Video = Float[Tensor, "batch video_frames pixels_high pixels_wide"]
Raw = Float[Tensor, "batch channels frames height width"]

SIZES = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True]}
SIZES |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "scale_factor_temporal": 4, "scale_factor_spatial": 4}
PIECE = 256  # clips that are encoded together


class Codec(nn.Module):
    """encode and decode between video and normalised latents; `vae` is the module that a pipeline saves."""

    def __init__(self, vae: AutoencoderKLWan | None = None):
        super().__init__()
        self.vae = vae or AutoencoderKLWan(**SIZES)

    def encode_raw(self, video: Video) -> Raw:
        """The mean of the posterior over raw latents. Raises InputError for a video of a shape that does not fit."""
        if video.ndim != 4 or video.shape[1] % 4 != 1 or video.shape[2] % 16 or video.shape[3] % 16:
            expected = "(B, T, H, W) with T = 4 n + 1 frames, H and W multiples of 16"
            raise InputError(f"a video of shape {tuple(video.shape)}; expected {expected}")
        colour = repeat(2 * video - 1, "b t h w -> b rgb t h w", rgb=3)  # three equal channels, in [-1, 1]
        return self.vae.encode(colour).latent_dist.mode()

    def decode_raw(self, raw: Raw) -> Video:
        """Raw latents to grey video, not clipped."""
        return (self.vae.decode(raw).sample.mean(1) + 1) / 2

    @torch.no_grad()
    def encode(self, video: Video) -> Latents:
        """Video (B, T, H, W) to normalised latents (B, F, C, h, w)."""
        mean, std = self._mean_and_std()
        return ((self._encode_pieces(video) - mean) / std).transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode(self, latents: Latents) -> Video:
        """Normalised latents (B, F, C, h, w) to video (B, T, H, W), clipped to [0, 1]."""
        if latents.ndim != 5 or latents.shape[2] != self.vae.config.z_dim:
            raise InputError(f"latents {tuple(latents.shape)}; expected (B, F, {self.vae.config.z_dim}, h, w)")
        mean, std = self._mean_and_std()
        pieces = latents.transpose(1, 2).split(PIECE)
        return torch.cat([self.decode_raw(piece * std + mean) for piece in pieces]).clamp(0, 1)

    @torch.no_grad()
    def normalise(self, video: Video) -> None:
        """Set the mean and standard deviation in the configuration to those of the latents of `video`."""
        raw = self._encode_pieces(video)
        mean, std = raw.mean((0, 2, 3, 4)).tolist(), raw.std((0, 2, 3, 4)).tolist()
        self.vae.register_to_config(latents_mean=mean, latents_std=std)

    def _encode_pieces(self, video):
        return torch.cat([self.encode_raw(piece) for piece in video.split(PIECE)])

    def _mean_and_std(self):
        config, weight = self.vae.config, self.vae.quant_conv.weight
        return (weight.new_tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
