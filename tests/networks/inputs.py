"""What the tests of networks share: random latents, times and prompts; transformers shaped as Wan's, with adapters."""

import torch
from diffusers import AnyFlowFARTransformer3DModel
from torch.utils._python_dispatch import TorchDispatchMode

from minianyflow.networks.causal import CausalNetwork
from minianyflow.networks.lora_roles import EMBEDDERS, TARGETS, Adapter, RoleNetwork, add_role
from minianyflow.networks.wan import TINY, WanNetwork, copy_time_embedder
from minianyflow.times import generator
from minianyflow.wan.shapes import SHARED, build_transformer

SHAPE = SHARED | {"num_attention_heads": 2, "attention_head_dim": 32, "ffn_dim": 128, "num_layers": 2}
SHAPE |= {"text_dim": 32, "freq_dim": 64}


def draw(*shape, seed=0, dtype=torch.float32):
    """Normal numbers, the same for a seed."""
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def clip(frames, size=4, seed=0, dtype=torch.float32):
    """Two rows of latents (2, F, 4, size, size)."""
    return draw(2, frames, 4, size, size, seed=seed, dtype=dtype)


def close(a, b, tolerance=1e-5):
    """Whether two tensors have one shape and differ by `tolerance` at most."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=tolerance)


PROMPT = draw(2, 4, TINY["text_dim"], seed=99)
T, R = torch.tensor([0.9, 0.4]), torch.tensor([0.3, 0.4])


def adapted(architecture, dtype=torch.float32, start=None):
    """A random transformer with an adapter that does something; start: one to take the weights of."""
    torch.manual_seed(0)
    limit = {"full_chunk_limit": 2} if architecture == "causal" else {}
    transformer = build_transformer(SHAPE, architecture, "cpu", dtype, **limit)
    for number, role in enumerate(("student", "fake")):
        add_role(transformer, role, 8, targets=TARGETS + EMBEDDERS)
        for weight in Adapter(transformer, role).parameters():
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator(number))
    if start is not None:
        transformer.load_state_dict({name: value.to(dtype) for name, value in start.state_dict().items()})
    return transformer


def tiny_causal(seed=0, **changes):
    """A fresh causal transformer of the size in TINY, for latents (5, 4, 4, 4) in chunks 1, 2, 2."""
    torch.manual_seed(seed)
    chunks = {"full_chunk_limit": 2, "chunk_partition": (1, 2, 2)}
    transformer = AnyFlowFARTransformer3DModel(**TINY | chunks | changes)
    copy_time_embedder(transformer)
    return transformer


def network(transformer, role="student"):
    """The network of a role on one of these transformers."""
    causal = "FAR" in type(transformer).__name__
    return RoleNetwork(CausalNetwork(transformer, 1, 2, ragged=True) if causal else WanNetwork(transformer), role)


def output_and_gradient(net):
    """The average velocity and its gradient: of a causal network under teacher forcing, with old chunks coarse."""
    (z, clean), prompt, condition = draw(2, 2, 9, 16, 8, 8, seed=3), draw(2, 6, 32, seed=4), {}
    if isinstance(net.network, CausalNetwork):
        condition, z = {"clean": clean[:, 5:], "past": clean[:, :5]}, z[:, 5:]
    u = net(z, T, R, prompt=prompt, **condition)
    u.square().mean().backward()
    gradient = torch.cat([weight.grad.flatten() for weight in net.parameters()])
    net.zero_grad()
    return u.detach(), gradient


def distance(a, b):
    """The largest relative distance of two tuples of tensors."""
    return max(float((one - other).detach().norm() / other.detach().norm()) for one, other in zip(a, b, strict=True))


class Watch(TorchDispatchMode):
    """Bytes that operations write, and how often fused attention runs forward."""

    def __init__(self):
        super().__init__()
        self.written, self.attended = 0, 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        out = operation(*arguments, **(options or {}))
        self.attended += "attention" in str(operation) and "backward" not in str(operation)
        if not operation.is_view:
            tensors = out if isinstance(out, tuple | list) else [out]
            self.written += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))
        return out
