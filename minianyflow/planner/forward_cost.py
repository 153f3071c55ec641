"""What one forward of a network costs, in FLOP and bytes: counted on the meta device, without weights or a GPU.

The real transformer runs forward and backward with two and with three blocks; every further block costs the same.
"""

from dataclasses import astuple, dataclass, replace
from functools import partial

import torch

from minianyflow.networks.causal_attention import causal_mask, chunk_partition, compressed_chunks
from minianyflow.networks.lora_roles import add_role
from minianyflow.networks.sequence import TokenGroup
from minianyflow.planner.counters import LiveBytes, fused_attention, tensors_in
from minianyflow.planner.forward_calls import ForwardCall
from minianyflow.wan.config import Config
from minianyflow.wan.run_networks import RunNetworks
from minianyflow.wan.shapes import build_transformer

MANY = 16  # rows: of so many, the peak is at the moment where it is of more


@dataclass(frozen=True)
class Cost:
    """The cost of a forward call, and of the backward after it.

    FLOP: of the `forward`; of the `backward` without recomputation; `recomputed` by checkpointing in the backward.
    Bytes: `saved` from forward to backward; further bytes at the peak of the forward (`transient`) and of the backward
    (`returning`); the `cache` that a causal network fills; bytes that the forward has `stored` in CPU memory and those
    that it `fetched` from there, the backward `fetched_again`; bytes that processes which share the tokens `exchanged`,
    and again in the backward. The output and gradients of weights are not included.
    """

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0
    saved: float = 0.0
    transient: float = 0.0
    returning: float = 0.0
    cache: float = 0.0
    stored: float = 0.0
    fetched: float = 0.0
    fetched_again: float = 0.0
    exchanged: float = 0.0
    exchanged_again: float = 0.0

    def __add__(self, other):
        return Cost(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor):
        return Cost(*(factor * value for value in astuple(self)))


class CountedGroup(TokenGroup):
    """The first of `size` processes that share the tokens of a clip, without the others: `exchanged` bytes so far."""

    def __init__(self, size: int):
        self.size, self.rank, self.on, self.exchanged = size, 0, True, 0.0

    def swap(self, parts: torch.Tensor) -> torch.Tensor:
        """As TokenGroup."""
        self.exchanged += parts.nbytes * (1 - 1 / self.size)
        return torch.empty_like(parts)

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """As TokenGroup."""
        self.exchanged += part.nbytes * (self.size - 1)
        return part.new_empty(self.size, *part.shape)


def measure(
    network,
    inputs: tuple,
    condition: dict,
    grad: bool,
    pairs: int | None = None,
    group: CountedGroup | None = None,
) -> Cost:
    """The cost of `network(*inputs, **condition)` on the meta device, including a backward if `grad`.

    pairs: number of (query, key) pairs that the attention mask keeps. group: with whom it shares tokens. Gradients of
    weights are dropped at once.
    """
    transformer = network.transformer
    weights = [*transformer.parameters(), *transformer.buffers(), rope_table(transformer)]
    group = group or CountedGroup(1)
    start = group.exchanged
    counter = LiveBytes([*weights, *tensors_in((inputs, condition))])
    with torch.set_grad_enabled(grad), counter, counter.host_memory(), fused_attention(counter, pairs):
        out = tensors_in(network(*inputs, **condition))
        storages = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in out if counter.is_live(tensor)}
        size = sum(storage.nbytes() for storage in storages.values())
        stored, fetched, exchanged = counter.stored, counter.fetched, group.exchanged - start
        forward, saved, peak = counter.flop, max(counter.now - size, 0), counter.peak
        cache = size if condition.get("fill_cache") else 0
        ends = [tensor for tensor in out if tensor.requires_grad]
        for tensor in ends:  # made as it is needed, so that nobody holds it longer than that
            tensor.register_hook(partial(torch.empty_like, memory_format=torch.contiguous_format))
        end = sum(tensor.sum() for tensor in ends)
        before = counter.peak = counter.now
        counter.recomputed = 0
        if grad and ends:
            end.backward()
    return Cost(
        forward=forward,
        backward=counter.flop - forward - counter.recomputed,
        recomputed=counter.recomputed,
        saved=saved,
        transient=peak - saved - cache,
        returning=counter.peak - before,
        cache=cache,
        stored=stored,
        fetched=fetched,
        fetched_again=counter.fetched - fetched,
        exchanged=exchanged,
        exchanged_again=group.exchanged - start - exchanged,
    )


def rope_table(transformer) -> torch.Tensor:
    """The sines and cosines of positions, which a transformer computes once and holds, not as a buffer."""
    return transformer.rope._build_freqs(torch.device("meta"))


def attended_pairs(partition, full: int, coarse: int, limit: int, clean: bool = False, mode: str = "train") -> int:
    """Number of (query, key) pairs that causal.causal_mask keeps, by its own rule. full, coarse: tokens per frame."""
    old = sum(partition[: compressed_chunks(partition, limit, mode)])
    recent = sum(partition) - old
    mask = causal_mask(tuple(partition), 1, 1, limit, clean, mode).double()
    tokens = torch.tensor([coarse] * old + [full] * recent * (1 + clean), dtype=torch.double)
    return int(tokens @ mask @ tokens)


class ShapeNetworks(RunNetworks):
    """The networks of a run around transformers of `shape` with random weights (build_transformer), not loaded."""

    def __init__(self, config: Config, frames: int, shape: dict, device="meta"):
        self.shape = shape
        super().__init__(replace(config, student=None, teacher=None), frames, device)
        if self.base is not None and config.teacher:
            add_role(self.base, "teacher", config.rank, config.alpha)
            self.config = replace(self.config, teacher=config.teacher)  # the adapter is there: nothing is loaded

    _group = CountedGroup

    def _transformer(self, source, dtype):
        chunks = {"full_chunk_limit": self.config.causal.full_chunks} if self.config.architecture == "causal" else {}
        device = "cpu" if "base" in self.config.offload else self.device
        return build_transformer(self.shape, self.config.architecture, device, dtype, **chunks)


class ForwardCosts:
    """The cost of every ForwardCall of a configuration, each counted once; and the bytes of its weights.

    shape: arguments of the transformer. clip: (F, C, H, W) of the latents. prompt: (tokens, numbers per token).
    """

    def __init__(self, config: Config, shape: dict, clip: tuple, prompt: tuple):
        self.config, self.shape, self.clip, self.prompt = config, shape, clip, prompt
        self.layers, self._costs, self._measured, self._caches = shape["num_layers"], {}, {}, {}
        self.few, self.more = min(2, self.layers), min(3, self.layers)  # numbers of blocks that are measured
        self.groups = {}
        self.networks = {layers: self.build(layers) for layers in {self.few, self.more}}

    def build(self, layers: int) -> dict:
        """The networks with so many blocks, {role: network}; gradients of their weights are dropped at once."""
        config = replace(self.config, compiled=False)  # on meta nothing runs that compilation could speed up
        whole = config.stage == "on_policy"
        with torch.device("meta"), LiveBytes().host_memory():  # where peft makes new weights
            networks = ShapeNetworks(config, self.clip[0], self.shape | {"num_layers": layers})
            roles = {role: networks.trained(role).network for role in ("student", "fake")[: 1 + whole]}
            roles["teacher"] = networks.teacher(whole=whole).network
            self.groups[layers] = networks.tokens
        for network in roles.values():
            for weight in _trained(network):
                weight.register_post_accumulate_grad_hook(_drop_gradient)
        return roles

    def weights(self) -> dict[str, tuple[float, float]]:
        """Bytes of weights, gradients and RoPE tables by role, and of what rests: in all, and of one block."""
        few, more = (self._weights(self.networks[layers]) for layers in (self.few, self.more))
        block = {name: more[name] - size for name, size in few.items()}
        further = self.layers - self.few
        return {n: (size + further * block[n], block[n] or size / self.layers) for n, size in few.items()}

    def _weights(self, networks):
        config, size = self.config, {role: _nbytes(network.parameters()) for role, network in networks.items()}
        gradients = {f"{role} gradients": _nbytes(_trained(network)) for role, network in networks.items()}
        transformers = [network.transformer for network in networks.values()]
        frozen = config.stage == "on_policy" or config.velocity == "base"  # or full weights have no teacher
        if config.trained == "lora" or not frozen:
            transformers = transformers[:1]  # with adapters, all roles share it
        if config.trained == "lora":
            size["base"] = _nbytes(transformers[0].parameters()) - sum(size.values())
        else:
            size |= {"base": frozen * size["teacher"], "teacher": 0}
        blocks, embedder = (
            _nbytes(weight for name, weight in part.named_parameters() if ".lora_" not in name)
            for part in (transformers[0].blocks, transformers[0].condition_embedder)
        )
        return (
            size
            | gradients
            | {"blocks": blocks, "embedder": embedder, "tables": _nbytes(map(rope_table, transformers))}
        )

    def __call__(self, call: ForwardCall) -> Cost:
        """The cost of all rows of a call. What does not grow with the rows, like RoPE tables, counts once."""
        per_row, rows = key = call.per_row, call.rows
        if key not in self._costs:
            self._costs[key] = self._cost(per_row, rows)
        return self._costs[key]

    def _cost(self, per_row, rows):
        few, more = (self._measure(layers, per_row) for layers in (self.few, self.more))
        one_row = few + (more + few * -1) * (self.layers - self.few)
        one_row = replace(one_row, transient=more.transient, returning=more.returning)  # of one block at a time
        if rows == 1:
            return one_row
        many, twice = (self._measure(self.few, replace(per_row, rows=n)) for n in (MANY, 2 * MANY))
        constant, per_row = many * 2 + twice * -1, (twice + many * -1) * (1 / MANY)
        cost, peaks = one_row * rows + constant * (1 - rows), constant + per_row * rows
        peaks = {name: max(getattr(one_row, name), getattr(peaks, name)) for name in ("transient", "returning")}
        return replace(cost, **peaks)  # the peak may be at another moment than that of one row

    def _measure(self, layers, call):
        if (layers, call) not in self._measured:
            self._measured[layers, call] = self.measure(self.networks[layers][call.role], call, self.groups[layers])
        return self._measured[layers, call]

    def measure(self, network, call: ForwardCall, group: CountedGroup | None = None) -> Cost:
        """The cost of a call of a network on the meta device."""
        with torch.device("meta"):
            z = torch.empty(call.rows, call.frames, *self.clip[1:], requires_grad=call.state_grad)
            prompt, t = torch.empty(call.rows, *self.prompt), torch.empty(call.rows)
        context = z.new_empty(call.rows, call.context, *z.shape[2:])
        inputs, condition, pairs = (z, t, t, prompt), {}, None
        if call.kind == "teacher_forced":
            condition = {"clean": torch.empty_like(z)} | ({"past": context} if call.context else {})
            pairs = self._pairs(call, True, "train")
        elif call.kind == "fill_cache":
            inputs, condition = (z, None, None, prompt), {"fill_cache": True}
            pairs = self._pairs(call, False, "cache")
        elif call.kind == "read_cache":
            key = (network, call.context, call.rows)
            if key not in self._caches:
                with torch.no_grad(), LiveBytes().host_memory():
                    filled = network(context, None, None, prompt, fill_cache=True) if call.context else ()
                self._caches[key] = filled
            condition = {"cache": self._caches[key]}
        elif call.kind == "one_chunk" and self.config.architecture == "causal":
            condition = {"single_chunk": torch.empty_like(t)}
        return measure(network, inputs, condition, call.grad, pairs, group)

    def _pairs(self, call, clean, mode):
        chunks, (_, _, height, width) = self.config.causal, self.clip
        partition = chunk_partition(call.context + call.frames, chunks.first, chunks.rest, True)
        full, coarse = (height // 2) * (width // 2), (height // 4) * (width // 4)
        rule = (partition, full, coarse, chunks.full_chunks, clean, mode)
        causal_mask(*rule, torch.device("meta"))  # it is held by an lru_cache, so it does not count
        return attended_pairs(*rule)


def _nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def _trained(network):
    return [weight for weight in network.parameters() if weight.requires_grad]


def _drop_gradient(weight):
    weight.grad = None


_COSTS = {}
_DECISIVE = ("stage", "architecture", "trained", "checkpointing", "keep_attention", "precision", "rank", "teacher")
_DECISIVE += ("velocity", "causal", "on_policy", "offload", "base_dtype", "sequence_parallel")


def forward_costs(config: Config, shape: dict, clip: tuple, prompt: tuple) -> ForwardCosts:
    """The ForwardCosts of a configuration, shared by all configurations with the same costs."""
    words = [word for word in config.offload if word in ("blocks", "halves")]  # of activations
    config = replace(config, offload=words, shard_base=False)
    key = repr([*(getattr(config, name) for name in _DECISIVE), shape, clip, prompt])
    if key not in _COSTS:
        _COSTS[key] = ForwardCosts(config, shape, clip, prompt)
    return _COSTS[key]
