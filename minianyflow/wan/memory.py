"""Whether the rollouts of a run are kept or recomputed, where its configuration leaves that open (memory=auto).

And whether the CPU memory holds what `offload` puts there.
"""

import os

import psutil
import torch

from minianyflow.networks.causal_attention import chunk_partition
from minianyflow.support.errors import InputError
from minianyflow.wan.config import Config

BLOCK = 40  # a block in its backward holds so many times its input, by the planner's count
ROLES = 8  # two roles, a gradient, four moments and an average, each of the size of a role's weights


def choose_memory(
    config: Config, size: dict | None, clip: tuple, device: torch.device, processes: int = 1
) -> tuple[str, str]:
    """fast or small, and why. size: the configuration of the transformer, whose frozen weights are loaded already."""
    if config.memory != "auto" or config.stage != "on_policy":
        return config.memory, "no rollouts" if config.memory == "auto" else "as set"
    if "blocks" in config.offload:
        return "fast", "what is kept of rollouts rests in CPU memory"
    if device.type == "cpu":
        return "fast", "time matters on a CPU"
    if not config.checkpointing or config.trained == "full":
        return "small", "rollouts take most of the memory"
    free, total = torch.cuda.mem_get_info(device)
    kept, rest = rollout_bytes(config, size, clip, processes)
    why = f"rollouts take {kept / 1e9:.1f} GB, all else to come {rest / 1e9:.1f}, and {free / 1e9:.1f} are free"
    return "fast" if kept + rest <= free - 0.05 * total else "small", why


def rollout_bytes(config: Config, size: dict, clip: tuple, processes: int = 1) -> tuple[float, float]:
    """Bytes of all jumps and caches, if all are kept; and about what training takes beside the frozen weights."""
    (frames, _, high, wide), chunks, layers = clip, config.causal, size["num_layers"]
    width = size["num_attention_heads"] * size["attention_head_dim"]
    frame = 1.2 * high * wide / 4 * width * (2 if config.precision == "bf16" else 4)  # a block's input, and beside it
    frame *= layers * config.batch // config.accumulate // processes
    causal = config.architecture == "causal"
    partition = chunk_partition(frames, chunks.first, chunks.rest, True) if causal else (frames,)
    before = [sum(partition[:index]) for index in range(len(partition))]
    recent = [sum(partition[max(0, index + 1 - chunks.full_chunks) : index]) for index in range(len(partition))]
    caches = 2 * sum(new + (old - new) / 4 for old, new in zip(before, recent, strict=True))  # old frames are coarse
    adapters = 4 * layers * config.rank * (10 * width + 2 * size["ffn_dim"])
    jumps = 3 * (1 + ("halves" in config.offload)) * frames
    return frame * (jumps + caches), frame * frames * (1 + BLOCK / layers) + ROLES * adapters


def check_host(config: Config, size: dict | None, roles: dict, clip: tuple, processes: int = 1) -> None:
    """Raise InputError if CPU memory has no room for the states and blocks that `offload` is about to put there.

    size: as above; the base is loaded, and there already. roles: {name: Role}.
    """
    needed = 0
    if "states" in config.offload:
        for role in roles.values():
            size_of_role = sum(weight.nbytes for weight in role.network.parameters() if weight.requires_grad)
            needed += size_of_role * (2 + (role.average is not None))
    if "blocks" in config.offload and size:
        jumps = rollout_bytes(config, size, clip, processes)[0]
        needed += jumps if config.stage == "on_policy" else jumps / 3  # about one evaluation
    here, free = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), psutil.virtual_memory().available
    if needed * here > free:
        problem = f"needs {needed * here / 1e9:.3g} GB of CPU memory, and {free / 1e9:.3g} are free"
        expected = "leave out states or blocks, make accumulate larger, or start fewer processes here"
        raise InputError(f"offload=[{','.join(config.offload)}] {problem}; {expected}")
