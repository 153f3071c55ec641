"""Causal generation: our attention is stock's where stock is right, a cache changes nothing, nobody sees the future."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask

from minianyflow.flow_map import pick_rows
from minianyflow.networks import causal
from minianyflow.networks.causal import CausalNetwork, causal_from, causal_rollout
from minianyflow.networks.causal_attention import attend, block_mask, causal_mask, chunk_partition
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.networks.wan import TINY, WanNetwork, tiny_transformer
from minianyflow.on_policy import backward_simulation_times
from minianyflow.times import time_grid
from tests.networks.inputs import PROMPT, R, T, clip, close, draw, tiny_causal
from tests.refused import refused


@pytest.fixture(scope="module")
def stock():
    """A transformer with diffusers' attention."""
    return tiny_causal()


@pytest.fixture(scope="module")
def u():
    return CausalNetwork(tiny_causal())


def per_frame(times, frames):
    return 1000 * times[:, None].expand(-1, frames)


def chunks_that_moved(before, after, partition):
    """The numbers of the chunks of (..., F, C, H, W) that are not the same in both."""
    pieces = zip(before.split(partition, -4), after.split(partition, -4), strict=True)
    return [chunk for chunk, (a, b) in enumerate(pieces) if float((a - b).abs().max()) > 1e-6]


def bump(x, chunk, partition):
    """x (B, F, C, H, W) with one chunk moved."""
    start = sum(partition[:chunk])
    moved = x.clone()
    moved[:, start : start + partition[chunk]] += 1.0
    return moved


@pytest.mark.parametrize("partition", [(5,), (1, 2), (1, 2, 2), (1, 2, 2, 2, 2), (1, 3, 3, 2)])
@pytest.mark.parametrize(("clean", "mode"), [(False, "train"), (True, "train"), (False, "cache")])
def test_the_mask_is_stocks_rule_at_the_true_length(stock, partition, clean, mode):
    options = {"height": 8, "width": 8, "has_clean_context": clean, "mode": mode}
    theirs = stock.build_attention_mask(chunk_partition=list(partition), **options)
    ours = causal_mask(partition, 16, 4, 2, clean, mode)
    tokens = torch.arange(len(ours))
    assert torch.equal(ours, theirs.mask_mod(0, 0, tokens[:, None], tokens).broadcast_to(ours.shape))
    padding = torch.arange(len(ours), theirs.shape[-1])
    assert not theirs.mask_mod(0, 0, tokens[:, None], padding).any()  # and no token of ours is missing
    assert causal_mask(partition, 16, 4, 2, clean, mode) is ours  # built once


def kinds(mask):
    """Numbers that are the same for tokens that see and are seen alike."""
    return torch.cat([mask, mask.T], 1).unique(dim=0, return_inverse=True)[1]


@pytest.mark.parametrize("partition", [(1, 2, 2), (3, 3, 3, 3), (2,)])
@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("per_frame", [36, 64])  # 128 does not divide the first
def test_a_mask_by_blocks_is_torchs(partition, clean, per_frame):
    mask = causal_mask(partition, per_frame, per_frame // 4, 2, clean)
    ours = block_mask(lambda b, h, q, k: mask[q, k], kinds(mask))
    theirs = create_block_mask(lambda b, h, q, k: mask[q, k], None, None, *mask.shape, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    tiles = functional.pad(mask, (0, -len(mask) % 128) * 2).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    assert torch.equal(ours.full_kv_num_blocks[0, 0].long(), tiles.all(3).all(1).sum(1))


@pytest.mark.slow
def test_flex_attention_takes_the_true_length_too():
    """The kernel that a GPU gets: a BlockMask of a length that 128 does not divide."""
    mask = causal_mask((1, 2, 2), 36, 9, 2, clean=True)
    blocks = block_mask(lambda b, h, q, k: mask[q, k], kinds(mask))
    query, key, value = draw(3, 2, 2, len(mask), 32)
    assert len(mask) % 128
    with torch.no_grad():
        assert close(attend(query, key, value, blocks), attend(query, key, value, mask))


@pytest.mark.parametrize("clean", [False, True])
def test_on_a_gpu_the_mask_is_made_by_blocks(clean, monkeypatch):
    rule = ((1, 2, 2), 36, 9, 2, clean)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "is_cuda", True)
        blocks = causal_mask.__wrapped__(*rule)
    mask = causal_mask(*rule)
    assert torch.equal(blocks.to_dense(), block_mask(lambda b, h, q, k: mask[q, k], kinds(mask)).to_dense())


def test_one_chunk_is_the_bidirectional_model():
    plain, z, rows = tiny_transformer(3), clip(5), torch.zeros(2)
    transformer = causal_from(plain)
    chunks, whole = CausalNetwork(transformer), CausalNetwork(transformer, first=5)
    with torch.no_grad():
        expected = WanNetwork(plain)(z, T, R, PROMPT)
        assert close(whole(z, T, R, PROMPT), expected)
        assert close(whole(z, T, R, PROMPT, cache=()), expected)
        assert torch.equal(chunks(z, T, R, PROMPT, single_chunk=rows), whole(z, T, R, PROMPT))
        assert not close(chunks(z[:, 1:], T, R, PROMPT, past=z[:, :1]), expected[:, 1:], 1e-3)


def test_weights_are_copied_and_coarse_patches_start_as_stocks():
    fresh, plain = tiny_causal(1), tiny_transformer(2)
    own = fresh.state_dict()
    plain.load_state_dict({name: value for name, value in own.items() if "far_patch" not in name})
    copy = causal_from(plain)
    assert all(torch.equal(value, own[name]) for name, value in copy.state_dict().items())
    with torch.no_grad():
        copy.patch_embedding.weight.zero_()
    assert plain.patch_embedding.weight.any()


@pytest.mark.parametrize(("past", "frames"), [(0, 3), (1, 4), (5, 4)])
@pytest.mark.parametrize("forced", [False, True])
@torch.no_grad()
def test_all_chunks_at_once_equal_stock(stock, u, past, frames, forced):
    z, clean, old = clip(frames), clip(frames, seed=1) if forced else None, clip(past, seed=2)
    options = {"clean_hidden_states": clean, "clean_timestep": torch.zeros(2, frames) if forced else None}
    parts = (old, z), *((torch.zeros(2, past), per_frame(times, frames)) for times in (T, R))
    states = [torch.cat(pair, 1) for pair in parts]
    theirs = stock(*states, PROMPT, list(chunk_partition(past + frames)), **options, return_dict=False)[0]
    assert close(u(z, T, R, PROMPT, clean=clean, past=old), theirs)
    times = (time[:, None].expand(-1, frames) for time in (T, R))
    assert close(u(z, *times, PROMPT, clean=clean, past=old), theirs)  # a time for every frame


def stock_read(stock, context, z, partition):
    """Stock's cache of `context`, as its pipeline makes it, and what it then says of the next chunk z."""
    full, coarse = (z.shape[3] // 2) ** 2, (z.shape[3] // 4) ** 2
    room = [(2, 2, 2, sum(partition) * tokens, 32) for tokens in (coarse, full)]
    kv_cache = [{"compressed_cache": torch.zeros(room[0]), "full_cache": torch.zeros(room[1])} for _ in stock.blocks]
    zeros = torch.zeros(context.shape[:2])
    flags = {"num_cached_chunks": len(partition) - 1}
    writing = {"kv_cache": kv_cache, "kv_cache_flag": flags | {"is_cache_step": True}}
    if len(partition) > 1:
        stock(context, zeros, zeros, PROMPT, list(partition[:-1]), **writing)
    reading = {"kv_cache": kv_cache, "kv_cache_flag": flags | {"is_cache_step": False}, "return_dict": False}
    t, r = per_frame(T, partition[-1]), per_frame(R, partition[-1])
    return kv_cache, stock(z, t, r, PROMPT, list(partition), **reading)[0]


@pytest.mark.parametrize(
    ("seen", "size"),
    [(0, 4), (7, 4), pytest.param(3, 4, marks=pytest.mark.slow), pytest.param(5, 16, marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_memory_and_reading_equal_stock(stock, u, seen, size):
    """Padded always; plain where stock has nothing to pad, since 2 frames of 16 x 16 are 128 queries."""
    context, z = clip(seen, size), clip(2 if seen else 1, size, seed=1)
    partition = chunk_partition(seen + z.shape[1])
    theirs, out = stock_read(stock, context, z, partition)
    padded = CausalNetwork(tiny_causal(), padded=True)
    cache = u(context, None, None, PROMPT, fill_cache=True) if seen else ()
    for ours, layer in zip(cache, theirs, strict=bool(seen)):
        for mine, name in zip(ours, ("compressed_cache", "full_cache"), strict=True):
            assert close(mine, layer[name][:, :, :, : mine.shape[3]].transpose(0, 1))
            assert not layer[name][:, :, :, mine.shape[3] :].any()
    assert close(padded(z, T, R, PROMPT, cache=cache), out)
    assert close(u(z, T, R, PROMPT, cache=cache), out) == (size == 16)


@pytest.mark.parametrize(("frames", "steps"), [(5, 3), (9, 1)])
@torch.no_grad()
def test_a_cache_changes_nothing(u, frames, steps):
    rollouts = (causal_rollout(u, clip(frames), time_grid(steps), PROMPT, cached=cached) for cached in (True, False))
    with_cache, without = rollouts
    assert with_cache.shape == (steps + 1, 2, frames, 4, 4, 4)
    assert torch.equal(with_cache[0], clip(frames))
    assert close(with_cache, without)


@torch.no_grad()
def test_teacher_forcing_sees_what_the_cache_holds(u):
    """The last chunk of the clean path is the chunk that a cache of the same clean frames is read for."""
    x, z = clip(9), clip(4, seed=1)
    forced = u(z, T, R, PROMPT, clean=x[:, 5:], past=x[:, :5])
    cache = u(x[:, :7], None, None, PROMPT, fill_cache=True)
    assert close(forced[:, 2:], u(z[:, 2:], T, R, PROMPT, cache=cache))


@pytest.fixture
def doubled(monkeypatch):
    """diffusers computes norms and residuals in float32 whatever it is given; here in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def gradients(transformer, loss):
    transformer.zero_grad()
    loss().backward()
    return {name: weight.grad.clone() for name, weight in transformer.named_parameters() if weight.grad is not None}


def same_gradients(a, b, tolerance=1e-6):
    largest = max(float(gradient.abs().max()) for gradient in a.values())
    return a.keys() == b.keys() and all(close(a[name], b[name], tolerance * largest) for name in a)


@pytest.mark.usefixtures("doubled")
@pytest.mark.parametrize(("frames", "steps"), [(5, 2), pytest.param(9, 1, marks=pytest.mark.slow)])
def test_gradients_of_a_cached_rollout_are_those_of_recomputation_and_of_checkpointing(frames, steps):
    transformer = tiny_causal(num_layers=2).double()
    u, z, weight = CausalNetwork(transformer), clip(frames, dtype=torch.float64), clip(frames, seed=5).double()

    def loss(context_gradient=True, **options):
        end = causal_rollout(u, z, time_grid(steps), PROMPT.double(), context_gradient=context_gradient, **options)[-1]
        return (end * weight).sum()

    cached, recomputed, detached = (
        gradients(transformer, lambda options=options: loss(**options))
        for options in ({}, {"cached": False}, {"context_gradient": False})
    )
    transformer.enable_gradient_checkpointing()
    checkpointed = gradients(transformer, loss)
    checkpointed_detached = gradients(transformer, lambda: loss(context_gradient=False))
    transformer.disable_gradient_checkpointing()
    assert same_gradients(cached, recomputed)
    assert same_gradients(cached, checkpointed)
    assert same_gradients(detached, checkpointed_detached)
    assert not close(detached["patch_embedding.weight"], cached["patch_embedding.weight"], 0.1)

    values = dict(transformer.named_parameters())
    with torch.no_grad():  # and they are gradients: the loss along one direction of weights (RMSNorm stays in float32)
        direction = {name: draw(*value.shape, seed=7, dtype=value.dtype) for name, value in values.items()}
        ends = []
        for step in (1e-4, -2e-4):
            for name, value in values.items():
                value += step * direction[name]
            ends.append(loss())
    slope = sum((gradient * direction[name]).sum() for name, gradient in cached.items())
    assert float((ends[0] - ends[1]) / 2e-4) == pytest.approx(float(slope), rel=1e-4)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("context_gradient", [True, False])
def test_gradient_reaches_earlier_chunks_only_if_asked(cached, context_gradient):
    u, z = CausalNetwork(tiny_causal(num_layers=2)), clip(7).requires_grad_()
    end = causal_rollout(u, z, time_grid(1), PROMPT, context_gradient=context_gradient, cached=cached)[-1]
    end[:, 5:].square().sum().backward()
    sizes = [float(piece.abs().sum()) for piece in z.grad.split((1, 2, 2, 2), 1)]
    assert sizes[3] > 0
    assert all((size > 0) == context_gradient for size in sizes[:3])
    assert (u.transformer.far_patch_embedding.weight.grad is not None) == (context_gradient or not cached)


def test_a_rollout_without_gradient_keeps_no_graph_of_its_context(u):
    """As the fake score's loss runs the student."""
    parts = []

    def watched(*arguments, **condition):
        out = u(*arguments, **condition)
        if condition.get("fill_cache"):
            parts.extend(part for layer in out for part in layer)
        return out

    with torch.no_grad():
        causal_rollout(watched, clip(3), time_grid(1), PROMPT, context_gradient=True)
    assert len(parts) == 2 * len(u.transformer.blocks)
    assert not any(part.requires_grad for part in parts)


@torch.no_grad()
def test_no_chunk_sees_a_later_one():
    u, chunks = CausalNetwork(tiny_causal(full_chunk_limit=3)), (1, 2, 2)
    z, x, older = clip(5), clip(5, seed=1), clip(3, seed=2)
    for chunk in range(3):
        from_here = [later for later in range(3) if later >= chunk]

        def moved(z_now, chunk=chunk, **condition):
            before, after = ({name: pair[side] for name, pair in condition.items()} for side in (0, 1))
            return chunks_that_moved(u(z, T, R, PROMPT, **before), u(z_now, T, R, PROMPT, **after), chunks)

        bumped = bump(x, chunk, chunks)
        assert moved(bump(z, chunk, chunks)) == from_here  # noisy chunks see earlier noisy ones
        assert moved(bump(z, chunk, chunks), clean=(x, x)) == [chunk]  # and nothing noisy but themselves
        assert moved(z, clean=(x, bumped)) == from_here[1:]  # but earlier clean ones, not their own answer
        before, after = (causal_rollout(u, noise, time_grid(2), PROMPT)[1:] for noise in (z, bump(z, chunk, chunks)))
        assert chunks_that_moved(before, after, chunks) == from_here
    # with a past, z are the three chunks of two frames after it
    z, x, chunks = clip(6), clip(6, seed=1), (2, 2, 2)
    for chunk in range(3):
        forced = [u(z, T, R, PROMPT, clean=known, past=older) for known in (x, bump(x, chunk, chunks))]
        assert chunks_that_moved(*forced, chunks) == list(range(chunk + 1, 3))
    forced = [u(z, T, R, PROMPT, clean=x, past=old) for old in (older, bump(older, 1, (1, 2)))]
    assert chunks_that_moved(*forced, chunks) == [0, 1, 2]


@torch.no_grad()
def test_what_is_remembered_of_a_chunk_does_not_depend_on_later_ones():
    u, x = CausalNetwork(tiny_causal(full_chunk_limit=3)), clip(7)
    before, after = (u(frames, None, None, PROMPT, fill_cache=True) for frames in (x, bump(x, 3, (1, 2, 2, 2))))
    assert [tuple(part.shape[3] for part in layer) for layer in before] == [(3 * 1, 4 * 4)] * TINY["num_layers"]
    for mine, theirs in zip(before, after, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert close(mine[1][..., :8, :], theirs[1][..., :8, :], 1e-6)
        assert not close(mine[1][..., 8:, :], theirs[1][..., 8:, :], 1e-2)


@torch.no_grad()
def test_reading_leaves_the_cache_alone_and_rows_can_be_picked(u):
    z = clip(2)
    cache = u(clip(3, seed=1), None, None, PROMPT, fill_cache=True)
    before = [part.clone() for layer in cache for part in layer]
    out = u(z, T, R, PROMPT, cache=cache)
    assert all(map(torch.equal, (part for layer in cache for part in layer), before))
    rows = torch.tensor([1])
    assert close(u(z[rows], T[rows], R[rows], **pick_rows({"prompt": PROMPT, "cache": cache}, rows)), out[rows])


@pytest.mark.parametrize("cached", [True, False])
@torch.no_grad()
def test_a_prefix_comes_out_untouched_and_is_seen(u, cached):
    z, times = clip(7), time_grid(2)
    whole = causal_rollout(u, z, times, PROMPT, cached=cached)
    for frames in (1, 5):
        prefix = whole[-1][:, :frames]
        again = causal_rollout(u, z, times, PROMPT, prefix=prefix, cached=cached)
        assert torch.equal(again[:, :, :frames], prefix.expand(3, *prefix.shape))
        assert close(again[:, :, frames:], whole[:, :, frames:])  # a clip goes on from its own beginning
        other = causal_rollout(u, z, times, PROMPT, prefix=prefix + 1, cached=cached)
        assert not close(other[1:, :, frames:], again[1:, :, frames:], 1e-3)


@torch.no_grad()
def test_backward_simulation_runs_chunk_by_chunk_three_jumps_each(u):
    """Rows leave out their zero-length jumps, cache and all, and come out as if alone."""
    u, z = EvaluationCounter(u), clip(5)
    lengths, step, simulate = torch.tensor([8, 2]), torch.tensor([3, 0]), causal.causal_backward_simulation()
    both = simulate(u, z, lengths, step, 5.0, prompt=PROMPT)
    assert u.rows == 3 * (3 + 2) + 2 * 2  # three chunks of jumps, and two contexts remembered for two rows
    for row in (0, 1):
        one = slice(row, row + 1)
        times = backward_simulation_times(lengths[one], step[one], 5.0)[:, 0]
        assert close(both[:, one], causal_rollout(u, z[one], times, PROMPT[one]))


def test_partitions():
    assert chunk_partition(5) == (1, 2, 2)
    assert chunk_partition(5, first=5) == (5,)
    assert chunk_partition(19, 1, 3) == (1, 3, 3, 3, 3, 3, 3)
    assert list(accumulate(chunk_partition(9, 3, 2))) == [3, 5, 7, 9]
    for bad in ((4, 1, 2), (0, 1, 2), (2, 3, 1), (5, 0, 1), (5, 1, 0)):
        with refused("do not make chunks"):
            chunk_partition(*bad)


LINES = {
    "do not make chunks of 1, 2": lambda u: u(clip(4), T, R, PROMPT),
    "past= of 1 frames": lambda u: u(clip(5), T, R, PROMPT),
    "past= of 3 frames": lambda u: u(clip(6), T, R, PROMPT, past=clip(1)),
    "clean has shape": lambda u: u(clip(3), T, R, PROMPT, clean=clip(1)),
    "got cache, context": lambda u: u(clip(1), T, R, PROMPT, cache=(), context=clip(0)),
    "got clean or past; expected": lambda u: u(clip(1), None, None, PROMPT, clean=clip(1), fill_cache=True),
    "expected the next chunk, 1": lambda u: u(clip(2), T, R, PROMPT, cache=()),
    "expected the next chunk, 2": lambda u: u(clip(1), T, R, PROMPT, context=clip(3)),
    "cache of 1 layers": lambda u: u(clip(2), T, R, PROMPT, cache=u(clip(1), None, None, PROMPT, fill_cache=True)[:1]),
    "and 2 rows; expected 4 and 1": lambda u: u(
        clip(2)[:1], T[:1], R[:1], PROMPT[:1], cache=u(clip(1), None, None, PROMPT, fill_cache=True)
    ),
    "at most rope_max_seq_len, 64": lambda u: u(clip(65), None, None, PROMPT, fill_cache=True),
    "compressed patches 4 x 4": lambda u: causal_rollout(u, clip(5, 6), time_grid(1), PROMPT),
    r"times \(3,\)": lambda u: u(clip(3), torch.rand(3), torch.rand(3), PROMPT),
    r"expected \(B, F, 4, H, W\)": lambda u: u(draw(2, 3, 5, 4, 4), T, R, PROMPT),
    "or 3 frames: whole chunks": lambda u: causal_rollout(u, clip(5), time_grid(1), PROMPT, prefix=clip(2)),
    "fewer than the clip": lambda u: causal_rollout(u, clip(5), time_grid(1), PROMPT, prefix=clip(5)),
    "expected the clip's shape": lambda u: causal_rollout(u, clip(5), time_grid(1), PROMPT, prefix=clip(1, 8)),
    "got clean or past, single_chunk": lambda u: u(clip(3), T, R, PROMPT, clean=clip(3), single_chunk=torch.zeros(2)),
}


@pytest.mark.parametrize("line", LINES)
def test_bad_input_is_one_clear_line(u, line):
    with refused(line), torch.no_grad():
        LINES[line](u)


def test_a_ragged_clip_ends_with_a_shorter_chunk_cached_or_not():
    assert chunk_partition(21, 1, 3, ragged=True) == (1, 3, 3, 3, 3, 3, 3, 2)  # AnyFlow's, of Wan's 21 latent frames
    assert chunk_partition(7, 1, 3, ragged=True) == chunk_partition(7, 1, 3)
    u, z, times = CausalNetwork(tiny_causal(), 1, 3, ragged=True), clip(6), time_grid(2)
    cached, plain = (causal_rollout(u, z, times, PROMPT, 1, 3, cached=how, ragged=True)[-1] for how in (True, False))
    assert close(cached, plain)
