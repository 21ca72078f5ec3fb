"""`dotcbm predict`: concept and class probabilities of pictures, as Parquet or CSV.

Two roads: pictures and a model (`dotcbm predict photos/ --checkpoint runs/birds/model --out birds.parquet`), or the config of a
run, for a split of its data set (`dotcbm predict --config configs/birds.yaml --out birds.parquet`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dotcbm.cli.parser import Parser, device

__all__ = ["run"]


def run(command: str, arguments: Sequence[str]) -> int:
    """See the head of this file. Pictures that cannot be decoded are skipped and named; status 1 if none could be."""
    if any(word in ("--config", "-c") or word.startswith("--config=") for word in arguments):
        from dotcbm.cli.predict_config import PredictCli
        from dotcbm.cli.train import launch

        return launch(PredictCli, arguments)
    parser = Parser(
        command,
        "Write concept and class probabilities of pictures as Parquet or CSV.",
        epilog="examples:\n"
        "  dotcbm predict photos/ --checkpoint runs/birds/model --out birds.parquet\n"
        "  dotcbm predict --config configs/birds.yaml --out birds.csv    (a split of the run's data set;\n"
        "                                                                 dotcbm predict --config FILE --help)",
    )
    parser.add_argument("pictures", nargs="+", metavar="IMAGE", help="picture files, or folders of pictures")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a saved model's folder, or a .ckpt file")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="ends in .parquet or .csv")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="pictures encoded at once (default: %(default)s)")
    parser.add_argument("--device", type=device, default="cpu", help="where the model runs (default: %(default)s)")
    given = parser.parse(arguments)
    if given.batch_size < 1:
        parser.error(f"--batch-size is {given.batch_size}; it must be at least 1")

    from dotcbm.cli.predictions import Predictions, check_out

    check_out(given.out)

    import torch

    from dotcbm.cli.pictures import find_pictures, prepared_batches
    from dotcbm.hub import from_pretrained

    paths = find_pictures(given.pictures)
    model = from_pretrained(given.checkpoint, map_location=given.device)
    predictions = Predictions(model.concepts)
    skipped: list[str] = []
    with torch.no_grad():
        for kept, image_B3HW in prepared_batches(model, paths, batch_size=given.batch_size, skipped=skipped):
            predictions.add([str(path) for path in kept], model(image_B3HW))
    for reason in skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    predictions.write(given.out)
    left_out = f", {len(skipped)} skipped" if skipped else ""
    print(f"{given.out}: {len(predictions.names)} pictures{left_out}")
    return 0
