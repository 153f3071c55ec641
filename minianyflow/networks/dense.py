"""A small video network without tokens: matrices see the whole clip, and what it puts out is the clean clip.

It keeps a ball's velocity where tiny transformers do not (docs/video.md). It takes clips of one size and has no class
in diffusers, so no pipeline loads it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from minianyflow.networks.video import Latents, Prompt
from minianyflow.support.errors import InputError

LEAST = 0.05  # the time that a clean clip is divided by, at least


class Dense(nn.Module):
    """A residual network on all numbers of a clip, modulated by its times and its prompt.

    shape: (F, C, H, W) of a clip. inner: width of what the times become. prompt: (L, D); (): it sees no prompt, no r.
    half: gradients are computed in bfloat16, which new processors multiply faster; samples in float32, if not inside
    autocast.
    """

    def __init__(
        self,
        width: int = 256,
        inner: int = 64,
        layers: int = 4,
        shape: Sequence[int] = (5, 4, 4, 4),
        prompt: Sequence[int] = (),
        half: bool = True,
    ):
        super().__init__()
        self.half = half
        self.config = {"width": width, "inner": inner, "layers": layers, "shape": [*shape], "prompt": [*prompt]}
        size = math.prod(shape)
        self.into, self.out = nn.Linear(size, width), nn.Linear(width, size)
        self.time = nn.Sequential(nn.Linear(16, inner), nn.SiLU(), nn.Linear(inner, 3 * width * layers))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        for down in self.down:
            nn.init.zeros_(down.weight)
        if prompt:
            self.text, self.target = nn.Linear(math.prod(prompt), inner), nn.Linear(16, inner)
            nn.init.zeros_(self.target.weight)  # at first the network does not see its target time

    def forward(self, z: Latents, t: Tensor, r: Tensor | None = None, prompt: Prompt | None = None) -> Latents:
        """The clip that z (B, F, C, H, W) at time t (B,) shows, for a jump to r (B,). InputError for another size."""
        if [*z.shape[1:]] != self.config["shape"]:
            expected = f"(B, {', '.join(map(str, self.config['shape']))}): a dense network takes clips of one size"
            raise InputError(f"latents {tuple(z.shape)}; expected {expected}")
        half = torch.is_autocast_enabled(z.device.type) or (self.half and torch.is_grad_enabled())
        with torch.autocast(z.device.type, torch.bfloat16, enabled=half):
            embedded = self.time[0](_phases(t))
            if self.config["prompt"]:
                embedded = embedded + self.target(_phases(r)) + self.text(prompt.flatten(1))
            changes = self.time[1:](embedded).chunk(3 * len(self.up), 1)
            h = self.into(z.flatten(1))
            for layer, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
                scale, shift, gate = changes[3 * layer : 3 * layer + 3]
                h = h + (1 + gate) * down(functional.gelu(up(self.norm(h) * (1 + scale) + shift)))
            return self.out(self.norm(h)).to(z.dtype).view_as(z)


class FromClean(nn.Module):
    """u = (z - x) / t, where `network` puts out the clean clip x."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, z: Latents, t: Tensor, r: Tensor, prompt: Prompt) -> Latents:
        """As WanNetwork, with one time per sample. Below LEAST the time counts as LEAST."""
        return (z - self.network(z, t, r, prompt=prompt)) / t.clamp(min=LEAST)[:, None, None, None, None]


def _phases(t):
    """Sines and cosines (B, 16) of the log odds of t (B,) and of t: details of the size of t are resolved."""
    odds = torch.log(t / (1 - t).clamp(min=1e-3) + 1e-3)
    octaves = torch.arange(4, device=t.device)
    phases = [odds[:, None] * 2.0 ** (octaves - 3), t[:, None] * 2.0 ** (octaves - 1)]
    return torch.cat([part for phase in phases for part in (phase.sin(), phase.cos())], 1)
