"""Blocks of diffusers' transformers as they train at full size: the same sums, with less copied.

`lean` changes how a transformer works, never its weights or what they are called. At 81 frames of 480 x 832 a clip has
32,760 tokens, and diffusers' blocks
    copy what a frame's time makes of it, six vectors, to each of its 1560 tokens, and again in float32 in every block;
    turn queries and keys in float64.
What comes out is equal but for rounding (tests/networks/test_blocks.py).
"""

from functools import partial

import torch

from minianyflow.networks.causal import CausalAttention


def lean(transformer):
    """Have a transformer, of either architecture, work with one modulation a frame and positions in float32."""
    embedder, rope = transformer.condition_embedder, transformer.rope
    embedder.forward_timestep = partial(_times, embedder)
    rope.forward = partial(_positions, rope)
    for block in transformer.blocks:
        block.forward = partial(_block, block)
        block.attn1.set_processor(CausalAttention())
    return transformer


def compile_blocks(transformer, backend="inductor"):
    """torch.compile for each block, as diffusers' compile_repeated_blocks: one graph serves all blocks of a kind.

    A block is traced anew for each role, with and without gradient, and for rows that are one or several.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # beyond it: slow, silently
    for block in transformer.blocks:
        block.compile(backend=backend)
    return transformer


def _times(embedder, t, r, prompt, tokens):
    """What stock's forward_timestep returns for t and r (B, F), but the modulation a frame: (B, N, D), (B, F, 6 D).

    The first is used once, after all blocks.
    """
    whole, modulation = type(embedder).forward_timestep(embedder, t, r, prompt, 1)
    return whole.repeat_interleave(tokens, dim=1), modulation


def _positions(rope, **layout):
    """Stock's rotations as cosine and sine (1, 1, N, D / 2, 2), float32, and the tokens of a frame, full and coarse."""
    turns = type(rope).forward(rope, **layout)
    told = layout["layout_cfg"] if "layout_cfg" in layout else layout["far_cfg"]
    tokens = told["full_token_per_frame"], told.get("compressed_token_per_frame", 0)
    return {name: torch.view_as_real(each.to(torch.complex64)) for name, each in turns.items()} | {"tokens": tokens}


def _block(block, hidden, prompt, modulation, positions, mask, kv_cache=None, kv_cache_flag=None):
    """Stock's block, for modulation (B, frames, 6, D) instead of (B, N, 6, D)."""
    # (B, frames, D) each
    shift, scale, gate, late_shift, late_scale, late_gate = (block.scale_shift_table + modulation.float()).unbind(2)
    each = partial(_by_frame, tokens=positions["tokens"])
    memory = {} if kv_cache is None else {"kv_cache": kv_cache, "kv_cache_flag": kv_cache_flag}

    inside = each(_move, block.norm1(hidden.float()), shift, scale).type_as(hidden)
    seen = block.attn1(inside, attention_mask=mask, rotary_emb=positions, **memory)
    hidden = (hidden.float() + each(_gate, seen, gate)).type_as(hidden)

    inside = block.norm2(hidden.float()).type_as(hidden)
    hidden = hidden + block.attn2(inside, encoder_hidden_states=prompt)

    inside = each(_move, block.norm3(hidden.float()), late_shift, late_scale).type_as(hidden)
    return (hidden.float() + each(_gate, block.ffn(inside).float(), late_gate)).type_as(hidden)


def _move(x, shift, scale):
    return x * (1 + scale) + shift


def _gate(x, gate):
    return x * gate


def _by_frame(action, x, *vectors, tokens):
    """action(x, *vectors) for x (B, N, D), vectors (B, frames, D): the first frames may be coarse, of fewer tokens."""
    full, coarse = tokens
    count, frames = x.shape[1], vectors[0].shape[1]
    old = (frames * full - count) // (full - coarse)
    parts = [(0, old, coarse)] * (old > 0) + [(old, frames, full)] * (frames > old)
    out, start = [], 0
    for first, last, size in parts:
        end = start + (last - first) * size
        here = x[:, start:end].unflatten(1, (last - first, size))
        out.append(action(here, *(vector[:, first:last, None] for vector in vectors)).flatten(1, 2))
        start = end
    return out[0] if len(out) == 1 else torch.cat(out, 1)
