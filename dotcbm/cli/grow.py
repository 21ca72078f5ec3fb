"""`dotcbm grow`: a larger model from a trained one, with more layers, more experts, or both.

Written is a new folder, whole or not at all:

    grown.ckpt      from a checkpoint: what `dotcbm fit --ckpt_path` goes on from
    model/          from a saved model: the same model, larger (`dotcbm.hub`)
    encoder.yaml    the encoder's settings, for a second --config after the run's own
    manifest.json   what became what
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dotcbm.cli.parser import Parser

if TYPE_CHECKING:
    from dotcbm.encoders.vit_moe_growth import Growth

__all__ = ["run"]

_CHECKPOINT, _MODEL, _ENCODER, _MANIFEST = "grown.ckpt", "model", "encoder.yaml", "manifest.json"


def run(command: str, arguments: Sequence[str]) -> int:
    """See the head of this file."""
    parser = Parser(
        command,
        "Make a larger model from a trained one whose encoder is a vit_moe: more blocks, more experts, or both.",
        epilog="example:\n  dotcbm grow runs/small/checkpoints/last.ckpt --width 2 --out runs/wide\n"
        "  dotcbm fit --config small.yaml --config runs/wide/encoder.yaml --ckpt_path runs/wide/grown.ckpt --run_dir runs/wide-trained",
    )
    parser.add_argument(
        "source", type=Path, metavar="PATH", help="a .ckpt of `dotcbm fit` with a trained encoder, or a saved model's folder"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--depth",
        choices=("interpose", "stack", "zero"),
        help="double the blocks: each followed by its copy; all of them twice; or each followed by a copy that does nothing yet (exact)",
    )
    parser.add_argument("--keep-first", type=int, default=0, metavar="N", help="first blocks that stay single (default: %(default)s)")
    parser.add_argument("--keep-last", type=int, default=0, metavar="N", help="last blocks that stay single (default: %(default)s)")
    parser.add_argument("--width", type=int, default=1, metavar="N", help="N times as many experts, and active ones (default: %(default)s)")
    parser.add_argument("--keep-k", action="store_true", help="with --width: as many active experts as before; this changes the output")
    parser.add_argument(
        "--alpha", type=float, default=0.01, help="with --width: noise on copies, in standard deviations; 0 is exact (default: %(default)s)"
    )
    parser.add_argument(
        "--optimizer", choices=("drop", "duplicate"), default="drop", help="moments of Adam: start anew or copy (default: %(default)s)"
    )
    parser.add_argument("--restart", action="store_true", help="count epochs and steps from 0 again; else they go on")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    given = parser.parse(arguments)
    if given.depth is None and given.width == 1:
        parser.error("nothing to grow: give --depth interpose|stack|zero, --width 2, or both")
    if given.width < 1:
        parser.error(f"--width is {given.width}; give 2 for twice as many experts")
    if given.depth is None and (given.keep_first or given.keep_last):
        parser.error("--keep-first and --keep-last work with --depth")
    if given.out.exists():
        parser.error(f"--out {given.out} exists, and nothing is overwritten; give a new folder")
    if not given.source.exists():
        raise ValueError(f"{given.source}: no such checkpoint or folder")

    from dotcbm.encoders.vit_moe_growth import Growth

    growth = Growth(
        depth=given.depth,
        keep_first=given.keep_first,
        keep_last=given.keep_last,
        width=given.width,
        grow_k=not given.keep_k,
        alpha=given.alpha,
        seed=given.seed,
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=given.out.parent, prefix=f".{given.out.name}."))
    try:
        if given.source.is_dir():
            manifest = _from_folder(given.source, fresh / _MODEL, growth)
        else:
            manifest = _from_checkpoint(given.source, fresh / _CHECKPOINT, growth, optimizer=given.optimizer, restart=given.restart)
        manifest = {"source": str(given.source), **manifest}
        _write(fresh / _MANIFEST, json.dumps(manifest, indent=1) + "\n")
        _write(fresh / _ENCODER, _yaml(manifest["encoder"], source=given.source))
        fresh.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        fresh.rename(given.out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    _say(given.out, manifest)
    return 0


def _from_folder(source: Path, target: Path, growth: Growth) -> dict[str, Any]:
    from dotcbm.hub import from_pretrained, save_pretrained
    from dotcbm.training.growth import grow_model

    model, manifest = grow_model(from_pretrained(source), growth)
    save_pretrained(model, target)
    return manifest


def _from_checkpoint(source: Path, target: Path, growth: Growth, **how: Any) -> dict[str, Any]:
    import pickle

    import torch

    from dotcbm.training.growth import grow_checkpoint

    try:
        small = torch.load(source, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(f"{source}: cannot be read as a checkpoint ({error}); is it truncated, or no .ckpt of dotcbm?") from error
    if not isinstance(small, dict):
        raise ValueError(f"{source}: holds a {type(small).__name__}; expected a .ckpt that `dotcbm fit` wrote")
    try:
        large, manifest = grow_checkpoint(small, growth, **how)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    with target.open("wb") as opened:
        torch.save(large, opened)
        opened.flush()
        os.fsync(opened.fileno())
    return manifest


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def _yaml(settings: dict[str, Any], *, source: Path) -> str:
    import yaml

    told = {"model": {"encoder": {"class_path": "ImageEncoder", "init_args": settings}}}
    return f"# The encoder that dotcbm grow made of {source}: a second --config\n" + yaml.safe_dump(told, sort_keys=False)


def _say(folder: Path, manifest: dict[str, Any]) -> None:
    moe = manifest["encoder"]["moe"]
    print(f"blocks: {len(manifest['blocks'])}, with experts: {len(moe['blocks'])} of {moe['num_experts']}, active: {moe['k']}")
    print("the output is the small model's" if manifest["exact"] else "the output is not the small model's until it is trained on")
    if (folder / _MODEL).is_dir():
        print(f"model: {folder / _MODEL}")
        return
    print(f"checkpoint: {folder / _CHECKPOINT}")
    print(f"next: dotcbm fit --config CONFIG --config {folder / _ENCODER} --ckpt_path {folder / _CHECKPOINT} --run_dir DIR")
