"""Maps and matrices as very small PNGs, one pixel a cell, for a page that holds thousands of them.

Sixteen levels of the colour map "inferno" (dark to bright, safe for colour-blind readers), the more opaque the hotter: so
the same few bytes stand alone on a dark ground and lie over a picture. Nothing is smoothed.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache

__all__ = ["heat_png", "outline"]

_LEVELS = 16
_MAX_OPACITY = 0.86  # the picture must be seen through the hottest cell
_ANCHORS = ((0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (250, 193, 39), (252, 255, 164))


def heat_png(cells: Sequence[int], *, width: int, opaque: bool = False) -> str:
    """A PNG of four bits a pixel as base64.

    Args:
        cells: height * width values 0 ... 255, row by row.
        width: Of the grid.
        opaque: Whether cold cells are dark instead of transparent.
    """
    height = len(cells) // width
    stride = (width + 1) // 2
    rows = bytearray()
    for y in range(height):
        row = [round(value / 17) for value in cells[y * width : (y + 1) * width]] + [0] * (2 * stride - width)
        rows.append(0)  # no filter
        rows.extend(high << 4 | low for high, low in zip(row[::2], row[1::2]))
    parts = [
        _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)),
        _palette(opaque),
        _chunk(b"IDAT", zlib.compress(bytes(rows), 9)),
        _chunk(b"IEND", b""),
    ]
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def outline(cells: Sequence[int], *, width: int, share: float) -> str:
    """The SVG path about the cells of at least `share` of the maximum, in units of cells; empty for a map of zeros.

    >>> outline([0, 9, 0, 8], width=2, share=0.6)
    'M1 0h1M1 2h1M1 0v2M2 0v2'
    """
    height, cut = len(cells) // width, share * max(cells, default=0)
    if not cut:
        return ""

    def hot(x: int, y: int) -> bool:
        return 0 <= x < width and 0 <= y < height and cells[y * width + x] >= cut

    across = [_runs([hot(x, y) != hot(x, y - 1) for x in range(width)], f"M{{at}} {y}h{{num}}") for y in range(height + 1)]
    down = [_runs([hot(x, y) != hot(x - 1, y) for y in range(height)], f"M{x} {{at}}v{{num}}") for x in range(width + 1)]
    return "".join(across + down)


def _runs(edges: Sequence[bool], stroke: str) -> str:
    """A stroke for each run of edges."""
    drawn, start = [], None
    for at, edge in enumerate([*edges, False]):
        if edge and start is None:
            start = at
        elif not edge and start is not None:
            drawn.append(stroke.format(at=start, num=at - start))
            start = None
    return "".join(drawn)


@lru_cache
def _palette(opaque: bool) -> bytes:
    """The chunks of colours and, unless opaque, of opacities."""
    colours = bytearray()
    for level in range(_LEVELS):
        at = level / (_LEVELS - 1) * (len(_ANCHORS) - 1)
        k = min(int(at), len(_ANCHORS) - 2)
        colours.extend(round(a + (b - a) * (at - k)) for a, b in zip(_ANCHORS[k], _ANCHORS[k + 1]))
    opacities = bytes(round(255 * _MAX_OPACITY * level / (_LEVELS - 1)) for level in range(_LEVELS))
    return _chunk(b"PLTE", bytes(colours)) + (b"" if opaque else _chunk(b"tRNS", opacities))


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
