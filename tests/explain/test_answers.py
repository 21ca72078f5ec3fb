"""Figures of answers show the answers' numbers, and no text overlaps or leaves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from test_plots import many, outside, overlaps, texts
from torch import Tensor

from dotcbm.cli import main
from dotcbm.explain.answers import plot_box, plot_contrast, plot_muted, plot_neighbours, plot_occlusion
from dotcbm.explain.comparison import plot_comparison, plot_weight_change
from dotcbm.explain.explanation import Explanation, explain
from dotcbm.explain.neighbours import PredictionTable, nearest_pictures, surest_pictures
from dotcbm.explain.occlusion import occlude
from dotcbm.explain.regions import MutedRegion, concepts_in_box, mute_region
from dotcbm.explain.style import percent, signed
from dotcbm.models.cbm import CBM
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.published_dot_cbm import PublishedDotCBM

BOX = (0.1, 0.2, 0.5, 0.7)


@pytest.fixture
def explanation(build: Callable[..., ConceptModel], picture: Tensor) -> Explanation:
    return explain(build(PublishedDotCBM), picture)


def table(explanation: Explanation, *, read: bool) -> PredictionTable:
    m = len(explanation.concept_names)
    return PredictionTable(
        tuple(f"a/long/folder/of/pictures/number {i}.png" for i in range(9)),
        explanation.concept_names,
        torch.rand(9, m, generator=torch.Generator().manual_seed(1)),
        tuple(explanation.class_names[i % 4] for i in range(9)),
        (lambda row: torch.full((3, 30 + 10 * row, 60), 200, dtype=torch.uint8)) if read else None,
    )


def figures(plain: Explanation) -> list[Figure]:
    changed = plain.intervene({name: 1.0 - float(p) for name, p in zip(plain.concept_names[:14], plain.concept_M)})
    weighed = plain.reweigh(dict.fromkeys(plain.concept_names[:14], 0.0))
    negative = plain.reweigh(dict.fromkeys(plain.concept_names[:5], -3.0))
    return [
        plot_contrast(plain.versus()),
        plain.versus().plot(2),
        plot_box(concepts_in_box(plain, BOX)),
        plot_box(concepts_in_box(replace(plain, evidence_MHW=None), BOX), n=3),
        plot_muted(MutedRegion(changed, BOX, "transport")),
        plot_comparison(weighed),
        plot_weight_change(negative),
        plain.intervene({plain.concept_names[0]: 0.0, plain.concept_names[1]: 1.0}).intervene({plain.concept_names[0]: 0.02}).plot(),
        plot_neighbours(nearest_pictures(plain, table(plain, read=True))),
        plot_neighbours(surest_pictures(plain, table(plain, read=False), concept=plain.concept_names[2])),
    ]


@pytest.mark.parametrize(("words", "height"), [(0, 48), (3, 40), (3, 90)])
def test_no_text_overlaps_or_leaves_a_figure(explanation: Explanation, words: int, height: int) -> None:
    for i, figure in enumerate(figures(many(explanation, words=words, height=height))):
        assert (i, overlaps(figure)) == (i, [])
        assert (i, outside(figure)) == (i, [])


def test_an_occlusion_figure_has_a_row_for_each_concept(build: Callable[..., ConceptModel], picture: Tensor) -> None:
    found = occlude(build(PublishedDotCBM), picture, concepts=["crest", "red wing"], num_random=3)
    long = replace(found, concepts=tuple(replace(row, name=row.name) for row in found.concepts))
    figure = plot_occlusion(long)
    assert overlaps(figure) == []
    assert outside(figure) == []
    assert len(figure.axes) == 8
    for i, row in enumerate(found.concepts):
        _, own, elsewhere, dots = figure.axes[4 * i : 4 * i + 4]
        assert len(own.patches) == int(row.region_hw.sum()) == len(elsewhere.patches)
        cell = own.patches[0]
        y, x = row.region_hw.nonzero()[0].tolist()
        assert cell.get_xy() == pytest.approx((x * 16 - 0.5, y * 12 - 0.5))  # pyright: ignore
        markers = [line for line in dots.lines if line.get_marker() == "o"]
        assert list(markers[0].get_xdata()) == pytest.approx(row.random_R.tolist())  # pyright: ignore
        assert list(markers[1].get_xdata()) == pytest.approx([row.covered])  # pyright: ignore


def test_bars_of_a_contrast_add_up_to_the_margin(explanation: Explanation) -> None:
    found = many(explanation, words=0).versus()
    (ax,) = plot_contrast(found, n=3).axes
    widths = [bar.get_width() for bar in ax.patches]  # pyright: ignore
    assert widths[:3] == pytest.approx([row.value for row in found.for_first(3)])
    assert sum(widths) == pytest.approx(found.margin, abs=1e-4)


def test_a_box_is_drawn_where_it_is_with_its_shares(explanation: Explanation) -> None:
    report = concepts_in_box(explanation, BOX)
    shown, bars = plot_box(report, n=4).axes
    frame = shown.patches[-1]
    assert (*frame.get_xy(), frame.get_width(), frame.get_height()) == pytest.approx(  # pyright: ignore
        (0.1 * 64 - 0.5, 0.2 * 48 - 0.5, 0.4 * 64, 0.5 * 48)
    )
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([row.share for row in report.concepts[:4]])  # pyright: ignore
    row = report.concepts[0]
    assert row.evidence is not None
    assert f"{percent(row.share)}  ({signed(row.evidence)})" in {t.get_text() for t in bars.texts}


def test_a_muted_region_shows_both_states_and_how(build: Callable[..., ConceptModel], picture: Tensor) -> None:
    for kind, how in ((PublishedDotCBM, "transport was solved again"), (CBM, "no longer add to the concepts")):
        muted = mute_region(build(kind), picture, BOX)
        shown = [text for text, _ in texts(muted.plot())]
        assert any(how in text for text in shown)
        for state in (muted.before, muted.after):
            assert percent(float(state.class_K.max())) in shown


def test_other_weights_are_shown_as_contributions(explanation: Explanation) -> None:
    weighed = explanation.reweigh({"crest": 0.0})
    (ax,) = plot_weight_change(weighed).axes
    widths = [bar.get_width() for bar in ax.patches]  # pyright: ignore
    assert widths == pytest.approx([explanation.concept("crest").contribution, 0.0])
    assert "Weights changed by hand" in {text for text, _ in texts(weighed.plot())}


def test_the_package_offers_its_answers() -> None:
    import dotcbm.explain

    for name in dotcbm.explain.__all__:
        assert getattr(dotcbm.explain, name).__name__ == name
    assert set(dotcbm.explain.__all__) <= set(dir(dotcbm.explain))
    with pytest.raises(AttributeError, match="it offers Attribution"):
        dotcbm.explain.heat  # noqa: B018  # pyright: ignore


def test_the_command_line_takes_a_view(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json
    from typing import get_args

    from PIL import Image

    from dotcbm.cli.explain import _VIEWS
    from dotcbm.data.synthetic import Synthetic
    from dotcbm.encoders.image import ImageEncoder
    from dotcbm.explain.heatmaps import View
    from dotcbm.hub import save_pretrained
    from dotcbm.structures import Problem

    assert get_args(View) == _VIEWS
    torch.manual_seed(0)
    source = Synthetic(size=64, num_train=4, num_val=1, num_test=4)
    encoder = ImageEncoder("timm/test_vit", image_size=64, pretrained=False)
    problem = Problem(encoder.width, encoder.global_width, encoder.grid, source.concepts)
    folder = save_pretrained(ConceptModel(encoder, CBM(problem)).eval(), tmp_path / "model")
    picture = tmp_path / "creature.png"
    Image.fromarray(source.picture("test", 0).permute(1, 2, 0).numpy()).save(picture)
    arguments = ["explain", str(picture), "--checkpoint", str(folder), "--out", str(tmp_path / "why")]
    assert main([*arguments, "--view", "gradcam"]) == 0
    assert "gradcam maps" in capsys.readouterr().out
    record = json.loads((tmp_path / "why" / "creature.json").read_text(encoding="utf-8"))
    assert record["view"] == "gradcam"
    assert main([*arguments, "--view", "concept"]) != 0
    assert "use view='evidence'" in capsys.readouterr().err
