"""Video chunk by chunk: diffusers' causal transformer as u(z, t, r, prompt), and the rollout over chunks.

causal_attention.py says which chunk sees which, kv_cache.py what is kept of earlier chunks. Shapes beside wan.py's:
    clean, past, context, prefix    (B, frames, C, H, W), clean frames: t = 0
    known                           (B, frames) of z, or of the clip that is rolled out: see known_frames.py
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate

import torch
from diffusers import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from minianyflow.flow_map import rollout
from minianyflow.networks.causal_attention import CausalAttention, causal_mask, chunk_partition, compressed_chunks
from minianyflow.networks.known_frames import Known, keep_known, known_times
from minianyflow.networks.kv_cache import Cache, cached_frames, read_cache, write_cache
from minianyflow.networks.video import TIMESTEPS, Latents, Partition, Prompt, VideoTimes, to_timesteps
from minianyflow.networks.wan import check_latents, to_compute_dtype
from minianyflow.notation import Grid, Network, Trajectory
from minianyflow.on_policy import backward_simulation_times
from minianyflow.support.checks import check_same_shape
from minianyflow.support.errors import InputError
from minianyflow.support.recompute import recompute

Clean = Float[Tensor, "batch clean_frames channels height width"]
Rows = Float[Tensor, "batch"]
Past = Float[Tensor, "batch past_frames channels height width"]


class CausalNetwork(nn.Module):
    """The average velocity u(z, t, r, prompt) of an AnyFlowFARTransformer3DModel, chunk by chunk.

    Chunks are (first, rest, rest, ...), the last one shorter where `ragged`; with `first` as long as the clip it is the
    bidirectional model. The transformer gets the attention of causal_attention.py (`padded`, `offload`: see there). A
    condition, at most one, says what a chunk sees of earlier chunks:

        none            their noisy states
        single_chunk    (B,), any values: the clip is one chunk, as in the bidirectional model
        clean           the clean clip of z: teacher forcing, all chunks at once
        past            with or without `clean`: the chunks older than the transformer's last full_chunk_limit,
                        compressed; z, clean and u are the frames after them
        context         all clean frames before the one chunk z, computed at every evaluation
        cache           the output of u(context, None, None, prompt, fill_cache=True); () before the first chunk
    """

    def __init__(
        self,
        transformer: nn.Module,
        first: int = 1,
        rest: int = 2,
        timesteps: float = TIMESTEPS,
        padded: bool = False,
        ragged: bool = False,
        offload: bool = False,
    ):
        super().__init__()
        self.transformer, self.timesteps = transformer, timesteps
        self.first, self.rest, self.ragged = first, rest, ragged
        for block in transformer.blocks:
            block.attn1.set_processor(CausalAttention(padded, offload))

    def partition(self, frames: int) -> Partition:
        """The chunks of a clip of `frames` frames; if ragged, one that is shorter than the first chunk is one chunk."""
        return chunk_partition(frames, min(self.first, frames) if self.ragged else self.first, self.rest, self.ragged)

    def forward(
        self,
        z: Latents,
        t: VideoTimes | None,
        r: VideoTimes | None,
        prompt: Prompt,
        clean: Clean | None = None,
        past: Past | None = None,
        context: Past | None = None,
        cache: Cache | None = None,
        single_chunk: Rows | None = None,
        known: Known | None = None,
        fill_cache: bool = False,
    ) -> Latents | Cache:
        """The average velocity of z; with `fill_cache` the cache of clean frames z, whatever t and r.

        Raises InputError for frames that do not make chunks, a context that does not fit them, and as WanNetwork.
        """
        check_latents(z, self.transformer.config)
        teacher_forcing = clean if past is None else past
        ways = {"cache": cache, "context": context, "clean or past": teacher_forcing, "single_chunk": single_chunk}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) > (not fill_cache):
            raise InputError(f"got {', '.join(given)}; expected one of them at most, and none with fill_cache")
        dtype = z.dtype
        z, prompt, clean, past, context = to_compute_dtype(self.transformer, z, prompt, clean, past, context)
        if fill_cache:
            partition = self.partition(z.shape[1])
            self._compressed_frames(partition, z, "cache")
            return write_cache(self.transformer, z, prompt, partition, self._mask(partition, z, False, "cache"))
        t, r = known_times(known, *(to_timesteps(time, z, self.timesteps) for time in (t, r)))
        if cache is not None:
            before = cached_frames(cache, len(self.transformer.blocks), len(z), self._tokens(z))
            u = read_cache(self.transformer, z, t, r, prompt, self._next_chunk(before, z)[0], cache)
        elif context is not None:
            u = self._recompute_context(z, t, r, prompt, context)
        else:
            partition = (z.shape[1],) if single_chunk is not None else None
            u = self._all_chunks(z, t, r, prompt, clean, z[:, :0] if past is None else past, partition)
        return keep_known(known, u.to(dtype))

    def _all_chunks(self, z, t, r, prompt, clean, past, partition=None):
        partition = partition or self.partition(past.shape[1] + z.shape[1])
        old = self._compressed_frames(partition, z)
        if past.shape[1] != old:
            expected = f"{old} frames: all but the last {self.transformer.config.full_chunk_limit} chunks"
            raise InputError(f"past of {past.shape[1]} frames in chunks {partition}; expected past= of {expected}")
        if clean is not None:
            check_same_shape("clean", clean, z)
        zeros = t.new_zeros(past.shape[:2])
        z, t, r = (torch.cat(pair, 1) for pair in ((past, z), (zeros, t), (zeros, r)))
        copies = {} if clean is None else {"clean_hidden_states": clean, "clean_timestep": torch.zeros_like(t[:, old:])}
        mask = self._mask(partition, z, clean is not None, "train")
        return self.transformer(z, t, r, prompt, partition, attention_mask=mask, return_dict=False, **copies)[0]

    def _recompute_context(self, z, t, r, prompt, context):
        _, old = self._next_chunk(context.shape[1], z)
        past, recent = context[:, :old], context[:, old:]
        clean = torch.cat([recent, z], 1)  # z fills its place among the clean frames: no noisy token sees it there
        t, r = (torch.cat([time.new_zeros(recent.shape[:2]), time], 1) for time in (t, r))
        return self._all_chunks(clean, t, r, prompt, clean, past)[:, -z.shape[1] :]

    def _next_chunk(self, before, z):
        """The partition of the clip that ends with z, one chunk after `before` frames; and its compressed frames."""
        size = self.rest if before else self.first
        if z.shape[1] != size and not (self.ragged and before and z.shape[1] < size):
            raise InputError(f"{z.shape[1]} frames after {before} clean ones; expected the next chunk, {size} frames")
        partition = self.partition(before + z.shape[1])
        return partition, self._compressed_frames(partition, z)

    def _compressed_frames(self, partition, z, mode="train"):
        """The number of compressed frames, after checks against the transformer's configuration."""
        config, frames = self.transformer.config, sum(partition)
        if frames > config.rope_max_seq_len:
            raise InputError(f"{frames} frames; expected at most rope_max_seq_len, {config.rope_max_seq_len}")
        old = sum(partition[: compressed_chunks(partition, config.full_chunk_limit, mode)])
        _, high, wide = config.compressed_patch_size
        if old and (z.shape[3] % high or z.shape[4] % wide):
            expected = f"a size that compressed patches {high} x {wide} divide"
            raise InputError(f"latents of {z.shape[3]} x {z.shape[4]} in {len(partition)} chunks; expected {expected}")
        return old

    def _tokens(self, z):
        """Tokens per frame, full and compressed."""
        sizes = (self.transformer.config.patch_size, self.transformer.config.compressed_patch_size)
        return tuple((z.shape[3] // high) * (z.shape[4] // wide) for _, high, wide in sizes)

    def _mask(self, partition, z, clean, mode):
        if len(partition) == 1 and not clean:
            return True  # where it is None, diffusers builds a mask
        limit = self.transformer.config.full_chunk_limit
        return causal_mask(partition, *self._tokens(z), limit, clean, mode, z.device)


def causal_rollout(
    u: Network,
    z: Latents,
    times: Grid,
    prompt: Prompt,
    first: int = 1,
    rest: int = 2,
    prefix: Past | None = None,
    context_gradient: bool = False,
    cached: bool = True,
    ragged: bool = False,
    known: Known | None = None,
    recomputed: bool = False,
) -> Trajectory:
    """Chunk by chunk, each a rollout along `times` given the clean ends of the chunks before; clips of any length.

    u: a CausalNetwork, or a wrapper of one, with the same `first`, `rest` and `ragged`. prefix: clean first frames, up
    to the end of a chunk (an image is one frame); they stand in the trajectory unchanged. Returns the trajectory.
    context_gradient: whether gradient reaches earlier chunks, and the weights through the cache. cached=False computes
    the context at every evaluation: the same states and, with `context_gradient`, gradients, for more work.
    recomputed: of each chunk but the last only its ends are kept; its cache and its jumps are computed again in the
    backward (`support.recompute`).
    Raises InputError for frames that do not make chunks, or a prefix that is not whole chunks of the clip's shape.
    """
    partition = chunk_partition(z.shape[1], first, rest, ragged)
    context = z[:, :0] if prefix is None else prefix
    starts = (0, *accumulate(partition[:-1]))
    if context.shape != z[:, : context.shape[1]].shape or context.shape[1] not in starts:
        frames = " or ".join(map(str, starts[1:])) or "no"
        expected = f"the clip's shape with {frames} frames: whole chunks, and fewer than the clip"
        raise InputError(f"prefix {tuple(context.shape)} of a clip {tuple(z.shape)}; expected {expected}")

    def chunk(context, z):
        start = context.shape[1]
        condition = {"context": context} if not cached else {"cache": ()}
        condition |= {} if known is None else {"known": known[:, start : start + z.shape[1]]}
        if cached and start:
            with torch.set_grad_enabled(context_gradient and torch.is_grad_enabled()):
                condition["cache"] = u(context, None, None, prompt=prompt, fill_cache=True)
        return rollout(u, z, times, prompt=prompt, **condition)

    trajectory = [context.expand(len(times), *context.shape)]
    for size in partition[starts.index(context.shape[1]) :]:
        start = context.shape[1]
        context = context if context_gradient else context.detach()
        run = partial(recompute, chunk) if recomputed and start + size < z.shape[1] else chunk
        trajectory.append(run(context, z[:, start : start + size]))
        context = torch.cat([context, trajectory[-1][-1]], 1)
    return torch.cat(trajectory, 2)


@torch.no_grad()
def causal_stream(
    u: Network,
    draw: Callable[[int], Latents],
    jobs: Iterable[tuple[Tensor, Tensor]],
    window: int,
    first: int = 1,
    rest: int = 2,
    prefix: Past | None = None,
) -> Iterator[Latents]:
    """Clean chunks (B, frames, C, H, W) of a clip without end, one per job; what is kept does not grow.

    u, first, rest, prefix: as of `causal_rollout`, which this is while the clip fits in `window` frames, the new chunk
    included; then each chunk is the last of a clip of `window` frames: positions count from there, and the cache is
    made of these frames alone. draw: noise of so many frames. jobs: times and prompt of each chunk; they may change.
    Raises InputError for a window that is not whole chunks, two or more.
    """
    if window <= first or (window - first) % rest:
        expected = f"{first + rest}, {first + 2 * rest}, ...: whole chunks, two or more"
        raise InputError(f"a window of {window} frames; expected {expected}")
    context = None if prefix is None else prefix[:, rest - window :]
    for times, prompt in jobs:
        cache = () if context is None else u(context, None, None, prompt=prompt, fill_cache=True)
        z = draw(first if context is None else rest)
        chunk = rollout(u, z, times, prompt=prompt, cache=cache)[-1]
        del cache, z
        yield chunk
        context = chunk if context is None else torch.cat([context, chunk], 1)[:, rest - window :]


def causal_backward_simulation(
    context_gradient: bool = False, first: int = 1, rest: int = 2, ragged: bool = False, recomputed: bool = False
) -> Callable:
    """`backward_simulation` chunk by chunk, for OnPolicyLoss and FakeScoreLoss: at most three jumps per chunk."""

    def simulate(u, z, lengths, step, shift=1.0, **condition):
        times = backward_simulation_times(lengths, step, shift)
        chunks = {"first": first, "rest": rest, "ragged": ragged, "context_gradient": context_gradient}
        return causal_rollout(u, z, times, **chunks, recomputed=recomputed, **condition)

    return simulate


@torch.no_grad()
def causal_from(
    transformer: AnyFlowTransformer3DModel, full_chunk_limit: int = 2, partition: Partition = (1, 2, 2)
) -> AnyFlowFARTransformer3DModel:
    """A causal transformer with copies of the weights of a bidirectional one."""
    config = {name: value for name, value in transformer.config.items() if not name.startswith("_")}
    causal = AnyFlowFARTransformer3DModel(**config, full_chunk_limit=full_chunk_limit, chunk_partition=partition)
    coarse = coarse_patches(transformer.patch_embedding, causal.config.compressed_patch_size)
    weights = {name: value.clone() for name, value in {**transformer.state_dict(), **coarse}.items()}
    causal.load_state_dict(weights, assign=True)  # assigned, so that each weight keeps its dtype
    return causal.to(transformer.device)


def coarse_patches(patch: nn.Conv3d, size: tuple[int, int, int]) -> dict[str, Tensor]:
    """The weights of the coarse patches' embedding: those of full patches, interpolated trilinearly as in diffusers."""
    coarse = functional.interpolate(patch.weight.float(), size=size, mode="trilinear", align_corners=False)
    weights = {"weight": coarse.to(patch.weight.dtype), "bias": patch.bias.detach().clone()}
    return {f"far_patch_embedding.{name}": value for name, value in weights.items()}
