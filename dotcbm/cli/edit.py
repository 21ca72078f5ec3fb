"""`dotcbm edit`: take concepts out of a model's classes or re-weight them, fit the rest anew, and show what that changed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotcbm.cli.parser import Parser, device

if TYPE_CHECKING:
    from dotcbm.report.edit import Edited, HeadSettings

__all__ = ["run"]

_FEW = 12


def run(command: str, arguments: Sequence[str]) -> int:
    """See the head of this file."""
    parser = Parser(
        command,
        "Remove or re-weight concepts of a model: fit the rest of its class head anew, log who and why, and show what that changed.",
        epilog='example:\n  dotcbm edit --config runs/birds/config.yaml --remove "beach background" --scale "long tail=0.5" \\\n'
        '    --by "A. Auditor" --reason "the beach is no part of a bird" --out runs/birds-edited',
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="config.yaml of the run: its data and settings are used")
    parser.add_argument("--checkpoint", metavar="PATH", help="the model to edit (default: the run's)")
    parser.add_argument("--remove", action="append", default=[], metavar="CONCEPT", help="no class reads it any more; may be repeated")
    parser.add_argument(
        "--scale",
        action="append",
        default=[],
        metavar="CONCEPT=FACTOR",
        help="hold its weights at FACTOR times what they are while the rest is fitted; may be repeated",
    )
    parser.add_argument(
        "--reweight", action="store_true", help="weigh training pictures so that classes do not depend on the removed concepts (CBDebug)"
    )
    parser.add_argument("--by", required=True, metavar="NAME", help="who decides this; logged with the model")
    parser.add_argument("--reason", required=True, metavar="TEXT", help="why; logged with the model")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder for the edited model and the report")
    parser.add_argument("--device", type=device, default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: %(default)s)")
    given = parser.parse(arguments)
    if not given.remove and not given.scale:
        parser.error("nothing to edit: give --remove CONCEPT or --scale CONCEPT=FACTOR")
    if given.out.exists():
        parser.error(f"--out {given.out} exists; an edit never replaces anything: give a new folder")
    scale: dict[str, float] = {}
    for word in given.scale:
        name, sign, factor = word.rpartition("=")
        try:
            scale[name] = float(factor)
        except ValueError:
            sign = ""
        if not sign or not name:
            parser.error(f'--scale is {word!r}; write it as "CONCEPT=FACTOR", as in "long tail=0.5"')

    from dotcbm.cli.config_parser import ConfigError
    from dotcbm.cli.run_config import read_run_config
    from dotcbm.hub import CardInfo, from_pretrained
    from dotcbm.report.audit.model import without_paths
    from dotcbm.report.edit import edit_model, write_edited

    try:
        config = read_run_config(given.config)
    except ConfigError as error:
        print(f"dotcbm {command}: {error.message}", file=sys.stderr)
        return 2
    checkpoint = given.checkpoint or config.checkpoint
    model = from_pretrained(checkpoint, map_location=given.device)
    edited = edit_model(
        model,
        config.data,
        remove=given.remove,
        scale=scale,
        reweight=given.reweight,
        by=given.by,
        reason=given.reason,
        head=_head_settings(config.model),
        seed=given.seed,
    )
    card = CardInfo(data=f"`{without_paths(repr(config.data.source))}`", metrics=dict(edited.edit.figures), command=f"dotcbm {command}")
    folder = write_edited(edited, given.out, config=_config_of(config.text), card=card)
    _say(edited)
    print(f"model: {folder / 'model'}\nreport: {folder / 'edit.html'}\nnext: dotcbm audit --config {folder / 'config.yaml'}")
    return 0


def _head_settings(model: Mapping[str, Any]) -> HeadSettings:
    """How the run fitted its head, as far as its config says."""
    from dotcbm.report.edit import HeadSettings

    if model.get("regime") == "joint":
        return HeadSettings(balanced=model.get("class_weighting") == "balanced")
    l2 = model.get("head_l2", "auto")
    return HeadSettings(
        l2="auto" if l2 == "auto" else float(l2),
        views="all" if model.get("head_views") == "all" else "plain",
        fit_on="truth" if model.get("regime") == "independent" else "predicted",
        balanced=model.get("class_weighting") == "balanced",
    )


def _config_of(text: str) -> str:
    """The run's config for the new folder: where the old run wrote is no setting of the new one."""
    kept = [line for line in text.splitlines() if line.partition(":")[0] not in ("run_dir", "resume", "overwrite", "ckpt_path")]
    return "\n".join(["# The config of the run that this edited model is from (dotcbm edit)", *kept, ""])


def _say(edited: Edited) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from dotcbm.report.compare.render import difference_text, value_text
    from dotcbm.report.edit.render import changed

    console = Console()
    console.print(escape(edited.edit.told), highlight=False)
    for note in edited.notes:
        console.print(f"note: {escape(note)}", highlight=False)
    names = [version.name for version in edited.versions]
    classes = changed(edited)
    whole = [row for row in edited.rows if row.kind != "class"]
    for title, rows in (
        ("Accuracy; differences in points, * keeps clear of 0", whole),
        ("Classes, the largest loss first", classes[:_FEW]),
    ):
        if not rows:
            continue
        table = Table(title=title, title_justify="left")
        for heading in ("split", "", names[0], *names[1:]):
            table.add_column(heading, justify="left" if heading in ("split", "") else "right")
        for row in rows:
            cells = (escape(difference_text(d, "percent")) for d in row.differences[1:])
            table.add_row(row.split, escape(row.name), escape(value_text(row.values[0], "percent")), *cells)
        console.print(table)
    if len(classes) > _FEW:
        console.print(f"{len(classes) - _FEW} more classes are in edit.json", highlight=False)
