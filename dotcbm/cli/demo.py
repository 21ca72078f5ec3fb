"""`dotcbm demo`: train on drawn creatures, measure, and draw what was seen. All settings are in demo.yaml, beside this file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from dotcbm.cli.listing import DEMO_CONFIG
from dotcbm.cli.parser import Parser

if TYPE_CHECKING:
    from dotcbm.cli.train import FitCli
    from dotcbm.data.source import ConceptDataset

__all__ = ["run"]

_SPLIT = "test"
_FIGURES = 4  # the first pictures of the test split, one of each of the first classes: not chosen by their result
_COLUMNS = 5


def run(command: str, arguments: Sequence[str]) -> int:
    """See the head of this file."""
    parser = Parser(
        command,
        "Train DOT-CBM on drawn creatures, of which every concept and pixel is known, print how well it reads concepts, classes and\n"
        "places, and draw what it saw. Nothing is downloaded.",
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where to write (default: %(default)s)")
    parser.add_argument("--config", type=Path, default=DEMO_CONFIG, metavar="FILE", help="other settings (default: those of the package)")
    given, rest = parser.parse_known_intermixed_args(list(arguments))
    console = Console()
    if given.config == DEMO_CONFIG and not rest:
        console.print("Training DOT-CBM on drawn creatures: about two minutes on two cores.")

    from dotcbm.cli.train import FitCli, launch

    started = time.monotonic()
    fitted: list[FitCli] = []

    class _Demo(FitCli):
        def say(self, figures: Mapping[str, Mapping[str, float]], folder: Path) -> None:
            del figures, folder  # the table on the test split is shown instead
            fitted.append(self)

    options = ["--config", str(given.config), "--run_dir", str(given.out / "run"), "--overwrite", *rest]
    status = launch(_Demo, options)
    if status:
        return status
    _report(fitted[0], given.out, console)
    console.print(f"{time.monotonic() - started:.0f} seconds", highlight=False)
    return 0


def _report(cli: FitCli, out: Path, console: Console) -> None:
    from dotcbm.training.evaluation import evaluate

    model, data = cli.model.model, cli.datamodule
    figures = evaluate(model, data.plain_loader(_SPLIT, annotations="all"), data.concepts)
    rows = [
        ("concepts: AUROC", figures["concept_auroc"], 0.5, "guessing"),
        ("classes: accuracy", figures["accuracy"], 1 / data.concepts.num_classes, "guessing"),
    ]
    for name, what in (("pointing_mask", "peak in the part's exact mask"), ("foreground_mass", "map inside the creature")):
        for kind in ("evidence", "plan"):
            if f"{name}_{kind}" in figures:
                rows.append((f"{kind}: {what}", figures[f"{name}_{kind}"], figures[f"{name}_prior"], "patch prior alone"))
    num_pictures, num_pairs = int(figures["num_pictures"]), int(figures["num_pointed"])
    table = Table(title=f"{num_pictures} test pictures, {num_pairs} concepts to be seen in them", title_justify="left")
    table.add_column("")
    table.add_column("DOT-CBM", justify="right")
    table.add_column("control", justify="right")
    table.add_column("which control")
    for name, value, control, which in rows:
        table.add_row(name, f"{value:.1%}", f"{control:.1%}", which)
    console.print(table)
    console.print(f"  {cli.run_dir / 'model'}", highlight=False, soft_wrap=True)
    for path in _draw(cli, out):
        console.print(f"  {path}", highlight=False, soft_wrap=True)


def _draw(cli: FitCli, out: Path) -> list[Path]:
    import torch
    from torchvision.io import write_png

    from dotcbm.explain.explanation import explain
    from dotcbm.explain.plots import plot_heatmap_grid

    model, dataset = cli.model.model, cli.datamodule.dataset(_SPLIT)
    paths: list[Path] = []
    explanations = [explain(model, dataset.read_image(row)) for row in range(min(_FIGURES, len(dataset)))]
    pictures = out / "pictures"
    pictures.mkdir(exist_ok=True)
    for row, explanation in enumerate(explanations):
        write_png(dataset.read_image(row), str(pictures / f"{row + 1}.png"))
        paths.append(out / f"creature-{row + 1}.png")
        explanation.plot(6).savefig(paths[-1])
    chosen = _shown_concepts(dataset, len(explanations))
    names = [dataset.concepts.names[j] for j in chosen]
    grid = plot_heatmap_grid(
        [explanation.picture_3HW for explanation in explanations],
        torch.stack([explanation.heatmaps_MHW[chosen] for explanation in explanations]),
        concept_names=names,
        row_names=[explanation.predicted_class for explanation in explanations],
        probability_BM=torch.stack([explanation.concept_M[chosen] for explanation in explanations]),
    )
    paths.append(out / "concepts.png")
    grid.savefig(paths[-1])
    return paths


def _shown_concepts(dataset: ConceptDataset, num_pictures: int) -> list[int]:
    """Concepts that the pictures in turn show, each on another part, as far as there are parts: chosen by the labels alone."""
    concepts, chosen, parts = dataset.concepts, list[int](), set[tuple[str, ...]]()
    for turn in range(_COLUMNS):
        for j in dataset.concept_NM[turn % num_pictures].nonzero()[:, 0].tolist():
            part = () if concepts.parts is None else concepts.parts[j]
            if part not in parts:
                chosen.append(j)
                parts.add(part)
                break
    return chosen
