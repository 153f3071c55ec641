"""Every place where minianyflow reaches into private parts of diffusers and peft, each with its reason.

tests/networks/test_patches.py fails if a library renames what stands here, or computes something else with it.
"""

from functools import partial

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional

from minianyflow.networks.causal_attention import CausalAttention

# ---- peft: which adapter is active


RoleLayer = LoraLayer | ModulesToSaveWrapper  # adds to a layer of the base, or takes its place


def active_adapter(layer: RoleLayer) -> tuple[list[str] | str, bool]:
    """The adapters that a layer adds to its base layer, and whether all are disabled."""
    return layer._active_adapter, layer._disable_adapters


def set_active_adapter(layer: RoleLayer, adapters: list[str] | str, disabled: bool) -> None:
    """Reason: peft's set_adapter and enable_adapters flip requires_grad; a backward after them loses gradients."""
    layer._active_adapter, layer._disable_adapters = adapters, disabled


# ---- peft: the dtype that an adapter computes in


class InputDtypeLinear(nn.Linear):
    """A linear layer without bias that computes in the dtype of its input; its weight keeps its own."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear."""
        return functional.linear(x, self.weight.to(x.dtype))


class InputDtypeConv3d(nn.Conv3d):
    """A convolution that computes in the dtype of its input; its weights keep their own."""

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Conv3d."""
        return self._conv_forward(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def compute_in_input_dtype(layer: RoleLayer, role: str) -> None:
    """Reason: peft copies the input of every layer to float32, the dtype of the adapter's weights.

    Of a layer that is trained whole it does not, and the layer fails.
    """
    if isinstance(layer, ModulesToSaveWrapper):
        layer.modules_to_save[role].__class__ = InputDtypeConv3d
        return
    layer.cast_input_dtype_enabled = False
    for half in (layer.lora_A, layer.lora_B):
        linear = InputDtypeLinear(half[role].in_features, half[role].out_features, bias=False, device="meta")
        linear.weight = half[role].weight
        half[role] = linear


# ---- diffusers: what blocks copy


def use_per_frame_modulation(transformer: nn.Module) -> nn.Module:
    """Have a transformer of either architecture keep one modulation per frame, and positions in float32.

    Reason: at 81 frames of 480 x 832 a clip has 32,760 tokens. diffusers copies the modulation of a frame, six vectors,
    to each of its 1560 tokens, again in float32 in every block, and rotates queries and keys in float64. Weights and
    their names stay; outputs differ by rounding.
    """
    embedder, rope = transformer.condition_embedder, transformer.rope
    embedder.forward_timestep = partial(_embed_times, embedder)
    rope.forward = partial(_rotations, rope)
    for block in transformer.blocks:
        block.forward = partial(_block, block)
        block.attn1.set_processor(CausalAttention())
    return transformer


def _embed_times(embedder, t, r, prompt, tokens):
    """As diffusers' forward_timestep for t and r (B, F), but the modulation per frame: (B, N, D), (B, F, 6 D).

    The first is used once, after all blocks.
    """
    embedding, modulation = type(embedder).forward_timestep(embedder, t, r, prompt, 1)
    return embedding.repeat_interleave(tokens, dim=1), modulation


def _rotations(rope, **layout):
    """As diffusers', but cosine and sine (1, 1, N, D / 2, 2) in float32; and the tokens per frame, full and coarse."""
    sizes = layout["layout_cfg"] if "layout_cfg" in layout else layout["far_cfg"]
    rotations = type(rope).forward(rope, **layout).items()
    rotations = {name: torch.view_as_real(rotation.to(torch.complex64)) for name, rotation in rotations}
    return rotations | {"tokens": (sizes["full_token_per_frame"], sizes.get("compressed_token_per_frame", 0))}


def _block(block, hidden, prompt, modulation, rotations, mask, kv_cache=None, kv_cache_flag=None, half=None):
    """As diffusers' block, for modulation (B, frames, 6, D) instead of (B, N, 6, D).

    half: 0, only the part up to self-attention; 1, only the rest.
    """
    # (B, frames, D) each
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.scale_shift_table + modulation.float()).unbind(2)
    per_frame = partial(_per_frame, tokens=rotations["tokens"])
    cache = {} if kv_cache is None else {"kv_cache": kv_cache, "kv_cache_flag": kv_cache_flag}

    if half != 1:
        x = per_frame(_shift_and_scale, block.norm1(hidden.float()), shift, scale).type_as(hidden)
        x = block.attn1(x, attention_mask=mask, rotary_emb=rotations, **cache)
        hidden = (hidden.float() + per_frame(torch.mul, x, gate)).type_as(hidden)
    if half == 0:
        return hidden

    x = block.norm2(hidden.float()).type_as(hidden)
    hidden = hidden + block.attn2(x, encoder_hidden_states=prompt)

    x = per_frame(_shift_and_scale, block.norm3(hidden.float()), ffn_shift, ffn_scale).type_as(hidden)
    return (hidden.float() + per_frame(torch.mul, block.ffn(x).float(), ffn_gate)).type_as(hidden)


def _shift_and_scale(x, shift, scale):
    return x * (1 + scale) + shift


def _per_frame(function, x, *vectors, tokens):
    """function(x, *vectors) for x (B, N, D), vectors (B, frames, D); the first frames may be coarse: fewer tokens."""
    (full, coarse), frames = tokens, vectors[0].shape[1]
    old = (frames * full - x.shape[1]) // (full - coarse)
    parts, start = [], 0
    for first, last, size in ((0, old, coarse), (old, frames, full)):
        if last > first:
            end = start + (last - first) * size
            part = x[:, start:end].unflatten(1, (last - first, size))
            parts.append(function(part, *(vector[:, first:last, None] for vector in vectors)).flatten(1, 2))
            start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


# ---- diffusers: what the codec remembers


class StreamDecoder:
    """A video codec's decoder that goes on where it stopped: raw latents (B, C, F, h, w) to (B, 3, T, H, W) in [-1, 1].

    Reason: `AutoencoderKLWan.decode` forgets at its end what the next frames need. The frames are those of one decode.
    """

    def __init__(self, vae: AutoencoderKLWan):
        vae.clear_cache()
        self.vae, self.features, self.started = vae, vae._feat_map, False

    @torch.no_grad()
    def __call__(self, raw: Tensor) -> Tensor:
        """The frames of the next latents: one for the first latent frame, four for each other."""
        frames = []
        for x in self.vae.post_quant_conv(raw).split(1, 2):
            options = {} if self.started else {"first_chunk": True}
            frames.append(self.vae.decoder(x, feat_cache=self.features, feat_idx=[0], **options))
            self.started = True
        patch = self.vae.config.patch_size
        return (torch.cat(frames, 2) if patch is None else unpatchify(torch.cat(frames, 2), patch)).clamp(-1, 1)
