"""The video networks as graphs that the page runs (static/video.js): some operations, traced by torch.export.

`python -m minianyflow.live.graphs` writes static/graphs.json anew, for a network that changed. Weights are not in it.
What depends on neither inputs nor weights is computed here. tests/live/test_video.py holds the page against torch.
"""

import json

import torch
from torch import Tensor, fx, nn

from minianyflow.live.player import STATIC
from minianyflow.networks.patches import use_per_frame_modulation
from minianyflow.networks.video import VideoTransformer
from minianyflow.networks.wan import TextEncoder
from minianyflow.networks.weights import load_codec, load_network
from minianyflow.video.stages import WEIGHTS, path_of
from toy_data import blobs

FILE = STATIC / "graphs.json"
CLIP = (5, 4, 4, 4)  # F, C, H, W of the latents
SAME = ("clone", "alias", "_to_copy", "_assert_tensor_metadata")  # their result is their argument
SHAPED = ("view", "unsqueeze", "squeeze")  # their result is their argument in another shape
ONE = ("cos", "sin", "sigmoid", "rsqrt", "log")
TWO = ("mul", "add", "sub", "div", "pow")


class Prompted(nn.Module):
    """u(z, t, r), after a `context` if it is given, of the two prompts."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.prompts = network, TextEncoder()(blobs.PROMPTS)

    def forward(self, z: Tensor, t: Tensor, r: Tensor, context: Tensor | None = None) -> Tensor:
        """As the network's."""
        return self.network(z, t, r, self.prompts, **({} if context is None else {"context": context}))


class Decoder(nn.Module):
    """Codec.decode as a forward."""

    def __init__(self):
        super().__init__()
        self.network = load_codec(path_of(WEIGHTS, "codec"))

    def forward(self, z: Tensor) -> Tensor:
        """As Codec.decode."""
        return self.network.decode(z)


def prompted(name: str) -> Prompted:
    """A committed network as its graph has it: real numbers, where diffusers' class turns tokens by complex ones."""
    network = load_network(path_of(WEIGHTS, name))
    if hasattr(network, "first"):
        use_per_frame_modulation(network.transformer)
    elif hasattr(network, "transformer"):
        plain = VideoTransformer(timesteps=network.timesteps)
        plain.load_state_dict(network.transformer.state_dict())
        network = plain
    return Prompted(network.eval())


def graphs() -> dict[str, dict]:
    """All graphs by name."""
    z, t, r = torch.zeros(2, *CLIP), torch.ones(2), torch.zeros(2)
    causal = prompted("causal")
    traced = {
        "whole": (prompted("on_policy"), z, t, r),
        "dense": (prompted("inertia"), z, t, r),
        "chunk0": (causal, z[:, :1], t, r),
        "chunk1": (causal, z[:, :2], t, r, z[:, :1]),
        "chunk2": (causal, z[:, :2], t, r, z[:, :3]),
        "decode": (Decoder(), z),
    }
    return {name: graph_of(*traced[name]) for name in traced}


@torch.no_grad()
def graph_of(module: nn.Module, *inputs: Tensor) -> dict:
    """{"nodes": [[operation, *arguments]], "out": node}. "#3": node 3; "@name": a weight of the module's `network`."""
    module(*inputs)  # masks are then there: tracing could not make them
    program = torch.export.export(module, inputs, strict=False).run_decompositions()
    signature = program.graph_signature
    weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    weights = {name: target for name, target in weights.items() if target in module.state_dict()}
    graph, given = Graph(), 0
    for node in program.graph.nodes:
        if node.name in weights:
            graph.places[node] = "@" + weights[node.name].removeprefix("network.").removeprefix("transformer.")
        elif node.name in signature.user_inputs:
            graph.places[node], given = graph.add("input", given), given + 1
        elif node.op == "placeholder":
            tables = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_buffers}
            graph.values[node] = program.constants[tables[node.name]]
        elif node.op == "call_function" and all(other in graph.values for other in node.all_input_nodes):
            arguments, options = fx.node.map_arg((node.args, node.kwargs), graph.values.get)
            graph.values[node] = node.target(*arguments, **options)
        elif node.op == "call_function":
            graph.places[node] = graph.emit(node)
        else:
            return {"nodes": graph.nodes, "out": graph.place(node.args[0][0])}


class Graph:
    """nodes: of the page's graph. places: what stands for a node of torch's; values: of those that were computed."""

    def __init__(self):
        self.nodes, self.known, self.places, self.values = [], {}, {}, {}

    def add(self, *node) -> str:
        """A node, or the one like it that is there."""
        key = json.dumps(node)
        if key not in self.known:
            self.known[key] = f"#{len(self.nodes)}"
            self.nodes.append(node)
        return self.known[key]

    def place(self, value):
        """What stands for an argument."""
        if isinstance(value, list | tuple):
            return [*map(self.place, value)]
        if not isinstance(value, fx.Node):
            return value
        if value not in self.places:
            table = self.values[value].clamp(min=-1e30)  # JSON has no infinity
            numbers = [float(f"{number:.9g}") for number in table.flatten().tolist()]
            self.places[value] = self.add("constant", [*table.shape], numbers)
        return self.places[value]

    def emit(self, node: fx.Node):
        """What stands for a node of torch's graph; parts of a split are a list.

        Raises NotImplementedError for an operation, or a form of one, that video.js has not.
        """
        name, *_ = getattr(node.target, "__name__", "").split(".")
        x, *rest = self.place(node.args)
        shape, was = (
            [*value.shape] if isinstance(value, Tensor) else None for value in map(_value, (node, node.args[0]))
        )
        if name in SAME:
            return x
        if name in SHAPED:
            return self.view(x, shape)
        if name == "getitem":
            return x[rest[0]] if isinstance(x, list) else x
        if name in ("slice", "select", "split_with_sizes"):
            return getattr(self, name)(x, was, *rest)
        if name == "permute":
            return self.add("permute", x, [dim % len(was) for dim in rest[0]])
        if name == "expand":
            return x if was == shape else self.add("expand", x, shape)
        if name == "cat":
            return self.add("cat", (rest or [0])[0] % len(shape), *x)
        if name in ONE:
            return self.add(name, x)
        if name in TWO and not node.kwargs:
            return self.add(name, x, *rest)
        if name == "gelu":
            return self.add({"tanh": "gelu_tanh"}.get(node.kwargs.get("approximate"), "gelu"), x)
        if name == "clamp":
            return self.add("clamp", x, *[*rest, None][:2])
        if name in ("bmm", "_softmax"):
            return self.add(name.strip("_"), x, *(rest if name == "bmm" else []))
        if name == "addmm":  # b + x w
            return self.add("add", self.add("bmm", *rest), x)
        if name == "native_layer_norm":
            _, weight, bias, epsilon = rest
            out = self.add("norm", x, epsilon)
            return out if weight is None else self.add("add", self.add("mul", out, weight), bias)
        if name == "mean" and len(rest[0]) == 1:
            return self.view(self.add("mean", x, rest[0][0] % len(was)), shape)
        if name == "linalg_vector_norm" and [rest[0], len(rest[1]), *rest[2:]] == [2, 1, True]:
            return self.add("pow", self.add("sum", self.add("mul", x, x), rest[1][0] % len(was)), 0.5)
        if name == "constant_pad_nd":
            pads = [*zip(rest[0][-2::-2], rest[0][::-2], strict=True)]  # torch begins with the last
            pads = [(0, 0)] * (len(was) - len(pads)) + pads
            return self.add("pad", x, pads) if any(map(any, pads)) else x
        if name == "convolution" and {*rest[4]} == {1} and not rest[5] and rest[7] == 1:
            return self.convolution(x, *rest[:4])
        if name == "index":
            for dim, where in enumerate(node.args[1]):
                if where is not None:
                    x = self.add("pick", x, dim, self.values[where].flatten().tolist())
            return x
        if name == "full_like":
            return self.add("expand", self.add("constant", [1], [rest[0]]), shape)
        if name in ("eq", "logical_not", "any"):  # whether a row of a softmax sees nothing: none does
            return x
        if name == "where" and "softmax" in node.args[2].name:
            return rest[1]
        raise NotImplementedError(f"{node.target}{node.args}, {node.kwargs}: video.js has no such operation")

    def view(self, x, shape):
        """x in another shape."""
        if isinstance(x, str) and x.startswith("#") and self.nodes[int(x[1:])][0] == "view":
            x = self.nodes[int(x[1:])][1]
        return self.add("view", x, shape)

    def slice(self, x, was, dim=0, start=0, end=None, step=1):
        """Every `step` of a dimension."""
        start, end, step = slice(start, end, step).indices(was[dim])
        length = len(range(start, end, step))
        return x if length == was[dim] else self.add("slice", x, dim % len(was), start, step, length)

    def select(self, x, was, dim, index):
        """One of a dimension, which is then gone."""
        dim, index = dim % len(was), index % was[dim]
        return self.view(self.slice(x, was, dim, index, index + 1), was[:dim] + was[dim + 1 :])

    def split_with_sizes(self, x, was, sizes, dim=0):
        """The parts, a list."""
        starts = [sum(sizes[:number]) for number in range(len(sizes))]
        return [
            self.slice(x, was, dim % len(was), start, start + size) for start, size in zip(starts, sizes, strict=True)
        ]

    def convolution(self, x, weight, bias, stride, padding):
        """Of two or three dimensions, without dilation or groups."""
        if any(padding):
            x = self.add("pad", x, [[0, 0], [0, 0], *([side, side] for side in padding)])
        return self.add("conv", x, weight, bias, stride)


def _value(node):
    return node.meta.get("val") if isinstance(node, fx.Node) else None


if __name__ == "__main__":
    FILE.write_text(json.dumps(graphs(), separators=(",", ":")) + "\n", "utf-8")
