"""Any flow-matching transformer of diffusers as a flow map u(z, t, r, **condition).

A stock transformer knows one time. This file adds the two things that are missing: a second embedder, of the length
t - r of the jump, and a `call` of a few lines that passes state, time and condition to the transformer in its own form.
    z, u    (B, C, H, W) or (B, F, C, H, W)   latents of images or of clips, frames first
    t, r    (B,)                              in [0, 1]; a transformer counts them to `timesteps`
    prompt  (B, L, D), pooled (B, D)          embeddings of the transformer's own text encoders
"""

import contextlib
import copy
from collections.abc import Callable

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from einops import rearrange
from torch import Tensor, nn

from minianyflow.support.checks import check_same_shape
from minianyflow.support.errors import InputError, choose

TIMESTEPS = 1000.0  # most transformers count from 0 to 1000, not to 1


class Backbone(nn.Module):
    """A stock transformer as u(z, t, r, **condition), a teacher: it ignores r, so it is the velocity at t.

    call: `call(transformer, z, t, **condition)`, t counted to `timesteps`, returns a tensor of z's shape; see CALLS.
    """

    def __init__(self, transformer: nn.Module, call: Callable, timesteps: float = TIMESTEPS):
        super().__init__()
        self.transformer, self.call, self.timesteps = transformer, call, timesteps

    def forward(self, z: Tensor, t: Tensor, r: Tensor, **condition) -> Tensor:
        """z (B, *shape), t and r (B,); returns the shape of z."""
        if t.shape != z.shape[:1] or r.shape != t.shape:
            raise InputError(f"times {tuple(t.shape)}, {tuple(r.shape)} for z {tuple(z.shape)}; expected (B,) for both")
        out = self.call(self.transformer, z, self.timesteps * t.float(), **condition)
        check_same_shape("what `call` returns", out, z)
        return out.to(z.dtype)


class FlowMapBackbone(Backbone):
    """A transformer that also knows the length of the jump: the average velocity u(z, t, r, **condition).

    The only new weights are `jump`, a copy of the transformer's own time embedder whose last layer starts at zero. Its
    embedding of t - r is added to the embedding of t. So at the start u(z, t, r) is exactly the stock velocity at
    (z, t), for all r. The transformer keeps its weights and their names.
    embedder: the name of its TimestepEmbedding, needed if there are several.
    """

    def __init__(self, transformer: nn.Module, call: Callable, timesteps=TIMESTEPS, embedder: str | None = None):
        super().__init__(transformer, call, timesteps)
        time, waves = find_embedder(transformer, embedder)
        if time._forward_hooks:
            raise InputError("this transformer is a flow map already; expected a stock one: copy it before")
        self.jump, self.waves = copy.deepcopy(time).requires_grad_(True), copy.deepcopy(waves)
        self.length = None  # (B,), counted to `timesteps`, while the transformer runs
        for weight in self.jump.linear_2.parameters():
            nn.init.zeros_(weight)
        time.register_forward_hook(self._add_jump)

    def forward(self, z: Tensor, t: Tensor, r: Tensor, **condition) -> Tensor:
        """z (B, *shape), t and r (B,); returns the shape of z."""
        with self._jumping(self.timesteps * (t - r).float()):
            return super().forward(z, t, r, **condition)

    @contextlib.contextmanager
    def _jumping(self, length):
        self.length = length
        try:
            yield
        finally:
            self.length = None

    def _add_jump(self, embedder, arguments, embedded):
        """The output of the transformer's embedder: its own embedding (B, D) of t plus that of t - r."""
        if self.length is None:  # by itself it would be neither the velocity nor a flow map
            raise InputError("the transformer of a flow map was called by itself; call the FlowMapBackbone around it")
        if embedded.shape[:-1] != self.length.shape:
            raise InputError(
                f"{tuple(embedded.shape[:-1])} times reach the transformer's embedder; expected one per sample, "
                f"{tuple(self.length.shape)}: pass it t as `call` gets it"
            )
        return embedded + self.jump(self.waves(self.length).to(embedded.dtype))


def find_embedder(transformer: nn.Module, name: str | None = None) -> tuple[TimestepEmbedding, Timesteps]:
    """The transformer's TimestepEmbedding (the only one, or that of `name`) and the Timesteps beside it."""
    found = {key: module for key, module in transformer.named_modules() if isinstance(module, TimestepEmbedding)}
    if not found or (name is None and len(found) > 1):
        what = f"{len(found)} embedders of time, {', '.join(found)}" if found else "no TimestepEmbedding"
        raise InputError(f"{type(transformer).__name__} has {what}; expected one: name it with embedder=")
    name = next(iter(found)) if name is None else name
    embedder = choose("embedder", name, found)
    beside = transformer.get_submodule(name.rpartition(".")[0]).children()
    waves = [module for module in beside if isinstance(module, Timesteps)]
    if len(waves) != 1:
        raise InputError(f"{len(waves)} Timesteps beside {name}; expected one, whose waves the embedder is made for")
    return embedder, waves[0]


def call_sd3(transformer, z, t, prompt, pooled):
    """SD3Transformer2DModel: z (B, C, H, W)."""
    return transformer(z, prompt, pooled, t, return_dict=False)[0]


def call_flux(transformer, z, t, prompt, pooled, guidance=None):
    """FluxTransformer2DModel: z (B, C, H, W) becomes one token per 2 x 2 patch; it counts time to 1000 itself."""
    high, wide = z.shape[2] // 2, z.shape[3] // 2
    tokens = rearrange(z, "b c (h p) (w q) -> b (h w) (c p q)", p=2, q=2)
    places = torch.cartesian_prod(torch.arange(1), torch.arange(high), torch.arange(wide)).to(z)
    words = places.new_zeros(prompt.shape[1], 3)
    out = transformer(tokens, prompt, pooled, t / 1000, places, words, guidance, return_dict=False)[0]
    return rearrange(out, "b (h w) (c p q) -> b c (h p) (w q)", h=high, p=2, q=2)


def call_ltx(transformer, z, t, prompt, mask=None):
    """LTXVideoTransformer3DModel: z (B, F, C, H, W) becomes one token per pixel of a frame."""
    frames, _, high, wide = z.shape[1:]
    tokens = rearrange(z, "b f c h w -> b (f h w) c")
    out = transformer(tokens, prompt, t, mask, frames, high, wide, return_dict=False)[0]
    return rearrange(out, "b (f h w) c -> b f c h w", f=frames, h=high)


def call_wan(transformer, z, t, prompt):
    """WanTransformer3DModel, stock: z (B, F, C, H, W)."""
    return transformer(z.transpose(1, 2), t, prompt, return_dict=False)[0].transpose(1, 2)


CALLS = {"sd3": call_sd3, "flux": call_flux, "ltx": call_ltx, "wan": call_wan}
