"""Comparisons: paired intervals against loops, tests against scikit-learn and SciPy, records that do not belong together, and pages."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control
from sklearn.metrics import roc_auc_score

from dotcbm.report.compare import compare
from dotcbm.report.compare.render import html, markdown, write_comparison
from dotcbm.report.compare.statistics import adjusted, auroc_draws, delong, draw_counts, mcnemar, unpaired_difference
from dotcbm.report.record import (
    FORMAT,
    AuditRecord,
    ConceptRow,
    Confusion,
    Figure,
    Finding,
    Interval,
    ModelCard,
    PictureColumns,
    Reliability,
)

CLASSES = ("finch", "<b>gull</b>", "owl")


def make_record(seed: int, *, n: int = 60, m: int = 4, skill: float = 1.0, order: list[int] | None = None, **card: str) -> AuditRecord:
    """An audit of the same n pictures by a model of some skill."""
    fixed, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(100 + seed)
    label = torch.randint(3, (n,), generator=fixed)
    truth = torch.randint(2, (n, m), generator=fixed)
    known = torch.rand(n, m, generator=fixed) > 0.1
    probability = (skill * (truth - 0.5) + torch.randn(n, m, generator=own)).sigmoid().double()
    score = torch.randn(n, 3, generator=own) + skill * torch.nn.functional.one_hot(label, 3)
    share = score.softmax(1).double()
    pairs = torch.randint(0, 4, (n,), generator=fixed)
    hits = (pairs.float() * torch.rand(n, generator=own)).round().int()
    rows = list(range(n)) if order is None else order
    predicted = share.argmax(1)
    accuracy = float((predicted == label).double().mean())
    values = {
        "bottleneck": "CBM",
        "settings": (),
        "encoder": "tiny",
        "encoder_fingerprint": "e",
        "weights_sha256": str(seed),
        "head_on": "probability",
        "data": "birds",
        "data_fingerprint": "same",
        "split": "test",
        "num_pictures": n,
        "num_concepts": m,
        "num_classes": 3,
        **card,
    }
    auroc = [roc_auc_score(truth[known[:, j], j], probability[known[:, j], j]) for j in range(m)]
    return AuditRecord(
        format=FORMAT,
        title=f"Audit {seed}",
        class_names=CLASSES,
        summary="",
        card=ModelCard(**values),  # pyright: ignore[reportArgumentType]
        findings=(Finding("leakage/ctl", "warning", f"Leaks {seed}", "", Interval(0.2, 0.1, 0.3, n), "percent", 0.1, "above"),),
        figures=(
            Figure("classes/accuracy", "Accuracy", Interval(accuracy, accuracy - 0.1, accuracy + 0.1, n)),
            Figure("concepts/auroc", "Concept AUROC", Interval(sum(auroc) / m, n=m, over="concepts")),
            Figure("leakage/ctl", "Leakage", Interval(0.2 + seed / 100, 0.1, 0.4, n), better="lower"),
            Figure("sparsity/nec", "Effective concepts", Interval(5.0 + seed), unit="number", better=None),
        ),
        absent=(),
        classes=(),
        confusion=Confusion(()),
        reliability=Reliability((), (), ()),
        concepts=tuple(ConceptRow(f"concept {j}") for j in range(m)),
        parts=(),
        sweeps=(),
        suspects=(),
        interventions=(),
        groups=(),
        errors=(),
        cards=(),
        grid=(),
        pictures=PictureColumns(
            name=tuple(f"{row:03d}.jpg" for row in rows),
            label=tuple(label[rows].tolist()),
            predicted=tuple(predicted[rows].tolist()),
            confidence=tuple(share.max(1).values[rows].tolist()),
            true_probability=tuple(share[torch.arange(n), label][rows].tolist()),
            concept_probability=tuple(map(tuple, probability[rows].tolist())),
            concept_truth=tuple(tuple(int(t) if k else None for t, k in zip(truth[r], known[r], strict=True)) for r in rows),
            pointing_hits=tuple(hits[rows].tolist()),
            pointing_pairs=tuple(pairs[rows].tolist()),
        ),
    )


A, B = make_record(1, skill=3.0), make_record(2, skill=1.0)


def figure(comparison, key):
    return next(row for row in comparison.figures if row.key == key)


def test_the_paired_interval_is_that_of_a_loop_over_resampled_pictures():
    found = figure(compare([A, B], ["a", "b"], num_draws=200, seed=3), "classes/accuracy")
    correct = [[p == t for p, t in zip(r.pictures.predicted, r.pictures.label, strict=True)] for r in (A, B)]
    generator = torch.Generator().manual_seed(3)
    differences = []
    for _ in range(200):
        rows = torch.randint(60, (60,), generator=generator).tolist()
        differences.append(sum(correct[1][i] for i in rows) / 60 - sum(correct[0][i] for i in rows) / 60)
    drawn = torch.tensor(differences, dtype=torch.float64)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    difference = found.differences[1]
    assert found.how == "paired"
    assert found.differences[0] is None
    assert difference.value == pytest.approx(sum(correct[1]) / 60 - sum(correct[0]) / 60)
    assert (difference.low, difference.high) == pytest.approx((low, high))


def test_paired_pointing_is_a_ratio_of_sums():
    found = figure(compare([A, B], ["a", "b"], num_draws=50, seed=1), "parts/pointing")
    pairs = sum(A.pictures.pointing_pairs)
    assert found.values[0].value == pytest.approx(sum(A.pictures.pointing_hits) / pairs)
    generator, drawn = torch.Generator().manual_seed(1), []
    for _ in range(50):
        rows = torch.randint(60, (60,), generator=generator).tolist()
        total = sum(A.pictures.pointing_pairs[i] for i in rows)
        drawn.append(sum(B.pictures.pointing_hits[i] - A.pictures.pointing_hits[i] for i in rows) / total)
    low = float(torch.quantile(torch.tensor(drawn, dtype=torch.float64), 0.025))
    assert found.differences[1].low == pytest.approx(low)


def test_auroc_in_each_draw_is_scikit_learns_with_weights():
    torch.manual_seed(0)
    score, truth = torch.rand(80).round(decimals=1), (torch.rand(80) < 0.3).float()  # with ties
    truth[::7] = torch.nan
    count = draw_counts(80, num_draws=20, seed=5)
    known = ~truth.isnan()
    expected = [roc_auc_score(truth[known], score[known], sample_weight=count[known, d]) for d in range(20)]
    assert auroc_draws(score, truth, count).tolist() == pytest.approx(expected)
    assert auroc_draws(score, torch.ones(80), count).isnan().all()


def test_identical_records_differ_by_nothing_with_intervals_of_no_width():
    found = compare([A, A, A], ["a", "b", "c"], num_draws=50)
    for row in found.figures:
        for difference in row.differences[1:]:
            assert difference.value == 0
            if row.how == "paired":
                assert difference.low == difference.high == 0
    assert all(p is None or p == 1 for row in (*found.concepts, *found.classes) for p in row.p)
    assert not found.disagreements
    assert all((t.gained, t.lost, t.p) == (0, 0, 1.0) for t in found.turned)


def test_pictures_are_matched_by_name_and_the_order_of_a_record_means_nothing():
    shuffled = make_record(2, skill=1.0, order=torch.randperm(60, generator=torch.Generator().manual_seed(4)).tolist())
    assert shuffled.pictures.name != B.pictures.name
    straight, turned = compare([A, B], ["a", "b"], num_draws=50), compare([A, shuffled], ["a", "b"], num_draws=50)
    assert straight.concepts == turned.concepts
    assert straight.classes == turned.classes
    assert straight.disagreements == turned.disagreements


def test_classes_and_concepts_are_matched_by_name():
    other = [2, 0, 1]  # the new place of each class
    back = [other.index(k) for k in range(3)]
    renamed = replace(
        B,
        class_names=tuple(CLASSES[k] for k in back),
        concepts=tuple(reversed(B.concepts)),
        pictures=replace(
            B.pictures,
            label=tuple(other[k] for k in B.pictures.label),
            predicted=tuple(other[k] for k in B.pictures.predicted),
            concept_probability=tuple(tuple(reversed(row)) for row in B.pictures.concept_probability),
            concept_truth=tuple(tuple(reversed(row)) for row in B.pictures.concept_truth),
        ),
    )
    assert compare([A, B], ["a", "b"], num_draws=20).concepts == compare([A, renamed], ["a", "b"], num_draws=20).concepts
    assert compare([A, B], ["a", "b"], num_draws=20).disagreements == compare([A, renamed], ["a", "b"], num_draws=20).disagreements


def test_the_reference_can_be_named_and_turns_the_signs():
    one, two = compare([A, B], ["a", "b"], num_draws=50), compare([A, B], ["a", "b"], against="b", num_draws=50)
    first, second = figure(one, "classes/accuracy").differences, figure(two, "classes/accuracy").differences
    assert second[1] is None
    assert second[0].value == pytest.approx(-first[1].value)
    assert (second[0].low, second[0].high) == pytest.approx((-first[1].high, -first[1].low))
    assert (one.turned[0].gained, one.turned[0].lost) == (two.turned[0].lost, two.turned[0].gained)
    assert one.names == two.names == ("a", "b")


def test_what_cannot_be_paired_says_so():
    found = compare([A, B], ["a", "b"], num_draws=20)
    assert figure(found, "leakage/ctl").how == "unpaired"
    assert figure(found, "sparsity/nec").how == "side by side"
    assert figure(found, "sparsity/nec").differences[1] == Interval(1.0)
    assert figure(found, "concepts/auroc").how == "paired"
    assert figure(found, "classes/balanced_accuracy").note == "Computed from the pictures."


def test_a_figure_that_the_pictures_do_not_give_is_not_paired():
    wrong = replace(A, figures=(Figure("classes/accuracy", "Accuracy", Interval(0.123, 0.1, 0.2, 60)), *A.figures[1:]))
    found = compare([wrong, B], ["a", "b"], num_draws=20)
    assert figure(found, "classes/accuracy").how == "unpaired"
    assert any("Accuracy: what the records say of each picture does not give" in note for note in found.notes)


def test_the_better_model_is_found_and_a_twin_is_not():
    found = compare([B, A], ["weak", "strong"], num_draws=100)
    concepts = found.different(found.concepts, 1, "auroc")
    assert concepts
    assert all(row.differences[1].value > 0 for row in concepts)
    assert found.tested(found.concepts, 1, "auroc") == 4
    assert figure(found, "classes/accuracy").differences[1].low > 0
    assert found.turned[0].gained > found.turned[0].lost


def test_disagreements_are_the_pictures_with_other_predictions_widest_spread_first():
    found = compare([A, B], ["a", "b"], num_draws=20).disagreements
    expected = {n for n, p, q in zip(A.pictures.name, A.pictures.predicted, B.pictures.predicted, strict=True) if p != q}
    assert {row.name for row in found} == expected
    spreads = [abs(row.true_probability[0] - row.true_probability[1]) for row in found]
    assert spreads == sorted(spreads, reverse=True)


@pytest.mark.parametrize(
    ("other", "match"),
    [
        (make_record(2, split="val"), "on the split 'val'"),
        (make_record(2, data="cats", data_fingerprint="other"), "b was audited on cats, a on birds"),
        (make_record(2, n=59), "other pictures: 0 only in b, 1 only in a"),
        (replace(B, class_names=("finch", "gull", "owl")), "know other classes"),
        (replace(B, pictures=replace(B.pictures, label=(0,) * 60)), "name different classes for '0"),
        (replace(B, pictures=replace(B.pictures, concept_truth=((1,) * 4,) * 60)), r"disagree on whether '000.jpg' shows 'concept"),
        (replace(B, pictures=replace(B.pictures, group=(0,) * 60)), "other sub-populations"),
    ],
)
def test_records_that_do_not_belong_together(other, match):
    with pytest.raises(ValueError, match=match):
        compare([A, other], ["a", "b"])
    found = compare([A, other], ["a", "b"], unpaired=True)
    assert not found.paired
    assert not found.disagreements
    assert not found.concepts
    assert all(row.how != "paired" for row in found.figures)


@pytest.mark.parametrize(
    ("records", "names", "settings", "match"),
    [
        ([A], ["a"], {}, "two audits or more"),
        ([A, B], ["a", "a"], {}, "'a' stands for several audits"),
        ([A, B], ["model", "other"], {"against": "modle"}, "did you mean model"),
        ([A, B], ["a", "b"], {"false_discovery_rate": 1.5}, "false_discovery_rate 1.5"),
    ],
)
def test_bad_questions(records, names, settings, match):
    with pytest.raises(ValueError, match=match):
        compare(records, names, **settings)


def test_a_concept_that_one_model_lacks_is_left_out_and_named():
    fewer = replace(B, concepts=(*B.concepts[:3], ConceptRow("another")))
    found = compare([A, fewer], ["a", "b"], num_draws=20)
    assert {row.name for row in found.concepts} == {"concept 0", "concept 1", "concept 2"}
    assert any("concept 3" in note and "another" in note for note in found.notes)


@given(st.lists(st.one_of(st.none(), st.floats(1e-12, 1)), max_size=12))
def test_q_values_are_those_of_a_loop_and_of_scipy(p):
    made = sorted(v for v in p if v is not None)
    q = adjusted(p)
    for value, found in zip(p, q, strict=True):
        if value is None:
            assert found is None
            continue
        expected = min(min(1.0, other * len(made) / sum(o <= other for o in made)) for other in made if other >= value)
        assert found == pytest.approx(expected)
    if made:
        known = [v for v in p if v is not None]
        assert [v for v in q if v is not None] == pytest.approx(false_discovery_control(known).tolist())


@given(st.integers(0, 14), st.integers(0, 14))
def test_mcnemar_is_the_exact_binomial_test(first, second):
    a = torch.tensor([True] * first + [False] * second + [True, False])
    b = torch.tensor([False] * first + [True] * second + [True, False])
    total = first + second
    probability = [math.comb(total, k) / 2**total for k in range(total + 1)]
    expected = min(1.0, sum(p for p in probability if p <= probability[first] * (1 + 1e-9)))
    assert mcnemar(a, b) == pytest.approx(expected)


def test_delong_is_the_formula_with_all_pairs():
    torch.manual_seed(1)
    truth = torch.tensor([1.0] * 12 + [0.0] * 18)
    a, b = torch.rand(30).round(decimals=1) + truth * 0.3, torch.rand(30)

    def kernel(score):
        return [[float(p > u) + 0.5 * float(p == u) for u in score[truth == 0]] for p in score[truth == 1]]

    ka, kb = torch.tensor(kernel(a)), torch.tensor(kernel(b))
    v10, v01 = torch.stack([ka.mean(1), kb.mean(1)]), torch.stack([ka.mean(0), kb.mean(0)])
    covariance = torch.cov(v10) / 12 + torch.cov(v01) / 18
    z = (ka.mean() - kb.mean()) / (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]).sqrt()
    assert delong(a, b, truth) == pytest.approx(math.erfc(abs(float(z)) / 2**0.5), rel=1e-4)
    assert delong(a, a, truth) == 1.0
    assert delong(a[:16], b[:16], truth[:16]) is None  # four negatives
    assert delong(truth, -truth, truth) < 1e-6  # a difference without any spread


def test_delong_keeps_its_level_where_nothing_differs():
    generator = torch.Generator().manual_seed(0)
    truth = (torch.arange(80) < 30).float()
    p = [delong(*(truth + 1.5 * torch.randn(80, generator=generator) for _ in range(2)), truth) for _ in range(400)]
    rejected = sum(v < 0.05 for v in p) / 400
    assert 0.02 < rejected < 0.09


def test_unpaired_differences_are_newcombes():
    # Newcombe 1998, table II, (a): 56/70 - 48/80, method 10.
    found = unpaired_difference(Interval(0.8, 0.6918, 0.8774, 70), Interval(0.6, 0.4904, 0.7004, 80))
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=2e-3)
    assert unpaired_difference(Interval(None), Interval(0.5)).value is None


def test_files_are_whole_and_say_the_same(tmp_path):
    found = compare([A, B], ["dot", "cbm|<i>"], num_draws=20)
    paths = write_comparison(found, tmp_path / "out")
    assert [path.name for path in paths] == ["compare.json", "compare.md", "compare.html"]
    stored = json.loads(paths[0].read_text())
    assert stored["format"] == 1
    assert stored["names"] == ["dot", "cbm|<i>"]
    assert len(stored["disagreements"]) == len(found.disagreements)
    text, page = paths[1].read_text(), paths[2].read_text()
    assert r"cbm\|&lt;i&gt;" in text
    assert "<i>" not in page
    assert "&lt;b&gt;gull&lt;/b&gt;" in page
    assert "<b>gull" not in page
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", page)
    assert 'class="differences"' in page
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compare.html", "compare.json", "compare.md"]


def test_unpaired_pages_are_drawn_too():
    found = compare([A, make_record(3, n=40)], ["a", "b"], unpaired=True)
    assert "Not paired, as asked" in html(found)
    assert "Not paired, as asked" in markdown(found)


def test_the_same_seed_gives_the_same_page():
    pages = [html(compare([A, B], ["a", "b"], num_draws=20, seed=seed)) for seed in (0, 0, 1)]
    assert pages[0] == pages[1] != pages[2]


def test_every_two_of_three_models_can_be_compared():
    c = make_record(3, skill=2.0)
    for reference, other in itertools.permutations((A, B, c), 2):
        assert compare([reference, other], ["x", "y"], num_draws=10).paired
