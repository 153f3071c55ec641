"""A video transformer u(z, t, r, prompt) in plain torch, to read: the one of Wan2.1, with AnyFlow's target time.

Sizes and weights have the names of diffusers' AnyFlowTransformer3DModel: a state dict of either loads into the other,
and outputs agree (tests/networks/test_video.py). Training and export use diffusers' class, in WanNetwork. Notebook 6
walks through this file. Letters of the shapes:

    B samples   F frames   C channels   H, W height and width of the latents   L tokens of the prompt
    h, w        patches along height and width; N = F h w tokens of the video
    M, D        width of the transformer and of one attention head, M = heads D
"""

from collections import OrderedDict

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from minianyflow.support.errors import InputError

Latents = Float[Tensor, "batch frames channels height width"]
VideoTimes = Float[Tensor, "batch"] | Float[Tensor, "batch frames"]  # one time per sample, or one per frame
Timesteps = Float[Tensor, "batch frames"]
Prompt = Float[Tensor, "batch length text_dim"]
Tokens = Float[Tensor, "batch tokens model_width"]
Text = Float[Tensor, "batch length model_width"]
Heads = Float[Tensor, "batch heads tokens head_dim"]
Angles = Float[Tensor, "tokens pairs"]
Partition = tuple[int, ...]  # the frames of each chunk of a clip

TIMESTEPS = 1000.0  # Wan's transformer takes times from 0 to 1000


def to_timesteps(t: VideoTimes, z: Latents, timesteps: float = TIMESTEPS) -> Timesteps:
    """Times in [0, 1] as a transformer takes them: one per frame, from 0 to `timesteps`, float32."""
    if t.shape not in (z.shape[:1], z.shape[:2]):
        raise InputError(f"times {tuple(t.shape)} for latents {tuple(z.shape)}; expected (B,) or (B, F)")
    return timesteps * (t[:, None] if t.ndim == 1 else t).float().expand(z.shape[:2])


def sinusoids(t: Timesteps, size: int) -> Tensor:
    """Cosines and sines of t (B, F) at size / 2 frequencies, from 1 down to nearly 1 / 10,000: (B, F, size)."""
    half = size // 2
    phase = t[..., None] * 10_000 ** (-torch.arange(half, device=t.device) / half)
    return torch.cat([phase.cos(), phase.sin()], -1)


def rotary_angles(frames: int, high: int, wide: int, head_dim: int) -> Angles:
    """The angles (N, D / 2) of 3-D rotary positions: some pairs count the frame, some the row, some the column."""
    side = 2 * (head_dim // 6)  # of the numbers of a head, rows get so many, columns as many, frames the rest
    count = {"f": frames, "h": high, "w": wide}
    angles = []
    for axis, size in (("f", head_dim - 2 * side), ("h", side), ("w", side)):
        frequency = 10_000 ** (-torch.arange(0, size, 2) / size)  # (size / 2,)
        angle = torch.outer(torch.arange(count[axis]), frequency)  # (count, size / 2)
        others = {name: number for name, number in count.items() if name != axis}
        angles.append(repeat(angle, f"{axis} pairs -> (f h w) pairs", **others))
    return torch.cat(angles, 1)


def rotate(x: Heads, angles: Angles) -> Heads:
    """Turn the pairs of each token by its angles: the product of two tokens then depends on their distance."""
    a, b = rearrange(x, "b heads n (pairs two) -> two b heads n pairs", two=2)
    cosine, sine = angles.cos(), angles.sin()
    return rearrange([a * cosine - b * sine, a * sine + b * cosine], "two b heads n pairs -> b heads n (pairs two)")


class Attention(nn.Module):
    """Tokens look at each other, or at a text: softmax(q k / sqrt(D)) v in each head."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))  # across all heads
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tokens, text: Text | None = None, angles: Angles | None = None) -> Tokens:
        """x (B, N, M) looks at text (B, L, M), or at itself, with rotary positions."""
        seen = x if text is None else text
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(seen)), self.to_v(seen)
        q, k, v = (rearrange(part, "b n (heads d) -> b heads n d", heads=self.heads) for part in (q, k, v))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        out = functional.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D)
        return self.to_out(rearrange(out, "b heads n d -> b n (heads d)"))


class Block(nn.Module):
    """Self-attention, text attention, feed-forward; the times shift, scale and gate the first and the last (AdaLN)."""

    def __init__(self, width: int, heads: int, ffn_dim: int):
        super().__init__()
        self.norm1, self.norm3 = (nn.LayerNorm(width, 1e-6, elementwise_affine=False) for _ in range(2))
        self.norm2 = nn.LayerNorm(width, 1e-6)
        self.attn1, self.attn2 = Attention(width, heads), Attention(width, heads)
        inner = _named(proj=nn.Linear(width, ffn_dim), gelu=nn.GELU("tanh"))
        self.ffn = _named(net=nn.Sequential(inner, nn.Identity(), nn.Linear(ffn_dim, width)))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / width**0.5)

    def forward(self, x: Tokens, text: Text, modulation: Tensor, angles: Angles) -> Tokens:
        """x (B, N, M), text (B, L, M), modulation (6, B, N, M), angles (N, D / 2); returns (B, N, M)."""
        own = rearrange(self.scale_shift_table, "1 six m -> six 1 1 m")
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = own + modulation  # (B, N, M) each
        x = x + gate * self.attn1(self.norm1(x) * (1 + scale) + shift, angles=angles)
        x = x + self.attn2(self.norm2(x), text)
        return x + ffn_gate * self.ffn(self.norm3(x) * (1 + ffn_scale) + ffn_shift)


class ConditionEmbedder(nn.Module):
    """Both times and the prompt as vectors of the transformer's width."""

    def __init__(self, width: int, freq_dim: int, text_dim: int, gate: float):
        super().__init__()
        self.freq_dim, self.gate = freq_dim, gate
        self.time_embedder, self.delta_embedder = (_two_layers(freq_dim, width, nn.SiLU()) for _ in range(2))
        self.time_proj = nn.Linear(width, 6 * width)
        self.text_embedder = _two_layers(text_dim, width, nn.GELU("tanh"))

    def forward(self, t: Timesteps, r: Timesteps, prompt: Prompt) -> tuple[Tensor, Tensor, Text]:
        """t and r (B, F): the times' embedding (B, F, M), a block's modulation (B, F, 6 M), the text (B, L, M)."""
        time, target = self.time_embedder(sinusoids(t, self.freq_dim)), self.delta_embedder(sinusoids(r, self.freq_dim))
        times = (1 - self.gate) * time + self.gate * target
        return times, self.time_proj(functional.silu(times)), self.text_embedder(prompt)


class VideoTransformer(nn.Module):
    """The average velocity u(z, t, r, prompt). Sizes by diffusers' names; timesteps: the number that time 1 becomes."""

    def __init__(
        self,
        num_attention_heads: int = 2,
        attention_head_dim: int = 32,
        in_channels: int = 4,
        out_channels: int = 4,
        text_dim: int = 16,
        freq_dim: int = 64,
        ffn_dim: int = 256,
        num_layers: int = 4,
        patch: int = 2,
        gate_value: float = 0.25,
        timesteps: float = TIMESTEPS,
    ):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        self.head_dim, self.patch, self.timesteps = attention_head_dim, patch, timesteps
        self.patch_embedding = nn.Conv3d(in_channels, width, (1, patch, patch), stride=(1, patch, patch))
        self.condition_embedder = ConditionEmbedder(width, freq_dim, text_dim, gate_value)
        self.blocks = nn.ModuleList(Block(width, num_attention_heads, ffn_dim) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / width**0.5)
        self.proj_out = nn.Linear(width, out_channels * patch**2)

    def forward(self, z: Latents, t: VideoTimes, r: VideoTimes, prompt: Prompt) -> Latents:
        """z (B, F, C, H, W), t and r (B,) or (B, F) in [0, 1], prompt (B, L, text_dim); returns the shape of z."""
        t, r = (to_timesteps(time, z, self.timesteps) for time in (t, r))  # (B, F)
        x = self.patch_embedding(rearrange(z, "b f c high wide -> b c f high wide"))  # (B, M, F, h, w)
        frames, h, w = x.shape[2:]
        x = rearrange(x, "b m f h w -> b (f h w) m")  # (B, N, M)
        times, modulation, text = self.condition_embedder(t, r, prompt)
        modulation = repeat(modulation, "b f (six m) -> six b (f n) m", six=6, n=h * w)
        angles = rotary_angles(frames, h, w, self.head_dim).to(x.device)
        for block in self.blocks:
            x = block(x, text, modulation, angles)
        own = rearrange(self.scale_shift_table, "1 two m -> two 1 1 m")
        shift, scale = own + repeat(times, "b f m -> b (f n) m", n=h * w)  # (B, N, M) each
        out = self.proj_out(self.norm_out(x) * (1 + scale) + shift)  # (B, N, C of a patch)
        size = {"f": frames, "h": h, "w": w, "p": self.patch, "q": self.patch}
        return rearrange(out, "b (f h w) (p q c) -> b f c (h p) (w q)", **size)


def _named(**layers):
    return nn.Sequential(OrderedDict(layers))


def _two_layers(size, width, activation):
    return _named(linear_1=nn.Linear(size, width), activation=activation, linear_2=nn.Linear(width, width))
