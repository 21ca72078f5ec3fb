"""Two processes with half of the tokens each against one process with all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fakes.processes import ACCELERATORS, environment
from parallel_lightning_run import fit
from parallel_run import STEPS, batch, loss_of, model, train

from dotcbm.moe.layer import MoELayer, moe_layers
from dotcbm.moe.parallel import ExpertParallel, check_ranks

KINDS = ("ddp", "fsdp", "experts", "both")


@pytest.fixture(scope="module", params=ACCELERATORS)
def accelerator(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, accelerator: str) -> Path:
    """A folder with what two processes made of each kind."""
    folder = tmp_path_factory.mktemp("parallel")
    command = [sys.executable, str(Path(__file__).with_name("parallel_run.py")), str(folder), accelerator]
    pair = [
        subprocess.Popen(
            [*command, str(rank), *KINDS, "half", "odd"], env=environment(accelerator), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=120)[0].decode() for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], "\n".join(text[-3000:] for text in said)
    return folder


def test_routing_of_the_first_step_is_bitwise_that_of_one_process(results, accelerator):
    """Before any update: the same logits to the last bit for the same pictures, and the same experts in the whole batch."""
    vit = model(accelerator)
    with torch.no_grad():
        loss_of(vit, batch(0).to(accelerator))
    whole = [layer.routing.index_TK.cpu() for layer in moe_layers(vit).values()]
    halves = []
    for half in batch(0).tensor_split(2):
        with torch.no_grad():
            loss_of(vit, half.to(accelerator))
        halves.append([layer.routing for layer in moe_layers(vit).values()])
    for kind in KINDS:
        told = [torch.load(results / f"{kind}{rank}.pt") for rank in (0, 1)]
        for layer in range(len(whole)):
            assert torch.equal(torch.cat([one["index"][layer] for one in told]), whole[layer]), (kind, layer)
            for rank in (0, 1):
                assert torch.equal(told[rank]["index"][layer], halves[rank][layer].index_TK.cpu()), (kind, layer)
        for rank in (0, 1):
            assert torch.equal(told[rank]["logit"][0], halves[rank][0].logit_TE.cpu()), kind


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_learn_what_one_learns(results, accelerator, kind):
    one = train(model(accelerator), rank=0, num_ranks=1)
    two = [torch.load(results / f"{kind}{rank}.pt") for rank in (0, 1)]
    for step in range(STEPS):
        assert torch.allclose(sum(told["loss"][step] for told in two) / 2, one["loss"][step], rtol=1e-5)
    for place, index_TK in enumerate(one["index"]):
        assert torch.equal(torch.cat([told["index"][place] for told in two]), index_TK)
    moved = 0
    start = model().state_dict()
    for name, value in one["state"].items():
        for told in two:
            assert torch.allclose(told["state"][name], value, atol=1e-6), name
        moved += int((value - start[name]).abs().max() > 1e-4)
    assert moved > 20  # it did learn


def test_under_lightnings_strategy(tmp_path, accelerator):
    """Sharded and with distributed experts; the checkpoint is one file with whole weights."""
    # Lightning starts the second process as a child of the first.
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("parallel_lightning_run.py")), str(tmp_path), accelerator],
        env=environment(accelerator),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "done.ckpt", weights_only=True, map_location="cpu")["state_dict"]
    one = fit(tmp_path, devices=1, accelerator=accelerator)
    assert two.keys() == one.keys()
    for name, value in one.items():
        assert torch.allclose(two[name], value, atol=1e-6), name


def test_routers_stay_in_float32_where_the_rest_is_in_half_precision(results):
    for rank in (0, 1):
        assert torch.load(results / f"half{rank}.pt") == {"logits": "torch.float32", "patches": "torch.bfloat16"}


def test_experts_that_cannot_be_divided_are_refused(results):
    for rank in (0, 1):
        said = torch.load(results / f"odd{rank}.pt")["said"]
        assert "7 experts cannot be divided evenly over 2 processes" in said
    check_ranks(64, 8)
    with pytest.raises(ValueError, match="such as 16"):
        check_ranks(15, 8)
    with pytest.raises(ValueError, match="not of MoELayer"):
        ExpertParallel()._apply(MoELayer(8, 8, 2, 1), None)  # pyright: ignore[reportArgumentType]
