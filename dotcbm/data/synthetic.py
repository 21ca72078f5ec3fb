"""Drawn creatures on painted places: pictures of which everything is known, down to the pixel.

`Synthetic` is a test bed. Concepts are the values of nine attributes ("striped body", "red wing"); each is seen on one part,
whose visible pixels are known exactly. The class is a function of seven of the attributes (`class_from_concepts`). An
obstacle may hide a part, so that a concept can be true and not to be seen. The place behind the creature can be tied to the
class with a chosen strength, and is cut loose again in the split "test_ood".

Picture i of a split depends on nothing but the seed, the split and i. Shape letters as in `dotcbm.structures`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dotcbm.data.source import ConceptDataset, ConceptSource
from dotcbm.data.synthetic_canvas import Canvas, Frame, Ink
from dotcbm.data.synthetic_creature import ATTRIBUTES, OUTLINE, PART_CENTRES, PARTS, Creature, Obstacle, draw_creature, draw_obstacle
from dotcbm.data.synthetic_rule import CLASS_NAMES, NUM_RULE, class_from_concepts, class_rule, draw_word, vocabulary
from dotcbm.data.synthetic_scenes import SCENES, scene_window
from dotcbm.structures import ConceptSet

__all__ = ["CLASS_NAMES", "SCENES", "Synthetic", "class_from_concepts", "class_rule"]

_STREAMS = {"train": 0, "val": 1, "test": 2, "test_ood": 2}  # test_ood shows the creatures of test


@dataclass(frozen=True)
class _Recipe:
    """One picture before it is painted."""

    creature: Creature
    obstacle: Obstacle | None
    scene: int
    scene_uniform_4: NDArray[np.float64]
    clutter_uniform: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Synthetic(ConceptSource):
    """Drawn creatures with known concepts, parts, masks, label rule and background shortcut.

    Splits: "train", "val" and "test" are drawn alike. "test_ood" shows the very creatures of "test", obstacles and all, each
    on a place drawn evenly from those that are not its class's own.

    Attributes:
        size: Side of the pictures in pixels, 64 at least.
        num_train, num_val, num_test: Pictures in a split; "test_ood" has num_test.
        num_classes: 2 to 16.
        shortcut: Probability in [0, 1] that a creature stands on its class's own place; else the place is drawn evenly from
            all eight. Own places are shared by two classes beyond eight classes.
        occlusion: Probability in [0, 1] that an obstacle stands before the creature; it aims at a part drawn evenly.
        variation: Probability in [0, 0.5] of each of a creature's seven rule attributes to stray from its class's value, given
            that the creature keeps two concepts more of its own class than of any other. The larger, the less a concept can
            be guessed from the rest of the creature.
        seed: Of everything but the places' paintings.
        labels: What `concept_NM` calls true. "visible": the creature has the concept and at least `min_visible` of the part
            is unhidden. "class": the creature has it, seen or not.
        min_visible: Share in (0, 1] of a part's pixels that must not be hidden by the obstacle for the part to be visible.
    """

    size: int = 224
    num_train: int = 2000
    num_val: int = 400
    num_test: int = 500
    num_classes: int = 8
    shortcut: float = 0.0
    occlusion: float = 0.4
    variation: float = 0.5
    seed: int = 0
    labels: Literal["visible", "class"] = "visible"
    min_visible: float = 0.35

    def __post_init__(self) -> None:
        if not 2 <= self.num_classes <= len(CLASS_NAMES):
            raise ValueError(f"num_classes is {self.num_classes}; there are 2 to {len(CLASS_NAMES)} kinds of creatures")
        if self.size < 64:
            raise ValueError(f"size is {self.size}; creatures need pictures of 64 pixels at least")
        for name in ("shortcut", "occlusion", "min_visible"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a share in [0, 1]")
        if not 0 <= self.variation <= 0.5:
            raise ValueError(f"variation is {self.variation}; give a probability in [0, 0.5], beyond which classes are hard to tell")
        if self.min_visible == 0:
            raise ValueError("min_visible is 0, which calls hidden parts visible; use labels='class' for the truth regardless of sight")
        for name in ("num_train", "num_val", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a split needs at least one picture")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give a whole number from 0 on")
        if self.labels not in ("visible", "class"):
            raise ValueError(f"labels is {self.labels!r}; choose 'visible' or 'class'")

    @property
    def concepts(self) -> ConceptSet:
        return vocabulary(self.num_classes, self.variation)

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(_STREAMS)

    def load(self, split: str) -> ConceptDataset:
        """Read one split: the masks of all rows are drawn (coarsely) to learn what is visible, pictures when asked for.

        `group_N` is label * 8 + place, with places numbered as in `SCENES`.
        """
        if split not in _STREAMS:
            raise ValueError(f"no split {split!r}; Synthetic has {list(_STREAMS)}")
        num = {"train": self.num_train, "val": self.num_val}.get(split, self.num_test)
        offsets = np.cumsum([0, *(len(a.values) for a in ATTRIBUTES)])
        has_NM = np.zeros((num, offsets[-1]), dtype=np.float32)
        points_NP3 = np.zeros((num, len(PARTS), 3), dtype=np.float32)
        box_N4 = np.zeros((num, 4), dtype=np.float32)
        scene_N = np.zeros(num, dtype=np.int64)
        for row in range(num):
            recipe = self._recipe(split, row)
            has_NM[row, offsets[:-1] + np.asarray(recipe.creature.values)] = 1
            points_NP3[row], box_N4[row] = self._seen(recipe)
            scene_N[row] = recipe.scene
        label_N = torch.arange(num) % self.num_classes
        concept_NM, points = torch.from_numpy(has_NM), torch.from_numpy(points_NP3)
        if self.labels == "visible":
            concept_NM = concept_NM * (points[:, :, 2] @ self.concepts.part_mask_MP().float().T)
        return ConceptDataset(
            concepts=self.concepts,
            split=split,
            names=tuple(f"{split}/{row:06d}" for row in range(num)),
            label_N=label_N,
            concept_NM=concept_NM,
            read_image=partial(self.picture, split),
            read_size=self._read_size,
            points_NP3=points,
            box_N4=torch.from_numpy(box_N4),
            group_N=label_N * len(SCENES) + torch.from_numpy(scene_N),
            read_foreground=partial(self.foreground, split),
            read_part_masks=partial(self.part_masks, split),
            source_key=self._key(),
        )

    def picture(self, split: str, row: int) -> Tensor:
        """(3, size, size) uint8: picture `row` of a split."""
        return torch.from_numpy(_drawn(self, split, row)[0].copy())

    def part_masks(self, split: str, row: int) -> Tensor:
        """(P, size, size) bool: the visible pixels of each part; disjoint."""
        part_HW = torch.from_numpy(_drawn(self, split, row)[1])
        return part_HW == torch.arange(1, len(PARTS) + 1, dtype=torch.uint8)[:, None, None]

    def foreground(self, split: str, row: int) -> Tensor:
        """(size, size) bool: the visible pixels of the creature, the union of its parts."""
        return torch.from_numpy(_drawn(self, split, row)[1] > 0)

    def _read_size(self, row: int) -> tuple[int, int]:
        return self.size, self.size

    def _key(self) -> str:
        """The settings that change pixels. The number of pictures and the kind of labels do not."""
        settings = asdict(self)
        for name in ("num_train", "num_val", "num_test", "labels", "min_visible"):
            del settings[name]
        return "synthetic-1 " + " ".join(f"{name}={value!r}" for name, value in sorted(settings.items()))

    def _recipe(self, split: str, row: int) -> _Recipe:
        """What picture `row` shows. Creature and obstacle come from one stream of numbers, the place from another."""
        entropy = (self.seed, _STREAMS[split], row)
        r = np.random.Generator(np.random.PCG64(np.random.SeedSequence([*entropy, 0]))).random(68)
        label = row % self.num_classes
        free = tuple(int(r[g] * len(a.values)) for g, a in enumerate(ATTRIBUTES[NUM_RULE:]))
        frame = _placed(r[8:13])
        rule = draw_word(label, float(r[45]), num_classes=self.num_classes, variation=self.variation)
        creature = Creature(rule + free, frame, tuple(r[16:30].tolist()))
        obstacle = None
        if r[13] < self.occlusion:
            part = PARTS[int(r[14] * len(PARTS))]
            kinds = ("branch", "cloud") if part in ("head", "crown", "mouth") else ("bush", "rock")
            centre = PART_CENTRES[part]
            x, y = frame.at(centre[0] + (r[31] - 0.5) * 0.3, centre[1] + (r[32] - 0.5) * 0.3)
            obstacle = Obstacle(kinds[int(r[15] * 2)], (x, y), frame.scale * (0.32 + 0.16 * r[33]), tuple(r[34:44].tolist()))
        ood = split == "test_ood"
        s = np.random.Generator(np.random.PCG64(np.random.SeedSequence([*entropy, 2 if ood else 1]))).random(8)
        own = label % len(SCENES)
        elsewhere = (own + 1 + int(s[1] * (len(SCENES) - 1))) % len(SCENES)
        tied = own if s[0] < self.shortcut else int(s[1] * len(SCENES))
        scene = elsewhere if ood else tied
        return _Recipe(creature, obstacle, scene, s[2:6], r[48:68])

    def _seen(self, recipe: _Recipe) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(P, 3) part points with visibility and (4,) box of the visible creature, from every k-th pixel of the masks."""
        stride = max(self.size // 96, 1)
        canvas = Canvas((self.size, self.size), stride=stride)
        draw_creature(canvas, recipe.creature)
        count = len(PARTS) + 1
        whole = np.bincount(canvas.part_HW.ravel(), minlength=count)
        if recipe.obstacle is not None:
            draw_obstacle(canvas, recipe.obstacle)
        points_P3 = np.zeros((len(PARTS), 3), dtype=np.float32)
        rows, columns = np.nonzero(canvas.part_HW)
        if not len(rows):
            return points_P3, np.zeros(4, dtype=np.float32)
        part, x, y = canvas.part_HW[rows, columns], canvas.x_W[columns], canvas.y_H[rows]
        seen = np.bincount(part, minlength=count)
        total = np.maximum(seen, 1)
        centre_x, centre_y = np.bincount(part, x, count) / total, np.bincount(part, y, count) / total
        away = (x - centre_x[part]) ** 2 + (y - centre_y[part]) ** 2
        away += np.where(_inside(canvas.part_HW, 2)[rows, columns], 0.0, 10.0)  # at the rim only if the part is all rim
        order = np.lexsort((away, part))
        nearest = order[np.searchsorted(part[order], np.arange(1, count)).clip(max=len(order) - 1)]
        points_P3[:, 0], points_P3[:, 1] = x[nearest], y[nearest]
        points_P3[:, 2] = seen[1:] >= np.maximum(self.min_visible * whole[1:], 1)
        points_P3[seen[1:] == 0] = 0
        half = np.float32(canvas.step / 2)
        box_4 = np.array([x.min() - half, y.min() - half, x.max() + half, y.max() + half], dtype=np.float32)
        return points_P3, box_4


def _inside(part_HW: NDArray[np.uint8], margin: int) -> NDArray[np.bool_]:
    """(H, W): whether all pixels of the square of side 2 * margin + 1 about a pixel are of its own part."""
    inside = np.zeros(part_HW.shape, dtype=np.bool_)
    width = 2 * margin + 1
    across = np.ones((part_HW.shape[0], part_HW.shape[1] - 2 * margin), dtype=np.bool_)
    centre = part_HW[:, margin:-margin]
    for k in range(width):
        across &= part_HW[:, k : k + across.shape[1]] == centre
    core = inside[margin:-margin, margin:-margin]
    core[:] = True
    middle = centre[margin:-margin]
    for k in range(width):
        core &= across[k : k + len(core)] & (centre[k : k + len(core)] == middle)
    return inside


def _placed(uniform_5: NDArray[np.float64]) -> Frame:
    """A frame of random scale, turn and mirror at a place where the whole creature is in the picture."""
    turned = Frame(scale=0.345 + 0.07 * uniform_5[0], angle=(uniform_5[1] - 0.5) * 0.44, mirror=bool(uniform_5[2] < 0.5))
    x, y = np.array([turned.at(*point) for point in OUTLINE]).T
    shrink = min(1.0, 0.98 / float(np.ptp(x)), 0.98 / float(np.ptp(y)))
    left, top = 0.01 - float(x.min()) * shrink, 0.01 - float(y.min()) * shrink
    room_x, room_y = 0.98 - float(np.ptp(x)) * shrink, 0.98 - float(np.ptp(y)) * shrink
    return replace(turned, scale=turned.scale * shrink, origin=(left + room_x * float(uniform_5[3]), top + room_y * float(uniform_5[4])))


@lru_cache(maxsize=4)  # picture, foreground and masks of a row are asked for one after the other
def _drawn(source: Synthetic, split: str, row: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(3, size, size) picture and (size, size) part numbers."""
    recipe = source._recipe(split, row)
    image = scene_window(recipe.scene, source.size, recipe.scene_uniform_4)
    canvas = Canvas((source.size, source.size), image_3HW=image)
    _draw_clutter(canvas, recipe)
    draw_creature(canvas, recipe.creature)
    if recipe.obstacle is not None:
        draw_obstacle(canvas, recipe.obstacle)
    image += np.float32(0.5)
    np.clip(image, np.float32(0), np.float32(255), out=image)
    return image.astype(np.uint8), canvas.part_HW


def _draw_clutter(canvas: Canvas, recipe: _Recipe) -> None:
    """The creature's shadow, and up to three stones, mushrooms or balls behind it that belong to the place."""
    u, f = recipe.clutter_uniform, Frame()
    for k in range(int(u[0] * 4)):
        kind, x, y, r, tint = u[1 + 5 * k : 6 + 5 * k]
        y, r = 0.72 + 0.26 * y, 0.03 + 0.035 * r
        if kind < 0.4:
            grey = 100 + 80 * tint
            canvas.ellipse(f, (x, y), (r * 1.3, r), Ink((grey, grey * 0.97, grey * 0.95), outline=0.005))
        elif kind < 0.75:
            canvas.stroke(f, [(x, y), (x, y + r)], [r * 0.35, r * 0.4], Ink((236, 226, 204), outline=0.005))
            canvas.ellipse(f, (x, y), (r * 1.1, r * 0.7), Ink((200, 70 + 90 * tint, 60), outline=0.005))
        else:
            colour = ((210, 70, 70), (80, 110, 200), (236, 200, 80))[int(tint * 3)]
            canvas.ellipse(f, (x, y), (r, r), Ink(colour, outline=0.005, pattern="stripes", second=(240, 240, 235), period=r * 0.9))
    frame = recipe.creature.frame
    x, y = frame.at(0.0, 0.95)
    canvas.ellipse(f, (x, y), (frame.scale * 0.75, frame.scale * 0.1), Ink((20, 24, 30), outline=0, light=0, opacity=0.35, soft=8))
