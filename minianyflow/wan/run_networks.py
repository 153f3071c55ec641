"""The networks of a run: student, teacher and fake score, each u(z, t, r, prompt), each counted.

With adapters all roles share one frozen base (networks/lora_roles.py); with full weights each role has a copy.
"""

from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from minianyflow.networks.blocks import checkpoint_blocks, compile_blocks
from minianyflow.networks.causal import CausalNetwork
from minianyflow.networks.causal_attention import chunk_partition
from minianyflow.networks.int8 import quantise
from minianyflow.networks.lora_roles import (
    COARSE_PATCHES,
    EMBEDDERS,
    TARGETS,
    RoleNetwork,
    add_role,
    remove_role,
    roles_of,
)
from minianyflow.networks.mlp import EvaluationCounter
from minianyflow.networks.patches import use_per_frame_modulation
from minianyflow.networks.resting import RestingBlocks
from minianyflow.networks.sequence import TokenGroup, share_tokens
from minianyflow.networks.wan import Autocast, WanNetwork
from minianyflow.networks.weights import load_role
from minianyflow.support.errors import InputError
from minianyflow.wan.config import Config
from minianyflow.wan.folders import is_folder, load_transformer


class RunNetworks:
    """The networks of a run. frames: of a clip, in latents. sizes: channels of the latents and width of the prompts.

    One base is loaded, and every role is an adapter on it; with full weights every role loads its own transformer.
    Raises InputError for one that takes other sizes.
    """

    _group = TokenGroup  # the processes that share a clip; the planner counts with a stand-in

    def __init__(
        self, config: Config, frames: int, device: torch.device | str = "cpu", sizes: tuple[int, int] | None = None
    ):
        self.sizes = sizes
        self.config, self.frames, self.device, self.counters = config, frames, device, {}
        self.resting = self.error = None
        self.tokens = self._group(config.sequence_parallel) if config.sequence_parallel > 1 else None
        self.base = self._load(config.base) if config.trained == "lora" else None

    def trained(self, role: str, start: str | None = None) -> nn.Module:
        """The network of `role`, to train, from the run `start` or as the base is. A fake score sees whole clips."""
        whole, config = role == "fake", self.config
        if self.base is None:
            transformer = self._load(weights_in(start, whole=True) if start else config.base).requires_grad_(True)
            network = self._wrap(transformer, whole)
            network = Autocast(network) if config.precision == "bf16" else network
        else:
            torch.manual_seed(config.seed)
            if start:
                load_role(weights_in(start), self.base, "start", from_bidirectional=whole)
            embedders = config.stage != "teacher" and (role != "fake" or config.on_policy.fake_embedders)
            targets = TARGETS + (EMBEDDERS if embedders else ())
            coarse = COARSE_PATCHES if config.architecture == "causal" else ()
            copies = coarse if config.causal.coarse_patches == "whole" else ()
            targets += () if copies else coarse
            add_role(self.base, role, config.rank, config.alpha, targets, "start" if start else None, copies)
            if start:
                remove_role(self.base, "start")
            network = RoleNetwork(self._wrap(self.base, whole), role).to(self.device)
        for name, weight in network.named_parameters():
            weight.requires_grad_(COARSE_PATCHES[0] not in name or (self._compresses() and not whole))
        return self._counted(role, network)

    def teacher(self, whole: bool = False) -> nn.Module:
        """The frozen teacher, from its run or as the base is. whole: it sees a clip as one chunk."""
        start = self.config.teacher
        if self.base is None:
            transformer = self._load(weights_in(start, whole=True) if start else self.config.base, frozen=True)
            return self._counted("teacher", self._wrap(transformer, whole))
        if start and "teacher" not in roles_of(self.base):
            load_role(weights_in(start), self.base, "teacher", from_bidirectional=whole)
        network = RoleNetwork(self._wrap(self.base, whole), "teacher" if start else None).to(self.device)
        return self._counted("teacher", network.requires_grad_(False))

    def _load(self, source, frozen=False):
        config = self.config
        half = config.precision == "bf16" and (frozen or config.trained == "lora")
        transformer = self._transformer(source, torch.bfloat16 if half else torch.float32)
        takes = transformer.config.in_channels, transformer.config.text_dim
        if self.sizes not in (None, takes):
            found = "{} channels and prompts {} wide".format(*self.sizes)
            expected = "{} and {}, as {} takes: prepare the latents with this base".format(*takes, source)
            raise InputError(f"the latents in {config.data} have {found}; expected {expected}")
        if config.base_dtype == "int8":
            self.error = quantise(transformer.blocks)
        transformer = prepare_transformer(config, transformer)
        if self.tokens:
            share_tokens(transformer, self.tokens)
        if resting := config.shard_base or "base" in config.offload:
            self.resting = RestingBlocks(transformer, self.device, config.shard_base)
        if config.checkpointing:
            offload, halves = ("blocks" in config.offload), ("halves" in config.offload)
            checkpoint_blocks(transformer, config.keep_attention, offload, embedder=resting, halves=halves)
        return transformer

    def _transformer(self, source, dtype):
        device = "cpu" if self.config.shard_base or "base" in self.config.offload else self.device
        return transformer_of(self.config, source, dtype, device)

    def wait(self) -> None:
        """Where processes share the base: until none evaluates it. All call it before they exchange anything else."""
        if self.config.shard_base:
            self.resting.wait()

    def _compresses(self):
        """Whether a causal student learns from old chunks: clips that long, and a loss whose gradient gets there."""
        if self.config.architecture == "bidirectional":
            return False
        policy, chunks = self.config.on_policy, self.config.causal
        learns = self.config.stage != "on_policy" or policy.forward_weight > 0 or policy.context_gradient
        return learns and len(chunk_partition(self.frames, chunks.first, chunks.rest, True)) > chunks.full_chunks

    def _wrap(self, transformer, whole):
        return network_of(transformer, self.config, self.frames if whole else None)

    def _counted(self, role, network):
        self.counters.setdefault(role, []).append(EvaluationCounter(network))
        return self.counters[role][-1]

    def counts(self) -> dict[str, tuple[int, int]]:
        """Evaluations so far, {role: (rows, rows with gradient)}; those of weight averages are not counted."""
        return {
            role: (sum(counter.rows for counter in counters), sum(counter.with_grad for counter in counters))
            for role, counters in self.counters.items()
        }

    def state_dict(self) -> dict:
        """The counts, for a checkpoint."""
        return {"counts": self.counts(), "processes": PartialState().num_processes}

    def load_state_dict(self, state: dict) -> None:
        """Resume from a checkpoint; rows that other processes counted are shared among the present ones."""
        share = state["processes"] / PartialState().num_processes
        for role, counters in self.counters.items():
            for index, counter in enumerate(counters):
                rows, with_grad = state["counts"][role] if index == 0 else (0, 0)
                counter.rows, counter.with_grad = round(rows * share), round(with_grad * share)


def transformer_of(config: Config, source: str | Path, dtype=torch.float32, device="cpu") -> nn.Module:
    """The transformer in `source` (folders.load_transformer), of the configuration's architecture."""
    limit = config.causal.full_chunks if config.architecture == "causal" else None
    return load_transformer(source, config.architecture, dtype, limit, device=device)


def prepare_transformer(config: Config, transformer: nn.Module) -> nn.Module:
    """A frozen transformer as a run uses it: per-frame modulation, compilation of blocks."""
    use_per_frame_modulation(transformer)
    if config.compiled:
        compile_blocks(transformer)
    return transformer.requires_grad_(False)


def network_of(transformer: nn.Module, config: Config, whole: int | None = None) -> nn.Module:
    """The network u(z, t, r, prompt) of a transformer. whole: number of frames of a clip that is one chunk."""
    if config.architecture == "bidirectional":
        return WanNetwork(transformer)
    offload = "blocks" in config.offload
    return CausalNetwork(transformer, whole or config.causal.first, config.causal.rest, ragged=True, offload=offload)


def weights_in(source: str | Path, role: str = "student", whole: bool = False) -> str | Path:
    """Where the weights of a role are: the file of an adapter in a run folder or, if `whole`, a transformer's source.

    source: a run folder or, if `whole`, also weights of Wan or AnyFlow as load_transformer takes them.
    """
    folder = Path(source)
    adapter, transformer = folder / f"{role}.safetensors", folder / role
    if whole:
        if adapter.exists():
            raise InputError(f"{source} holds adapters; expected whole weights: set trained=lora, or export it first")
        return transformer if transformer.exists() else source
    if adapter.exists():
        return adapter
    is_folder(source, "the folder of a finished run")
    expected = "a finished run: name whole weights as base=, or set trained=full"
    raise InputError(f"{source} is no run with an adapter of role {role!r}; expected {expected}")
