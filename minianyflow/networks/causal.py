"""Frame by frame: diffusers' causal transformer as u(z, t, r, prompt), its memory, and the rollout over chunks.

A clip is cut into chunks of (first, rest, rest, ...) frames. A chunk sees earlier ones clean: the last few in full,
older ones in coarse patches (FAR, arXiv 2503.19325). The transformer is diffusers', the attention our own: stock's has
no backward on CPU, builds its mask anew at every call and, where it reads a cache, adds keys of zeros that nothing
masks: as many as fill the *queries* up to a multiple of 128, each in the softmax with a logit of 0.

Shapes, beyond those of wan.py:
    partition                       (n_1, n_2, ...), the frames of every chunk
    clean, past, context, prefix    (B, frames, C, H, W), clean frames: t = 0
    cache                           a tuple over layers of (compressed, full), each (B, 2, heads, tokens, D): the keys,
                                    before their rotary embedding, and the values
"""

from functools import lru_cache
from itertools import accumulate

import torch
from diffusers import AnyFlowFARTransformer3DModel
from diffusers.models.transformers.transformer_anyflow_far import apply_rotary_emb
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from minianyflow.flow_map import rollout
from minianyflow.interpolant import check_same_shape
from minianyflow.networks.wan import TIMESTEPS, TINY, check_latents, copy_time_embedder, count_time, in_dtype
from minianyflow.on_policy import backward_simulation_times
from minianyflow.support.errors import InputError, choose

TINY_CAUSAL = {**TINY, "full_chunk_limit": 2, "chunk_partition": (1, 2, 2)}


def chunk_partition(frames, first=1, rest=2, ragged=False):
    """The chunks of a clip: (first, rest, rest, ...), the last one shorter if need be and `ragged`, as in AnyFlow.

    Raises InputError where they do not sum to `frames`.
    """
    left = (frames - first) % max(rest, 1)
    if min(first, rest) < 1 or frames < first or (left and not ragged):
        expected = f"{first}, or {rest}, {2 * rest}, ... more"
        raise InputError(f"{frames} frames do not make chunks of {first}, {rest}, {rest}, ...; expected {expected}")
    return (first,) + (rest,) * ((frames - first) // rest) + ((left,) if left else ())


def compressed_chunks(partition, full_chunk_limit, mode="train"):
    """How many of the first chunks are seen compressed. A cache leaves room for the chunk that will read it."""
    full = choose("mode", mode, {"train": full_chunk_limit, "cache": full_chunk_limit - 1})
    return max(0, len(partition) - full)


@lru_cache(maxsize=128)
def causal_mask(
    partition, tokens_per_frame, compressed_tokens_per_frame, full_chunk_limit, clean=False, mode="train", device="cpu"
):
    """Which query sees which key: (Q, K) bool, True where it does; on a GPU a BlockMask, for flex attention.

    Tokens in order: compressed frames, full ones and, if `clean`, the clean copies of these. mode: "train", or "cache"
    for a clip to remember. The rule is that of stock's mask, the length the true one.
    """
    old = compressed_chunks(partition, full_chunk_limit, mode)
    per_frame = [compressed_tokens_per_frame] * old + [tokens_per_frame] * (len(partition) - old)
    chunk = torch.arange(len(partition)).repeat_interleave(torch.tensor(partition) * torch.tensor(per_frame))
    private = torch.zeros_like(chunk, dtype=torch.bool)  # noisy with a clean copy: no other chunk sees it
    if clean:
        private = torch.cat([chunk >= old, private[chunk >= old]])
        chunk = torch.cat([chunk, chunk[chunk >= old]])
    chunk, private = chunk.to(device), private.to(device)

    def sees(batch, head, query, key):
        own = (chunk[key] == chunk[query]) & (private[key] == private[query])
        return own | (chunk[key] < chunk[query]) & ~private[key]

    if chunk.is_cuda:
        return create_block_mask(sees, None, None, len(chunk), len(chunk), device=device)
    every = torch.arange(len(chunk), device=device)
    return sees(None, None, every[:, None], every)


@lru_cache
def _compiled_flex():
    # as it stands it makes the (Q, K) matrix, and torch goes back to that after 8 graphs of one function
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention)


def attend(query, key, value, mask=None):
    """Attention of (B, heads, tokens, D). mask: None, (Q, K) bool or a BlockMask."""
    if isinstance(mask, BlockMask):
        count = query.shape[2]
        spare = mask.seq_lengths[0] - count  # a stock pipeline makes its masks for multiples of 128
        query, key, value = (functional.pad(each, (0, 0, 0, spare)) for each in (query, key, value))
        flex = _compiled_flex() if query.is_cuda else flex_attention
        return flex(query, key, value, block_mask=mask)[:, :, :count]
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def rotate(x, turns):
    """Rotary embedding of x (B, heads, N, D): stock's, or in float32 for turns (1, 1, N, D / 2, 2), cosine and sine."""
    if turns.is_complex():
        return apply_rotary_emb(x, turns)
    pairs = x.float().unflatten(3, (-1, 2))
    if torch.compiler.is_compiling():  # which fuses these, and leaves complex numbers as they are
        (a, b), (cosine, sine) = pairs.unbind(-1), turns.unbind(-1)
        turned = torch.stack([a * cosine - b * sine, a * sine + b * cosine], -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    return turned.flatten(3).type_as(x)


class CausalAttention:
    """Self-attention processor for the causal transformer: `block.attn1.set_processor(CausalAttention())`.

    It writes nothing in place: a step that remembers puts new tensors into the dict it is given (made for that call),
    a step that reads leaves it alone. So checkpointing may run either of them again.
    padded: stock's keys of zeros where a cache is read, to reproduce a stock pipeline or to see what they do.
    """

    def __init__(self, padded=False):
        self.padded = padded

    def __call__(self, attn, hidden_states, attention_mask=None, rotary_emb=None, kv_cache=None, kv_cache_flag=None):
        """Called as stock's AnyFlowCausalAttnProcessor; attention_mask None or True means that every key is seen."""
        value = attn.to_v(hidden_states)
        # the norms compute in float32: back to what attention computes in
        query = attn.norm_q(attn.to_q(hidden_states)).to(value.dtype)
        key = attn.norm_k(attn.to_k(hidden_states)).to(value.dtype)
        query, key, value = (each.unflatten(2, (attn.heads, -1)).transpose(1, 2) for each in (query, key, value))
        if kv_cache is not None:
            both = torch.stack([key, value], 1)  # (B, 2, heads, tokens, D)
            if kv_cache_flag["is_cache_step"]:
                old = kv_cache_flag["num_compressed_tokens"]
                kv_cache["compressed"], kv_cache["full"] = both[..., :old, :], both[..., old:, :]
            else:
                # by name: a stock pipeline's dict also has room for stock to write to
                known = [kv_cache[name] for name in ("compressed", "full") if name in kv_cache]
                key, value = torch.cat([*known, both], 3).unbind(1)
        if rotary_emb is not None:  # after the cache: a key's position counts from the clip's first frame
            query, key = rotate(query, rotary_emb["query"]), rotate(key, rotary_emb["key"])
        if self.padded and attention_mask is None:
            key, value = (functional.pad(each, (0, 0, 0, -query.shape[2] % 128)) for each in (key, value))
        mask = None if attention_mask is True else attention_mask
        hidden_states = attend(query, key, value, mask).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](hidden_states))


class CausalNetwork(nn.Module):
    """The average velocity u(z, t, r, prompt) of an AnyFlowFARTransformer3DModel, chunk by chunk.

    Chunks are (first, rest, rest, ...), the last one shorter where `ragged`; with `first` as long as the clip it is the
    bidirectional model. The transformer is given our attention (`padded`: see CausalAttention). What a chunk sees of
    earlier ones is a condition:

        nothing    their noisy states
        whole      (B,), whatever is in it: the clip is one chunk, as in the bidirectional model
        clean      the clean clip of z: teacher forcing, all chunks at once
        past       with or without `clean`: the chunks older than the last full_chunk_limit (of the transformer's
                   configuration), compressed; z, clean and u are the frames after them
        context    all frames before the one chunk z, worked through at every evaluation
        cache      what u(context, None, None, prompt, remember=True) made of them once; () before the first chunk
    """

    def __init__(self, transformer, first=1, rest=2, timesteps=TIMESTEPS, padded=False, ragged=False):
        super().__init__()
        self.transformer, self.timesteps = transformer, timesteps
        self.first, self.rest, self.ragged = first, rest, ragged
        for block in transformer.blocks:
            block.attn1.set_processor(CausalAttention(padded))

    def partition(self, frames):
        """The chunks of a clip of so many frames."""
        return chunk_partition(frames, self.first, self.rest, self.ragged)

    def forward(self, z, t, r, prompt, clean=None, past=None, context=None, cache=None, whole=None, remember=False):
        """z (B, F, C, H, W), t and r (B,) or (B, F), prompt (B, L, D); the shape of z, or with `remember` a cache.

        `remember` takes z as clean, whatever t and r. Raises InputError for frames that do not make chunks, a context
        that does not fit them, and what WanNetwork refuses.
        """
        check_latents(z, self.transformer.config)
        ways = {"cache": cache, "context": context, "clean or past": clean if past is None else past, "whole": whole}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > (not remember):
            raise InputError(f"got {', '.join(given)}; expected one of them at most, and none with remember")
        outside = z.dtype
        z, prompt, clean, past, context = in_dtype(self.transformer, z, prompt, clean, past, context)
        if remember:
            return self._remember(z, prompt)
        t, r = (count_time(each, z, self.timesteps) for each in (t, r))
        if cache is not None:
            return self._read(z, t, r, prompt, cache).to(outside)
        if context is not None:
            return self._recompute(z, t, r, prompt, context).to(outside)
        chunks = (z.shape[1],) if whole is not None else None
        return self._all_at_once(z, t, r, prompt, clean, z[:, :0] if past is None else past, chunks).to(outside)

    def _all_at_once(self, z, t, r, prompt, clean, past, chunks=None):
        partition, old = self._chunks(past.shape[1] + z.shape[1], z, chunks=chunks)
        if past.shape[1] != old:
            raise InputError(
                f"past of {past.shape[1]} frames in a clip of chunks {partition}; expected past= of {old} frames: "
                f"all but the last {self.transformer.config.full_chunk_limit} chunks"
            )
        if clean is not None:
            check_same_shape("clean", clean, z)
        zeros = t.new_zeros(past.shape[:2])
        z, t, r = (torch.cat(pair, 1) for pair in ((past, z), (zeros, t), (zeros, r)))
        copies = {} if clean is None else {"clean_hidden_states": clean, "clean_timestep": torch.zeros_like(t[:, old:])}
        mask = self._mask(partition, z, clean is not None, "train")
        return self.transformer(z, t, r, prompt, partition, attention_mask=mask, return_dict=False, **copies)[0]

    def _recompute(self, z, t, r, prompt, context):
        _, old = self._next_chunk(context.shape[1], z)
        past, recent = context[:, :old], context[:, old:]
        clean = torch.cat([recent, z], 1)  # z among the clean ones fills its place: nothing noisy sees it there
        t, r = (torch.cat([each.new_zeros(recent.shape[:2]), each], 1) for each in (t, r))
        return self._all_at_once(clean, t, r, prompt, clean, past)[:, -z.shape[1] :]

    def _remember(self, x, prompt):
        partition, _ = self._chunks(x.shape[1], x, "cache")
        zeros = torch.zeros(x.shape[:2], device=x.device)
        layers = [{} for _ in self.transformer.blocks]  # this call's own: see CausalAttention
        memory = {"kv_cache": layers, "kv_cache_flag": {"is_cache_step": True}}
        mask = self._mask(partition, x, False, "cache")
        self.transformer(x, zeros, zeros, prompt, partition, attention_mask=mask, return_dict=False, **memory)
        return tuple((layer["compressed"], layer["full"]) for layer in layers)

    def _read(self, z, t, r, prompt, cache):
        layers = [{"compressed": old, "full": recent} for old, recent in cache] or [{} for _ in self.transformer.blocks]
        rows = len(cache[0][0]) if cache else len(z)
        if (len(layers), rows) != (len(self.transformer.blocks), len(z)):
            raise InputError(
                f"a cache of {len(layers)} layers and {rows} rows; expected {len(self.transformer.blocks)} and {len(z)}"
            )
        full, coarse = self._tokens(z)
        seen = cache[0][0].shape[3] // max(coarse, 1) + cache[0][1].shape[3] // full if cache else 0
        partition, _ = self._next_chunk(seen, z)
        flags = {"is_cache_step": False, "num_cached_chunks": len(partition) - 1}
        memory = {"kv_cache": layers, "kv_cache_flag": flags}
        return self.transformer(z, t, r, prompt, partition, return_dict=False, **memory)[0]

    def _next_chunk(self, seen, z):
        """The clip up to and with z, which must be the one chunk after `seen` frames; as `_chunks`."""
        size = self.rest if seen else self.first
        if z.shape[1] != size and not (self.ragged and seen and z.shape[1] < size):
            raise InputError(f"{z.shape[1]} frames after {seen} known ones; expected the next chunk, {size} frames")
        return self._chunks(seen + z.shape[1], z)

    def _chunks(self, frames, z, mode="train", chunks=None):
        """The partition of `frames` and how many of them are compressed, checked against the transformer."""
        config = self.transformer.config
        partition = chunks or self.partition(frames)
        if frames > config.rope_max_seq_len:
            raise InputError(f"{frames} frames; expected at most rope_max_seq_len, {config.rope_max_seq_len}")
        old = sum(partition[: compressed_chunks(partition, config.full_chunk_limit, mode)])
        _, high, wide = config.compressed_patch_size
        if old and (z.shape[3] % high or z.shape[4] % wide):
            raise InputError(
                f"latents of {z.shape[3]} x {z.shape[4]} in {len(partition)} chunks; expected a size that compressed "
                f"patches {high} x {wide} divide"
            )
        return partition, old

    def _tokens(self, z):
        """Tokens a frame, full and compressed."""
        sizes = (self.transformer.config.patch_size, self.transformer.config.compressed_patch_size)
        return tuple((z.shape[3] // high) * (z.shape[4] // wide) for _, high, wide in sizes)

    def _mask(self, partition, z, clean, mode):
        if len(partition) == 1 and not clean:
            return True  # given None, stock would build one
        limit = self.transformer.config.full_chunk_limit
        return causal_mask(partition, *self._tokens(z), limit, clean, mode, z.device)


def causal_rollout(
    u, z, times, prompt, first=1, rest=2, prefix=None, context_gradient=False, cached=True, ragged=False
):
    """Chunk by chunk, each a rollout along `times` that knows what came out before; clips of any length.

    u: a CausalNetwork, or what wraps one, with the same `first`, `rest` and `ragged`. z (B, F, C, H, W), times (N + 1,)
    or (N + 1, B), prompt (B, L, D). prefix (B, P, C, H, W): clean first frames, up to the end of a chunk (an image is
    one frame); they stand in the trajectory as they are. Returns all of it, (N + 1, B, F, C, H, W).
    context_gradient: whether gradient reaches earlier chunks, and the weights by way of the cache. cached=False works
    through the context at every evaluation: the same states and, with `context_gradient`, gradients, for more work.
    """
    partition = chunk_partition(z.shape[1], first, rest, ragged)
    context = z[:, :0] if prefix is None else prefix
    starts = (0, *accumulate(partition[:-1]))
    if context.shape != z[:, : context.shape[1]].shape or context.shape[1] not in starts:
        raise InputError(
            f"prefix {tuple(context.shape)} of a clip {tuple(z.shape)}; expected the clip's shape with "
            f"{' or '.join(map(str, starts[1:])) or 'no'} frames: whole chunks, and fewer than the clip"
        )
    trajectory = [context.expand(len(times), *context.shape)]
    for size in partition[starts.index(context.shape[1]) :]:
        start = context.shape[1]
        context = context if context_gradient else context.detach()
        known = {"context": context} if not cached else {"cache": ()}
        if cached and start:
            with torch.set_grad_enabled(context_gradient and torch.is_grad_enabled()):
                known["cache"] = u(context, None, None, prompt=prompt, remember=True)
        trajectory.append(rollout(u, z[:, start : start + size], times, prompt=prompt, **known))
        context = torch.cat([context, trajectory[-1][-1]], 1)
    return torch.cat(trajectory, 2)


def causal_backward_simulation(context_gradient=False, first=1, rest=2, ragged=False):
    """`backward_simulation` chunk by chunk, for OnPolicyLoss and FakeScoreLoss: at most three jumps a chunk."""

    def simulate(u, z, lengths, step, shift=1.0, *, prompt):
        times = backward_simulation_times(lengths, step, shift)
        return causal_rollout(u, z, times, prompt, first, rest, context_gradient=context_gradient, ragged=ragged)

    return simulate


def tiny_causal(seed=0, **changes):
    """A fresh causal transformer of the size in TINY, for latents (5, 4, 4, 4) in chunks 1, 2, 2."""
    torch.manual_seed(seed)
    transformer = AnyFlowFARTransformer3DModel(**TINY_CAUSAL | changes)
    copy_time_embedder(transformer)
    return transformer


@torch.no_grad()
def causal_from(transformer, full_chunk_limit=2, partition=(1, 2, 2)):
    """A causal transformer with copies of the weights of a bidirectional AnyFlowTransformer3DModel.

    Coarse patches start as stock starts them: from the weights of full ones, interpolated trilinearly.
    """
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    causal = AnyFlowFARTransformer3DModel(**config, full_chunk_limit=full_chunk_limit, chunk_partition=partition)
    far = coarse_patches(transformer.patch_embedding, causal.config.compressed_patch_size)
    weights = {name: value.clone() for name, value in {**transformer.state_dict(), **far}.items()}
    causal.load_state_dict(weights, assign=True)  # assigned: each keeps its dtype
    return causal.to(transformer.device)


def coarse_patches(patch, size):
    """The weights of far_patch_embedding, for patches of `size`, made of the full patches' embedding."""
    coarse = functional.interpolate(patch.weight.float(), size=size, mode="trilinear", align_corners=False)
    return {
        "far_patch_embedding.weight": coarse.to(patch.weight.dtype),
        "far_patch_embedding.bias": patch.bias.detach().clone(),
    }
