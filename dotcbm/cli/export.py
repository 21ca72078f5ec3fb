"""`dotcbm export`: a model as a file that runs without dotcbm, compared with the original before it appears.

One input, `image`: (B, 3, h, w) float32, prepared as `config.json` of the saved model says ("preprocessing"); B is free. Outputs:
`concepts` (B, M) probabilities, `classes` (B, K) probabilities, and where the model says it, `plan` (B, N, M), the transport plan, or
`evidence` (B, N, M), what each patch adds to each concept's logit.
"""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from dotcbm.cli.parser import Parser

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from dotcbm.cli.export_module import ExportedModel
    from dotcbm.models.concept_model import ConceptModel

__all__ = ["ExportFormat", "export_model", "run"]

ExportFormat = Literal["torch", "onnx"]
_SUFFIX = {"torch": ".pt2", "onnx": ".onnx"}
_BATCHES = (1, 3)  # compared at both: neither is the size that the graph is traced with


def run(command: str, arguments: Sequence[str]) -> int:
    """See the head of this file."""
    parser = Parser(
        command,
        "Write a model as a file that runs without dotcbm: image -> concepts, classes, plan, for any batch size.",
        epilog="example:\n  dotcbm export --checkpoint runs/birds/model --format onnx --out birds.onnx",
    )
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="a saved model's folder, or a .ckpt file")
    parser.add_argument("--format", choices=get_args(ExportFormat), default="torch", help="torch.export program or ONNX (default: torch)")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="ends in .pt2 (torch) or .onnx")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference that is accepted (default: %(default)s)")
    given = parser.parse(arguments)
    if given.out.suffix != _SUFFIX[given.format]:
        parser.error(f"--out is {given.out.name}; a file of --format {given.format} ends in {_SUFFIX[given.format]}")

    from dotcbm.hub import from_pretrained

    model = from_pretrained(given.checkpoint)
    difference = export_model(model, given.out, format=given.format, tolerance=given.tolerance)
    print(f"{given.out}: image -> {', '.join(difference)}; batch size is free")
    for name, value in difference.items():
        print(f"  {name}: largest difference from the original {value:.1e}")
    return 0


def export_model(model: ConceptModel, path: Path, *, format: ExportFormat = "torch", tolerance: float = 1e-4) -> dict[str, float]:
    """Write `model` to `path`, after its file was read back and compared with it.

    Args:
        model: Any concept model; exported as it is in eval mode, on the CPU.
        path: The file; it appears whole or not at all.
        format: See `ExportFormat`.
        tolerance: Largest absolute difference of any output that is accepted.

    Returns:
        The largest absolute difference from the model for each output, by name.

    Raises:
        ValueError: The file gives other numbers than the model, packages of the extra [export] are missing, or the model cannot be traced.
        OSError: The file cannot be written.
    """
    import torch

    from dotcbm.cli.export_module import ExportedModel

    exported = ExportedModel(model).cpu().eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        with _quiet():
            reader = _write_torch(exported, temporary) if format == "torch" else _write_onnx(exported, temporary)
        difference = dict.fromkeys(exported.outputs, 0.0)
        generator = torch.Generator().manual_seed(0)
        for batch_size in _BATCHES:
            image_B3HW = torch.randn(batch_size, 3, *model.preprocessing.size, generator=generator)
            with torch.no_grad():
                expected, found = exported(image_B3HW), reader(image_B3HW)
            for output, ours, theirs in zip(exported.outputs, expected, found, strict=True):
                # A comparison with NaN is never true, so that NaN counts as a difference.
                gap = float((ours - theirs).abs().max())
                difference[output] = gap if not gap <= difference[output] else difference[output]
        wrong = {output: gap for output, gap in difference.items() if not gap <= tolerance}
        if wrong:
            told = ", ".join(f"{output} by {gap:.1e}" for output, gap in wrong.items())
            raise ValueError(f"{path}: not written; its numbers differ from the model's: {told} (accepted: {tolerance:.0e})")
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return difference


Reader = Callable[["Tensor"], Sequence["Tensor"]]


def _write_torch(exported: ExportedModel, path: Path) -> Reader:
    import torch

    program = torch.export.export(exported, (_example(exported),), dynamic_shapes=_free_batch())
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _write_onnx(exported: ExportedModel, path: Path) -> Reader:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ModuleNotFoundError as error:
        raise ValueError(f'ONNX needs {error.name}, which is not installed: pip install "dotcbm[export]"') from None
    import torch

    program = torch.onnx.export(
        exported,
        (_example(exported),),
        dynamo=True,
        dynamic_shapes=_free_batch(),
        input_names=["image"],
        output_names=list(exported.outputs),
        verbose=False,
    )
    if program is None:
        raise ValueError("torch.onnx gave no program; update torch and onnxscript")
    program.optimize()  # once more: where there is a loop, the first time leaves a constant behind, of which onnxruntime warns each user
    program.save(str(path))
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def read(image_B3HW: Tensor) -> list[Tensor]:
        found = session.run(list(exported.outputs), {"image": image_B3HW.numpy()})
        return [torch.from_numpy(value) for value in found]

    return read


def _example(exported: ExportedModel) -> Tensor:
    import torch

    # Two pictures: a batch of one would be taken for a constant.
    return torch.zeros(2, 3, *exported.model.preprocessing.size)


def _free_batch() -> dict[str, dict[int, object]]:
    import torch

    return {"image": {0: torch.export.Dim("batch", min=1)}}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' talk, which no user can act on."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
