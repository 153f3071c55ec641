"""Self-attention chunk by chunk: which token sees which, and rotary positions.

A clip is cut into chunks of (first, rest, rest, ...) frames. A chunk sees itself and earlier chunks: the last few at
full resolution, older ones compressed to coarse patches (FAR, arXiv 2503.19325).

Shapes:
    query, key, value           (B, heads, tokens, D)
    mask                        (queries, keys) bool, True where the query sees the key; a BlockMask on a GPU
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from minianyflow.networks.kv_cache import Mask, read_layer, write_layer
from minianyflow.networks.video import Heads, Partition, Tokens
from minianyflow.support.errors import InputError, choose


def chunk_partition(frames: int, first: int = 1, rest: int = 2, ragged: bool = False) -> Partition:
    """The chunks of a clip: (first, rest, rest, ...); if `ragged`, the last one may be shorter, as in AnyFlow.

    Raises InputError where they do not sum to `frames`.
    """
    left = (frames - first) % max(rest, 1)
    if min(first, rest) < 1 or frames < first or (left and not ragged):
        expected = f"{first}, or {rest}, {2 * rest}, ... more"
        raise InputError(f"{frames} frames do not make chunks of {first}, {rest}, {rest}, ...; expected {expected}")
    return (first,) + (rest,) * ((frames - first) // rest) + ((left,) if left else ())


def compressed_chunks(partition: Partition, full_chunk_limit: int, mode: str = "train") -> int:
    """The number of chunks, from the first on, that are compressed.

    mode: "train", or "cache", which leaves room for the next chunk, the one that will read the cache.
    """
    full = choose("mode", mode, {"train": full_chunk_limit, "cache": full_chunk_limit - 1})
    return max(0, len(partition) - full)


@lru_cache(maxsize=128)
def causal_mask(
    partition: Partition,
    tokens_per_frame: int,
    compressed_tokens_per_frame: int,
    full_chunk_limit: int,
    clean: bool = False,
    mode: str = "train",
    device: torch.device | str = "cpu",
) -> Mask:
    """Which query sees which key: (queries, keys) bool; on a GPU a BlockMask, for flex attention.

    Tokens in order: compressed frames, full ones and, if `clean`, the clean copies of the full ones. mode: as in
    `compressed_chunks`. The rule is that of diffusers' mask, without the padding to a multiple of 128.
    """
    old = compressed_chunks(partition, full_chunk_limit, mode)
    per_frame = [compressed_tokens_per_frame] * old + [tokens_per_frame] * (len(partition) - old)
    chunk = torch.arange(len(partition)).repeat_interleave(torch.tensor(partition) * torch.tensor(per_frame))
    private = torch.zeros_like(chunk, dtype=torch.bool)  # a noisy token that has a clean copy: only its chunk sees it
    if clean:
        private = torch.cat([chunk >= old, private[chunk >= old]])
        chunk = torch.cat([chunk, chunk[chunk >= old]])
    chunk, private = chunk.to(device), private.to(device)

    def sees(batch, head, query, key):
        same_chunk = (chunk[key] == chunk[query]) & (private[key] == private[query])
        return same_chunk | (chunk[key] < chunk[query]) & ~private[key]

    if chunk.is_cuda:
        return block_mask(sees, 2 * chunk + private)
    token = torch.arange(len(chunk), device=device)
    return sees(None, None, token[:, None], token)


def block_mask(sees: Callable[..., Tensor], kind: Int[Tensor, " tokens"], size: int = 128) -> BlockMask:
    """The BlockMask of a rule `sees(batch, head, query, key)` that depends on the kinds of query and key alone.

    kind: a whole number per token. It looks at one token per kind. torch's `create_block_mask` looks at all pairs of
    tokens: for a moment some 10 GB at 30,030 of them, extrapolated from a CPU. size: tokens per block.
    """
    kinds, place = kind.unique(return_inverse=True)
    token = torch.arange(len(kind), device=kind.device)
    first = torch.stack([token[place == index][0] for index in range(len(kinds))])
    seen = sees(None, None, first[:, None], first).float()
    within = seen.new_zeros(-(-len(kind) // size), len(kinds)).index_put_((token // size, place), seen.new_ones(()))
    some, hidden = (within @ pairs @ within.T > 0 for pairs in (seen, 1 - seen))
    if len(kind) % size:  # the last block is not full
        hidden[-1] = hidden[:, -1] = True
    blocks = [dense[None, None].int() for dense in (some & hidden, some & ~hidden)]
    order = [(dense.sum(-1).int(), dense.argsort(dim=-1, descending=True, stable=True).int()) for dense in blocks]
    return BlockMask.from_kv_blocks(*order[0], *order[1], size, sees, (len(kind), len(kind)))


@lru_cache
def _compiled_flex_attention():
    # uncompiled, flex attention makes the (queries, keys) matrix, and torch falls back to that after 8 graphs
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention)


def attend(query: Heads, key: Tensor, value: Tensor, mask: Mask | None = None) -> Heads:
    """Softmax attention of (B, heads, tokens, D); a mask of None lets every query see every key."""
    if isinstance(mask, BlockMask):
        count = query.shape[2]
        padding = mask.seq_lengths[0] - count  # diffusers' pipelines make masks for multiples of 128
        query, key, value = (functional.pad(part, (0, 0, 0, padding)) for part in (query, key, value))
        flex = _compiled_flex_attention() if query.is_cuda else flex_attention
        return flex(query, key, value, block_mask=mask)[:, :, :count]
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def rotate(x: Heads, rotations: Tensor) -> Heads:
    """Rotary embedding (RoFormer, arXiv 2104.09864): the D / 2 pairs of each token turn by its position's angles.

    rotations: (1, 1, tokens, D / 2) complex, as diffusers has them, or (1, 1, tokens, D / 2, 2), cosine and sine.
    """
    rotations = torch.view_as_real(rotations) if rotations.is_complex() else rotations
    pairs = rearrange(x.to(rotations.dtype), "b heads n (pair two) -> b heads n pair two", two=2)
    if torch.compiler.is_compiling():  # inductor fuses these, and leaves complex numbers as they are
        (a, b), (cosine, sine) = pairs.unbind(-1), rotations.unbind(-1)
        turned = torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations))
    return turned.flatten(3).type_as(x)


class CausalAttention:
    """Attention processor of the causal transformer: `block.attn1.set_processor(CausalAttention())`.

    It takes the place of diffusers' AnyFlowCausalAttnProcessor, which has no backward on CPU, builds its mask at every
    call and, where it reads a cache, pads the keys with zeros (as many as fill the queries up to a multiple of 128)
    that the softmax counts with a logit of 0. padded: with these keys of zeros, to reproduce a stock pipeline.
    offload: caches that it fills and reads are in CPU memory.
    """

    def __init__(self, padded: bool = False, offload: bool = False):
        self.padded, self.offload = padded, offload

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tokens,
        attention_mask: Mask | bool | None = None,
        rotary_emb: dict | None = None,
        kv_cache: dict | None = None,
        kv_cache_flag: dict | None = None,
    ) -> Tokens:
        """The arguments are those of diffusers' processor; a mask of None or True lets every query see every key."""
        value = attn.to_v(hidden_states)
        # the norms compute in float32: back to the dtype of attention
        query = attn.norm_q(attn.to_q(hidden_states)).to(value.dtype)
        key = attn.norm_k(attn.to_k(hidden_states)).to(value.dtype)
        query, key, value = (
            rearrange(part, "b n (heads d) -> b heads n d", heads=attn.heads) for part in (query, key, value)
        )
        layout = (rotary_emb or {}).get("layout")  # of processes that share tokens: sequence.py
        if layout:
            query, key, value = map(layout.to_heads, (query, key, value))
        if kv_cache is not None and kv_cache_flag["is_cache_step"]:
            write_layer(kv_cache, key, value, kv_cache_flag["num_compressed_tokens"], self.offload)
        elif kv_cache is not None:
            key, value = read_layer(kv_cache, key, value, self.offload)
        if rotary_emb is not None:  # after the cache: positions count from the clip's first frame
            query, key = rotate(query, rotary_emb["query"]), rotate(key, rotary_emb["key"])
        if self.padded and attention_mask is None:
            key, value = (functional.pad(part, (0, 0, 0, -query.shape[2] % 128)) for part in (key, value))
        mask = None if attention_mask is True else attention_mask
        out = attend(query, key, value, mask)
        out = rearrange(layout.to_tokens(out) if layout else out, "b heads n d -> b n (heads d)")
        return attn.to_out[1](attn.to_out[0](out))
