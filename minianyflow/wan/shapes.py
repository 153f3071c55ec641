"""The sizes of Wan's text-to-video transformers, and transformers of these sizes with random weights, or without.

The numbers are those of `transformer/config.json` in Wan-AI/Wan2.1-T2V-1.3B-Diffusers and -14B-Diffusers; the
defaults of diffusers among them (patches of 1 x 2 x 2, text of 4096 numbers per token) are written out.
"""

import torch
from torch import nn

from minianyflow.networks.wan import copy_time_embedder
from minianyflow.support.errors import choose
from minianyflow.wan.data.options import CODECS
from minianyflow.wan.folders import CLASSES

SHARED = {
    "patch_size": (1, 2, 2),
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "eps": 1e-6,
    "rope_max_seq_len": 1024,
    "attention_head_dim": 128,
}
SHAPES = {
    "1.3b": SHARED | {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "5b": SHARED
    | {"in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336},
    "14b": SHARED | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}


def latent_shape(frames: int = 81, height: int = 480, width: int = 832, channels: int = 16) -> tuple[int, ...]:
    """(F, C, H, W) of a clip's latents: one frame for four after the first, one pixel for 8 x 8 (Wan2.2: 16 x 16)."""
    factor, _ = CODECS[channels]
    return (frames - 1) // 4 + 1, channels, height // factor, width // factor


def build_transformer(
    shape: str | dict, architecture: str, device: torch.device | str = "meta", dtype=torch.float32, **changes
) -> nn.Module:
    """A transformer as folders.load_transformer makes it, of random weights; on "meta" without any.

    shape: a name in SHAPES, or a dict of arguments. dtype: of the weights, except those that the class keeps in
    float32. changes: other arguments; for a causal one full_chunk_limit, chunk_partition, compressed_patch_size.
    """
    kind = choose("architecture", architecture, CLASSES)
    options = (choose("shape", shape, SHAPES) if isinstance(shape, str) else dict(shape)) | changes
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # a copy in float32 first would be twice as large
    try:
        with torch.device(device):
            transformer = kind(**options)
    finally:
        torch.set_default_dtype(before)
    for name, weight in transformer.named_parameters():
        if set(name.split(".")) & set(kind._keep_in_fp32_modules):
            weight.data = weight.data.float()
    copy_time_embedder(transformer)
    return transformer.eval()
