"""`dotcbm explain`: for each picture a figure and a JSON file with the concepts, their places and what they add to the class."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dotcbm.cli.parser import Parser, device

__all__ = ["run"]

# As `dotcbm.explain.heatmaps.View`, which --help must not import: it would load torch.
_VIEWS = ("concept", "patch", "evidence", "gradcam", "integrated_gradients", "lrp")


def run(command: str, arguments: Sequence[str]) -> int:
    """See the head of this file. Status 1 if a picture could not be read; the others are explained all the same."""
    parser = Parser(
        command,
        "Show which concepts a model saw in a picture, where, and how the class follows from them.",
        epilog="example:\n  dotcbm explain bird.jpg --checkpoint runs/birds/model --out why",
    )
    parser.add_argument("pictures", nargs="+", metavar="IMAGE", help="picture files, or folders of pictures")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a saved model's folder, or a .ckpt file")
    parser.add_argument("--out", type=Path, default=Path("explanations"), metavar="DIR", help="where to write (default: %(default)s)")
    parser.add_argument("--top", type=int, default=6, metavar="N", help="concepts shown, 1 to 8 (default: %(default)s)")
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="class to explain (default: the predicted one)")
    parser.add_argument(
        "--view",
        choices=_VIEWS,
        metavar="VIEW",
        help=f"what the maps show: {', '.join(_VIEWS)} (default: the model's own, else gradcam)",
    )
    parser.add_argument("--device", type=device, default="cpu", help="where the model runs (default: %(default)s)")
    given = parser.parse(arguments)
    if not 1 <= given.top <= 8:
        parser.error(f"--top is {given.top}; a figure shows 1 to 8 concepts")

    from dotcbm.cli.pictures import find_pictures
    from dotcbm.data.source import BadPictureError
    from dotcbm.explain.explanation import explain
    from dotcbm.hub import from_pretrained

    paths = find_pictures(given.pictures)
    model = from_pretrained(given.checkpoint, map_location=given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    stems = _stems(paths)
    console = Console()
    failed = 0
    for path in paths:
        try:
            explanation = explain(model, path, target_class=given.class_name, view=given.view)
        except BadPictureError as error:
            print(f"skipped: {error}", file=sys.stderr)
            failed += 1
            continue
        target = given.out / stems[path]
        explanation.plot(given.top).savefig(f"{target}.png")
        top = explanation.top_concepts(given.top)
        found = explanation.to_dict()
        found["picture"] = str(path)
        found["top_concepts"] = [evidence.name for evidence in top]
        Path(f"{target}.json").write_text(json.dumps(found, ensure_ascii=False, indent=1), encoding="utf-8")
        share = float(explanation.class_K[explanation.target])
        table = Table(title=f"{path.name}: {explanation.target_class} ({share:.1%}), {explanation.view} maps", title_justify="left")
        for heading in ("concept", "probability", "contribution", "peak"):
            table.add_column(heading, justify="left" if heading == "concept" else "right")
        for evidence in top:
            at = "" if evidence.peak is None else f"{evidence.peak[0]:.2f}, {evidence.peak[1]:.2f}"
            table.add_row(evidence.name, f"{evidence.probability:.1%}", f"{evidence.contribution:+.2f}", at)
        console.print(table)
        console.print(f"  {target}.png, {target}.json", highlight=False)
    if failed:
        print(f"{failed} of {len(paths)} pictures could not be read", file=sys.stderr)
    return 1 if failed else 0


def _stems(paths: Sequence[Path]) -> dict[Path, str]:
    """A file name for each picture: its own, or numbered where several pictures share one."""
    stems: dict[Path, str] = {}
    used: set[str] = set()
    for path in paths:
        stem, number = path.stem, 1
        while stem in used:
            number += 1
            stem = f"{path.stem}-{number}"
        used.add(stem)
        stems[path] = stem
    return stems
