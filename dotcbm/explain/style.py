"""The look that all figures share: colours, type, and how heat is laid over a picture.

Colours keep one meaning everywhere and are told apart by colour-blind readers (Okabe and Ito 2008): blue speaks for, orange
against, grey is the rest. Heat is matplotlib's YlOrRd, darker where hotter, over a faded copy of the picture: on a dark or
colourful one no map can be read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib import patheffects as effects
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextToPath
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from dotcbm.explain.heatmaps import Box, upsample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "AGAINST",
    "FOR",
    "INK",
    "LABELS",
    "LINE",
    "MARGIN",
    "MUTED",
    "NAME",
    "REST",
    "SMALL",
    "TITLE",
    "draw_heat",
    "draw_picture",
    "faded",
    "fit",
    "heading",
    "heat_rgba",
    "new_figure",
    "percent",
    "place",
    "relative_heat",
    "room_aspect",
    "signed",
    "wrapped",
]

FOR, AGAINST, REST = "#0072B2", "#D55E00", "#9AA3AD"
INK, MUTED, LINE = "#1F2933", "#66727F", "#D5DAE0"
TITLE, NAME, SMALL = 13.0, 9.0, 7.5  # font sizes in points
MARGIN = 0.3  # inches around a figure
LABELS = 1.95  # inches left of bars for the names of concepts
_HEAT = "YlOrRd"
_FADE = 0.55  # share of pale grey in a picture under heat
_MOST_OPAQUE = 0.85  # the picture stays readable under the hottest spot
_LONGEST_SIDE = 640  # pixels of a picture in a figure; more cannot be seen and makes heavy files
_SMALL_BOX = 0.12  # of the side: a cross would hide what is in it
_METRICS = TextToPath()


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure, in inches."""
    return Figure(figsize=(width, height), dpi=150, facecolor="white")


def wrapped(text: str, *, inches: float, size: float, lines: int = 2, bold: bool = False) -> str:
    """A text broken between words into lines that fit by the font's own metrics, with an ellipsis where even that is too little."""
    font = FontProperties(size=size, weight="bold" if bold else "normal")

    def fits(line: str) -> bool:
        return _METRICS.get_text_width_height_descent(line, font, ismath=False)[0] <= inches * 72

    def cut(line: str) -> str:
        while len(line) > 1 and not fits(line + "…"):
            line = line[:-1]
        return line.rstrip(" ,-") + "…"

    done: list[str] = []
    current = ""
    for word in text.split():
        longer = f"{current} {word}".strip()
        if not current or fits(longer):
            current = longer
        elif len(done) == lines - 1:
            return "\n".join([*done, cut(longer)])
        else:
            done.append(current if fits(current) else cut(current))
            current = word
    return "\n".join([*done, current if fits(current) else cut(current)])


def percent(value: float) -> str:
    """0.974 -> "97 %"; never 100 % or 0 % for what is neither."""
    if 0.995 <= value < 1:
        return "> 99 %"
    if 0 < value < 0.005:
        return "< 1 %"
    return f"{value:.0%}".replace("%", " %")


def signed(value: float) -> str:
    """-1.234 -> "−1.23", with a true minus sign."""
    return f"{value:+.2f}".replace("-", "−")


def fit(picture_3HW: Tensor) -> Tensor:
    """(3, h, w) float in [0, 1], at most 640 pixels long."""
    picture = picture_3HW.float() / 255
    longest = max(picture.shape[1:])
    if longest <= _LONGEST_SIDE:
        return picture
    size = [max(1, round(side * _LONGEST_SIDE / longest)) for side in picture.shape[1:]]
    return functional.interpolate(picture[None], size=size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def faded(picture_3HW: Tensor) -> Tensor:
    """A picture in [0, 1], mixed with its own grey, lightened."""
    grey = (picture_3HW * picture_3HW.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)  # ITU-R BT.601
    return (1 - _FADE) * picture_3HW + _FADE * (0.35 * grey + 0.65)


def draw_picture(ax: Axes, picture_3HW: Tensor, *, fade: bool = False) -> tuple[int, int]:
    """Show a picture without ticks or frame; the height and width that it is shown in."""
    shown = fit(picture_3HW)
    if fade:
        shown = faded(shown)
    ax.imshow(shown.permute(1, 2, 0).numpy(), interpolation="antialiased")
    ax.set_anchor("N")
    ax.set_axis_off()
    return int(shown.shape[1]), int(shown.shape[2])


def relative_heat(map_HW: Tensor) -> Tensor:
    """A map divided by its maximum, in [0, 1]; all zero without heat."""
    return map_HW / map_HW.max().clamp(min=torch.finfo(torch.float32).tiny)


def heat_rgba(heat_HW: Tensor, *, probability: float = 1.0) -> NDArray[np.float64]:
    """(H, W, 4) colours of heat in [0, 1]; the opacity is proportional to heat * probability, so absent concepts fade."""
    colours = np.array(colormaps[_HEAT](heat_HW.numpy()), dtype=np.float64)
    colours[..., 3] = _MOST_OPAQUE * probability * heat_HW.numpy()
    return colours


def draw_heat(
    ax: Axes,
    picture_3HW: Tensor,
    map_HW: Tensor,
    *,
    probability: float = 1.0,
    region: Box = (0.0, 0.0, 1.0, 1.0),
    box: Box | None = None,
    peak: tuple[float, float] | None = None,
) -> None:
    """A picture under a map: heat, the box around its hot cells, and a cross at its peak, which a small box says by itself."""
    height, width = draw_picture(ax, picture_3HW, fade=True)
    heat_HW = upsample(relative_heat(map_HW.float())[None], (height, width), region=region)[0]
    ax.imshow(heat_rgba(heat_HW, probability=probability), interpolation="nearest")
    halo = [effects.Stroke(linewidth=3.2, foreground="white", alpha=0.8), effects.Normal()]
    if box is not None:
        x0, y0, x1, y1 = (value * side for value, side in zip(box, (width, height, width, height), strict=True))
        ax.add_patch(Rectangle((x0 - 0.5, y0 - 0.5), x1 - x0, y1 - y0, fill=False, edgecolor=INK, linewidth=1.3, path_effects=halo))
    small = box is not None and max(box[2] - box[0], box[3] - box[1]) < _SMALL_BOX
    if peak is not None and not small:
        ax.plot(peak[0] * width - 0.5, peak[1] * height - 0.5, marker="+", markersize=9, markeredgewidth=1.6, color=INK, path_effects=halo)
    ax.set_xlim(-0.5, width - 0.5)
    ax.set_ylim(height - 0.5, -0.5)


def place(figure: Figure, *, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place given in inches from the top left corner."""
    total_width, total_height = figure.get_size_inches()
    return figure.add_axes((left / total_width, 1 - (top + height) / total_height, width / total_width, height / total_height))


def room_aspect(picture_3HW: Tensor) -> float:
    """Height over width of the room for the picture; pictures beyond keep their shape and leave some of it empty."""
    return min(1.6, max(0.55, picture_3HW.shape[1] / picture_3HW.shape[2]))


def heading(ax: Axes, title: str, subtitle: str, *, inches: float, size: float = TITLE, lines: int = 1, shift: float = 0.0) -> None:
    """Title and a muted line above an axes, `shift` inches left of its left edge."""
    for text, height, points, colour, weight in (
        (wrapped(title, inches=inches, size=size, lines=lines, bold=True), 21, size, INK, "bold"),
        (wrapped(subtitle, inches=inches, size=NAME, lines=1), 5, NAME, MUTED, "normal"),
    ):
        ax.annotate(
            text, (0, 1), xycoords="axes fraction", xytext=(-72 * shift, height), textcoords="offset points", va="bottom",
            fontsize=points, fontweight=weight, color=colour,
        )  # fmt: skip
