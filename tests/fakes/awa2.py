"""Writes a small Animals_with_Attributes2 in the original layout; pictures are drawn."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.folder import picture

CLASSES = ("antelope", "killer+whale", "persian+cat")
PREDICATES = ("black", "longleg", "flippers", "newworld")
BINARY = ((0, 1, 0, 0), (1, 0, 1, 1), (1, 0, 0, 0))
PERCENT = ((-1.0, 61.25, 0.0, 5.5), (91.0, 0.0, 100.0, 40.0), (50.0, 2.0, 0.0, 0.0))


def awa2(root: Path, *, per_class: int = 10) -> Path:
    """Three classes, four predicates, `per_class` photos a class; numbers and blanks as in the original files."""
    root.mkdir(parents=True, exist_ok=True)
    for file, names in (("classes.txt", CLASSES), ("predicates.txt", PREDICATES)):
        (root / file).write_text("".join(f"{i:6d}\t{name}\n" for i, name in enumerate(names, start=1)))
    (root / "predicate-matrix-binary.txt").write_text("".join(" ".join(map(str, row)) + "\n" for row in BINARY))
    (root / "predicate-matrix-continuous.txt").write_text("".join("   " + "   ".join(f"{v:6.2f}" for v in row) + "\n" for row in PERCENT))
    (root / "trainclasses.txt").write_text("antelope\nkiller+whale\n")
    (root / "testclasses.txt").write_text("persian+cat\n")
    for k, name in enumerate(CLASSES):
        for i in range(per_class):
            picture(root / "JPEGImages" / name / f"{name}_1{i:04d}.jpg", value=80 * k)
    return root
