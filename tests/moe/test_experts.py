"""Every backend computes the same MLPs, forward and backward, whatever the routing is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from expert_problems import DEVICE, distance, expert_layer, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dotcbm.moe import experts as experts_module
from dotcbm.moe.dispatch import Order, _sum_by_expert, _sum_by_product, add_bias, collect, dispatch
from dotcbm.moe.experts import Experts

SORTING = ("grouped", "padded")
BACKENDS = (*SORTING, "loop", "dense")


def experts_of(seed: int = 0, *, E=8, D=16, H=24, bias=True, dtype=torch.float32) -> Experts:
    return expert_layer(seed, width=D, hidden=H, num_experts=E, bias=bias, k=1).experts.to(dtype)


def random_routing(seed: int, T: int, E: int, k: int, dtype=torch.float32):
    index_TK = tokens(seed, T, E).argsort(1)[:, :k]
    return index_TK, tokens(seed + 1, T, k, dtype=dtype).sigmoid()


def results(experts: Experts, x, index, gate, backend, weight=None):
    """Output and the gradients of x, gates and weights, of a sum (an expanded gradient) or a weighted one."""
    x, gate = x.detach().clone().requires_grad_(), gate.detach().clone().requires_grad_()
    y = experts(x, index, gate, backend)
    leaves = [x, gate, *experts.parameters()]
    return [y.detach(), *torch.autograd.grad(y.sum() if weight is None else (y * weight).sum(), leaves)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize("backend", ["loop", "dense"])
def test_references_against_one_token_at_a_time(backend, k, bias):
    experts = experts_of(E=8, bias=bias, dtype=torch.float64)
    x, (index, gate) = tokens(0, 13, 16, dtype=torch.float64), random_routing(1, 13, 8, k, torch.float64)
    expected = torch.zeros_like(x)
    for t in range(13):
        for slot in range(k):
            e = index[t, slot]
            up_bias, down_bias = (experts.up_bias_EH[e], experts.down_bias_ED[e]) if bias else (None, None)
            hidden = F.gelu(F.linear(x[t], experts.up_EDH[e].T, up_bias))
            expected[t] += gate[t, slot] * F.linear(hidden, experts.down_EHD[e].T, down_bias)
    torch.testing.assert_close(experts(x, index, gate, backend), expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_grouped_loop_and_dense_agree(k, bias):
    experts = experts_of(bias=bias)
    x, (index, gate), weight = tokens(2, 200, 16), random_routing(3, 200, 8, k), tokens(4, 200, 16)
    for weighting in (weight, None):
        dense = results(experts, x, index, gate, "dense", weighting)
        for backend in ("grouped", "padded", "loop"):
            for ours, theirs in zip(results(experts, x, index, gate, backend, weighting), dense, strict=True):
                assert distance(ours, theirs) <= 1e-6, backend


@pytest.mark.parametrize("k", [1, 2, 8])
def test_they_agree_over_many_tokens(k):
    experts = experts_of(E=8, D=64, H=64)
    x, (index, gate), weight = tokens(2, 4096, 64), random_routing(3, 4096, 8, k), tokens(4, 4096, 64)
    loop = results(experts, x, index, gate, "loop", weight)
    for ours, theirs in zip(results(experts, x, index, gate, "grouped", weight), loop, strict=True):
        assert distance(ours, theirs) <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_tokens_to_one_expert_and_none_to_the_others(backend):
    experts, x = experts_of(), tokens(5, 40, 16)
    index, gate = torch.full((40, 1), 3, device=DEVICE), torch.ones(40, 1, device=DEVICE)
    y, *gradients = results(experts, x, index, gate, backend)
    hidden = F.gelu(x @ experts.up_EDH[3] + experts.up_bias_EH[3])
    assert distance(y, (hidden @ experts.down_EHD[3] + experts.down_bias_ED[3]).detach()) <= 1e-6
    for gradient in gradients[2:]:
        assert gradient[3].abs().max() > 0
        assert gradient[[0, 1, 2, 4, 5, 6, 7]].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend):
    experts = experts_of()
    index, gate = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE), torch.zeros(0, 2, device=DEVICE)
    y, *gradients = results(experts, tokens(0, 0, 16), index, gate, backend)
    assert y.shape == (0, 16)
    assert all(gradient.abs().sum() == 0 for gradient in gradients)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 8), st.sampled_from(BACKENDS))
def test_the_order_of_experts_and_of_tokens_does_not_matter(seed, T, k, backend):
    experts, x, (index, gate) = experts_of(), tokens(seed, T, 16), random_routing(seed, T, 8, k)
    y = experts(x, index, gate, backend).detach()
    generator = torch.Generator().manual_seed(seed)
    shuffle = torch.randperm(T, generator=generator).to(DEVICE)
    assert distance(experts(x[shuffle], index[shuffle], gate[shuffle], backend), y[shuffle]) <= 1e-5
    renamed = torch.randperm(8, generator=generator).to(DEVICE)
    for parameter in experts.parameters():
        parameter.data = parameter.data[renamed]
    assert distance(experts(x, renamed.argsort()[index], gate, backend), y) <= 1e-5


@pytest.mark.parametrize("backend", ["padded", "loop", "dense"])
def test_against_finite_differences(backend):
    experts = experts_of(E=3, D=4, H=4, dtype=torch.float64)
    index, gate = random_routing(7, 5, 3, 2, torch.float64)
    leaves = [x.detach().requires_grad_() for x in (tokens(6, 5, 4, dtype=torch.float64), gate)]
    parameters = list(experts.parameters())
    assert torch.autograd.gradcheck(lambda x, gate, *_: experts(x, index, gate, backend), (*leaves, *parameters), fast_mode=True)


@pytest.mark.parametrize("k", [1, 3])
def test_sorting_and_its_gradients(k):
    index, gate = random_routing(8, 6, 4, k, torch.float64)
    order = Order.of(index, 5)  # the last expert is empty
    flat = index.flatten().tolist()
    assert order.order_R.tolist() == sorted(range(6 * k), key=lambda r: flat[r])
    assert order.end_E.tolist() == [sum(e <= expert for e in flat) for expert in range(5)]
    x, bias = (tokens(9, n, 3, dtype=torch.float64).requires_grad_() for n in (6, 5))
    torch.testing.assert_close(dispatch(x, order), x[order.order_R // k])
    torch.testing.assert_close(collect(dispatch(x, order), gate, order), x * gate.sum(1, keepdim=True))

    def both(x, gate, bias):
        return collect(add_bias(dispatch(x, order), bias, order), gate, order)

    assert torch.autograd.gradcheck(both, (x, gate.requires_grad_(), bias))
    assert torch.autograd.gradgradcheck(lambda x, gate: collect(dispatch(x, order), gate, order), (x, gate))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_of_adding_up_a_bias_gradient(dtype):
    order, x = Order.of(random_routing(18, 300, 5, 2)[0], 7), tokens(19, 600, 16).to(dtype)  # two experts are empty
    expected = torch.stack([x[order.expert_R == e].double().sum(0) for e in range(7)])
    for found in (_sum_by_product(x, order.end_E), _sum_by_expert(x, order.expert_R, order.end_E)):
        assert found.dtype == dtype
        assert distance(found.double(), expected) < (1e-6 if dtype == torch.float32 else 5e-3)


class Types(TorchDispatchMode):
    """Notes the types that grouped products compute in."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._grouped_mm.default:
            self.seen.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_its_type(backend):
    experts, x, (index, gate) = experts_of(), tokens(10, 100, 16), random_routing(11, 100, 8, 2)
    exact = results(experts, x, index, gate, "dense")
    with Types() as types:
        inputs = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            y = experts(inputs[0], index, inputs[1], backend)
        assert y.dtype == torch.bfloat16
        gradients = torch.autograd.grad(y.sum(), [*inputs, *experts.parameters()])
    if backend == "grouped":
        # Two products, two for each in backward, and on a GPU one for each bias.
        assert types.seen == [torch.bfloat16] * (8 if DEVICE.type == "cuda" else 6)
    for ours, theirs in zip([y, *gradients], exact, strict=True):
        assert distance(ours.float(), theirs) < 0.03
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype):
    experts, x, (index, gate) = experts_of(dtype=dtype), tokens(12, 50, 16).to(dtype), random_routing(13, 50, 8, 2)
    dense = results(experts, x, index, gate, "dense")
    for ours, theirs in zip(results(experts, x, index, gate, "grouped"), dense, strict=True):
        assert ours.dtype == theirs.dtype
        assert distance(ours.float(), theirs.float()) < 0.03


def test_auto_takes_what_applies():
    with Types() as types:
        y = {}
        for name, experts in (("fits", experts_of()), ("odd", experts_of(D=6, H=10)), ("double", experts_of(dtype=torch.float64))):
            D, dtype = experts.up_EDH.shape[1], experts.up_EDH.dtype
            x, (index, gate) = tokens(14, 9, D, dtype=dtype), random_routing(15, 9, 8, 2, dtype)
            types.seen.clear()
            y[name] = experts(x, index, gate)
            assert len(types.seen) == (2 if name == "fits" else 0)
            assert distance(y[name], experts(x, index, gate, "dense").detach()) <= 1e-6


def test_errors_say_what_is_allowed():
    x, (index, gate) = tokens(0, 9, 6), random_routing(0, 9, 8, 2)
    with pytest.raises(ValueError, match=r'backend is "grouped", with torch.float32, width 6 and hidden 10; .*choose "auto"'):
        experts_of(D=6, H=10)(x, index, gate, "grouped")
    with pytest.raises(ValueError, match=r"float64.*choose \"auto\""):
        experts_of(D=6, H=10, dtype=torch.float64)(x.double(), index, gate, "grouped")
    with pytest.raises(ValueError, match=r"backend is 'fast'; choose one of"):
        experts_of(D=6, H=10)(x, index, gate, "fast")  # pyright: ignore
    with pytest.raises(ValueError, match="hidden 0"):
        Experts(4, 0, 2)


def test_the_same_bits_in_every_run():
    experts, x, (index, gate) = experts_of(), tokens(16, 300, 16), random_routing(17, 300, 8, 3)
    for first, second in zip(*(results(experts, x, index, gate, "grouped") for _ in range(2)), strict=True):
        assert torch.equal(first, second)


class _Ragged(TorchDispatchMode):
    """Takes note of products over the rows of groups (2D times 2D) whose first operand has these rows side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.unaligned = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "grouped_mm" in str(func) and args[0].ndim == args[1].ndim == 2:
            self.seen += 1
            if args[0].stride(1) == 1 or args[1].stride(1) != 1:
                self.unaligned.append([tuple(tensor.shape) for tensor in args[:2]])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("k", [1, 3])
def test_groups_may_begin_anywhere_in_grouped_products(k):
    """CUDA stops the process where the start of a group is not aligned to 16 bytes; a sum of rows by a product once did that."""
    experts, x, index = Experts(16, 32, 4), torch.randn(13, 16, requires_grad=True), torch.stack([torch.randperm(4)[:k] for _ in range(13)])
    with _Ragged() as found:
        experts(x, index, torch.rand(13, k), "grouped").sum().mul(2).backward()
        _sum_by_product(torch.randn(13 * k, 16), Order.of(index, 4).end_E)
    assert found.seen == 3
    assert found.unaligned == []


@pytest.mark.parametrize(("room", "dtype", "chosen"), [(232448, torch.bfloat16, "triton"), (101376, torch.bfloat16, "grouped")])
def test_auto_takes_our_kernels_where_their_tiles_fit(monkeypatch, room, dtype, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(shared_memory_per_block_optin=room))
    monkeypatch.setattr(experts_module, "_HAS_TRITON", True)
    assert experts_of()._chosen("auto", dtype, torch.device("cuda")) is experts_module._BACKENDS[chosen]
    assert experts_of()._chosen("auto", torch.float64, torch.device("cuda")) is experts_module._BACKENDS["padded"]
    torch.compiler.reset()  # a compiler that looked into the properties would stop there; what it made before must not be taken
    compiled = torch.compile(lambda x: x + experts_module._has_room(x.device), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == (chosen == "triton")
