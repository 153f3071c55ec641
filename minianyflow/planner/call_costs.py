"""What the networks of a run cost for every question that its losses ask them, on the meta device (costs.py).

Counted with two and three blocks: every further block costs what the third does.
"""

import json
from dataclasses import replace

import torch
from tqdm import tqdm

from minianyflow.networks.causal_attention import causal_mask, chunk_partition
from minianyflow.networks.lora_roles import TARGETS, add_role
from minianyflow.planner.costs import kept_pairs, measure
from minianyflow.wan.run_networks import RunNetworks, prepare_transformer
from minianyflow.wan.shapes import build_transformer


class ShapeNetworks(RunNetworks):
    """The networks of a run around transformers of `shape` that are built (build_transformer), not loaded."""

    def __init__(self, config, frames, shape, device="meta", **changes):
        self.shape, self.changes = shape, changes
        super().__init__(replace(config, student=None, teacher=None), frames, device)
        if self.base is not None and config.teacher:
            options = {"rank": config.rank, "alpha": config.alpha, "targets": TARGETS}
            with torch.device(device):
                add_role(self.base, "teacher", **options)
            self.config = replace(self.config, teacher=config.teacher)  # which then is there, and not loaded

    def trained(self, role, start=None):
        """As RunNetworks has it, from no start."""
        with torch.device(self.device):  # where peft then makes new weights, too
            return super().trained(role)

    def _load(self, source, frozen=False):
        config, changes = self.config, dict(self.changes)
        if config.architecture == "causal":
            changes["full_chunk_limit"] = config.causal.full_chunks
        half = config.precision == "bf16" and (frozen or config.trained == "lora")
        dtype = torch.bfloat16 if half else torch.float32
        transformer = build_transformer(self.shape, config.architecture, self.device, dtype, **changes)
        empty = transformer.device.type == "meta"  # nothing runs there that would be faster compiled
        return prepare_transformer(replace(config, compiled=config.compiled and not empty), transformer)


class Prices:
    """Cost of a Question, of a row of it, for a configuration and a clip; each counted once."""

    def __init__(self, config, shape, clip_shape, length, text_dim):
        self.config, self.clip, self.prompt = config, clip_shape, (length, text_dim)
        self.layers, self.known, self.caches = shape["num_layers"], {}, {}
        self.networks = [self._build(shape, count) for count in (2, 3)] if self.layers > 2 else []
        self.networks = self.networks or [self._build(shape, self.layers)]

    def _build(self, shape, layers):
        networks = ShapeNetworks(self.config, self.clip[0], shape, num_layers=layers)
        made = {"student": networks.trained("student")}
        if self.config.stage == "on_policy":
            made["fake"] = networks.trained("fake")
        made["teacher"] = networks.teacher(whole=self.config.stage == "on_policy")
        return {role: each.network for role, each in made.items()}

    def __call__(self, question):
        """Of all its rows."""
        one = self.one(question)
        if question.rows == 1:
            return one
        return one * question.rows + self.fixed(question) * (1 - question.rows)

    def count(self, questions):
        """Count what these cost now, the different ones, under a bar if that takes more than two seconds."""
        new = [each for each in dict.fromkeys(question.costs for question in questions) if each not in self.known]
        for each in tqdm(new, desc="counting", unit="evaluation", delay=2, leave=False, disable=None):
            self.one(each)

    def fixed(self, question):
        """What does not grow with the rows, like the sines and cosines of positions."""
        key = question.costs
        if (key, "fixed") not in self.known:
            one, two = (self._measure(self.networks[0][key.role], replace(key, rows=rows)) for rows in (1, 2))
            self.known[key, "fixed"] = one * 2 + two * -1
        return self.known[key, "fixed"]

    def one(self, question):
        """Of one row."""
        key = question.costs
        if key not in self.known:
            fewer, *more = [self._measure(networks[key.role], key) for networks in self.networks]
            cost = fewer
            if more:
                cost = fewer + (more[0] + fewer * -1) * (self.layers - 2)
                cost = replace(cost, transient=more[0].transient, returning=more[0].returning)
            self.known[key] = cost
        return self.known[key]

    def _measure(self, network, question):
        one = torch.device("meta")
        z = torch.empty(question.rows, question.frames, *self.clip[1:], device=one, requires_grad=question.moved)
        prompt, t = torch.empty(question.rows, *self.prompt, device=one), torch.empty(question.rows, device=one)
        inputs = {"remember": (z, None, None, prompt)}.get(question.kind, (z, t, t, prompt))
        return measure(network, inputs, self._condition(network, question, z), question.grad, self._pairs(question))

    def _condition(self, network, question, z):
        known = torch.empty(len(z), question.before, *z.shape[2:], device="meta")
        if question.kind == "forced":
            return {"clean": torch.empty_like(z)} | ({"past": known} if question.before else {})
        if question.kind == "read":
            key = (network, question.before, len(z))
            if key not in self.caches:
                prompt = torch.empty(len(z), *self.prompt, device="meta")
                with torch.no_grad():
                    self.caches[key] = network(known, None, None, prompt, fill_cache=True) if question.before else ()
            return {"cache": self.caches[key]}
        if question.kind == "remember":
            return {"fill_cache": True}
        single = question.kind == "whole" and self.config.architecture == "causal"
        return {"single_chunk": torch.empty(len(z))} if single else {}

    def _pairs(self, question):
        if question.kind not in ("forced", "remember"):
            return None
        chunks, (_, _, high, wide) = self.config.causal, self.clip
        partition = chunk_partition(question.before + question.frames, chunks.first, chunks.rest, True)
        full, coarse = (high // 2) * (wide // 2), (high // 4) * (wide // 4)
        clean, mode = (True, "train") if question.kind == "forced" else (False, "cache")
        causal_mask(partition, full, coarse, chunks.full_chunks, clean, mode, torch.device("meta"))  # made, and kept
        return kept_pairs(partition, full, coarse, chunks.full_chunks, clean, mode)


_PRICES = {}


def prices_of(config, shape, clip_shape, length, text_dim):
    """The Prices of a configuration: kept, as what they cost does not depend on most of it."""
    names = ("stage", "architecture", "trained", "checkpointing", "keep_attention", "precision", "rank")
    kept = [getattr(config, name) for name in names]
    policy = (bool(config.teacher), config.on_policy.forward_weight > 0, config.on_policy.context_gradient)
    policy += (repr(config.causal), config.velocity)
    key = (*kept, *policy, json.dumps(shape), clip_shape, length, text_dim)
    if key not in _PRICES:
        _PRICES[key] = Prices(config, shape, clip_shape, length, text_dim)
    return _PRICES[key]
