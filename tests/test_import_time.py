"""Importing costs nothing: neither `import dotcbm` nor `dotcbm --help` loads a heavy package."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "lightning", "timm", "matplotlib", "numpy", "PIL", "jsonargparse", "torchmetrics", "open_clip", "ot")
LIGHT = ("demo", "doctor", "explain", "export", "list", "predict")


def loaded(code: str) -> list[str]:
    """The modules that a fresh interpreter loads, in the order in which their import ended: those below others come first."""
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    "code",
    [
        "import dotcbm",
        "import dotcbm; dir(dotcbm)",
        "from dotcbm.cli import main; assert main(['--help']) == 0",
        "from dotcbm.cli import main; assert main(['--version']) == 0",
        "from dotcbm.cli import main; assert main(['exprot']) == 2",
        *(f"from dotcbm.cli import main; assert main(['{name}', '--help']) == 0" for name in LIGHT),
    ],
)
def test_nothing_heavy_is_loaded(code):
    names = loaded(code)
    culprits = {}
    for i, name in enumerate(names):
        root = name.partition(".")[0]
        if root in HEAVY and root not in culprits:
            # The first module of ours that ends afterwards is the one whose import brought it in.
            culprits[root] = next((later for later in names[i:] if later.startswith("dotcbm")), "?")
    assert not culprits, f"`{code}` loads " + ", ".join(f"{root} (through {ours})" for root, ours in culprits.items())


def test_the_check_sees_a_culprit():
    assert "numpy" in {name.partition(".")[0] for name in loaded("import dotcbm.metrics.classes")}
