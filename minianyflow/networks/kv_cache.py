"""The causal cache: keys and values of a clip's clean frames, computed once and read at every step of the next chunk.

    cache       a tuple over layers of (compressed, full), each (B, 2, heads, tokens, D): keys, then values.
                Keys have no rotary embedding yet. () is the cache before the first chunk.

Nothing is written in place: filling makes new tensors, reading concatenates. So autograd and recomputation may run
either of them again, and a rollout may keep the gradient of its context.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from minianyflow.networks.video import Heads, Latents, Partition, Prompt, Timesteps
from minianyflow.support import host
from minianyflow.support.errors import InputError

Compressed = Float[Tensor, "batch 2 heads compressed head_dim"]
Full = Float[Tensor, "batch 2 heads full head_dim"]
Cache = tuple[tuple[Compressed, Full], ...]
Mask = Bool[Tensor, "queries keys"] | BlockMask


def write_layer(layer: dict, key: Heads, value: Heads, compressed_tokens: int, offload: bool = False) -> None:
    """Put the keys and values of one layer into its dict, which was made for this call; (B, heads, tokens, D) each.

    offload: into CPU memory, from where `read_layer` takes them one layer at a time.
    """
    both = torch.stack([key, value], 1)  # (B, 2, heads, tokens, D)
    parts = both[..., :compressed_tokens, :], both[..., compressed_tokens:, :]
    layer["compressed"], layer["full"] = map(host.store, parts) if offload else parts


def read_layer(layer: dict, key: Tensor, value: Tensor, offload: bool = False) -> tuple[Tensor, Tensor]:
    """The cached keys and values of one layer with those of the current chunk after them."""
    # by name: the dict of a diffusers pipeline also holds the tensors that diffusers' own processor writes to
    cached = [layer[name] for name in ("compressed", "full") if name in layer]
    cached = [host.fetch(part, key.device) for part in cached] if offload else cached
    return torch.cat([*cached, torch.stack([key, value], 1)], 3).unbind(1)


def write_cache(transformer: nn.Module, x: Latents, prompt: Prompt, partition: Partition, mask: Mask | bool) -> Cache:
    """The cache of clean frames x, at t = r = 0. mask: as CausalAttention takes it."""
    zeros = torch.zeros(x.shape[:2], device=x.device)
    layers = [{} for _ in transformer.blocks]
    options = {"kv_cache": layers, "kv_cache_flag": {"is_cache_step": True}, "attention_mask": mask}
    transformer(x, zeros, zeros, prompt, partition, return_dict=False, **options)
    return tuple((layer["compressed"], layer["full"]) for layer in layers)


def read_cache(
    transformer: nn.Module, z: Latents, t: Timesteps, r: Timesteps, prompt: Prompt, partition: Partition, cache: Cache
) -> Latents:
    """The transformer's output for the last chunk z of the partition; t and r (B, F) as the transformer takes them."""
    layers = [{"compressed": old, "full": recent} for old, recent in cache] or [{} for _ in transformer.blocks]
    flags = {"is_cache_step": False, "num_cached_chunks": len(partition) - 1}
    return transformer(z, t, r, prompt, partition, return_dict=False, kv_cache=layers, kv_cache_flag=flags)[0]


def cached_frames(cache: Cache, blocks: int, rows: int, tokens: tuple[int, int]) -> int:
    """The number of frames in a cache; tokens: per frame, full and compressed.

    Raises InputError for a cache of another number of layers or rows.
    """
    if not cache:
        return 0
    if (len(cache), len(cache[0][0])) != (blocks, rows):
        raise InputError(f"a cache of {len(cache)} layers and {len(cache[0][0])} rows; expected {blocks} and {rows}")
    full, coarse = tokens
    return cache[0][0].shape[3] // max(coarse, 1) + cache[0][1].shape[3] // full
