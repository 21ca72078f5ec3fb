"""Our kernels against the dense-mask reference: on a GPU as they are, without one in Triton's interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from expert_problems import DEVICE, distance, expert_layer, tokens, triton_runs
from test_experts import experts_of, random_routing, results
from torch.utils.flop_counter import FlopCounterMode

from dotcbm.moe import experts as experts_module
from dotcbm.moe import flops
from dotcbm.moe.dispatch import Order
from dotcbm.moe.experts import Experts

if not triton_runs():
    pytest.skip("no Triton, or one whose interpreter does not work", allow_module_level=True)

from dotcbm.moe import backend_triton, triton_lanes, triton_launch
from dotcbm.moe.triton_launch import Rows
from dotcbm.moe.triton_sorting import sort_by_expert, tile_map
from dotcbm.moe.triton_tiles import PRODUCTS, Tiles, chunk_size, tiles_of

SMALL = Tiles(64, 32, 32, 4, 2, descriptors=True, parts=2)


@pytest.fixture(params=["descriptors", "pointers", "chosen"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Tiles of which tiny problems have several, with what is dense read in both ways; and those that are chosen for real."""
    if request.param != "chosen":
        small = SMALL._replace(descriptors=request.param != "pointers")
        of_weights = small._replace(columns=96, parts=3)
        monkeypatch.setattr(triton_launch, "tiles_of", lambda product, *_, **__: of_weights if "weight" in product else small)
        monkeypatch.setattr(triton_launch, "chunk_size", lambda *_: 48)
        monkeypatch.setattr(triton_launch, "_num_sms", lambda _: 2)  # so that a program takes several tiles
    return request.param


def reference(experts: Experts, x, index, gate, weight):
    """Of the dense-mask backend, in float64."""
    double = Experts(*experts.up_EDH.shape[1:], experts.num_experts, bias=experts.up_bias_EH is not None).to(DEVICE, torch.float64)
    double.load_state_dict(experts.state_dict())
    return results(double, x.double(), index, gate.double(), "dense", None if weight is None else weight.double())


def check(ours, theirs, tolerance):
    for name, a, b in zip(("y", "x", "gate", "up", "down", "up_bias", "down_bias"), ours, theirs, strict=False):
        assert a.shape == b.shape
        assert distance(a.double(), b.double()) <= tolerance, name


@pytest.mark.parametrize(("T", "k", "bias"), [(75, 1, True), (37, 2, True), (37, 2, False), (19, 8, True)])
def test_triton_agrees_with_the_reference(tiles, T, k, bias):
    # Of the sizes, none is a multiple of a tile.
    experts = experts_of(E=8, D=40, H=72, bias=bias)
    x, (index, gate), weight = tokens(2, T, 40), random_routing(3, T, 8, k), tokens(4, T, 40)
    check(results(experts, x, index, gate, "triton", weight), reference(experts, x, index, gate, weight), 1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_triton_with_whole_tiles(tiles, k):
    experts = experts_of(E=3, D=64, H=64)
    x, (index, gate), weight = tokens(2, 64, 64), random_routing(3, 64, 3, k), tokens(4, 64, 64)
    check(results(experts, x, index, gate, "triton", weight), reference(experts, x, index, gate, weight), 1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_triton_with_an_expanded_gradient_odd_sizes_and_empty_experts(tiles, k):
    experts = experts_of(E=9, D=6, H=10)
    x, (index, gate) = tokens(5, 33, 6), random_routing(6, 33, 4, k)
    index = index * 2  # experts 1, 3, 5, 7 and 8 are empty
    check(results(experts, x, index, gate, "triton"), reference(experts, x, index, gate, None), 1e-6)


def test_triton_with_all_tokens_to_one_expert(tiles):
    experts, x, weight = experts_of(D=32, H=40), tokens(7, 150, 32), tokens(8, 150, 32)
    index, gate = torch.full((150, 1), 3, device=DEVICE), tokens(9, 150, 1).sigmoid()
    ours = results(experts, x, index, gate, "triton", weight)
    check(ours, reference(experts, x, index, gate, weight), 1e-6)
    for gradient in ours[3:]:
        assert gradient[[0, 1, 2, 4, 5, 6, 7]].abs().max() == 0


@pytest.mark.parametrize(("T", "k"), [(0, 1), (0, 2), (1, 1), (1, 8)])
def test_triton_with_few_tokens_or_none(T, k):
    experts = experts_of()
    index, gate = torch.arange(k, device=DEVICE).expand(T, k), torch.ones(T, k, device=DEVICE)
    ours, x = results(experts, tokens(0, T, 16), index, gate, "triton"), tokens(0, T, 16)
    assert ours[0].shape == (T, 16)
    if T:
        check(ours, reference(experts, x, index, gate, None), 1e-6)
    else:
        assert all(gradient.abs().sum() == 0 for gradient in ours)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_in_half_precision(tiles, dtype, k):
    """Against float64 from the same rounded numbers: what differs is what is rounded on the way."""
    experts, x, (index, gate) = experts_of(E=4, D=40, H=64, dtype=dtype), tokens(10, 60, 40).to(dtype), random_routing(11, 60, 4, k)
    weight = tokens(12, 60, 40).to(dtype)
    ours = results(experts, x, index, gate, "triton", weight)
    assert {gradient.dtype for gradient in ours[3:]} == {dtype}
    assert (ours[0].dtype, ours[2].dtype) == (dtype, torch.float32)
    # The interpreter cuts digits off where a GPU rounds.
    check(ours, reference(experts, x, index, gate, weight), 1e-3 if dtype == torch.float16 else 8e-3 if DEVICE.type == "cuda" else 2e-2)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_with_rows_put_in_order(tiles, monkeypatch, dtype, k):
    """What training does with large layers: `up` and `hidden` read rows in order, and PyTorch makes the gradients of weights."""
    if dtype == torch.float32 and DEVICE.type == "cuda":
        pytest.skip("PyTorch has no grouped products in float32 there")
    monkeypatch.setattr(backend_triton, "puts_in_order", lambda *_, **__: True)
    experts, x, (index, gate) = experts_of(E=9, D=40, H=72, dtype=dtype), tokens(38, 70, 40).to(dtype), random_routing(39, 70, 4, k)
    index, weight = index * 2, tokens(40, 70, 40).to(dtype)  # experts 1, 3, 5, 7 and 8 are empty
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3 if DEVICE.type == "cuda" else 2e-2
    ours = results(experts, x, index, gate, "triton", weight)
    check(ours, reference(experts, x, index, gate, weight), tolerance)
    for gradient in ours[3:]:
        assert gradient[[1, 3, 5, 7, 8]].abs().max() == 0
    assert results(experts, x[:0], index[:0], gate[:0], "triton")[0].shape == (0, 40)


def test_rows_are_put_in_order_where_that_was_measured_to_pay(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    cuda = torch.device("cuda")
    sizes = {(384, 1536): False, (768, 768): False, (768, 1024): True, (1024, 1024): True, (768, 3072): True, (770, 3072): False}
    for (width, hidden), pays in sizes.items():
        assert backend_triton.puts_in_order(torch.bfloat16, cuda, width=width, hidden=hidden, num_experts=64) == pays
    large = {"width": 1024, "hidden": 4096}
    for dtype, device in ((torch.float16, cuda), (torch.float32, cuda), (torch.bfloat16, torch.device("cpu"))):
        assert not backend_triton.puts_in_order(dtype, device, **large, num_experts=8)
    assert backend_triton.puts_in_order(torch.bfloat16, cuda, **large, num_experts=1023)
    assert not backend_triton.puts_in_order(torch.bfloat16, cuda, **large, num_experts=1024)  # which PyTorch's products refuse
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert not backend_triton.puts_in_order(torch.bfloat16, cuda, **large, num_experts=8)


def test_triton_under_autocast():
    experts, x, (index, gate), weight = experts_of(), tokens(13, 100, 16), random_routing(14, 100, 8, 2), tokens(15, 100, 16)
    inputs = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y = experts(inputs[0], index, inputs[1], "triton")
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad((y * weight).sum(), [*inputs, *experts.parameters()])
    assert {gradient.dtype for gradient in gradients} == {torch.float32}
    check([y, *gradients], reference(experts, x, index, gate, weight), 0.02)


@pytest.mark.parametrize("frozen", ["x", "weights", "gate", "up bias"])
def test_triton_leaves_out_gradients_that_nobody_wants(frozen):
    experts, x, (index, gate), weight = experts_of(), tokens(16, 50, 16), random_routing(17, 50, 8, 2), tokens(18, 50, 16)
    leaves = {"x": x.clone(), "gate": gate.clone(), **dict(experts.named_parameters())}
    off = {"weights": list(dict(experts.named_parameters())), "up bias": ["up_bias_EH"]}.get(frozen, [frozen])
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in off)
    found = {}
    for backend in ("triton", "loop"):
        (experts(leaves["x"], index, leaves["gate"], backend) * weight).sum().backward()
        found[backend] = {name: leaf.grad for name, leaf in leaves.items()}
        for leaf in leaves.values():
            leaf.grad = None
    for name, gradient in found["triton"].items():
        assert (gradient is None) == (name in off)
        assert gradient is None or distance(gradient, found["loop"][name]) <= 1e-6


def test_triton_keeps_nothing_without_gradients():
    experts, x, (index, gate) = experts_of(), tokens(19, 50, 16), random_routing(20, 50, 8, 2)
    weights = (experts.up_EDH, experts.up_bias_EH, experts.down_EHD, experts.down_bias_ED)
    y, *kept = torch.ops.dotcbm.experts(x, index, gate, *weights, False)
    assert all(tensor.numel() == 0 for tensor in kept)
    with torch.no_grad():
        assert torch.equal(experts(x, index, gate, "triton"), y)


def test_triton_gives_the_same_bits_in_every_run():
    experts, x, (index, gate) = experts_of(), tokens(21, 90, 16), random_routing(22, 90, 8, 3)
    for first, second in zip(*(results(experts, x, index, gate, "triton") for _ in range(2)), strict=True):
        assert torch.equal(first, second)


def test_without_cuda_all_lanes_are_the_current_stream():
    scratch = torch.zeros(3)
    with triton_lanes.lanes(2**30, torch.device("cpu"), 2) as found:
        for lane in found:
            with lane.using(scratch):
                scratch += 1
            assert not lane._held
    assert scratch.tolist() == [2, 2, 2]


def test_a_lane_that_was_not_used_is_not_waited_for():
    class Stream:
        device = torch.device("cuda")

    triton_lanes.Lane(Stream()).join()  # without CUDA there is no current stream that could wait


@pytest.mark.skipif(DEVICE.type != "cuda", reason="streams are of CUDA")
@pytest.mark.parametrize("frozen", [False, True])
def test_triton_is_captured_with_and_without_gradients_of_weights(monkeypatch, frozen):
    monkeypatch.setattr(triton_lanes, "_LARGE", 0)
    experts, x = experts_of(E=8, D=64, H=64, dtype=torch.bfloat16).requires_grad_(not frozen), tokens(41, 500, 64).bfloat16()
    index, gate = random_routing(42, 500, 8, 2)
    x.requires_grad_()

    def step() -> torch.Tensor:
        return torch.autograd.grad(experts(x, index, gate, "triton").float().square().sum(), x)[0]

    for _ in range(3):
        eager = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert torch.equal(captured, eager)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="streams are of CUDA")
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_triton_gives_the_same_bits_in_lanes(monkeypatch, k, captured, in_order):
    monkeypatch.setattr(backend_triton, "puts_in_order", lambda *_, **__: in_order)
    experts, x, (index, gate) = (
        experts_of(E=8, D=256, H=256, dtype=torch.bfloat16),
        tokens(35, 4000, 256).bfloat16(),
        random_routing(36, 4000, 8, k),
    )
    weight = tokens(37, 4000, 256).bfloat16()
    found = {}
    for name, large in (("one stream", 2**60), ("lanes", 0)):
        monkeypatch.setattr(triton_lanes, "_LARGE", large)
        for _ in range(3):
            found[name] = results(experts, x, index, gate, "triton", weight)
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                found[name] = results(experts, x, index, gate, "triton", weight)
            for _ in range(2):
                graph.replay()
            found[name] = [tensor.clone() for tensor in found[name]]
    for ours, theirs in zip(found["lanes"], found["one stream"], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("T", "E", "k"), [(1, 1, 1), (700, 3, 1), (300, 8, 3), (90, 100, 5), (40, 600, 2)])
def test_triton_sorts_as_torch_does(T, E, k):
    index = random_routing(23, T, E, k)[0]
    ours, theirs = sort_by_expert(index, E), Order.of(index, E)
    assert torch.equal(ours.order_R.long(), theirs.order_R)
    assert torch.equal(ours.inverse_R.long(), theirs.inverse_R)
    assert torch.equal(ours.end_E, theirs.end_E)


@pytest.mark.parametrize("counts", [[5], [0, 0, 70, 0], [32, 64, 1, 0, 33], [0] * 40 + [100] + [1] * 7])
@pytest.mark.parametrize("size", [16, 32])
def test_triton_maps_each_row_to_one_tile(counts, size):
    end_E = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    tile_L4, span_E3 = tile_map(end_E, sum(counts), size)
    expected, slot, spans = [], 0, []
    for expert, count in enumerate(counts):
        begin, tiles = int(end_E[expert]) - count, -(-count // size)
        spans.append([len(expected), tiles, slot])
        for i in range(tiles):
            row = begin + i * size
            expected.append([expert, row, min(row + size, begin + count), slot if tiles > 1 else -1])
            slot += tiles > 1
    assert tile_L4[: len(expected)].tolist() == expected
    assert (tile_L4[len(expected) :, 0] == -1).all()
    assert span_E3.tolist() == spans
    assert slot <= 2 * sum(counts) // size  # room that `launch.weight` makes


def test_chunks_fill_the_gpu_and_are_not_many():
    # 3 programs to a chunk and 132 at once: 8 experts would make 24.
    assert 8 * 3 < 132 <= 8 * 3 * -(-8192 // chunk_size(65536, 8, 3, 132))
    # 96 programs, for which most of the GPU works, are enough, so only an expert with twice its share is cut.
    assert chunk_size(65536, 32, 3, 132) == 4096
    assert chunk_size(1, 8, 18, 132) == 256


def test_few_configurations():
    chosen = {
        (product, in_order): {
            tiles_of(product, torch.bfloat16, inner=inner, columns=columns, in_order=in_order)
            for inner in (192, 384, 768, 1024, 3072)
            for columns in (192, 384, 768, 1024, 3072)
        }
        for product in PRODUCTS
        for in_order in (False, True)
    }
    for (product, in_order), tiles in chosen.items():
        one = product == "hidden" or (product == "up" and in_order)
        assert len(tiles) == (1 if one else 3 if "weight" in product else 2)
        assert all(tile.columns % tile.parts == 0 for tile in tiles)


@pytest.mark.parametrize("gate", [0.0, 1e-30])
def test_triton_with_gates_of_nothing(gate):
    """d(gate) is made of what is kept, not by a division by the gate."""
    experts, x, index = experts_of(), tokens(24, 30, 16), random_routing(25, 30, 8, 2)[0]
    gate, weight = torch.full((30, 2), gate, device=DEVICE), tokens(26, 30, 16)
    ours, theirs = (results(experts, x, index, gate, backend, weight)[2] for backend in ("triton", "dense"))
    assert distance(ours, theirs) <= 1e-6


@pytest.mark.parametrize("k", [1, 2, 8])
def test_triton_counts_as_by_formula(k):
    layer, x = expert_layer(k=k, backend="triton", shared_hidden=20), tokens(0, 3, 50, 16).requires_grad_()
    expected = flops.layer_flops(150, width=16, hidden=24, num_experts=8, k=k, shared_hidden=20)
    with FlopCounterMode(display=False) as forward:
        y = layer(x)
    assert forward.get_total_flops() == expected
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    assert backward.get_total_flops() == 2 * expected
    with FlopCounterMode(display=False) as meta:
        layer.to("meta")(torch.empty(3, 50, 16, device="meta", requires_grad=True)).sum().backward()
    assert meta.get_total_flops() == 3 * expected


@pytest.mark.parametrize("in_order", [False, True])
def test_triton_operators_are_registered_as_torch_wants_them(monkeypatch, in_order):
    monkeypatch.setattr(backend_triton, "puts_in_order", lambda *_, **__: in_order)
    experts, x, (index, gate) = experts_of(), tokens(27, 20, 16), random_routing(28, 20, 8, 2)
    weights = (experts.up_EDH, experts.up_bias_EH, experts.down_EHD, experts.down_bias_ED)
    inputs = (x.requires_grad_(), index, gate.requires_grad_(), *weights)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(backend_triton._operator, (*inputs, True), test_utils=tests)
    torch.library.opcheck(backend_triton._operator, (*inputs[:4], None, inputs[5], None, False), test_utils=tests)
    with torch.no_grad():
        y, row_RD, *kept = torch.ops.dotcbm.experts(*inputs, True)
        arguments = (y, row_RD if in_order else x, *inputs[1:4], *inputs[5:], *kept)
        for wanted in ((True, True, True), (True, False, True), (False, True, False)):
            torch.library.opcheck(backend_triton._gradient_operator, (*arguments, in_order, *wanted), test_utils=tests[:2])


def test_triton_in_a_compiled_graph():
    experts, x, (index, gate), weight = experts_of(), tokens(29, 60, 16), random_routing(30, 60, 8, 2), tokens(31, 60, 16)
    compiled = torch.compile(lambda x, gate: experts(x, index, gate, "triton"), fullgraph=True, backend="aot_eager")
    found = {}
    for name, call in (("eager", lambda x, gate: experts(x, index, gate, "triton")), ("compiled", compiled)):
        inputs = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
        y = call(*inputs)
        found[name] = [y, *torch.autograd.grad((y * weight).sum(), [*inputs, *experts.parameters()])]
    for ours, theirs in zip(found["compiled"], found["eager"], strict=True):
        assert torch.equal(ours, theirs)


def test_triton_says_where_it_does_not_run(monkeypatch):
    experts, x, (index, gate) = experts_of(dtype=torch.float64), tokens(32, 9, 16), random_routing(33, 9, 8, 2)
    with pytest.raises(ValueError, match=r'"triton", which takes float32.*float64; choose "auto"'):
        experts(x.double(), index, gate, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r'"triton", which runs on CUDA.*cpu; choose "auto"'):
        experts.cpu()(x.cpu().double(), index.cpu(), gate.cpu(), "triton")


def test_maps_are_made_once():
    rows = Rows(sort_by_expert(random_routing(34, 50, 8, 2)[0], 8), 2)
    assert rows.tiles(64) is rows.tiles(64)
    assert rows.num_rows == 100


def test_auto_knows_what_the_tiles_need():
    sizes = [(inner, columns) for inner in (384, 768, 3072) for columns in (384, 768, 1000)]
    for product, dtype in itertools.product(PRODUCTS, (torch.float32, torch.bfloat16)):
        every = [tiles_of(product, dtype, inner=inner, columns=columns) for inner, columns in sizes]
        # Two stages of a weight gradient are of the rows' order; what is finished while operands come needs room beside them.
        of_weights = product.endswith("weight")
        held = [(tiles.num_stages - 2 * of_weights) * tiles.inner * (tiles.rows + tiles.columns) for tiles in every]
        finished = [0 if of_weights else tiles.rows * tiles.columns // tiles.parts for tiles in every]
        needed = [sum(sizes) for sizes in zip(held, finished, strict=True)]
        assert max(needed) * dtype.itemsize <= experts_module._TILE_BYTES
        if product in ("up", "down", "token") and dtype == torch.bfloat16:
            assert max(needed) * dtype.itemsize >= experts_module._TILE_BYTES - 1024
    assert experts_module._TILE_BYTES <= 227 * 1024  # of an H100
