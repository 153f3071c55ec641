"""On one-dimensional Gaussians the minimiser of each objective is the formula; guided ones too.

A model that is affine in z, with polynomials in (t, r) for coefficients, is wide enough for these maps and has one
stationary point; Newton's method on the stop-gradient field of the real FlowMapLoss finds it.
"""

import pytest
import torch
from numpy.polynomial.legendre import legvander

from minianyflow.guidance import Guidance
from minianyflow.objectives import FLOW_MAPS, FlowMapLoss
from minianyflow.times import draw_pairs, generator
from toy_data.gaussians import Gaussian, GuidedGaussian

DEGREE = 10
CONDITIONAL, UNCONDITIONAL, SCALE = Gaussian(1.0, 0.7), Gaussian(-0.2, 1.0), 3.0
GUIDED = GuidedGaussian(CONDITIONAL, UNCONDITIONAL, SCALE)


class Affine(torch.nn.Module):
    """u = a(t, r) z + b(t, r), polynomials orthonormal on the triangle; each `label` has coefficients of its own."""

    def __init__(self, labels=1, degree=DEGREE):
        super().__init__()
        self.degree, self.powers = degree, [(i, j) for i in range(degree + 1) for j in range(degree + 1 - i)]
        self.theta = torch.nn.Parameter(torch.zeros(labels, 2, len(self.powers), dtype=torch.float64))
        t, r = torch.rand(2, 20_000, generator=generator(5), dtype=torch.float64).sort(0, descending=True).values
        self.mix = torch.linalg.inv(torch.linalg.qr(self.products(t, r) / len(t) ** 0.5).R)
        self.known = {}  # the times of a batch stay the same, and with them most of the work

    def products(self, t, r):
        t, r = (torch.from_numpy(legvander(2 * time.numpy() - 1, self.degree)) for time in (t, r))
        return torch.stack([t[:, i] * r[:, j] for i, j in self.powers], 1)

    def basis(self, t, r):
        key = torch.stack([t, r]).numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.products(t, r) @ self.mix
        return self.known[key]

    def forward(self, z, t, r, label=None):
        theta = self.theta[torch.zeros_like(t, dtype=torch.long) if label is None else label]  # (B, 2, P)
        a, b = torch.einsum("bcp,bp->cb", theta, self.basis(t, r))
        return a[:, None] * z + b[:, None]


def stationary_point(u, loss, batch):
    """Newton's method on the gradient field that training follows, targets held still inside each gradient.

    The field is affine in the coefficients, or nearly: one Jacobian, by differences, serves all rounds.
    """

    def field(theta):
        u.theta.data = theta.reshape(u.theta.shape)
        return torch.autograd.grad(loss(u, batch)[0].mean(), u.theta)[0].flatten()

    theta = u.theta.detach().flatten().clone()
    for rounds in range(40):
        gradient = field(theta)
        if float(gradient.norm()) < 1e-9:
            return u
        if rounds % 20 == 0:
            steps = 1e-4 * torch.eye(len(theta), dtype=torch.float64)
            inverse = torch.linalg.pinv(torch.stack([(field(theta + step) - gradient) / 1e-4 for step in steps], 1))
        theta = theta - inverse @ gradient
    raise AssertionError(f"no stationary point: {float(gradient.norm())}")


def spread_batch(count):
    source = generator(0)
    x, eps = torch.randn(2, count, 1, generator=source, dtype=torch.float64)
    return {"x": x, "eps": 1.5 * eps} | {name: value.double() for name, value in draw_pairs(count, source).items()}


def error(u, exact, label=None):
    """Root mean square over the triangle of times, its bottom edge and z in [-2, 2]; the maps reach 2 to 10."""
    t, r = torch.rand(2, 400, generator=generator(9), dtype=torch.float64).sort(0, descending=True).values
    r[:100] = 0
    z = torch.linspace(-2, 2, 400, dtype=torch.float64)[:, None]
    condition = {} if label is None else {"label": torch.full((400,), label)}
    with torch.no_grad():
        return float((u(z, t, r, **condition) - exact(z, t, r)).square().mean().sqrt())


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "eulerian")) for n in FLOW_MAPS])
def test_the_minimiser_is_the_flow_map(name):
    loss = FlowMapLoss(FLOW_MAPS[name], CONDITIONAL.velocity, weight=torch.ones_like, delta=1e-3)
    u = stationary_point(Affine(), loss, spread_batch(1500))
    assert error(u, CONDITIONAL.average_velocity) < 3e-3


@pytest.mark.slow
def test_the_minimiser_with_data_velocity_is_the_flow_map_up_to_sampling():
    """The Eulerian target with eps - x for the velocity: right on average, so its minimiser converges as 1/sqrt(n)."""
    batch = spread_batch(60_000)
    batch |= {"x": CONDITIONAL.mean + CONDITIONAL.sigma * batch["x"], "eps": batch["eps"] / 1.5}
    u = stationary_point(Affine(degree=4), FlowMapLoss({"eulerian": 1.0}, weight=torch.ones_like), batch)
    assert error(u, CONDITIONAL.average_velocity) < 0.06


def guided_student(published):
    def velocity(z, t, label):
        return torch.where(label[:, None] == 1, CONDITIONAL.velocity(z, t), UNCONDITIONAL.velocity(z, t))

    batch = spread_batch(2400)
    label = torch.arange(2400) % 2  # half of the rows dropped their condition
    batch |= {"condition": {"label": label}, "dropped": label == 0}
    guidance = Guidance(SCALE, {"label": torch.zeros(1, dtype=torch.long)}, published)
    loss = FlowMapLoss({"eulerian": 1.0}, velocity, guidance, weight=torch.ones_like, delta=1e-3)
    return stationary_point(Affine(2), loss, batch)


@pytest.mark.slow
def test_exact_guidance_learns_the_guided_flow_map():
    u = guided_student(published=False)
    assert error(u, GUIDED.average_velocity, label=1) < 3e-3
    assert error(u, UNCONDITIONAL.average_velocity, label=0) < 4e-3  # dropped rows keep their own velocity


@pytest.mark.slow
def test_published_guidance_is_exact_on_the_diagonal_alone():
    u = guided_student(published=True)
    on = error(lambda z, t, r, label: u(z, t, t, label), lambda z, t, r: GUIDED.velocity(z, t), label=1)
    off = error(u, GUIDED.average_velocity, label=1)
    assert on < 1e-2 < 0.25 < off
    assert error(u, published_fixed_point, label=1) < 1.5e-2  # what it learns instead is known, too
    assert error(u, published_null, label=0) < 1.5e-2


def test_the_published_null_branch_satisfies_its_equation_and_the_flow_map_does_not():
    """u_null = v - (t - r) / g du_null/dt along the unconditional flow: both sides divided by g, as in other rows."""
    t, r = torch.rand(2, 400, generator=generator(9), dtype=torch.float64).sort(0, descending=True).values
    z = torch.linspace(-2, 2, 400, dtype=torch.float64)[:, None]
    v, one = UNCONDITIONAL.velocity(z, t), torch.ones_like(t)

    def residual(u):
        now, du = torch.func.jvp(lambda z, t: u(z, t, r), (z, t), (v, one))
        return float((now - v + (t - r)[:, None] / SCALE * du).square().mean().sqrt())

    assert residual(published_null) < 1e-10 < 0.1 < residual(UNCONDITIONAL.average_velocity)


def mean_along(flow, inside, z, t, r):
    """The mean over s in [0, 1] of inside(z_tau, tau, r, s) at tau = r + s (t - r), along a flow from (z, t)."""
    s, weights = (1 + GuidedGaussian.nodes) / 2, GuidedGaussian.weights / 2
    z, t, r = (value.reshape(-1, 1).repeat_interleave(len(s), 0) for value in (z, t, r))
    s = s.repeat(len(z) // len(s))[:, None]
    tau = (r + s * (t - r)).squeeze(1)
    found = inside(flow(z, t.squeeze(1), tau), tau, r.squeeze(1), s)
    return (found.reshape(-1, len(weights)) * weights).sum(1, keepdim=True)


def published_null(z, t, r):
    """What its null branch learns: u = g mean of s^(g-1) v along the unconditional flow; for g = 1 the average of v."""
    g = SCALE
    return mean_along(UNCONDITIONAL.flow, lambda z, t, r, s: g * s ** (g - 1) * UNCONDITIONAL.velocity(z, t), z, t, r)


def published_fixed_point(z, t, r):
    """The mean of g v + (1 - g) u_null(z_tau, tau, r) along the *unguided* flow z_tau."""

    def inside(z, t, r, s):
        return SCALE * CONDITIONAL.velocity(z, t) + (1 - SCALE) * published_null(z, t, r)

    return mean_along(CONDITIONAL.flow, inside, z, t, r)
