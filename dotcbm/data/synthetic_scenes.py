"""The places that drawn creatures stand in: eight painted landscapes, larger than a picture, that pictures cut a window from."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dotcbm.data.synthetic_canvas import Canvas, Colour, Floats, Frame, Ink

__all__ = ["SCENES", "scene_window"]

SCENES = ("meadow", "desert", "sea", "snow", "night", "forest", "autumn", "cave")
_VARIANTS = 3  # painted versions of each place
_WIDE, _HIGH = 1.9, 1.35  # size of a painting, in pictures
_ROOT = Frame()


def scene_window(scene: int, size: int, uniform_4: NDArray[np.float64]) -> Floats:
    """(3, size, size) float32 in 0..255: a window on `SCENES[scene]`, chosen, mirrored and lit by four numbers in [0, 1)."""
    picture = _painting(scene, int(uniform_4[0] * _VARIANTS), size)
    top = int(uniform_4[1] * (picture.shape[1] - size + 1))
    mirror, place = divmod(uniform_4[2] * 2, 1.0)
    left = int(place * (picture.shape[2] - size + 1))
    window = picture[:, top : top + size, left : left + size]
    if mirror:
        window = window[:, :, ::-1]
    return window * np.float32(0.88 + 0.2 * uniform_4[3])


@lru_cache(maxsize=64)
def _painting(scene: int, variant: int, size: int) -> Floats:
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([20, scene, variant])))
    height, width = int(_HIGH * size), int(_WIDE * size)
    image = np.zeros((3, height, width), dtype=np.float32)
    canvas = Canvas((height, width), image_3HW=image, side=size)
    _PAINTERS[scene](canvas, rng)
    image += rng.standard_normal((1, height, width), dtype=np.float32) * np.float32(3.0)
    np.clip(image, 0, 235, out=image)
    image.setflags(write=False)
    return image


def _noise(canvas: Canvas, rng: np.random.Generator, cell_x: float, cell_y: float) -> Floats:
    """(H, W) smooth noise in [-1, 1] whose hills are `cell` pictures wide and high."""
    rows, columns = int(_HIGH / cell_y) + 3, int(_WIDE / cell_x) + 3
    knots = (rng.random((rows, columns)) * 2 - 1).astype(np.float32)
    x, y = canvas.x_W / np.float32(cell_x), canvas.y_H / np.float32(cell_y)
    ix, iy = x.astype(np.int64), y.astype(np.int64)
    fx, fy = x - ix, y - iy
    fx, fy = fx * fx * (3 - 2 * fx), (fy * fy * (3 - 2 * fy))[:, None]
    upper = knots[iy][:, ix] * (1 - fx) + knots[iy][:, ix + 1] * fx
    lower = knots[iy + 1][:, ix] * (1 - fx) + knots[iy + 1][:, ix + 1] * fx
    return upper * (1 - fy) + lower * fy


def _fill(canvas: Canvas, top: Colour, bottom: Colour, start: float, end: float) -> None:
    """A gradient over all rows from `start`; rows above stay as they are."""
    image = canvas.image_3HW
    assert image is not None
    y = canvas.y_H
    share = np.clip((y - start) / (end - start), 0, 1).astype(np.float32)[None, :, None]
    colours = np.asarray(top, np.float32)[:, None, None] * (1 - share) + np.asarray(bottom, np.float32)[:, None, None] * share
    below = y >= start
    image[:, below] = colours[:, below]


def _texture(canvas: Canvas, field: Floats, strength: float, start: float = 0.0) -> None:
    image = canvas.image_3HW
    assert image is not None
    below = canvas.y_H >= start
    image[:, below] *= 1 + np.float32(strength) * field[None, below]


def _horizon(rng: np.random.Generator) -> float:
    return 0.62 + 0.1 * float(rng.random())


def _hills(canvas: Canvas, rng: np.random.Generator, colour: Colour, horizon: float, height: float, count: int = 5) -> None:
    for _ in range(count):
        x, w = rng.random() * _WIDE, 0.3 + 0.4 * rng.random()
        canvas.ellipse(_ROOT, (x, horizon + 0.02), (w, height * (0.5 + 0.7 * rng.random())), Ink(colour, outline=0, light=0.15))


def _sprinkle(canvas: Canvas, rng: np.random.Generator, colours: list[Colour], count: int, radius: float, start: float) -> None:
    """Flat pebbles, flowers or leaves, larger towards the front."""
    for _ in range(count):
        y = start + (_HIGH - start) * float(rng.random())
        r = radius * (0.5 + float(rng.random())) * (0.5 + 0.8 * (y - start) / (_HIGH - start))
        colour = colours[int(rng.random() * len(colours))]
        flat = 0.5 + 0.5 * float(rng.random())
        canvas.ellipse(
            _ROOT, (float(rng.random()) * _WIDE, y), (r, r * flat), Ink(colour, outline=0.003, light=0.3), angle=float(rng.random()) * 3
        )


def _grass(canvas: Canvas, rng: np.random.Generator, colours: list[Colour], count: int, start: float, length: float = 0.05) -> None:
    for y in np.sort(start + (_HIGH + 0.03 - start) * rng.random(count)):
        x = float(rng.random()) * _WIDE
        tip = (x + (float(rng.random()) - 0.5) * 0.04, float(y) - length * (0.6 + float(rng.random())))
        ink = Ink(colours[int(rng.random() * len(colours))], outline=0, light=0)
        canvas.stroke(_ROOT, [(x, float(y)), tip], [0.006, 0.001], ink)


def _clouds(canvas: Canvas, rng: np.random.Generator, colour: Colour, horizon: float) -> None:
    for _ in range(5):
        x, y = float(rng.random()) * _WIDE, float(rng.random()) * horizon * 0.8
        for shift in (-0.07, 0.0, 0.08):
            r = 0.04 + 0.03 * float(rng.random())
            canvas.ellipse(_ROOT, (x + shift, y - r * 0.2), (r * 1.5, r * 0.8), Ink(colour, outline=0, light=0, opacity=0.7, soft=6))


def _meadow(canvas: Canvas, rng: np.random.Generator) -> None:
    h = _horizon(rng)
    _fill(canvas, (150, 200, 235), (215, 232, 235), 0, h)
    _clouds(canvas, rng, (245, 247, 248), h)
    _hills(canvas, rng, (128, 172, 120), h, 0.12)
    _fill(canvas, (138, 182, 92), (84, 140, 58), h, _HIGH)
    _texture(canvas, _noise(canvas, rng, 0.2, 0.06), 0.12, h)
    _grass(canvas, rng, [(96, 150, 62), (150, 192, 96), (70, 122, 52)], 220, h + 0.03)
    _sprinkle(canvas, rng, [(240, 220, 120), (235, 235, 230), (220, 130, 150)], 26, 0.012, h + 0.08)


def _desert(canvas: Canvas, rng: np.random.Generator) -> None:
    h = _horizon(rng)
    _fill(canvas, (180, 208, 220), (244, 226, 192), 0, h)
    _hills(canvas, rng, (214, 172, 118), h, 0.16, 4)
    _fill(canvas, (226, 190, 136), (206, 164, 108), h, _HIGH)
    waves = _noise(canvas, rng, 0.35, 0.2) * 1.5 + canvas.y_H[:, None] * 32
    _texture(canvas, np.sin(waves * 2).astype(np.float32), 0.05, h)
    _sprinkle(canvas, rng, [(172, 140, 104), (196, 168, 130), (150, 122, 96)], 18, 0.022, h + 0.05)


def _sea(canvas: Canvas, rng: np.random.Generator) -> None:
    h = _horizon(rng) - 0.12
    _fill(canvas, (162, 206, 232), (226, 238, 240), 0, h)
    _clouds(canvas, rng, (248, 248, 248), h)
    _fill(canvas, (70, 144, 178), (36, 96, 142), h, _HIGH)
    waves = _noise(canvas, rng, 0.12, 0.05) * 2 + canvas.y_H[:, None] * 60
    _texture(canvas, np.sin(waves).astype(np.float32), 0.09, h)
    for _ in range(60):
        x, y = float(rng.random()) * _WIDE, h + (_HIGH - h) * float(rng.random())
        w = 0.02 + 0.04 * float(rng.random())
        canvas.stroke(_ROOT, [(x, y), (x + w, y + 0.004)], [0.004, 0.001], Ink((196, 226, 236), outline=0, light=0, opacity=0.7))


def _pine(canvas: Canvas, x: float, y: float, tall: float, colour: Colour) -> None:
    for k in range(3):
        base = y - tall * 0.27 * k
        canvas.stroke(_ROOT, [(x, base), (x, base - tall * 0.42)], [tall * (0.2 - 0.045 * k), 0.002], Ink(colour, outline=0.003, light=0.3))


def _snow(canvas: Canvas, rng: np.random.Generator) -> None:
    h = _horizon(rng)
    _fill(canvas, (176, 194, 216), (222, 230, 238), 0, h)
    for _ in range(9):
        _pine(canvas, float(rng.random()) * _WIDE, h + 0.02, 0.2 + 0.16 * float(rng.random()), (112, 142, 148))
    _fill(canvas, (226, 233, 240), (204, 216, 230), h, _HIGH)
    _texture(canvas, _noise(canvas, rng, 0.4, 0.1), 0.05, h)
    _sprinkle(canvas, rng, [(184, 198, 216), (214, 222, 232)], 14, 0.03, h + 0.05)
    for _ in range(60):
        r = 0.004 + 0.005 * float(rng.random())
        canvas.ellipse(
            _ROOT, (float(rng.random()) * _WIDE, float(rng.random()) * _HIGH), (r, r), Ink((235, 235, 235), outline=0, light=0, soft=2)
        )


def _night(canvas: Canvas, rng: np.random.Generator) -> None:
    h = _horizon(rng)
    _fill(canvas, (22, 26, 58), (62, 60, 110), 0, h)
    for _ in range(70):
        r = 0.002 + 0.004 * float(rng.random())
        canvas.ellipse(_ROOT, (float(rng.random()) * _WIDE, float(rng.random()) * h), (r, r), Ink((230, 228, 200), outline=0, light=0))
    moon = (0.3 + 1.3 * float(rng.random()), 0.2 + 0.1 * float(rng.random()))
    canvas.ellipse(_ROOT, moon, (0.13, 0.13), Ink((120, 120, 150), outline=0, light=0, opacity=0.5, soft=30))
    canvas.ellipse(_ROOT, moon, (0.07, 0.07), Ink((236, 232, 205), outline=0, light=0.1))
    _hills(canvas, rng, (40, 44, 82), h, 0.14)
    _fill(canvas, (44, 54, 80), (26, 34, 56), h, _HIGH)
    _texture(canvas, _noise(canvas, rng, 0.2, 0.06), 0.14, h)
    _grass(canvas, rng, [(40, 56, 76), (62, 78, 100), (30, 42, 62)], 150, h + 0.03)


def _forest(canvas: Canvas, rng: np.random.Generator) -> None:
    h = _horizon(rng) + 0.1
    _fill(canvas, (60, 92, 70), (116, 150, 104), 0, h)
    _texture(canvas, _noise(canvas, rng, 0.12, 0.12), 0.2)
    for depth in (0.3, 0.6, 1.0):
        for _ in range(6):
            x, w = float(rng.random()) * _WIDE, 0.014 + 0.02 * depth
            colour = (104 - 34 * depth, 104 - 46 * depth, 84 - 46 * depth)
            canvas.stroke(_ROOT, [(x, -0.1), (x + 0.02, h + 0.05 * depth)], [w * 0.8, w * 1.2], Ink(colour, outline=0, light=0.1))
    _fill(canvas, (88, 100, 56), (56, 62, 36), h, _HIGH)
    _texture(canvas, _noise(canvas, rng, 0.08, 0.04), 0.2, h)
    _grass(canvas, rng, [(74, 112, 58), (104, 136, 72), (52, 80, 44)], 160, h + 0.03, 0.07)
    for _ in range(30):
        x, y = float(rng.random()) * _WIDE, 0.22 * float(rng.random()) ** 2
        r = 0.05 + 0.05 * float(rng.random())
        canvas.ellipse(_ROOT, (x, y), (r * 1.4, r), Ink((62, 104, 60), outline=0.003, light=0.3))


def _autumn(canvas: Canvas, rng: np.random.Generator) -> None:
    h = _horizon(rng)
    _fill(canvas, (232, 196, 160), (244, 222, 184), 0, h)
    for _ in range(11):
        x, r = float(rng.random()) * _WIDE, 0.08 + 0.07 * float(rng.random())
        colour = [(206, 128, 62), (188, 92, 54), (216, 168, 84)][int(rng.random() * 3)]
        y = h - 0.12 - 0.12 * float(rng.random())
        canvas.stroke(_ROOT, [(x, y), (x, h + 0.02)], [0.01, 0.014], Ink((110, 80, 62), outline=0, light=0))
        canvas.ellipse(_ROOT, (x, y), (r, r * 1.1), Ink(colour, outline=0, light=0.35))
    _fill(canvas, (178, 138, 84), (138, 98, 58), h, _HIGH)
    _texture(canvas, _noise(canvas, rng, 0.15, 0.05), 0.14, h)
    _sprinkle(canvas, rng, [(204, 120, 54), (178, 76, 46), (218, 176, 84), (120, 84, 52)], 90, 0.016, h + 0.03)


def _cave(canvas: Canvas, rng: np.random.Generator) -> None:
    h = _horizon(rng) + 0.05
    _fill(canvas, (84, 80, 90), (138, 130, 134), 0, h)
    _texture(canvas, _noise(canvas, rng, 0.25, 0.3), 0.22)
    _texture(canvas, _noise(canvas, rng, 0.05, 0.08), 0.1)
    for _ in range(14):
        x, tall = float(rng.random()) * _WIDE, 0.08 + 0.22 * float(rng.random())
        canvas.stroke(
            _ROOT, [(x, -0.03), (x, tall)], [0.03 + 0.02 * float(rng.random()), 0.003], Ink((98, 92, 100), outline=0.004, light=0.3)
        )
    _fill(canvas, (122, 114, 112), (84, 78, 80), h, _HIGH)
    _texture(canvas, _noise(canvas, rng, 0.2, 0.05), 0.16, h)
    _sprinkle(canvas, rng, [(140, 132, 130), (104, 98, 102), (160, 152, 146)], 26, 0.03, h + 0.03)


_PAINTERS: tuple[Callable[[Canvas, np.random.Generator], None], ...] = (_meadow, _desert, _sea, _snow, _night, _forest, _autumn, _cave)
