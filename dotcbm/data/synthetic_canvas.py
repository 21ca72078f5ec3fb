"""A small painter on numpy arrays: ellipses and tapered strokes with outlines, soft light and exact masks.

Every shape is a signed distance, negative inside, in the units of its frame. A pixel belongs to a shape if and only if the
distance at the pixel's centre is negative; that is where its coverage (the antialiased edge) passes one half.

A canvas may take only every `stride`-th pixel, and may leave the colours out: the masks of such a canvas are exactly the
masks of the full canvas at those pixels, for a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan2, cos, hypot, sin
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["Canvas", "Colour", "Floats", "Frame", "Ink", "Pattern", "Point"]

Floats = NDArray[np.floating[Any]]  # float32, always
Colour = tuple[float, float, float]
Point = tuple[float, float]
Pattern = Literal["plain", "stripes", "spots", "checks"]


@dataclass(frozen=True)
class Frame:
    """Where a drawing's own coordinates lie in the picture, in fractions of its side: origin, turn, scale and mirror."""

    origin: Point = (0.0, 0.0)
    scale: float = 1.0
    angle: float = 0.0
    mirror: bool = False

    def matrix(self) -> tuple[float, float, float, float]:
        """The 2 x 2 matrix, row by row, from own coordinates to fractions of the picture."""
        c, s = cos(self.angle) * self.scale, sin(self.angle) * self.scale
        return (-c, s, s, c) if self.mirror else (c, -s, s, c)

    def at(self, x: float, y: float) -> Point:
        """The point (x, y) of the drawing as fractions of the picture."""
        a, b, c, d = self.matrix()
        return self.origin[0] + a * x + b * y, self.origin[1] + c * x + d * y


@dataclass(frozen=True)
class Ink:
    """How a shape is filled.

    Attributes:
        colour: RGB in 0..255.
        outline: Width of the dark rim in own units; 0 for none.
        light: Strength of the light from above, 0 for a flat fill.
        opacity: 1 covers what lies below.
        soft: Widens the antialiased edge to this many pixels (shadows, clouds). Masks do not change.
        pattern: "plain", or bands ("stripes"), dots ("spots") or squares ("checks") of `second` in the shape's own coordinates.
        second: Colour of the pattern.
        period: Distance of two bands or dots, in own units.
        phase: Shift of the pattern, in periods.
    """

    colour: Colour
    outline: float = 0.025
    light: float = 0.3
    opacity: float = 1.0
    soft: float = 1.0
    pattern: Pattern = "plain"
    second: Colour = (0.0, 0.0, 0.0)
    period: float = 0.2
    phase: float = 0.0


class Canvas:
    """A square picture that shapes are painted on, one over the other.

    Attributes:
        image_3HW: float32 RGB in 0..255, or None when only masks are drawn.
        part_HW: uint8; the number that the topmost shape at a pixel was painted with.
    """

    def __init__(self, size: tuple[int, int], *, image_3HW: Floats | None = None, stride: int = 1, side: int | None = None) -> None:
        height, width = size
        self.side = side or height  # pixels that one unit of the picture's own coordinates spans
        self.x_W = (np.arange(stride // 2, width, stride, dtype=np.float32) + np.float32(0.5)) / np.float32(self.side)
        self.y_H = (np.arange(stride // 2, height, stride, dtype=np.float32) + np.float32(0.5)) / np.float32(self.side)
        self.step = stride / self.side
        self.part_HW = np.zeros((len(self.y_H), len(self.x_W)), dtype=np.uint8)
        self.image_3HW = image_3HW

    def ellipse(
        self,
        frame: Frame,
        centre: Point,
        radii: Point,
        ink: Ink,
        *,
        angle: float = 0.0,
        part: int | None = None,
        inside: tuple[Point, Point, float] | None = None,
    ) -> None:
        """An ellipse; with `inside` only where it lies in that other ellipse (centre, radii, angle)."""
        located = self._locate(frame, centre, angle, (-radii[0], radii[0], -radii[1], radii[1]), ink.soft)
        if located is None:
            return
        box, u, v = located
        distance = _ellipse(u, v, *radii)
        if inside is not None:
            other_centre, other_radii, other_angle = inside
            u2, v2 = self._coordinates(frame, other_centre, other_angle, box)
            distance = np.maximum(distance, _ellipse(u2, v2, *other_radii))
        self._paint(frame, box, distance, ink, part, u, v)

    def stroke(self, frame: Frame, points: Sequence[Point], radii: Sequence[float], ink: Ink, *, part: int | None = None) -> None:
        """A round brush along the segments between `points`, whose radius goes from each of `radii` to the next."""
        (x0, y0), (x1, y1) = points[0], points[-1]
        angle = atan2(y1 - y0, x1 - x0)
        c, s = cos(angle), sin(angle)
        local = [((x - x0) * c + (y - y0) * s, (y - y0) * c - (x - x0) * s) for x, y in points]
        left = min(p[0] - r for p, r in zip(local, radii))
        right = max(p[0] + r for p, r in zip(local, radii))
        top = min(p[1] - r for p, r in zip(local, radii))
        bottom = max(p[1] + r for p, r in zip(local, radii))
        located = self._locate(frame, points[0], angle, (left, right, top, bottom), ink.soft)
        if located is None:
            return
        box, u, v = located
        distance: Floats | None = None
        for (au, av), (bu, bv), ra, rb in zip(local, local[1:], radii, radii[1:]):
            one = _capsule(u - np.float32(au), v - np.float32(av), (bu - au, bv - av), ra, rb)
            distance = one if distance is None else np.minimum(distance, one, out=distance)
        assert distance is not None
        self._paint(frame, box, distance, ink, part, u, v)

    def _locate(
        self, frame: Frame, centre: Point, angle: float, extent: tuple[float, float, float, float], soft: float
    ) -> tuple[tuple[slice, slice], Floats, Floats] | None:
        """The part of the canvas around a shape, and the shape's own coordinates there; None if it lies outside the picture."""
        a, b, c, d = frame.matrix()
        ca, sa = cos(angle), sin(angle)
        corners = [(u, v) for u in extent[:2] for v in extent[2:]]
        dx = [a * (u * ca - v * sa) + b * (u * sa + v * ca) for u, v in corners]
        dy = [c * (u * ca - v * sa) + d * (u * sa + v * ca) for u, v in corners]
        x, y = frame.at(*centre)
        edge = (1 + soft / 2) / self.side
        step = self.step
        x0, x1 = int((x + min(dx) - edge) // step), int((x + max(dx) + edge) // step) + 2
        y0, y1 = int((y + min(dy) - edge) // step), int((y + max(dy) + edge) // step) + 2
        box = slice(max(y0, 0), max(min(y1, len(self.y_H)), 0)), slice(max(x0, 0), max(min(x1, len(self.x_W)), 0))
        if box[0].start >= box[0].stop or box[1].start >= box[1].stop:
            return None
        u, v = self._coordinates(frame, centre, angle, box)
        return box, u, v

    def _coordinates(self, frame: Frame, centre: Point, angle: float, box: tuple[slice, slice]) -> tuple[Floats, Floats]:
        """Own coordinates, turned by `angle` about `centre`, of the pixels in `box`: each is a sum of a row and a column."""
        a, b, c, d = frame.matrix()
        det = a * d - b * c
        ca, sa = cos(angle), sin(angle)
        ia, ib, ic, id_ = d / det, -b / det, -c / det, a / det
        ua, ub = ca * ia + sa * ic, ca * ib + sa * id_
        va, vb = -sa * ia + ca * ic, -sa * ib + ca * id_
        x, y = frame.at(*centre)
        row, column = self.x_W[box[1]] - np.float32(x), (self.y_H[box[0]] - np.float32(y))[:, None]
        u = row * np.float32(ua) + column * np.float32(ub)
        v = row * np.float32(va) + column * np.float32(vb)
        return u, v

    def _paint(
        self,
        frame: Frame,
        box: tuple[slice, slice],
        distance: Floats,
        ink: Ink,
        part: int | None,
        u: Floats,
        v: Floats,
    ) -> None:
        if part is not None:
            np.copyto(self.part_HW[box], part, where=distance < 0)
        if self.image_3HW is None:
            return
        pixels = frame.scale * self.side  # pixels in one own unit
        cover = distance * np.float32(-pixels / ink.soft)
        cover += np.float32(0.5)
        level: Floats | np.float32 = np.float32(1)
        if ink.light:
            y = self.y_H[box[0]]
            top, bottom = 1 + ink.light * 0.15, 1 - ink.light * 0.85
            slope = _ramp(top, bottom, len(y))
            level = np.minimum(distance * np.float32(-5.3 * ink.light), np.float32(0.73 * ink.light))
            level += slope
        if ink.outline:
            inner = np.clip(cover - np.float32(ink.outline * pixels), np.float32(0), np.float32(1))
            level = (level - np.float32(0.28)) * inner + np.float32(0.28)
        np.clip(cover, np.float32(0), np.float32(1), out=cover)
        colour: Floats = np.asarray(ink.colour, dtype=np.float32)[:, None, None]
        if ink.pattern != "plain":
            wave = _pattern(u, v, ink, pixels)
            colour = colour + wave * (np.asarray(ink.second, dtype=np.float32)[:, None, None] - colour)
        if ink.opacity != 1:
            cover *= np.float32(ink.opacity)
        view = self.image_3HW[(slice(None), *box)]
        paint = colour * level - view
        paint *= cover
        view += paint


def _ramp(first: float, last: float, num: int) -> Floats:
    """(num, 1) from first to last."""
    return (np.arange(num, dtype=np.float32) * np.float32((last - first) / num) + np.float32(first))[:, None]


def _ellipse(u: Floats, v: Floats, a: float, b: float) -> Floats:
    """Distance to an ellipse, exact for circles and to first order at the ends of the axes' geometric mean."""
    if a == b:
        return np.sqrt(u * u + v * v) - np.float32(a)
    p, q = u * np.float32(1 / a), v * np.float32(1 / b)
    return (np.sqrt(p * p + q * q) - np.float32(1)) * np.float32((a * b) ** 0.5)


def _capsule(u: Floats, v: Floats, end: Point, r0: float, r1: float) -> Floats:
    """Distance to a stroke from the origin to `end` whose radius goes from r0 to r1."""
    length = max(hypot(*end), 1e-6)
    h = u * np.float32(end[0] / length**2) + v * np.float32(end[1] / length**2)
    np.clip(h, np.float32(0), np.float32(1), out=h)
    du, dv = u - h * np.float32(end[0]), v - h * np.float32(end[1])
    distance = np.sqrt(du * du + dv * dv)
    distance -= np.float32(r0)
    distance -= h * np.float32(r1 - r0)
    return distance


def _pattern(u: Floats, v: Floats, ink: Ink, pixels: float) -> Floats:
    """Share of the second colour at each pixel."""
    p = u * np.float32(1 / ink.period) + np.float32(ink.phase)
    sharp = np.float32(ink.period * pixels)
    if ink.pattern == "stripes":
        p += np.float32(0.25) * v * v  # bent like the bands of a round body
        near = np.abs(p - np.rint(p))
        return np.clip((np.float32(0.25) - near) * sharp + np.float32(0.5), np.float32(0), np.float32(1))
    q = v * np.float32(1 / ink.period)
    if ink.pattern == "checks":
        waves = (np.abs(p - np.rint(p)) - np.float32(0.25)) * (np.abs(q - np.rint(q)) - np.float32(0.25))
        return np.clip(waves * (4 * sharp) + np.float32(0.5), np.float32(0), np.float32(1))
    row = np.rint(q)
    p = p + np.float32(0.5) * row  # every other row is shifted
    p -= np.rint(p)
    q -= row
    return np.clip((np.float32(0.31) - np.sqrt(p * p + q * q)) * sharp + np.float32(0.5), np.float32(0), np.float32(1))
