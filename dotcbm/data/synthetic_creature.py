"""Drawn creatures: what they can look like, and how one is painted.

A creature is one value of each of nine attributes and a pose. Its own coordinates have the body near the origin, x towards
the face, y down; it spans about 2.2 units each way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, sin

from dotcbm.data.synthetic_canvas import Canvas, Colour, Frame, Ink, Pattern, Point

__all__ = ["ATTRIBUTES", "OUTLINE", "PARTS", "PART_CENTRES", "Attribute", "Creature", "Obstacle", "draw_creature", "draw_obstacle"]

PARTS = ("tail", "legs", "body", "belly", "wing", "head", "crown", "mouth")


@dataclass(frozen=True)
class Attribute:
    """A group of exclusive concepts that are all seen on one part."""

    name: str
    part: str
    values: tuple[str, ...]


ATTRIBUTES = (
    Attribute("body pattern", "body", ("plain body", "striped body", "spotted body", "checked body")),
    Attribute("crown shape", "crown", ("round ears", "pointed ears", "horns", "crest")),
    Attribute("mouth shape", "mouth", ("beak", "snout", "trunk", "bill")),
    Attribute("wing colour", "wing", ("red wing", "blue wing", "yellow wing", "white wing")),
    Attribute("tail shape", "tail", ("curled tail", "fan tail", "round tail", "forked tail")),
    Attribute("body colour", "body", ("green body", "orange body", "violet body", "grey body")),
    Attribute("head colour", "head", ("white head", "brown head", "teal head", "golden head")),
    Attribute("belly colour", "belly", ("cream belly", "dark belly")),
    Attribute("leg colour", "legs", ("yellow legs", "black legs")),
)

_BODY: tuple[Colour, ...] = ((122, 176, 84), (232, 140, 62), (158, 118, 196), (140, 146, 156))
_HEAD: tuple[Colour, ...] = ((236, 232, 222), (134, 92, 64), (70, 160, 160), (236, 190, 84))
_WING: tuple[Colour, ...] = ((208, 58, 54), (62, 104, 198), (240, 202, 70), (238, 238, 240))
_BELLY: tuple[Colour, ...] = ((244, 226, 184), (74, 60, 66))
_LEGS: tuple[Colour, ...] = ((238, 192, 64), (58, 54, 58))

PART_CENTRES: dict[str, Point] = {
    "tail": (-0.82, -0.12),
    "legs": (0.0, 0.74),
    "body": (-0.1, 0.2),
    "belly": (0.2, 0.36),
    "wing": (-0.2, 0.02),
    "head": (0.45, -0.36),
    "crown": (0.36, -0.82),
    "mouth": (0.9, -0.26),
}


# Points round everything that a creature can have: where these are in the picture, all of it is.
OUTLINE: tuple[Point, ...] = (
    *((-1.16, 0.34), (-1.12, -0.2), (-1.0, -0.56), (0.0, -1.12), (0.82, -1.12)),
    *((1.16, -0.3), (1.16, 0.26), (0.5, 1.0), (-0.4, 1.0)),
)


@dataclass(frozen=True)
class Creature:
    """Everything that its drawing depends on.

    Attributes:
        values: For each of `ATTRIBUTES` the number of the value.
        frame: Where it stands.
        jitter: Numbers in [0, 1): small freedoms of shape, colour and pattern.
    """

    values: tuple[int, ...]
    frame: Frame
    jitter: tuple[float, ...]


@dataclass(frozen=True)
class Obstacle:
    """A thing in front of the creature: "bush", "rock", "branch" or "cloud", about `centre`, in fractions of the picture."""

    kind: str
    centre: Point
    radius: float
    jitter: tuple[float, ...]


def _number(part: str) -> int:
    return PARTS.index(part) + 1


def _shade(colour: Colour, factor: float) -> Colour:
    return (min(colour[0] * factor, 250.0), min(colour[1] * factor, 250.0), min(colour[2] * factor, 250.0))


def _turn(points: Sequence[Point], pivot: Point, angle: float) -> list[Point]:
    c, s = cos(angle), sin(angle)
    return [(pivot[0] + (x - pivot[0]) * c - (y - pivot[1]) * s, pivot[1] + (x - pivot[0]) * s + (y - pivot[1]) * c) for x, y in points]


def draw_creature(canvas: Canvas, creature: Creature) -> None:
    """Paint the creature from back to front: tail, legs, body, belly, wing, head, crown, mouth."""
    f, j = creature.frame, creature.jitter
    pattern, crown, mouth, wing, tail, body, head, belly, legs = creature.values
    body_colour = _shade(_BODY[body], 0.92 + 0.16 * j[0])
    head_colour = _shade(_HEAD[head], 0.92 + 0.12 * j[1])
    _draw_tail(canvas, f, tail, _shade(body_colour, 0.86), (j[2] - 0.5) * 0.5)
    _draw_legs(canvas, f, _shade(_LEGS[legs], 0.92 + 0.16 * j[3]), (j[4] - 0.5) * 0.3)

    kinds: tuple[Pattern, ...] = ("plain", "stripes", "spots", "checks")
    second = (body_colour, (40, 34, 40), (248, 240, 214), _shade(body_colour, 0.55))[pattern]
    period = (1.0, 0.26, 0.26, 0.38)[pattern]
    ink = Ink(body_colour, pattern=kinds[pattern], second=second, period=period, phase=j[5])
    body_centre, body_radii, body_angle = (-0.08, 0.16), (0.62 + 0.04 * j[6], 0.48), -0.12
    canvas.ellipse(f, body_centre, body_radii, ink, angle=body_angle, part=_number("body"))
    inside = (body_centre, (body_radii[0] - 0.05, body_radii[1] - 0.05), body_angle)
    belly_ink = Ink(_BELLY[belly], outline=0.012)
    canvas.ellipse(f, (0.18, 0.42), (0.38, 0.24), belly_ink, angle=-0.35, part=_number("belly"), inside=inside)
    _draw_wing(canvas, f, _shade(_WING[wing], 0.92 + 0.14 * j[7]), (j[8] - 0.5) * 0.7)

    if crown != 3:
        _draw_crown(canvas, f, crown, head_colour, (j[9] - 0.5) * 0.24)
    canvas.ellipse(f, (0.46, -0.36), (0.36 + 0.03 * j[10], 0.34), Ink(head_colour), part=_number("head"))
    if crown == 3:
        _draw_crown(canvas, f, crown, head_colour, (j[9] - 0.5) * 0.24)
    _draw_mouth(canvas, f, mouth, head_colour, (j[11] - 0.5) * 0.3)
    _draw_eye(canvas, f, (0.5, -0.47), 0.085 + 0.02 * j[12], look=(j[13] - 0.3) * 0.04)


def _draw_tail(canvas: Canvas, f: Frame, tail: int, colour: Colour, angle: float) -> None:
    part, root = _number("tail"), (-0.55, 0.14)
    if tail == 0:
        points = [root, (-0.78, 0.16), (-0.92, 0.0), (-0.96, -0.22), (-0.86, -0.42), (-0.68, -0.44)]
        canvas.stroke(f, _turn(points, root, angle), [0.15, 0.15, 0.15, 0.14, 0.14, 0.12], Ink(colour), part=part)
        canvas.stroke(f, _turn(points, root, angle)[3:], [0.14, 0.14, 0.12], Ink(_shade(colour, 0.5)), part=part)
    elif tail == 1:
        for lift in (-0.85, 0.05, -0.4):
            tip = _turn([(-1.0, 0.14)], root, -lift + angle)[0]
            canvas.stroke(f, [root, tip], [0.07, 0.17], Ink(colour), part=part)
            canvas.ellipse(f, tip, (0.1, 0.1), Ink((250, 232, 150), outline=0, light=0), part=part)
            canvas.ellipse(f, tip, (0.06, 0.06), Ink((40, 60, 130), outline=0, light=0), part=part)
    elif tail == 3:
        ink = Ink(colour, pattern="stripes", second=(240, 236, 226), period=0.22)
        for tip in ((-1.0, 0.3), (-0.92, -0.36)):
            canvas.stroke(f, [root, *_turn([(-0.74, 0.06), tip], root, angle)], [0.15, 0.15, 0.07], ink, part=part)
    else:
        ball = _turn([(-0.84, -0.02)], root, angle)[0]
        canvas.stroke(f, [root, ball], [0.09, 0.09], Ink(colour), part=part)
        canvas.ellipse(f, ball, (0.26, 0.26), Ink((238, 228, 216), pattern="spots", second=(196, 120, 150), period=0.17), part=part)


def _draw_legs(canvas: Canvas, f: Frame, colour: Colour, swing: float) -> None:
    for hip, sign in (((0.2, 0.5), 1), ((-0.28, 0.5), -1)):
        knee, foot = _turn([(hip[0], 0.84), (hip[0] + 0.14, 0.86)], hip, sign * swing)
        canvas.stroke(f, [hip, knee, foot], [0.13, 0.13, 0.11], Ink(colour), part=_number("legs"))


def _draw_wing(canvas: Canvas, f: Frame, colour: Colour, angle: float) -> None:
    part, root = _number("wing"), (0.08, -0.06)
    for tip, radii, shade in (((-0.62, 0.18), [0.13, 0.09], 0.8), ((-0.6, -0.02), [0.18, 0.1], 0.9), ((-0.5, -0.2), [0.2, 0.11], 1.0)):
        canvas.stroke(f, [root, *_turn([tip], root, angle)], radii, Ink(_shade(colour, shade)), part=part)


def _draw_crown(canvas: Canvas, f: Frame, crown: int, head: Colour, angle: float) -> None:
    part, pivot = _number("crown"), (0.44, -0.5)
    if crown == 0:
        for centre in _turn([(0.68, -0.7), (0.2, -0.7)], pivot, angle):
            canvas.ellipse(f, centre, (0.2, 0.2), Ink(head), part=part)
            canvas.ellipse(f, centre, (0.13, 0.13), Ink((206, 84, 112), outline=0, light=0.2), part=part)
    elif crown == 1:
        for base, tip in (((0.64, -0.6), (0.76, -1.06)), ((0.24, -0.6), (0.1, -1.06))):
            points = _turn([base, tip], pivot, angle)
            canvas.stroke(f, points, [0.19, 0.03], Ink(head), part=part)
            middle = ((points[0][0] + 2 * points[1][0]) / 3, (points[0][1] + 2 * points[1][1]) / 3)
            canvas.stroke(f, [points[0], middle], [0.09, 0.03], Ink((226, 150, 150), outline=0, light=0.2), part=part)
            canvas.stroke(f, [middle, points[1]], [0.083, 0.03], Ink((66, 56, 60), light=0.2), part=part)
    elif crown == 2:
        for points in ([(0.6, -0.62), (0.76, -0.82), (0.7, -1.08)], [(0.28, -0.62), (0.1, -0.82), (0.16, -1.08)]):
            ink = Ink((232, 222, 196), pattern="stripes", second=(190, 172, 136), period=0.11)
            canvas.stroke(f, _turn(points, pivot, angle), [0.15, 0.13, 0.03], ink, part=part)
    else:
        for tip, shade in (((0.06, -0.72), 0.8), ((0.22, -0.98), 0.9), ((0.48, -1.04), 1.0)):
            points = _turn([(0.42, -0.6), tip], pivot, angle)
            canvas.stroke(f, points, [0.08, 0.14], Ink(_shade((214, 82, 150), shade)), part=part)


def _draw_mouth(canvas: Canvas, f: Frame, mouth: int, head: Colour, angle: float) -> None:
    part, root = _number("mouth"), (0.76, -0.28)
    if mouth == 0:
        lower, upper = _turn([(1.0, -0.12), (1.1, -0.22)], root, angle)
        canvas.stroke(f, [(0.74, -0.2), lower], [0.13, 0.03], Ink((226, 140, 40)), part=part)
        canvas.stroke(f, [(0.74, -0.3), upper], [0.18, 0.03], Ink((246, 172, 58)), part=part)
    elif mouth == 1:
        centre = _turn([(0.84, -0.24)], root, angle)[0]
        canvas.ellipse(f, centre, (0.25, 0.2), Ink((240, 170, 170)), part=part)
        for dx in (-0.03, 0.11):
            canvas.ellipse(f, (centre[0] + dx, centre[1] - 0.04), (0.035, 0.05), Ink((130, 66, 76), outline=0, light=0), part=part)
    elif mouth == 3:
        lower, upper = _turn([(1.04, -0.12), (1.06, -0.24)], root, angle)
        canvas.stroke(f, [(0.74, -0.2), lower], [0.12, 0.07], Ink((70, 72, 84)), part=part)
        canvas.stroke(f, [(0.74, -0.28), upper], [0.17, 0.09], Ink((92, 96, 112)), part=part)
        canvas.ellipse(f, upper, (0.05, 0.05), Ink((236, 214, 150), outline=0, light=0), part=part)
    else:
        points = _turn([(0.72, -0.28), (0.9, -0.2), (0.94, 0.04), (1.04, 0.2)], root, angle)
        ink = Ink((150, 156, 172), pattern="stripes", second=(118, 122, 140), period=0.13)
        canvas.stroke(f, points, [0.17, 0.15, 0.13, 0.11], ink, part=part)


def _draw_eye(canvas: Canvas, f: Frame, centre: Point, radius: float, look: float) -> None:
    part = _number("head")
    canvas.ellipse(f, centre, (radius, radius * 1.15), Ink((250, 250, 250), outline=0.02, light=0), part=part)
    pupil = (centre[0] + 0.025 + look, centre[1] + 0.01)
    canvas.ellipse(f, pupil, (radius * 0.58, radius * 0.68), Ink((28, 24, 30), outline=0, light=0), part=part)
    canvas.ellipse(
        f, (pupil[0] - 0.015, pupil[1] - 0.03), (radius * 0.22, radius * 0.22), Ink((255, 255, 255), outline=0, light=0), part=part
    )


def draw_obstacle(canvas: Canvas, obstacle: Obstacle) -> None:
    """Paint the obstacle; its pixels belong to no part."""
    (x, y), r, j = obstacle.centre, obstacle.radius, obstacle.jitter
    f = Frame()
    if obstacle.kind == "rock":
        base = min(y + r * 0.5, 1.0)
        ink = Ink(_shade((146, 142, 146), 0.8 + 0.3 * j[0]), outline=0.007)
        canvas.ellipse(f, (x + r * 0.55, base), (r * 0.8, r * 0.7), ink, part=0)
        turn = (j[1] - 0.5) * 0.5
        canvas.ellipse(f, (x - r * 0.1, base - r * 0.3), (r * 1.05, r * 1.0), ink, angle=turn, part=0)
        dark = Ink(_shade(ink.colour, 0.62), outline=0, light=0)
        canvas.stroke(f, [(x - r * 0.2, base - r), (x, base - r * 0.6), (x - r * 0.3, base - r * 0.1)], [0.006, 0.005, 0.002], dark, part=0)
        canvas.ellipse(f, (x - r * 0.5, base - r * 0.75), (r * 0.34, r * 0.2), Ink((112, 136, 84), outline=0), angle=-0.6, part=0)
        return
    if obstacle.kind == "cloud":
        ink = Ink((240, 243, 247), outline=0, light=0.12, soft=2.0)
        blobs = ((-0.75, 0.2, 0.55), (0.75, 0.2, 0.5), (-0.3, -0.2, 0.7), (0.35, -0.15, 0.65), (0.0, 0.25, 0.7))
    else:
        leaf = ((72, 120, 58), (96, 138, 60), (58, 104, 70))[int(j[0] * 3)]
        ink = Ink(leaf, outline=0.006, light=0.4, pattern="spots", second=_shade(leaf, 1.2), period=0.045, phase=j[2])
        blobs = ((-0.7, 0.25, 0.5), (0.7, 0.2, 0.5), (0.0, 0.35, 0.65), (-0.35, -0.3, 0.6), (0.4, -0.25, 0.55))
        wood = Ink((104, 76, 54), outline=0.006)
        end = (x + (j[1] - 0.5) * 0.3, -0.05) if obstacle.kind == "branch" else (x, min(y + r * 1.6, 1.1))
        canvas.stroke(f, [(x, y), end], [0.012, 0.02], wood, part=0)
    for k, (dx, dy, size) in enumerate(blobs):
        wobble = 0.85 + 0.3 * j[3 + k]
        canvas.ellipse(f, (x + dx * r, y + dy * r), (size * r * wobble, size * r * wobble), ink, part=0)
