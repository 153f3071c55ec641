"""The names that a LoRA file gives to its layers: diffusers', those of the original Wan code, and kohya's.

    diffusers   blocks.0.attn1.to_q.lora_A.weight                    scaled by alpha / rank, both in its metadata
    wan         diffusion_model.blocks.0.self_attn.q.lora_A.weight   scaled by 1
    kohya       lora_unet_blocks_0_self_attn_q.lora_down.weight      scaled by alpha / rank, alpha beside each layer

A file in the last two is written with alpha / rank in `lora_B` and an alpha of the rank. Two layers have no place in
Wan's own code and keep their names: the embedder of the target time and a causal model's coarse patches.
"""

import re

import torch
from torch import Tensor

from minianyflow.support.errors import InputError, choose

WAN = {  # diffusers' names inside a block or outside of it, and Wan's
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.delta_embedder.linear_1": "delta_embedding.0",
    "condition_embedder.delta_embedder.linear_2": "delta_embedding.2",
    "far_patch_embedding": "far_patch_embedding",
}
LAYOUTS = {  # prefix, separator, names of the halves
    "wan": ("diffusion_model.", ".", ("lora_A", "lora_B")),
    "kohya": ("lora_unet_", "_", ("lora_down", "lora_up")),
}


def to_layout(state: dict[str, Tensor], layout: str, alpha: float) -> dict[str, Tensor]:
    """A LoRA by diffusers' names, {layer.lora_A.weight: tensor}, by the names of `layout`: wan or kohya.

    alpha: of all its layers. Raises InputError for a layer that has no name there.
    """
    (prefix, dot, halves), named = choose("layout", layout, LAYOUTS), {}
    for name, down in state.items():
        layer, _, half = name.partition(".lora_")
        block, inner = re.fullmatch(r"(blocks\.\d+\.)?(.*)", layer).groups()
        if inner not in WAN:
            raise InputError(f"layer {layer} has no name in Wan's own code; expected {', '.join(WAN)} (of blocks)")
        if half != "A.weight":
            continue
        up, rank = state[f"{layer}.lora_B.weight"], len(down)
        key = prefix + f"{block or ''}{WAN[inner]}".replace(".", dot)
        named |= {f"{key}.{halves[0]}.weight": down.clone(), f"{key}.{halves[1]}.weight": up * (alpha / rank)}
        if layout == "kohya":
            named[f"{key}.alpha"] = torch.tensor(float(rank))
    return named


def from_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA by the names of any layout, by diffusers', with an alpha of its rank; one of diffusers' stays as it is.

    Raises InputError for a name that its layout does not have.
    """
    found = next((found for found in LAYOUTS.values() if all(name.startswith(found[0]) for name in state)), None)
    if found is None:
        return {name.removeprefix("transformer."): value for name, value in state.items()}
    prefix, dot, halves = found
    layers = {theirs.replace(".", dot): ours for ours, theirs in WAN.items()}
    part = re.escape(dot)
    pattern = rf"{re.escape(prefix)}(?:blocks{part}(\d+){part})?(.+?)\.({'|'.join(halves)}|alpha)(?:\.weight)?"
    renamed, alphas = {}, {}
    for name, value in state.items():
        match = re.fullmatch(pattern, name)
        if not match or match[2] not in layers:
            raise InputError(f"{name} is no layer of a LoRA for Wan; expected one that minianyflow export wrote")
        block, inner, half = match.groups()
        layer = (f"blocks.{block}." if block else "") + layers[inner]
        if half == "alpha":
            alphas[layer] = float(value)
        else:
            renamed[f"{layer}.lora_{'AB'[halves.index(half)]}.weight"] = value
    for layer, alpha in alphas.items():
        down, up = (f"{layer}.lora_{half}.weight" for half in "AB")
        renamed[up] = renamed[up] * (alpha / len(renamed[down]))
    return renamed
