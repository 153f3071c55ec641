"""How many frames per second a GPU could stream: FLOP of a chunk of a causal model, counted without weights."""

from minianyflow.planner.forward_calls import ForwardCall
from minianyflow.planner.forward_cost import forward_costs
from minianyflow.planner.gpus import GPUS, find_gpu
from minianyflow.support.reports import markdown_table
from minianyflow.wan.config import load_config
from minianyflow.wan.data.options import WAN_CLIP
from minianyflow.wan.shapes import SHAPES, latent_shape

SIZES, STEPS = ("1.3b", "14b"), (1, 2, 4)


def chunk_flop(size: str) -> dict[str, float]:
    """FLOP per chunk at the end of the window, as `networks.causal.causal_stream` makes it: of the cache, of a step.

    At 480 x 832, in a window of 81 frames, its adapter merged. Also `frames` of video per chunk, and bytes:
    `weights` and `cache`. The codec and the text encoder are not counted.
    """
    config, shape = load_config([f"wan-{size}", "causal", "forward"]), SHAPES[size]
    clip, chunks = latent_shape(), config.causal
    window = chunks.first + (clip[0] - chunks.first) // chunks.rest * chunks.rest
    costs = forward_costs(config, shape, clip, (WAN_CLIP["length"], shape["text_dim"]))

    def call(kind, frames, context=0):
        return costs(ForwardCall("teacher", 1, False, False, kind, frames, context))

    cache, step = call("fill_cache", window - chunks.rest), call("read_cache", chunks.rest, window - chunks.rest)
    weights, _ = costs.weights()["base"]
    return {
        "cache": cache.forward,
        "step": step.forward,
        "frames": 4 * chunks.rest,
        "bytes": {"weights": weights, "cache": cache.cache},
    }


def table(flop: dict[str, dict], share: float = 0.5) -> str:
    """Frames per second of every GPU, size and step count, and what a chunk takes."""
    rows = []
    for size, chunk in flop.items():
        about = [size.upper(), f"{chunk['cache'] / 1e12:.0f}", f"{chunk['step'] / 1e12:.0f}"]
        about += [f"{chunk['bytes'][part] / 1e9:.1f}" for part in ("weights", "cache")]
        rates = [
            " / ".join(f"{rate(chunk, steps, find_gpu(gpu).rate, share):.1f}" for steps in STEPS)
            if fits(chunk, gpu)
            else "-"
            for gpu in GPUS
        ]
        rows.append([*about, *rates])
    return markdown_table(["", "TFLOP: cache", "a step", "GB: weights", "cache", *GPUS], rows)


def rate(chunk: dict, steps: int, flop_per_second: float, share: float = 0.5) -> float:
    """Frames per second; 16 are real time."""
    return chunk["frames"] * share * flop_per_second / (chunk["cache"] + steps * chunk["step"])


def fits(chunk: dict, gpu: str) -> bool:
    """Whether weights and cache fit, with SPARE left."""
    return find_gpu(gpu).holds(sum(chunk["bytes"].values()))
