"""Image to video: a known first frame stays as it is, at time 0, and the other frames learn as by hand."""

import pytest
import torch

from minianyflow.guidance import Guidance
from minianyflow.interpolant import broadcast_time
from minianyflow.networks.causal import CausalNetwork, causal_backward_simulation, causal_rollout
from minianyflow.networks.known_frames import know_first_frames
from minianyflow.networks.teacher_forcing import TeacherForced, teacher_forcing_batch
from minianyflow.networks.wan import TINY_TIMESTEPS, WanNetwork, tiny_transformer
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss
from minianyflow.on_policy import FakeScoreLoss, OnPolicyLoss, backward_simulation, draw_on_policy
from minianyflow.times import draw_pairs, generator, time_grid
from tests.networks.inputs import draw, tiny_causal

ARCHITECTURES, DELTA, SCALE = ("bidirectional", "causal"), 5e-3, 2.0
ROWS = {"t": torch.tensor([0.7, 0.7, 0.9, 0.6]), "r": torch.tensor([0.7, 0.2, 0.3, 0.6])}
ROWS |= {"known": torch.tensor([True, True, False, False]), "dropped": torch.tensor([False, False, False, True])}
NULL = torch.zeros(1, 4, 16)


def network(architecture):
    if architecture == "bidirectional":
        return WanNetwork(tiny_transformer(1), TINY_TIMESTEPS)
    return CausalNetwork(tiny_causal(1), timesteps=TINY_TIMESTEPS)


def batch_of(architecture, partition=(1, 2), **more):
    """Four clips of five frames, the first two with a known frame; a causal network learns those of `partition`."""
    x, eps = draw(2, 4, 5, 4, 4, 4, seed=1)
    prompt = torch.where(ROWS["dropped"][:, None, None], NULL, draw(4, 4, 16, seed=2))
    batch = {"x": x, "eps": eps, "condition": {"prompt": prompt}, **ROWS, **more}
    batch |= {"objective_draw": torch.full((4,), 0.5), "split": torch.full((4,), 0.5)}
    batch = know_first_frames(batch)
    return teacher_forcing_batch(batch, partition, 2) if architecture == "causal" else batch | {"context": {}}


def losses_by_hand(u, batch, x, eps):
    """What the frames that are not known learn: guided, Eulerian where r < t, of the clean clips x and their noise.

    u(z, t, r, prompt): all times one per frame; known frames are not touched and have time 0.
    """
    t, r, known = batch["t"], batch["r"], batch["known"]
    moves = torch.ones(x.shape[:2])
    moves[known, 0] = 0.0

    def at(z, t, r, prompt):
        targets = r[:, None].expand(x.shape[:2]).clone()
        targets[known & (t == r), 0] = 0.0
        return u(z, t[:, None] * moves, targets, prompt)

    with torch.no_grad():
        prompt, still = batch["condition"]["prompt"], broadcast_time(moves, x)
        z, v = x + still * broadcast_time(t, x) * (eps - x), still * (eps - x)
        conditional = broadcast_time((~batch["dropped"]).float(), x)
        v = v + conditional * (SCALE - 1) * still * (v - at(z, t, t, NULL.expand_as(prompt)))
        du = (at(z + DELTA * v, t + DELTA, r, prompt) - at(z - DELTA * v, t - DELTA, r, prompt)) / (2 * DELTA)
        target = v - broadcast_time(t - r, x) * du
    error = (at(z, t, r, prompt) - target).square() * still
    return (1 - t).sqrt() * error.flatten(1).sum(1) / x[0].numel()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_other_frames_learn_as_by_hand_and_the_known_one_not_at_all(architecture):
    u, batch = network(architecture).double(), batch_of(architecture)
    batch = torch.utils._pytree.tree_map(lambda each: each.double() if each.is_floating_point() else each, batch)
    u.transformer.condition_embedder.time_embedder.double()
    loss = FlowMapLoss({"eulerian": 1.0}, guidance=Guidance(SCALE, {"prompt": NULL.double()}), delta=DELTA)
    losses, _ = (TeacherForced(loss) if architecture == "causal" else loss)(u, batch)
    clean = {"clean": batch["x"]} if architecture == "causal" else {}
    x, eps = (each[:, : batch["x"].shape[1]].double() for each in draw(2, 4, 5, 4, 4, 4, seed=1))
    expected = losses_by_hand(lambda z, t, r, prompt: u(z, t, r, prompt.double(), **clean), batch, x, eps)
    assert torch.allclose(losses, expected, rtol=1e-6)
    weights = [weight for weight in u.parameters() if weight.requires_grad]
    ours, by_hand = (torch.autograd.grad(each.mean(), weights, allow_unused=True) for each in (losses, expected))
    for one, other in zip(ours, by_hand, strict=True):
        assert (one is None) == (other is None)
        assert one is None or float((one - other).norm()) <= 1e-6 * float(other.norm()) + 1e-12


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("objective", FLOW_MAPS)
def test_every_evaluation_sees_the_known_frame_itself(architecture, objective):
    u, batch, seen = network(architecture), batch_of(architecture), []

    def spy(z, t, r, **condition):
        seen.append((z, condition["known"]))
        return u(z, t, r, **condition)

    velocity = None if objective == "eulerian" else lambda z, t, **condition: spy(z, t, t, **condition)
    loss = FlowMapLoss(FLOW_MAPS[objective], velocity, Guidance(SCALE, {"prompt": NULL}))
    losses, _ = (TeacherForced(loss) if architecture == "causal" else loss)(spy, batch)
    frames, clean = batch["x"][:2, 0], [z[known[:, 0], 0] for z, known in seen]
    assert sum(map(len, clean)) >= 6
    for z in clean:
        assert float((z[:, None] - frames).flatten(2).abs().amax(2).amin(1).max() if len(z) else 0) < 1e-6
    losses.sum().backward()


def test_frames_after_compressed_chunks_are_all_learnt():
    batch = batch_of("causal", partition=(1, 1, 1, 2))
    assert batch["context"]["known"].shape == (4, 3)
    assert not batch["context"]["known"].any()
    assert torch.equal(batch["context"]["past"][:, :1], draw(2, 4, 5, 4, 4, 4, seed=1)[0][:, :1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rollouts_and_scores_leave_the_known_frame(architecture):
    u, fake = network(architecture), network("bidirectional")
    batch = batch_of(architecture, **draw_on_policy((5, 4, 4, 4), 4, generator(3)))
    simulate = causal_backward_simulation() if architecture == "causal" else backward_simulation
    arguments = batch["noise"], batch["lengths"], batch["step"]
    end = simulate(u, *arguments, **batch["condition"])[-1]
    assert torch.equal(end[:2, 0], draw(2, 4, 5, 4, 4, 4, seed=1)[0][:2, 0])
    assert float((end[2:, 0] - batch["x"][2:, 0]).abs().max()) > 0.1
    scores = []

    def real(z, t, **condition):
        scores.append(z)
        return u_whole(z, t, t, **condition)

    u_whole = network("bidirectional")
    policy = OnPolicyLoss(real, fake, None, simulate=simulate)
    losses, _ = policy(u, batch)
    losses.sum().backward()
    assert float((scores[0][:2, 0] - end[:2, 0]).abs().max()) < 1e-6
    FakeScoreLoss(u, simulate=simulate)(fake, batch)[0].sum().backward()
    assert bool(torch.stack([w.grad.isfinite().all() for w in fake.parameters() if w.grad is not None]).all())


def test_a_known_first_chunk_is_a_prefix():
    u, (z, x), prompt = network("causal"), draw(2, 2, 5, 4, 4, 4), draw(2, 4, 16, seed=5)
    known = torch.tensor([[True] + 4 * [False], 5 * [False]])
    start = torch.where(known[:, :, None, None, None], x, z)
    with torch.no_grad():
        made = causal_rollout(u, start, time_grid(3), prompt, known=known)[-1]
        prefixed = causal_rollout(u, z[:1], time_grid(3), prompt[:1], prefix=x[:1, :1])[-1]
        free = causal_rollout(u, z[1:], time_grid(3), prompt[1:])[-1]
    assert torch.equal(made[0, 0], x[0, 0])
    assert float((made - torch.cat([prefixed, free])).abs().max()) < 1e-5


def test_draws_are_those_without_but_for_the_rows_that_know():
    plain, drawn = (draw_pairs(4000, generator(1), drop=0.1, **more) for more in ({}, {"known": 0.25}))
    assert all(torch.equal(plain[name], drawn[name]) for name in plain)
    assert float(drawn["known"].float().mean()) == pytest.approx(0.25, abs=0.03)
    assert know_first_frames(plain) is plain
