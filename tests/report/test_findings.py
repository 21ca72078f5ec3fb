"""Rules from figures to findings, each on both sides of its threshold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes.audit_record import make_record

from dotcbm.report.findings import find_all, summary
from dotcbm.report.record import SWAP_FALL_CLASS, AuditRecord, Figure, Finding, GroupRow, Interval, Suspect, Unit

ZERO = Interval(0.0, n=100)
BASE = make_record(num_pictures=12, num_cards=1, num_grid=1)


def with_figures(*figures: Figure, **fields: object) -> AuditRecord:
    """A record with these figures alone."""
    return replace(BASE, figures=figures, findings=(), suspects=(), groups=(), **fields)  # pyright: ignore


def of(record: AuditRecord, key: str) -> Finding | None:
    return next((finding for finding in find_all(record) if finding.key == key), None)


def points_figure(key: str, value: float, low: float, high: float, n: int = 100, unit: Unit = "points") -> Figure:
    return Figure(key, key, Interval(value, low, high, n), unit, control=ZERO, control_label="nothing")


def swap(value: float, low: float, high: float, odds: float = 0.1, n: int = 150) -> tuple[Figure, Figure]:
    """Figures of a swap: the fall of accuracy with its interval, and the lower end of that of the log-odds."""
    fall = points_figure("suspects/swap_fall", value, low, high, n)
    return fall, points_figure("suspects/swap_log_odds", odds + 0.2, odds, odds + 0.4, n, "number")


def test_a_shortcut_is_critical_first_and_names_who_leans_on_it():
    suspects = (
        Suspect("small", "A", 0.9, 0.1, 0.09, Interval(0.2, 0.1, 0.3, 20), Interval(0.0, -0.1, 0.1, 20), "confirmed"),
        Suspect("large", "B", 0.5, 2.0, 1.0, Interval(0.4, 0.3, 0.5, 20), Interval(0.1, 0.0, 0.2, 20), "confirmed"),
        Suspect("never", "B", 0.9, 9.0, 8.1, Interval(0.4, 0.3, 0.5, 20), Interval(0.4, 0.3, 0.5, 20), "refuted"),
    )
    classes = (
        Figure(f"{SWAP_FALL_CLASS}B", "", Interval(0.6, 0.4, 0.8, 20)),
        Figure(f"{SWAP_FALL_CLASS}A", "", Interval(0.2, -0.1, 0.5, 20)),
    )
    record = with_figures(*swap(0.3, 0.17, 0.4), *classes, points_figure("classes/overconfidence", 0.4, 0.35, 0.5))
    record = replace(record, suspects=suspects)
    first = find_all(record)[0]
    assert (first.key, first.severity, first.verdict, first.threshold) == ("shortcut/background", "critical", "confirmed", 0.02)
    assert first.concepts == ("large", "small")
    assert first.classes == ("B",)
    assert "30.0 points, most for B, through large, small" in first.title
    assert "99 % interval 17.0 to 40.0" in first.detail


@pytest.mark.parametrize(
    ("interval", "key", "severity"),
    [
        ((0.1, 0.021, 0.2), "shortcut/background", "critical"),
        ((0.1, 0.021, 0.2, 0.3), "shortcut/background", "critical"),
        ((0.1, 0.02, 0.2), "shortcut/open", "note"),
        ((0.1, 0.02, 0.2, 0.251), "shortcut/background", "warning"),
        ((0.01, -0.02, 0.049), "shortcut/background", "good"),
        ((0.01, -0.02, 0.049, 0.251), "shortcut/background", "warning"),
        ((0.01, -0.02, 0.05, 0.25), "shortcut/open", "note"),
    ],
)
def test_the_shortcut_rule(interval, key, severity):
    found = [finding for finding in find_all(with_figures(*swap(*interval))) if finding.key.startswith("shortcut")]
    assert [(finding.key, finding.severity) for finding in found] == [(key, severity)]


def test_a_few_pictures_prove_nothing():
    few = with_figures(*swap(1.0, 1.0, 1.0, n=3), points_figure("parts/pointing_gain", 0.5, 0.5, 0.5, n=3))
    assert not [finding for finding in find_all(few) if finding.key.startswith(("shortcut", "localization"))]


def test_groups_speak_where_no_picture_could_be_swapped():
    gap = points_figure("groups/usual_gap", 0.3, 0.2, 0.4)
    assert of(with_figures(gap), "shortcut/groups").severity == "critical"  # pyright: ignore
    assert of(with_figures(gap), "shortcut/groups").verdict == "open"  # pyright: ignore
    assert of(with_figures(gap, *swap(0.3, 0.17, 0.4)), "shortcut/groups").severity == "warning"  # pyright: ignore
    assert of(with_figures(points_figure("groups/usual_gap", 0.3, 0.05, 0.4)), "shortcut/groups") is None


def test_data_that_invites_a_shortcut():
    def told(low: float) -> Finding | None:
        return of(
            with_figures(Figure("suspects/background_colours", "", Interval(0.5, low, 0.6, 300), control=Interval(0.2))), "data/background"
        )

    for low, severity in ((0.51, "warning"), (0.5, "note"), (0.31, "note")):
        found = told(low)
        assert found is not None
        assert found.severity == severity
    assert told(0.30) is None


def test_a_planted_shortcut_comes_first_among_the_warnings():
    planted = Figure("suspects/background_colours", "", Interval(0.9, 0.85, 0.95, 300), control=Interval(0.2))
    record = with_figures(planted, *swap(0.01, -0.01, 0.04, 0.3), points_figure("classes/overconfidence", 0.9, 0.85, 0.95))
    assert [finding.key for finding in find_all(record)][:3] == ["shortcut/background", "data/background", "classes/overconfident"]


@pytest.mark.parametrize(
    ("key", "name", "passed"),
    [
        ("parts/pointing_gain", "localization/prior", 0.05),
        ("concepts/occlusion_excess", "concepts/occlusion", 0.02),
        ("controls/nec5_gain", "controls/random_concepts", 0.05),
    ],
)
def test_gains_over_a_control(key, name, passed):
    cases = [(passed + 0.001, "good", "confirmed"), (passed, "note", "confirmed"), (0.001, "note", "confirmed"), (0.0, "warning", "open")]
    for low, severity, verdict in cases:
        found = of(with_figures(points_figure(key, low + 0.05, low, low + 0.1)), name)
        assert found is not None
        assert (found.severity, found.verdict) == (severity, verdict)
    surely = of(with_figures(points_figure(key, -0.05, -0.1, 0.0)), name)
    assert surely is not None
    assert (surely.severity, surely.verdict) == ("warning", "confirmed")


def test_interventions():
    accuracy = Figure("classes/accuracy", "", Interval(0.7, 0.6, 0.8, 100))

    def told(fall: float, gain: tuple[float, float]) -> tuple[str, str] | None:
        figures = (
            accuracy,
            points_figure("interventions/fall", fall + 0.01, fall, fall + 0.02),
            points_figure("interventions/gain", gain[0] + 0.01, *gain),
        )
        found = [f for f in find_all(with_figures(*figures)) if f.key.startswith("interventions")]
        return (found[0].key, found[0].severity) if found else None

    assert told(0.011, (0.1, 0.2)) == ("interventions/monotone", "warning")
    assert told(0.0, (0.1, 0.2)) == ("interventions/monotone", "good")
    assert told(0.0, (-0.02, 0.059)) == ("interventions/ignored", "warning")  # a fifth of the 30 points that it lacks
    assert told(0.0, (-0.02, 0.061)) is None
    black = with_figures(accuracy)
    black = replace(black, card=replace(black.card, head_on="none"))
    assert of(black, "interventions/black_box").severity == "note"  # pyright: ignore


def test_concepts_at_chance_with_weight_duplicates_and_those_never_present():
    base = BASE
    rows = list(base.concepts[:3])
    rows[0] = replace(rows[0], auroc=Interval(0.55, 0.49, 0.58, 90), weight_span=3.0, num_known=90, num_positive=15)
    rows[1] = replace(rows[1], auroc=Interval(0.55, 0.49, 0.7, 90), weight_span=0.1, num_known=90, num_positive=5)
    rows[2] = replace(rows[2], auroc=Interval(None), weight_span=1.0, num_known=90, num_positive=0)
    truth = ((1, 1, 0), (0, 0, 0), (None, None, 0))
    record = replace(with_figures(), concepts=tuple(rows), pictures=replace(base.pictures, concept_truth=truth))
    chance = of(record, "concepts/chance")
    assert chance is not None
    assert chance.concepts == (rows[0].name,)
    assert chance.verdict == "confirmed"
    assert of(record, "concepts/never_present").concepts == (rows[2].name,)  # pyright: ignore
    assert of(record, "concepts/duplicates").concepts == (rows[0].name, rows[1].name)  # pyright: ignore


def test_a_model_that_is_no_better_than_an_answer_without_a_picture_is_told_so():
    def accuracy(low: float, high: float, n: int = 100) -> Figure:
        return Figure(
            "classes/accuracy", "Accuracy", Interval((low + high) / 2, low, high, n), control=Interval(0.5), control_label="one class"
        )

    def error(low: float, high: float) -> Figure:
        return Figure(
            "concepts/error", "Error", Interval((low + high) / 2, low, high, 90), control=Interval(0.2), control_label="saying no"
        )

    for figure, key, severity in (
        (accuracy(0.3, 0.45), "classes/no_skill", "warning"),
        (accuracy(0.4, 0.6), "classes/no_skill", "note"),
        (accuracy(0.55, 0.6), "classes/no_skill", None),
        (accuracy(0.3, 0.45, 20), "classes/no_skill", None),
        (error(0.25, 0.3), "concepts/no_skill", "warning"),
        (error(0.1, 0.3), "concepts/no_skill", "note"),
        (error(0.1, 0.15), "concepts/no_skill", None),
    ):
        found = of(with_figures(figure), key)
        assert (None if found is None else found.severity) == severity
        assert found is None or (found.verdict == "confirmed") == (severity == "warning")


def test_the_summary_says_which_pictures_it_speaks_of():
    accuracy = Figure("classes/accuracy", "Accuracy", Interval(0.5, 0.4, 0.6, 3))
    card = replace(BASE.card, split="train", audit=(("seed", "0"), ("limit", "3")))
    said = summary(replace(with_figures(accuracy), card=card))
    assert "of 3 pictures drawn from the split train rightly" in said
    assert "the pictures that it was trained on" in said


def test_too_few_pictures_accuse_no_concept_and_no_split():
    rows = [replace(row, auroc=Interval(None), weight_span=0.1) for row in BASE.concepts]
    rows[0] = replace(rows[0], auroc=Interval(0.7, 0.3, 0.95, 12), weight_span=3.0)
    open_one = of(replace(with_figures(), concepts=tuple(rows)), "concepts/chance")
    assert open_one is not None
    assert (open_one.severity, open_one.verdict, open_one.concepts) == ("note", "open", (rows[0].name,))
    assert "no better" not in open_one.title
    rows[1] = replace(rows[1], auroc=Interval(0.0, 0.0, 0.0, 90), weight_span=2.0, num_known=90, num_positive=1)
    alone = of(replace(with_figures(), concepts=tuple(rows)), "concepts/chance")
    assert alone is not None
    assert (alone.severity, set(alone.concepts)) == ("note", {rows[0].name, rows[1].name})  # one positive proves nothing
    rows[1] = replace(rows[1], num_positive=30)  # surely the wrong way round
    sure = of(replace(with_figures(), concepts=tuple(rows)), "concepts/chance")
    assert sure is not None
    assert (sure.severity, sure.verdict, sure.concepts) == ("warning", "confirmed", (rows[1].name,))
    for n, accused in ((3, False), (30, True)):
        row = GroupRow("test_ood", "split", Interval(0.0, 0.0, 0.6, n), Interval(1.0, 1.0, 1.0, n))
        assert (of(replace(with_figures(), groups=(row,)), "groups/split/test_ood") is not None) == accused


def test_leakage_calibration_groups_and_splits():
    ctl = Figure("concepts/leakage_ctl", "", Interval(0.1, n=100), "number", control=Interval(0.01))
    for low, high, severity in ((0.051, 0.2, "warning"), (0.0, 0.019, "good"), (0.0, 0.2, None)):
        found = of(with_figures(ctl, points_figure("concepts/leakage_excess", 0.1, low, high, unit="number")), "leakage/ctl")
        assert (found and found.severity) == severity
    assert of(with_figures(points_figure("classes/overconfidence", 0.1, 0.051, 0.2)), "classes/overconfident") is not None
    assert of(with_figures(points_figure("classes/overconfidence", 0.1, 0.05, 0.2)), "classes/overconfident") is None
    assert of(with_figures(Figure("classes/calibration_error", "", Interval(0.03, 0.02, 0.049, 100))), "classes/calibrated") is not None
    worst = Figure("groups/worst_group_accuracy", "Worst group (x on y)", Interval(0.5, 0.4, 0.69, 40), control=Interval(0.8))
    assert of(with_figures(worst), "groups/worst").title.startswith("x on y")  # pyright: ignore
    assert of(with_figures(replace(worst, value=Interval(0.5, 0.4, 0.71, 40))), "groups/worst") is None
    split = GroupRow("test_ood", "split", Interval(0.4), Interval(0.3, 0.051, 0.5, 100))
    assert of(replace(with_figures(), groups=(split,)), "groups/split/test_ood") is not None
    assert of(replace(with_figures(), groups=(replace(split, gap=Interval(0.3, 0.05, 0.5)),)), "groups/split/test_ood") is None
    for high, verdict in ((0.02, "confirmed"), (0.06, "refuted")):
        gap = Figure(
            "groups/gap_test_ood", "", split.gap or Interval(None), "points", control=Interval(0.0, -high, high), control_label="dealt"
        )
        held = of(replace(with_figures(gap), groups=(split,)), "groups/split/test_ood")
        assert held is not None
        assert (held.verdict, held.control_label) == (verdict, "dealt")
    residual = Figure("parts/transport_residual_max", "", Interval(0.011, n=9), "number", "lower")
    assert of(with_figures(residual), "parts/residual") is not None
    box = Figure("parts/detection_correct_plan", "", Interval(0.1, 0.05, 0.19, 90), control=Interval(0.2), control_label="the prior")
    assert of(with_figures(box), "localization/detection") is not None
    assert of(with_figures(replace(box, control=Interval(0.19))), "localization/detection") is None


def test_order_and_summary():
    record = with_figures(
        Figure("classes/accuracy", "", Interval(0.7, 0.6, 0.8, 100), control=Interval(0.1), control_label="guessing"),
        points_figure("parts/pointing_gain", 0.0, -0.1, 0.1),
        points_figure("classes/overconfidence", 0.3, 0.2, 0.4),
        *swap(0.01, -0.02, 0.04, -0.03),
    )
    record = replace(record, findings=find_all(record))
    severities = [finding.severity for finding in record.findings]
    assert severities == sorted(severities, key=["critical", "warning", "note", "good"].index)
    keys = [finding.key for finding in record.findings]
    assert keys.index("classes/overconfident") < keys.index("localization/prior")  # farther from its threshold
    assert "70.0% of 100 pictures" in summary(record)
    assert record.findings[0].title in summary(record)
