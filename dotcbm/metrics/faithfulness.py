"""Does a concept fall when the place that its map points at is covered, and more than when another place of the same size is?

h w rows and columns of a map's grid, H W pixels, X pairs of picture and concept. Regions are bool on the grid.

A region is covered with the picture's mean colour or with a blurred copy of it; both take the network somewhat out of its
training distribution, so a drop counts only beside the drop for the random region, which suffers the same.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Fill", "cover", "occlusion_drop", "random_region", "region_of"]

Fill = Literal["mean", "blur"]


def region_of(map_hw: Tensor, *, share: float = 0.5, max_area: float = 0.25) -> Tensor:
    """(..., h, w) bool: the hottest cells that together hold a share of a map's positive mass.

    Args:
        map_hw: (..., h, w); negative values count as zero.
        share: Of the mass, in (0, 1]: as few cells as hold it.
        max_area: At most this share of the cells, in (0, 1], but at least one: covering half the picture proves nothing.

    Returns:
        Nothing for a map without positive mass. Among equals the first in row order.

    Raises:
        ValueError: A share out of range, or a map with NaN.
    """
    for what, value in (("share", share), ("max_area", max_area)):
        if not 0 < value <= 1:
            raise ValueError(f"{what} is {value}; it must lie in (0, 1]")
    if map_hw.isnan().any():
        raise ValueError("the map holds NaN; the model that made it has diverged")
    mass_N = map_hw.double().clamp(min=0).flatten(-2)
    sorted_N, order_N = mass_N.sort(stable=True, dim=-1, descending=True)
    before_N = sorted_N.cumsum(-1) - sorted_N
    # A cell is taken while those before it do not yet hold the share; the slack absorbs the rounding of the sum.
    taken_N = (before_N < share * mass_N.sum(-1, keepdim=True) * (1 - 1e-12)) & (sorted_N > 0)
    most = max(1, int(max_area * mass_N.shape[-1]))
    taken_N &= torch.arange(mass_N.shape[-1], device=mass_N.device) < most
    return torch.zeros_like(taken_N).scatter(-1, order_N, taken_N).unflatten(-1, map_hw.shape[-2:])


def random_region(region_hw: Tensor, *, seed: int = 0) -> Tensor:
    """(h, w) bool: a contiguous region of as many cells, grown cell by cell from a random place, beside the given one if possible.

    It starts in a stretch of free cells that is large enough, each of whose cells is as likely; without any, it grows over the
    largest stretch and then into the region itself, so that it always has as many cells.

    Args:
        region_hw: (h, w) bool.
        seed: Of place and growth.

    Raises:
        ValueError: The region is not two-dimensional.
    """
    if region_hw.ndim != 2:
        raise ValueError(f"a region has shape {tuple(region_hw.shape)}; give one region at a time, (h, w)")
    height, width = region_hw.shape
    wanted = int(region_hw.sum())
    result = torch.zeros(height, width, dtype=torch.bool)
    if wanted == 0:
        return result
    generator = torch.Generator().manual_seed(seed)
    free = {divmod(i, width) for i in (~region_hw.cpu()).flatten().nonzero()[:, 0].tolist()}
    stretches = _stretches(free)
    roomy = [cell for stretch in stretches if len(stretch) >= wanted for cell in stretch]
    starts = sorted(roomy or max(stretches, key=len, default={divmod(i, width) for i in range(height * width)}))
    grown: set[tuple[int, int]] = set()
    border = [starts[_draw(len(starts), generator)]]
    while len(grown) < wanted:
        inside_free = [i for i, cell in enumerate(border) if cell in free] or range(len(border))
        cell = border.pop(inside_free[_draw(len(inside_free), generator)])
        grown.add(cell)
        known = grown.union(border)
        border += [near for near in _neighbours(cell) if 0 <= near[0] < height and 0 <= near[1] < width and near not in known]
    for row, column in grown:
        result[row, column] = True
    return result.to(region_hw.device)


def cover(image_3HW: Tensor, region_hw: Tensor, *, fill: Fill = "mean") -> Tensor:
    """The picture with a region covered.

    Args:
        image_3HW: (..., 3, H, W) float, also normalised for an encoder, or uint8.
        region_hw: (..., h, w) bool on a grid over the whole picture, with the picture's leading dimensions.
        fill: "mean" takes the mean colour of the picture; "blur" the picture seen through a Gaussian of one grid cell's size, which
            keeps the colours and removes what is smaller.

    Returns:
        The same shape and type.

    Raises:
        ValueError: Shapes do not fit, or no such fill.
    """
    if fill not in get_args(Fill):
        raise ValueError(f"fill is {fill!r}; choose one of {list(get_args(Fill))}")
    if image_3HW.ndim < 3 or image_3HW.shape[-3] != 3 or image_3HW.shape[:-3] != region_hw.shape[:-2]:
        raise ValueError(f"a picture of shape {tuple(image_3HW.shape)} and a region of shape {tuple(region_hw.shape)} do not fit")
    height, width = image_3HW.shape[-2:]
    rows_H = torch.arange(height, device=region_hw.device) * region_hw.shape[-2] // height
    columns_W = torch.arange(width, device=region_hw.device) * region_hw.shape[-1] // width
    covered_1HW = region_hw[..., rows_H, :][..., columns_W][..., None, :, :].bool()
    picture_3HW = image_3HW.float()
    if fill == "mean":
        filling_3HW = picture_3HW.mean((-2, -1), keepdim=True)
    else:
        filling_3HW = _blurred(picture_3HW, (height / region_hw.shape[-2], width / region_hw.shape[-1]))
    if not image_3HW.is_floating_point():
        filling_3HW = filling_3HW.round().clamp(0, 255)
    return torch.where(covered_1HW, filling_3HW.to(image_3HW.dtype), image_3HW)


def occlusion_drop(probability_X: Tensor, covered_X: Tensor) -> Tensor:
    """(X,) float64 in [-1, 1]: how far a concept's probability falls when a region is covered.

    For the difference to a random region's drop take `dotcbm.metrics.intervals.paired_bootstrap` of both, with pairs summed up by
    picture (`picture_sums`).

    Args:
        probability_X: Of the untouched picture, in [0, 1].
        covered_X: Of the covered one.

    Raises:
        ValueError: Shapes do not fit, or values that are no probabilities.
    """
    if probability_X.shape != covered_X.shape:
        raise ValueError(f"{tuple(probability_X.shape)} probabilities before and {tuple(covered_X.shape)} after covering; give pairs")
    for values in (probability_X, covered_X):
        known = values[~values.isnan()]
        if known.numel() and (known.min() < 0 or known.max() > 1):
            raise ValueError(f"values from {known.min():g} to {known.max():g} are no probabilities; apply a sigmoid first")
    return probability_X.double() - covered_X.double()


def _blurred(picture_3HW: Tensor, sigma: tuple[float, float]) -> Tensor:
    """Gaussian blur with a standard deviation in pixels for rows and columns; the border is repeated."""
    flat_XHW = picture_3HW.reshape(-1, 1, *picture_3HW.shape[-2:])
    for dim, deviation in enumerate(sigma):
        reach = max(1, round(3 * deviation))
        offset = torch.arange(-reach, reach + 1, dtype=flat_XHW.dtype, device=flat_XHW.device)
        weight = (-0.5 * (offset / deviation) ** 2).exp()
        kernel = (weight / weight.sum()).view(1, 1, -1, 1) if dim == 0 else (weight / weight.sum()).view(1, 1, 1, -1)
        pad = (0, 0, reach, reach) if dim == 0 else (reach, reach, 0, 0)
        flat_XHW = functional.conv2d(functional.pad(flat_XHW, pad, mode="replicate"), kernel)
    return flat_XHW.view_as(picture_3HW)


def _stretches(free: set[tuple[int, int]]) -> list[set[tuple[int, int]]]:
    """The connected stretches of cells, in row order of their first cells."""
    left, stretches = set(free), []
    while left:
        stretch, edge = set(), [min(left)]
        left.remove(edge[0])
        while edge:
            cell = edge.pop()
            stretch.add(cell)
            near = left.intersection(_neighbours(cell))
            left -= near
            edge += near
        stretches.append(stretch)
    return stretches


def _neighbours(cell: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    row, column = cell
    return ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))


def _draw(number: int, generator: torch.Generator) -> int:
    return int(torch.randint(number, (), generator=generator))
