"""Measures of blob videos that need no pretrained network: balls found, light, shape, acceleration; drift of latents.

Deterministic. Report each beside data against data and codec against data: the codec alone blurs, dims and shakes.
Shapes:
    video    (B, T, 16, 16) in [0, 1]
    latents  (B, F, C, h, w) with F = (T + 3) / 4
    balls    (B,) the prompted number, 1 or 2
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from minianyflow.measures import sliced_w2
from minianyflow.support.checks import check_finite
from minianyflow.support.errors import InputError
from toy_data.blobs import LIGHT, PROMPTS, SIGMA, SIZE, WALLS, render

FOUND = 0.5  # the amplitude above which there is a ball
CLEAR = 1.5  # pixels from a wall: a ball that was reflected between three frames is nearer than that in one of them
LIGHT_OFF = 0.15  # how far the light may be off
MOST, SWEEPS, PIECE = 4, 4, 4096  # balls searched; rounds of refinement; frames at a time, to stay in the cache
_PIXEL = torch.arange(SIZE, dtype=torch.float32)
_REACH = (WALLS[0] - 1, WALLS[1] + 1)  # the range of a ball's centre
_ENERGY = math.pi * SIGMA**2  # of one ball: the sum of its squared pixels


def find_balls(video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The balls, brightest first: positions (B, T, 4, 2) in pixels (x, y), amplitudes (B, T, 4), residual like `video`.

    Matching pursuit (Mallat and Zhang 1993): add the ideal ball that explains most of the residual, then refine all in
    turn by Gauss-Newton steps. To .003 pixels and amplitude on rendered clips. An amplitude near 0 is no ball.
    """
    video = _checked(video)
    pieces = [_pursue(frames) for frames in video.flatten(0, 1).split(PIECE)]
    return tuple(torch.cat(part).unflatten(0, video.shape[:2]) for part in zip(*pieces, strict=True))


def _pursue(rest):
    """find_balls for frames (N, 16, 16)."""
    rest, balls = rest.clone(), []
    grid = torch.arange(_REACH[0], _REACH[1] + 1)
    templates = _profile(grid)  # (P, 16)
    for _ in range(MOST):
        score, place = (templates @ rest @ templates.T).flatten(1).max(1)  # rows are y, columns x
        position = torch.stack([grid[place % len(grid)], grid[place // len(grid)]], 1)
        amplitude = (score / _ENERGY).clamp(min=0)
        rest -= amplitude[:, None, None] * render(position[:, None])
        balls.append((position, amplitude))
        for _ in range(SWEEPS):
            balls = [_refine(rest, *ball) for ball in balls]
    positions, amplitudes = (torch.stack(part, 1) for part in zip(*balls, strict=True))
    amplitudes, order = amplitudes.sort(1, descending=True)
    return positions.take_along_dim(order[..., None], 1), amplitudes, rest


def _refine(rest, position, amplitude):
    """One Gauss-Newton step of one ball (N, 2), (N,), in place of `rest`. It and its derivatives are orthogonal."""
    bump = _profile(position)  # (N, 2, 16)
    slope = bump * (_PIXEL - position[..., None]) / SIGMA**2
    energy, steep = bump.square().sum(2), slope.square().sum(2)  # (N, 2): along x, along y
    (x, y), (slope_x, slope_y) = bump.unbind(1), slope.unbind(1)
    along_x = rest @ torch.stack([x, slope_x], 2)  # (N, 16, 2)
    bright = (along_x[..., 0] * y).sum(1) / energy.prod(1)
    shift = torch.stack([(along_x[..., 1] * y).sum(1), (along_x[..., 0] * slope_y).sum(1)], 1)
    brighter = (amplitude + bright).clamp(min=0)
    shift = shift / (steep * energy.flip(1) * brighter.clamp(min=0.05)[:, None])
    moved = (position + shift.clamp(-0.5, 0.5)).clamp(*_REACH)
    new_x, new_y = _profile(moved).unbind(1)
    columns = torch.stack([amplitude[:, None] * y, -brighter[:, None] * new_y], 2)
    rest.baddbmm_(columns, torch.stack([x, new_x], 1))
    return moved, brighter


def _profile(centre):
    """A ball along one axis: (..., 16) for centres (...)."""
    return torch.exp(-0.5 * ((_PIXEL - centre[..., None]) / SIGMA) ** 2)


def physics(video: Tensor, balls: Tensor) -> dict[str, Tensor]:
    """Measures per frame: tensors (B, T), or the shape given. `balls` (B,): the prompted number, 1 or 2.

    light               total intensity over that of the prompted balls: 1 is right
    count               balls found, amplitude above .5
    from_ideal          root mean square difference from the prompted number of ideal balls where balls were found, over
                        the root mean square of that ideal frame: 0 is right, a black frame or a wrong place about 1
    squared_acceleration  (B, T, 2) in pixels^2 / frame^4, of each prompted ball over the three frames that end here;
                        NaN unless all three hold the prompted number and the ball is 1.5 pixels from every wall
    acceleration        (B,) in pixels / frame^2: the root of its mean over a clip, NaN where there is none
    """
    video, balls = _checked(video), check_balls(balls, len(video))
    positions, amplitudes, _ = find_balls(video)
    prompted = torch.arange(len(PROMPTS)) < balls[:, None]  # (B, 2)
    places = positions[:, :, : len(PROMPTS)].masked_fill(~prompted[:, None, :, None], torch.nan)
    count = (amplitudes > FOUND).sum(2)
    squares = _squared_acceleration(places, count == balls[:, None])
    difference = (video - render(places)).square().sum((2, 3))
    return {
        "light": video.sum((2, 3)) / (LIGHT * balls[:, None]),
        "count": count,
        "from_ideal": (difference / (_ENERGY * balls[:, None])).sqrt(),
        "squared_acceleration": squares,
        "acceleration": squares.flatten(1).nanmean(1).sqrt(),
    }


def _squared_acceleration(places, right):
    """(B, T, 2) from places (B, T, 2, 2), NaN for a ball that is not prompted; right (B, T): whether the count is."""
    places = track(places)
    inside = (places > WALLS[0] + CLEAR) & (places < WALLS[1] - CLEAR)
    valid = inside.all(3) & right[..., None]  # (B, T, 2)
    second = (places[:, 2:] - 2 * places[:, 1:-1] + places[:, :-2]).square().sum(3)
    second = second.masked_fill(~(valid[:, 2:] & valid[:, 1:-1] & valid[:, :-2]), torch.nan)
    return pad(second, (0, 0, min(2, places.shape[1]), 0), value=torch.nan)


def track(places: Tensor) -> Tensor:
    """Places (B, T, 2, 2) of two balls, swapped where a frame lists them in another order than the one before."""
    as_listed = (places[:, 1:] - places[:, :-1]).square().sum((2, 3))
    swapped = (places[:, 1:] - places[:, :-1].flip(2)).square().sum((2, 3))  # NaN for one ball: never swapped
    swap = pad((swapped < as_listed).cumsum(1) % 2 == 1, (1, 0))
    return torch.where(swap[..., None, None], places.flip(2), places)


def summary(video: Tensor, balls: Tensor, partition: tuple[int, ...] | None = None) -> dict:
    """Means and shares over clips: a dict of floats (`acceleration` NaN where no clip has any).

    prompt_obeyed  share of clips with the prompted number of balls in every frame
    light          mean; light_kept: share of clips whose light is within 15% of 1 in every frame
    obeyed_and_kept            share of clips with both
    from_ideal, acceleration   means, as in `physics`
    Data: 1, 1, 1, 1, 0, 0. The codec alone: 1, .99, 1, 1, .05, .14.

    A `partition` of latent frames into chunks, say (1, 2, 2), adds `by_chunk`, a list of the same measures per chunk;
    an acceleration counts in the chunk of its last frame. Raises InputError if it does not sum to (T + 3) / 4.
    """
    balls, frames = check_balls(balls, len(video)), video.shape[1]
    figures = physics(video, balls)
    whole = _summary(figures, balls, slice(None))
    if partition is not None:
        if frames % 4 != 1:
            raise InputError(f"{frames} frames; expected 4 n + 1, such as 17, for a chunk partition: cut the clip")
        whole["by_chunk"] = [
            _summary(figures, balls, slice(max(4 * chunk.start - 3, 0), 4 * chunk.stop - 3))
            for chunk in _chunks(partition, (frames + 3) // 4)  # latent frame k is video frames 4 k - 3 to 4 k
        ]
    return whole


def _summary(figures, balls, frames):
    names = "light", "count", "from_ideal", "squared_acceleration"
    light, count, from_ideal, squares = (figures[name][:, frames] for name in names)
    obeyed, light_kept = (count == balls[:, None]).all(1), ((light - 1).abs() <= LIGHT_OFF).all(1)
    return {
        "prompt_obeyed": float(obeyed.float().mean()),
        "light": float(light.mean()),
        "light_kept": float(light_kept.float().mean()),
        "obeyed_and_kept": float((obeyed & light_kept).float().mean()),
        "from_ideal": float(from_ideal.mean()),
        "acceleration": float(squares.flatten(1).nanmean(1).sqrt().nanmean()),
    }


def drift(latents: Tensor, reference: Tensor, partition: tuple[int, ...]) -> list[float]:
    """Sliced W2 of each chunk's latents (n, F, C, h, w) from the same chunk of `reference`: floats, in data units."""
    if latents.shape[1:] != reference.shape[1:]:
        raise InputError(f"latents {latents.shape}; expected the same frames and sizes as those of {reference.shape}")
    return [sliced_w2(latents[:, chunk], reference[:, chunk]) for chunk in _chunks(partition, latents.shape[1])]


def _chunks(partition, frames):
    """A chunk partition as slices of latent frames."""
    if min(partition, default=0) < 1 or sum(partition) != frames:
        raise InputError(f"chunk partition {tuple(partition)}; expected whole numbers above 0 that sum to {frames}")
    ends = torch.tensor(partition).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, partition, strict=True)]


def _checked(video):
    if video.ndim != 4 or video.shape[2:] != (SIZE, SIZE) or 0 in video.shape:
        raise InputError(f"a video of shape {tuple(video.shape)}; expected (B, T, {SIZE}, {SIZE}): decode latents")
    check_finite("a video", video)
    return video.float().cpu()


def check_balls(balls: Tensor | list[int], count: int) -> Tensor:
    """The numbers of balls (count,), or an InputError."""
    balls = torch.as_tensor(balls).cpu()
    if balls.shape != (count,) or not bool(((balls >= 1) & (balls <= len(PROMPTS))).all()):
        raise InputError(f"balls {tuple(balls.shape)}, {balls.tolist()[:4]}; expected ({count},), each 1 or 2")
    return balls
