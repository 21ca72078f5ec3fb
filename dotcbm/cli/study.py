"""`dotcbm study`: many bottlenecks and seeds on one data set, one record a run, one table."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dotcbm.cli.parser import Parser

__all__ = ["run"]

_COLUMNS = (
    ("accuracy", "class accuracy"),
    ("concept_auroc", "concept AUROC"),
    ("pointing_0.05_plan|pointing_0.05_evidence", "pointing, r = 0.05"),
    ("pointing_0.1_plan|pointing_0.1_evidence", "pointing, r = 0.1"),
    ("pointing_0.1_evidence", "of the evidence"),
    ("pointing_0.1_prior", "control: prior alone"),
    ("pointing_mask_plan|pointing_mask_evidence", "peak inside the part"),
    ("foreground_mass_plan|foreground_mass_evidence", "mass on the object"),
)


def run(command: str, arguments: Sequence[str]) -> int:
    """Make the missing runs of a study and print its table."""
    parser = Parser(command, "Train every method of a study on every seed, and print one table. Goes on where it was stopped.")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML of the study, as in configs/studies/")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the records (default: runs/studies/<name>)")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="a row of the study; may be given more than once")
    parser.add_argument("--share", default="1/1", metavar="I/N", help="make every N-th missing run, from the I-th (for N processes)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table there as well")
    given = parser.parse(arguments)
    number, _, of = given.share.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        parser.error(f"--share is {given.share!r}; it is a fraction like 1/3")

    from dotcbm.report.study import read_study, run_study
    from dotcbm.report.table import markdown

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    try:
        study = read_study(given.config)
        records = run_study(
            study,
            given.out or Path("runs") / "studies" / study.name,
            only=given.only,
            share=(int(number) - 1, int(of)),
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on with the runs that have no record yet", file=sys.stderr)
        return 130
    splits = sorted({name.split("/")[0] for record in records for name in record.figures if name.startswith("test")})
    table = markdown(study, records, columns=_COLUMNS, splits=splits)
    print(f"{' / '.join(splits)}; mean and standard deviation over n seeds, %\n\n{table}")
    if given.table:
        given.table.write_text(table)
    return 0
