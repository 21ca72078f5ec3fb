"""`dotcbm audit`: what a model gets wrong, where it looks, and what its concepts are worth, as JSON, one HTML file and Markdown."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotcbm.cli.parser import Parser, device

if TYPE_CHECKING:
    from dotcbm.report.record import AuditRecord

__all__ = ["run"]

_PARTS = ".parts"
_FEW = 12


def run(command: str, arguments: Sequence[str]) -> int:
    """See the head of this file. A stopped audit goes on where it was when the same command is given again."""
    parser = Parser(
        command,
        "Audit a run's model on a split of its data: findings by fixed rules, each with its threshold, interval and control.\n"
        "Stopped, it goes on where it was when the same command is given again.",
        epilog="examples:\n"
        "  dotcbm audit --config runs/birds/config.yaml\n"
        "  dotcbm audit --config configs/birds.yaml --checkpoint runs/birds-edited/model --split test_twins --out audits/edited",
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="config.yaml of the run: its data and settings are used")
    parser.add_argument(
        "--checkpoint", "--ckpt_path", metavar="PATH", help="the model: a folder or a .ckpt file (default: the run's finished model)"
    )
    parser.add_argument("--split", default="test", help="what is audited (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: audit/ in the model's run)")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="audit only N pictures of the split, drawn with the seed")
    parser.add_argument("--depth", choices=("full", "figures"), default="full", help="figures: no picture cards, no grid")
    parser.add_argument("--no-pictures", action="store_true", help="leave photos out, for data that may not be shown; maps stay")
    parser.add_argument("--pdf", action="store_true", help="write audit.pdf too (needs weasyprint)")
    parser.add_argument("--title", metavar="TEXT", help="of the report")
    parser.add_argument("--data-licence", metavar="TEXT", help="for the model card")
    parser.add_argument("--encoder-licence", metavar="TEXT", help="for the model card")
    parser.add_argument("--device", type=device, default="cpu", help="where the model runs (default: %(default)s)")
    given = parser.parse(arguments)
    if given.limit is not None and given.limit < 1:
        parser.error(f"--limit is {given.limit}; an audit needs at least one picture")

    if given.pdf and find_spec("weasyprint") is None:
        parser.error("--pdf needs weasyprint: pip install 'dotcbm[audit,pdf]'")

    from rich.console import Console

    from dotcbm.cli.config_parser import ConfigError
    from dotcbm.cli.run_config import read_run_config
    from dotcbm.hub import from_pretrained
    from dotcbm.report.audit import AuditSettings, audit
    from dotcbm.report.record_file import write_record
    from dotcbm.report.render import write_html, write_markdown, write_pdf

    try:
        config = read_run_config(given.config)
    except ConfigError as error:
        print(f"dotcbm {command}: {error.message}", file=sys.stderr)
        return 2
    checkpoint = Path(given.checkpoint) if given.checkpoint else config.checkpoint
    out: Path = given.out or _run_of(checkpoint) / "audit"
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder, which is made if it is not there")
    model = from_pretrained(checkpoint, map_location=given.device)
    told = Console(stderr=True)
    record = audit(
        model,
        config.data,
        split=given.split,
        settings=AuditSettings(seed=given.seed, limit=given.limit, depth=given.depth, pictures=not given.no_pictures),
        resume_dir=out / _PARTS,
        title=given.title,
        data_licence=given.data_licence,
        encoder_licence=given.encoder_licence,
        training=_training(config.model),
        console=told if told.is_terminal else None,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_record(record, out / "audit.json")
    written = [out / "audit.json", write_html(record, out / "audit.html"), write_markdown(record, out / "audit.md")]
    if given.pdf:
        written.append(write_pdf(record, out / "audit.pdf"))
    _say(record)
    for path in written:
        print(f"written: {path}")
    return 0


def _run_of(checkpoint: Path) -> Path:
    """The folder of the run: above model/ and checkpoints/model.ckpt."""
    above = checkpoint.parent
    return above.parent if above.name == "checkpoints" else above


def _training(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The plain settings of the training task, as the config says them."""
    return [(name, str(value)) for name, value in model.items() if isinstance(value, bool | int | float | str)]


def _say(record: AuditRecord) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(escape(record.summary), highlight=False)
    table = Table(title="Findings", title_justify="left")
    for heading in ("severity", "finding", "control says"):
        table.add_column(heading)
    for finding in record.findings[:_FEW]:
        table.add_row(finding.severity, escape(finding.title), finding.verdict)
    if record.findings:
        console.print(table)
    if len(record.findings) > _FEW:
        console.print(f"{len(record.findings) - _FEW} more findings are in the report", highlight=False)
