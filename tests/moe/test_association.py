"""Tables against slow loops, planted experts that are found, and routers that ignore the picture and get no mark."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dotcbm.moe.association import Association, Associations, _student

# B pictures, P patches, E experts, K experts per patch, X things of patches, Y things of pictures


def found(index_BPK: Tensor, num_experts: int, *, seed: int = 0, num: int = 99, block: int = 16, **weights: Tensor) -> Association:
    """One layer, fed in blocks."""
    associations = Associations(num_permutations=num, seed=seed)
    for start in range(0, len(index_BPK), block):
        rows = slice(start, start + block)
        associations.update({"layer": (index_BPK[rows], num_experts)}, **{name: weight[rows] for name, weight in weights.items()})
    return associations.compute()["layer"]


def random_index(drawn: torch.Generator, b: int, p: int, e: int, k: int) -> Tensor:
    return torch.rand(b, p, e, generator=drawn).topk(k).indices


def slow_lift(index_BPK: Tensor, weight_BPZ: Tensor, num_experts: int) -> Tensor:
    """Own pictures' mass over the mean of other pictures', by loops over pairs of pictures."""
    b, _, z = weight_BPZ.shape
    own, other = torch.zeros(z, num_experts, dtype=torch.float64), torch.zeros(z, num_experts, dtype=torch.float64)
    for i in range(b):
        for j in range(b):
            for p, experts in enumerate(index_BPK[j].tolist()):
                for e in experts:
                    (own if i == j else other)[:, e] += weight_BPZ[i, p].double()
    return own / (other / (b - 1))


@settings(max_examples=25)
@given(
    st.integers(2, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3), st.integers(0, 10**6), st.integers(1, 9)
)
def test_lifts_are_those_of_slow_loops_however_pictures_are_fed(b, p, e, x, y, seed, block):
    drawn = torch.Generator().manual_seed(seed)
    k = 1 + seed % e
    index_BPK = random_index(drawn, b, p, e, k)
    patch_BPX, picture_BY = torch.rand(b, p, x, generator=drawn), torch.rand(b, y, generator=drawn).round()
    wanted_ZE = slow_lift(index_BPK, torch.cat([patch_BPX, picture_BY[:, None].expand(b, p, y)], 2), e)
    got = found(index_BPK, e, block=block, num=19, weight_BPX=patch_BPX, weight_BY=picture_BY)
    sure_ZE = wanted_ZE.isfinite()
    torch.testing.assert_close(got.lift_ZE[sure_ZE], wanted_ZE[sure_ZE], rtol=1e-5, atol=1e-6)
    assert bool(got.lift_ZE[~sure_ZE].isnan().all())
    if x:
        torch.testing.assert_close(got.share_ZE[:x].sum(1), torch.full((x,), float(k), dtype=torch.float64), rtol=1e-5, atol=1e-6)


def test_renaming_experts_renames_columns():
    drawn = torch.Generator().manual_seed(0)
    index_BPK, weight_BPX = random_index(drawn, 32, 6, 5, 2), torch.rand(32, 6, 3, generator=drawn)
    order_E = torch.randperm(5, generator=drawn)
    plain, renamed = found(index_BPK, 5, weight_BPX=weight_BPX), found(order_E[index_BPK], 5, weight_BPX=weight_BPX)
    for name in ("lift_ZE", "low_ZE", "high_ZE", "share_ZE", "expected_ZE", "p_ZE"):
        torch.testing.assert_close(getattr(renamed, name)[:, order_E], getattr(plain, name), rtol=1e-6, atol=1e-6)


def blobs(drawn: torch.Generator, b: int, side: int, x: int) -> Tensor:
    """(B, P, X) things that are connected, mostly in the upper half, and absent from half of the pictures."""
    y, at = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    top_BX, left_BX = (torch.rand(b, x, generator=drawn) * s for s in (side / 2, side - 1))
    near = ((y - top_BX[..., None, None]).abs() <= 1) & ((at - left_BX[..., None, None]).abs() <= 1)
    return (near & (torch.rand(b, x, 1, 1, generator=drawn) < 0.5)).flatten(2).transpose(1, 2).float()


def blind_index(drawn: torch.Generator, kind: str, b: int, side: int, e: int) -> Tensor:
    """(B, P, 1) of routers that never look: by chance, by place and chance, or one expert for most of a picture."""
    p = side * side
    chance_BP = torch.randint(e, (b, p), generator=drawn)
    if kind == "place":  # the upper half, where the things are, has its own experts
        usual_P = torch.arange(p) // side * e // side
        return torch.where(torch.rand(b, p, generator=drawn) < 0.8, usual_P, chance_BP)[..., None]
    if kind == "picture":
        favourite_B1 = torch.randint(e, (b, 1), generator=drawn)
        return torch.where(torch.rand(b, p, generator=drawn) < 0.7, favourite_B1, chance_BP)[..., None]
    return chance_BP[..., None]


@pytest.mark.parametrize("kind", ["chance", "place", "picture"])
def test_a_router_that_does_not_look_is_marked_no_more_often_than_said(kind):
    num_audits, num_marked = 80, 0
    for seed in range(num_audits):
        drawn = torch.Generator().manual_seed(seed)
        weight_BPX = blobs(drawn, 48, 5, 6)
        class_BY = torch.nn.functional.one_hot(torch.randint(4, (48,), generator=drawn), 4).float()
        got = found(blind_index(drawn, kind, 48, 5, 4), 4, seed=seed, weight_BPX=weight_BPX, weight_BY=class_BY)
        num_marked += bool((got.p_ZE <= 0.05).any())
    assert num_marked <= 9  # of 80 at 5 %: more in 1 of 100 such tests


def test_a_router_by_place_alone_looks_like_independence():
    drawn = torch.Generator().manual_seed(0)
    index_BPK = (torch.arange(25) // 5 // 3).expand(64, 25)[..., None]
    got = found(index_BPK, 2, weight_BPX=blobs(drawn, 64, 5, 3))
    assert got.share_ZE[:, 0].min() > 0.8  # plain lifts over the experts' loads would say that the upper expert serves all
    torch.testing.assert_close(got.lift_ZE, torch.ones(3, 2, dtype=torch.float64), rtol=1e-6, atol=0)
    assert bool(got.p_ZE.isnan().all())  # whatever is exchanged, nothing changes


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_planted_experts_are_found_and_no_others(noise):
    drawn = torch.Generator().manual_seed(3)
    weight_BPX = blobs(drawn, 96, 6, 3)
    own_BP = torch.where(weight_BPX.amax(2) > 0, weight_BPX.argmax(2), torch.randint(3, 6, weight_BPX.shape[:2], generator=drawn))
    chance_BP = torch.randint(6, own_BP.shape, generator=drawn)
    index_BPK = torch.where(torch.rand(own_BP.shape, generator=drawn) < noise, chance_BP, own_BP)[..., None]
    got = found(index_BPK, 6, weight_BPX=weight_BPX)
    marked = (got.p_ZE <= 0.05).nonzero().tolist()
    assert marked == [[0, 0], [1, 1], [2, 2]]
    for x in range(3):
        assert 2 < got.low_ZE[x, x] < got.lift_ZE[x, x] < got.high_ZE[x, x]
    torch.testing.assert_close(got.expected_ZE * got.lift_ZE, got.share_ZE, rtol=1e-6, atol=1e-9)


def test_an_expert_of_a_class_is_found_in_the_right_layer():
    drawn = torch.Generator().manual_seed(0)
    associations = Associations(num_permutations=99)
    for _ in range(6):
        class_B = torch.randint(3, (16,), generator=drawn)
        blind_BPK = torch.randint(3, (16, 8, 1), generator=drawn)
        seeing_BPK = torch.where(torch.rand(16, 8, 1, generator=drawn) < 0.5, class_B[:, None, None], blind_BPK)
        class_BY = torch.nn.functional.one_hot(class_B, 3).float()
        associations.update({"blind": (blind_BPK, 3), "seeing": (seeing_BPK, 3)}, weight_BY=class_BY)
    got = associations.compute()
    assert not bool((got["blind"].p_ZE <= 0.05).any())
    assert (got["seeing"].p_ZE <= 0.05).nonzero().tolist() == [[0, 0], [1, 1], [2, 2]]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """Half of the patches hold the thing; expert 0 takes 60 % of those and 40 % of the others: a lift of 1.2."""
    num_covering = 0
    for seed in range(100):
        drawn = torch.Generator().manual_seed(seed)
        thing_BP = (torch.rand(60, 9, generator=drawn) < 0.5).float()
        index_BPK = (torch.rand(60, 9, generator=drawn) > 0.4 + 0.2 * thing_BP).long()[..., None]
        got = found(index_BPK, 2, num=19, weight_BPX=thing_BP[..., None])
        num_covering += bool(got.low_ZE[0, 0] <= 1.2 <= got.high_ZE[0, 0])
    assert 89 <= num_covering <= 100


def test_what_is_in_few_pictures_is_not_tested():
    drawn = torch.Generator().manual_seed(0)
    weight_BPX = torch.zeros(32, 4, 2)
    weight_BPX[:4, :, 0] = 1
    weight_BPX[:5, :, 1] = 1
    p_ZE = found(torch.randint(3, (32, 4, 1), generator=drawn), 3, weight_BPX=weight_BPX).p_ZE
    assert bool(p_ZE[0].isnan().all())
    assert not bool(p_ZE[1].isnan().any())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="num_permutations is 10"):
        Associations(num_permutations=10)
    index_BPK = torch.zeros(4, 3, 1, dtype=torch.long)
    for weights, said in (
        ({"weight_BPX": torch.zeros(4, 2, 1)}, "do not fit 4 pictures of 3 patches"),
        ({"weight_BY": torch.zeros(3, 1)}, "do not fit"),
        ({"weight_BY": torch.full((4, 1), torch.nan)}, "0 or more"),
        ({"weight_BPX": -torch.ones(4, 3, 1)}, "0 or more"),
    ):
        with pytest.raises(ValueError, match=said):
            Associations().update({"layer": (index_BPK, 2)}, **weights)


def test_the_quantile_of_student():
    assert _student(0.975, 19) == pytest.approx(2.0930, abs=1e-3)
    assert _student(0.975, 10) == pytest.approx(2.2281, abs=3e-3)
