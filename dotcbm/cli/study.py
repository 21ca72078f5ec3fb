"""`dotcbm study`: many bottlenecks and seeds on one or several data sets, one record a run, one table and figure a claim."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dotcbm.cli.parser import Parser

if TYPE_CHECKING:
    from dotcbm.report.study import Record, Study

__all__ = ["run"]


def run(command: str, arguments: Sequence[str]) -> int:
    """Make the missing runs of a study, print its tables and, where a report is asked for, write them with their figures."""
    parser = Parser(command, "Train every method of a study on every seed, and print its tables. Goes on where it was stopped.")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML of the study, as in configs/studies/")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the records (default: runs/studies/<name>)")
    parser.add_argument("--only", action="append", default=[], metavar="ROW", help="a row of the study; may be given more than once")
    parser.add_argument("--world", action="append", default=[], metavar="NAME", help="a world of the study; may be given more than once")
    parser.add_argument("--share", default="1/1", metavar="I/N", help="make every N-th missing run, from the I-th (for N processes)")
    parser.add_argument(
        "--stage",
        choices=("all", "train", "measure"),
        default="all",
        help="train: leave the models only; measure: test and audit the models that are there (default: %(default)s)",
    )
    parser.add_argument("--report", type=Path, metavar="DIR", help="write tables.md, a figure for each claim and records.jsonl there")
    parser.add_argument("--no-runs", action="store_true", help="make no run: tables and figures of the records that are there")
    parser.add_argument("--larger", action="store_true", help="the variant `larger` of a study of experts, for a GPU")
    given = parser.parse(arguments)
    number, _, of = given.share.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        parser.error(f"--share is {given.share!r}; it is a fraction like 1/3")

    from dotcbm.report.study import is_expert_study, read_records, read_study, run_study
    from dotcbm.report.study.table import default_claim, markdown

    if is_expert_study(given.config):
        if given.world or given.stage != "all":
            parser.error("a study of experts has no worlds and no stages; leave --world and --stage out")
        return _experts(given, share=(int(number) - 1, int(of)))
    if given.larger:
        parser.error("--larger is of studies of experts")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    study = read_study(given.config)
    out = given.out or Path("runs") / "studies" / study.name
    if given.no_runs:
        records = read_records(study, out)
    else:
        try:
            records = run_study(
                study,
                out,
                only=given.only,
                worlds=given.world,
                share=(int(number) - 1, int(of)),
                stage=given.stage,
                say=lambda line: print(line, file=sys.stderr, flush=True),
            )
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on with the runs that have no record yet", file=sys.stderr)
            return 130
    if given.stage == "train":
        return 0
    if not records:
        raise ValueError(f"{out}: no record of the study {study.name} there; run it without --no-runs")
    for claim in study.claims or (default_claim(records),):
        print(f"{claim.question}\nmean ± standard deviation over n seeds, %\n\n{markdown(study, records, claim)}")
    if given.report:
        _write(study, records, given.report)
    return 0


def _experts(given: Namespace, *, share: tuple[int, int]) -> int:
    import json
    from dataclasses import asdict

    from dotcbm.report.study.experts_claims import markdown
    from dotcbm.report.study.experts_plan import read_expert_records, read_expert_study
    from dotcbm.report.study.experts_plot import plot_experts
    from dotcbm.report.study.experts_run import run_expert_study

    study = read_expert_study(given.config, larger=given.larger)
    out = given.out or Path("runs") / "studies" / study.name
    if given.no_runs:
        records = read_expert_records(study, out)
    else:
        try:
            records = run_expert_study(study, out, only=given.only, share=share, say=lambda line: print(line, file=sys.stderr, flush=True))
        except KeyboardInterrupt:
            print("\ninterrupted; the same command goes on with the runs that have no record yet", file=sys.stderr)
            return 130
    if not records:
        raise ValueError(f"{out}: no record of the study {study.name} there; run it without --no-runs")
    told = f"{study.question}\n\nmean ± standard deviation over n seeds; accuracies in %\n\n{markdown(study, records)}"
    print(told)
    if given.report:
        given.report.mkdir(parents=True, exist_ok=True)
        plot_experts(study, records).savefig(given.report / f"{study.name}.png", metadata={"Software": None})
        heading = f"# Study {study.name}\n\nWritten by `dotcbm study`. "
        (given.report / f"{study.name}.md").write_text(f"{heading}{told}\n![{study.question}]({study.name}.png)\n", encoding="utf-8")
        lines = [json.dumps(asdict(record)) for record in records]
        (given.report / f"{study.name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"written: {given.report / study.name}.md, .png and .jsonl")
    return 0


def _write(study: Study, records: list[Record], directory: Path) -> None:
    import json
    from dataclasses import asdict

    from dotcbm.report.study.plot import plot_claim
    from dotcbm.report.study.table import default_claim, markdown

    directory.mkdir(parents=True, exist_ok=True)
    parts = [f"# Study {study.name}: tables\n\nWritten by `dotcbm study`; mean ± standard deviation over n seeds, %.\n"]
    for claim in study.claims or (default_claim(records),):
        plot_claim(study, records, claim).savefig(directory / f"{claim.name}.png", metadata={"Software": None})
        parts.append(f"## {claim.question}\n\n![{claim.question}]({claim.name}.png)\n\n{markdown(study, records, claim)}")
    (directory / "tables.md").write_text("\n".join(parts), encoding="utf-8")
    lines = [json.dumps(asdict(record)) for record in records]
    (directory / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written: {directory / 'tables.md'}, {len(study.claims) or 1} figures, {directory / 'records.jsonl'}")
