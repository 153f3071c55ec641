"""The teachers of the tries: what each network puts out."""

import torch

from benchmarks import motion
from minianyflow.networks.wan import TextEncoder
from minianyflow.times import generator


def test_a_clean_clip_is_where_the_velocity_points_and_every_try_is_a_network():
    z, t = torch.randn(2, 5, 4, 4, 4, generator=generator(0)), torch.tensor([0.3, 1.0])
    prompt = TextEncoder()(["one ball"]).expand(2, -1, -1)
    for settings, _, _ in motion.TRIES.values():
        network = motion.build(0, **settings)
        u = network(z, t, t, prompt=prompt)
        assert u.shape == z.shape
        assert bool(u.isfinite().all())
        if settings["clean"]:
            inner = network.network(z, t, t, prompt=prompt)
            assert torch.allclose(z - t[:, None, None, None, None] * u, inner, atol=1e-5)
