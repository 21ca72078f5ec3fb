"""Other backgrounds behind the same object, on uint8 pictures and exact masks.

The object's own pixels are never touched. Outside it a rim of `_RIM` pixels is mixed with the new background, because a hard
cut is a cue by itself. Where a background must be known behind an object, it is painted out from its own surroundings by
normalised convolution over a pyramid (pull-push; Gortler et al., "The Lumigraph", SIGGRAPH 1996), and the detail that this
leaves out is borrowed from half a picture away.

H W pixels; C colours (3).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PAINT", "blurred_background", "coloured_background", "paint_out", "swap_background"]

PAINT = 1
"""Part of the keys of what is computed from painted pictures; raised when the paint looks different."""

_RIM = 2  # pixels around the object that are mixed; masks are drawn by hand, and photos blur edges over about as many
_RIM_SHARE = (0.6, 0.25)  # of the old picture at 1 and at 2 pixels from the object
_HALO = 0.015  # share of the shorter side by which an object grows before it is painted out: masks miss feathers and shadows
_DETAIL = 0.02  # share of the shorter side: structure finer than this is borrowed from elsewhere


def coloured_background(picture_3HW: Tensor, foreground_HW: Tensor, rgb: tuple[int, int, int]) -> Tensor:
    """The object on one colour.

    Args:
        picture_3HW: (3, H, W) uint8.
        foreground_HW: (H, W) bool, the object.
        rgb: Red, green and blue in 0 ... 255.

    Returns:
        (3, H, W) uint8.

    Raises:
        ValueError: Another type or shape, an empty mask, or one that covers all, and (here) a colour out of range.
    """
    _check(picture_3HW, foreground_HW, what="the picture")
    if len(rgb) != 3 or not all(0 <= value <= 255 for value in rgb):
        raise ValueError(f"rgb is {rgb}; give three values from 0 to 255")
    background = torch.tensor(rgb, dtype=torch.float32)[:, None, None].expand(3, *foreground_HW.shape)
    return _composed(picture_3HW, foreground_HW, background)


def blurred_background(picture_3HW: Tensor, foreground_HW: Tensor, *, blur: float = 0.1) -> Tensor:
    """The object before its own background, of which a Gaussian leaves only the colours. The object does not bleed into it.

    Args:
        picture_3HW: (3, H, W) uint8.
        foreground_HW: (H, W) bool, the object.
        blur: Deviation of the Gaussian as a share of the shorter side, positive. The default leaves no texture or thing.

    Returns:
        (3, H, W) uint8.

    Raises:
        ValueError: As `coloured_background`, or blur not positive.
    """
    _check(picture_3HW, foreground_HW, what="the picture")
    if not blur > 0:
        raise ValueError(f"blur is {blur}; give a positive share of the shorter side")
    painted = paint_out(picture_3HW, foreground_HW).float()
    return _composed(picture_3HW, foreground_HW, _gaussian(painted, sigma=blur * min(foreground_HW.shape)))


def swap_background(picture_3HW: Tensor, foreground_HW: Tensor, donor_3HW: Tensor, donor_foreground_hw: Tensor | None = None) -> Tensor:
    """The object on the background of another picture.

    The donor's object is painted out, then the donor is resized to cover the picture and cut at the centre.

    Args:
        picture_3HW: (3, H, W) uint8.
        foreground_HW: (H, W) bool, the object.
        donor_3HW: (3, h, w) uint8, of any size.
        donor_foreground_hw: (h, w) bool, the donor's object; None for a donor without one (a landscape).

    Returns:
        (3, H, W) uint8.

    Raises:
        ValueError: As `coloured_background`, for the picture or the donor.
    """
    _check(picture_3HW, foreground_HW, what="the picture")
    if donor_foreground_hw is not None:
        _check(donor_3HW, donor_foreground_hw, what="the donor")
        donor_3HW = paint_out(donor_3HW, donor_foreground_hw)
    elif donor_3HW.dtype != torch.uint8 or donor_3HW.ndim != 3 or donor_3HW.shape[0] != 3:
        raise ValueError(f"the donor is {_told(donor_3HW)}; expected (3, h, w) uint8")
    height, width = foreground_HW.shape
    scale = max(height / donor_3HW.shape[1], width / donor_3HW.shape[2])
    size = [max(round(donor_3HW.shape[1] * scale), height), max(round(donor_3HW.shape[2] * scale), width)]
    covering = F.interpolate(donor_3HW[None].float(), size=size, mode="bilinear", antialias=True, align_corners=False)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return _composed(picture_3HW, foreground_HW, covering[:, top : top + height, left : left + width])


def paint_out(picture_3HW: Tensor, foreground_HW: Tensor) -> Tensor:
    """The picture with its object replaced by what its surroundings suggest; beyond a halo around the object nothing changes.

    Args:
        picture_3HW: (3, H, W) uint8.
        foreground_HW: (H, W) bool, the object.

    Returns:
        (3, H, W) uint8.

    Raises:
        ValueError: As `coloured_background`.
    """
    _check(picture_3HW, foreground_HW, what="the picture")
    side = min(foreground_HW.shape)
    hole_HW = _grown(foreground_HW, max(round(_HALO * side), 1))
    if hole_HW.all():  # the halo has swallowed what background there was
        hole_HW = foreground_HW
    picture = picture_3HW.float()
    known_HW = (~hole_HW).float()
    smooth = _gaussian(_pulled_and_pushed(picture, known_HW), sigma=_DETAIL * side)
    # Texture: what the picture has beyond its own smooth part, from half a picture away, where that shows background.
    weight = _gaussian(known_HW[None], sigma=_DETAIL * side).clamp(min=1e-6)
    detail = (picture - _gaussian(picture * known_HW, sigma=_DETAIL * side) / weight) * known_HW
    borrowed = torch.zeros_like(detail)
    height, width = foreground_HW.shape
    for shift in ((height // 2, width // 2), (height // 2, 0), (0, width // 2)):  # the last that shows background counts
        source_HW, moved = known_HW.roll(shift, (-2, -1)), detail.roll(shift, (-2, -1))
        borrowed = torch.where(source_HW > 0, moved, borrowed)
    # Texture only: a contour borrowed from elsewhere would be a thing that is not there.
    limit = 2 * (detail.abs().sum() / (3 * known_HW.sum()))
    borrowed = borrowed.clamp(-limit, limit)
    fade = _gaussian(hole_HW.float()[None], sigma=1.0)  # no edge where picture and paint meet
    inside = smooth + borrowed * fade
    return torch.where(hole_HW, inside.round().clamp(0, 255), picture).to(torch.uint8)


def _composed(picture_3HW: Tensor, foreground_HW: Tensor, background_3HW: Tensor) -> Tensor:
    share_HW = foreground_HW.float()
    reached_HW = foreground_HW
    for share in _RIM_SHARE[:_RIM]:
        grown_HW = _grown(reached_HW, 1)
        share_HW = torch.where(grown_HW & ~reached_HW, share, share_HW)
        reached_HW = grown_HW
    mixed = share_HW * picture_3HW.float() + (1 - share_HW) * background_3HW
    return torch.where(foreground_HW, picture_3HW, mixed.round().clamp(0, 255).to(torch.uint8))


def _grown(mask_HW: Tensor, radius: int) -> Tensor:
    """(H, W) bool: the mask and all pixels within `radius` (in the maximum norm)."""
    return F.max_pool2d(mask_HW[None].float(), kernel_size=2 * radius + 1, stride=1, padding=radius)[0] > 0


def _gaussian(image_CHW: Tensor, *, sigma: float) -> Tensor:
    """A Gaussian blur; for a large `sigma` of a smaller copy, which nobody can tell apart."""
    height, width = image_CHW.shape[-2:]
    factor = max(int(sigma // 4), 1)
    small = image_CHW[None]
    if factor > 1:
        size = [max(height // factor, 1), max(width // factor, 1)]
        small = F.interpolate(small, size=size, mode="bilinear", antialias=True, align_corners=False)
        sigma = sigma / factor
    for axis in (-2, -1):
        radius = min(max(round(3 * sigma), 1), small.shape[axis] - 1)
        if radius < 1:
            continue
        offset = torch.arange(-radius, radius + 1, dtype=torch.float32)
        kernel = torch.exp(-offset.square() / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).view((1, 1, -1, 1) if axis == -2 else (1, 1, 1, -1))
        padding = (0, 0, radius, radius) if axis == -2 else (radius, radius, 0, 0)
        padded = F.pad(small, padding, mode="reflect")
        small = F.conv2d(padded.transpose(0, 1), kernel).transpose(0, 1)
    if factor > 1:
        small = F.interpolate(small, size=[height, width], mode="bilinear", align_corners=False)
    return small[0]


def _pulled_and_pushed(picture_3HW: Tensor, known_HW: Tensor) -> Tensor:
    """(3, H, W) known pixels as they are, the others interpolated from the coarsest level on which anything around is known."""
    colour, weight = (picture_3HW * known_HW)[None], known_HW[None, None]
    levels = [(colour, weight)]
    while min(levels[-1][1].shape[-2:]) > 1 and not (levels[-1][1] > 0).all():
        colour, weight = levels[-1]
        # Sums over 2 x 2 pixels; a weight above 1 says no more than 1: one pixel in four is enough to know a colour.
        pulled, mass = (4 * F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in (colour, weight))
        kept = mass.clamp(max=1)
        levels.append((pulled / mass.clamp(min=1e-6) * kept, kept))
    colour, weight = levels.pop()
    total = weight.sum().clamp(min=1e-6)
    filled = torch.where(weight > 0, colour / weight.clamp(min=1e-6), (colour.sum((-2, -1), keepdim=True)) / total)
    while levels:
        colour, weight = levels.pop()
        coarse = F.interpolate(filled, size=colour.shape[-2:], mode="bilinear", align_corners=False)
        filled = colour + (1 - weight) * coarse
    return filled[0]


def _told(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _check(picture_3HW: Tensor, foreground_HW: Tensor, *, what: str) -> None:
    if picture_3HW.dtype != torch.uint8 or picture_3HW.ndim != 3 or picture_3HW.shape[0] != 3:
        raise ValueError(f"{what} is {_told(picture_3HW)}; expected (3, H, W) uint8")
    if foreground_HW.dtype != torch.bool or foreground_HW.shape != picture_3HW.shape[1:]:
        raise ValueError(f"the mask of {what} is {_told(foreground_HW)}; expected {tuple(picture_3HW.shape[1:])} bool")
    if not foreground_HW.any() or foreground_HW.all():
        covered = "all of it" if foreground_HW.all() else "nothing"
        raise ValueError(f"the mask of {what} covers {covered}; a background can be changed only where object and background are seen")
