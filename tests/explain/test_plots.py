"""What is drawn is what was computed, and nothing overlaps."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from dotcbm.explain import comparison, plots, style
from dotcbm.explain.explanation import Explanation, explain
from dotcbm.explain.heatmaps import upsample
from dotcbm.models.cbm import CBM
from dotcbm.models.concept_model import ConceptModel
from dotcbm.models.published_dot_cbm import PublishedDotCBM
from dotcbm.structures import ConceptSet, Problem


@pytest.fixture
def explanation(build: Callable[..., ConceptModel], picture: Tensor) -> Explanation:
    return explain(build(PublishedDotCBM), picture)


def many(explanation: Explanation, *, words: int, height: int = 48) -> Explanation:
    """Thirty concepts with long names, and a picture of another shape."""
    g = torch.Generator().manual_seed(0)
    names = tuple(" ".join([f"concept{j}", *["wonderfully", "descriptive"] * words]) for j in range(30))
    concept_M, weight_KM, bias_K = torch.rand(30, generator=g), torch.randn(4, 30, generator=g), torch.randn(4, generator=g)
    logit_K = weight_KM @ concept_M + bias_K
    concepts = ConceptSet(names=names, class_names=tuple("abcd"), class_concept_KM=torch.zeros(4, 30))
    bottleneck = CBM(Problem(6, 6, (4, 4), concepts))
    with torch.no_grad():
        bottleneck.head.weight.copy_(weight_KM)
        bottleneck.head.bias.copy_(bias_K)
    return replace(
        explanation,
        picture_3HW=torch.zeros(3, height, 64, dtype=torch.uint8),
        concept_names=names,
        class_names=tuple(" ".join([f"class{k}", *["magnificently", "named"] * words]) for k in range(4)),
        concept_logit_M=concept_M.logit(),
        contribution_KM=weight_KM * concept_M,
        bottleneck=bottleneck,
        evidence_MHW=torch.randn(30, 4, 4, generator=g),
        weight_KM=weight_KM,
        bias_K=bias_K,
        class_logit_K=logit_K,
        target=int(logit_K.argmax()),
        heatmaps_MHW=torch.rand(30, 4, 4, generator=g),
    )


def texts(figure: Figure) -> list[tuple[str, np.ndarray]]:
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    found = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_visible() and t.get_text().strip()]
    shown = [t for t in found if t.axes is None or t.axes.axison or t in t.axes.texts]
    return [(t.get_text(), t.get_window_extent(renderer).extents) for t in shown]


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    boxes = texts(figure)
    clashes = []
    for i, (first, a) in enumerate(boxes):
        for second, b in boxes[:i]:
            if min(a[2], b[2]) - max(a[0], b[0]) > 1 and min(a[3], b[3]) - max(a[1], b[1]) > 1:
                clashes.append((first, second))
    return clashes


def outside(figure: Figure) -> list[str]:
    width, height = figure.get_size_inches() * figure.dpi
    return [text for text, (x0, y0, x1, y1) in texts(figure) if x0 < 0 or y0 < 0 or x1 > width or y1 > height]


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("words", [0, 3])
def test_no_text_overlaps_or_leaves_the_figure(explanation: Explanation, n: int, words: int) -> None:
    figure = plots.plot_explanation(many(explanation, words=words, height=(40, 64, 90)[n % 3]), n=n)
    assert overlaps(figure) == []
    assert outside(figure) == []


@pytest.mark.parametrize("words", [0, 3])
def test_comparisons_grids_and_single_plots_do_not_overlap_either(explanation: Explanation, words: int) -> None:
    plain = many(explanation, words=words)
    changed = plain.intervene({name: 1.0 - float(p) for name, p in zip(plain.concept_names[:14], plain.concept_M)})
    grid = plots.plot_heatmap_grid(
        [plain.picture_3HW] * 2, plain.heatmaps_MHW[None, :4].expand(2, -1, -1, -1), concept_names=plain.concept_names[:4],
        row_names=["some/long/folder/with/a/picture.png"] * 2, probability_BM=torch.rand(2, 4),
    )  # fmt: skip
    for figure in (
        comparison.plot_comparison(changed), comparison.plot_comparison(plain.intervene({})), plots.plot_contributions(plain), grid,
        plots.plot_overlay(plain, plain.concept_names[3]), comparison.plot_concept_change(changed), comparison.plot_class_change(changed),
    ):  # fmt: skip
        assert overlaps(figure) == []
        assert outside(figure) == []


def test_the_detector_of_overlaps_sees_one() -> None:
    figure = Figure(figsize=(3, 3))
    figure.text(0.5, 0.5, "one thing")
    figure.text(0.52, 0.51, "another")
    figure.text(0.9, 0.1, "far too long for this figure")
    assert overlaps(figure) == [("another", "one thing")]
    assert outside(figure) == ["far too long for this figure"]


def test_overlay_is_the_map_at_the_pictures_size_with_opacity_from_heat_and_probability(explanation: Explanation) -> None:
    index = explanation.concept_names.index("blue head")
    explanation = replace(explanation, concept_logit_M=explanation.concept_M.index_fill(0, torch.tensor([index]), 0.8).logit())
    evidence = explanation.concept("blue head")
    (ax,) = plots.plot_overlay(explanation, "blue head").axes
    shown, heat = (np.asarray(image.get_array()) for image in ax.images)
    assert shown.shape == (48, 64, 3)
    np.testing.assert_allclose(shown, style.faded(explanation.picture_3HW.float() / 255).permute(1, 2, 0).numpy(), atol=1e-6)
    raw = explanation.heatmaps_MHW[evidence.index]
    expected = upsample((raw / raw.max())[None], (48, 64))[0].numpy()
    np.testing.assert_allclose(heat[..., 3], 0.85 * evidence.probability * expected, atol=1e-5)
    assert evidence.box is not None
    assert evidence.peak is not None
    (rectangle,) = ax.patches
    x0, y0, x1, y1 = evidence.box
    assert (*rectangle.get_xy(), rectangle.get_width(), rectangle.get_height()) == pytest.approx(  # pyright: ignore
        (x0 * 64 - 0.5, y0 * 48 - 0.5, (x1 - x0) * 64, (y1 - y0) * 48)
    )
    (cross,) = ax.lines
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == pytest.approx((evidence.peak[0] * 64 - 0.5, evidence.peak[1] * 48 - 0.5))  # pyright: ignore
    assert {t.get_text() for t in ax.texts} == {"blue head", style.percent(evidence.probability), style.signed(evidence.contribution)}


def test_a_concept_that_is_not_seen_has_no_place(explanation: Explanation) -> None:
    index = explanation.concept_names.index("blue head")
    unseen = replace(explanation, concept_logit_M=explanation.concept_M.index_fill(0, torch.tensor([index]), 0.49).logit())
    assert unseen.concept("blue head").box is not None
    (ax,) = plots.plot_overlay(unseen, "blue head").axes
    assert not ax.patches
    assert not ax.lines


def test_bars_are_the_contributions_and_add_up_to_the_logit(explanation: Explanation) -> None:
    plain = many(explanation, words=0)
    (ax,) = plots.plot_contributions(plain, n=5).axes
    widths = [bar.get_width() for bar in ax.patches]  # pyright: ignore
    assert widths[:5] == pytest.approx([e.contribution for e in plain.top_concepts(5)])
    assert widths[5:8] == pytest.approx([e.contribution for e in reversed(plain.against(3))])
    assert sum(widths) == pytest.approx(float(plain.class_logit_K[plain.target]), abs=1e-4)
    assert [t.get_text() for t in ax.get_yticklabels()][-2:] == ["22 other concepts", "bias"]
    colours = ["#{:02x}{:02x}{:02x}".format(*(round(255 * c) for c in bar.get_facecolor()[:3])) for bar in ax.patches]  # pyright: ignore
    assert colours == [style.FOR.lower()] * 5 + [style.AGAINST.lower()] * 3 + [style.REST.lower()] * 2


def test_a_figure_holds_one_map_for_each_concept_and_the_predicted_class(explanation: Explanation) -> None:
    figure = plots.plot_explanation(many(explanation, words=0), n=7)
    assert sum(len(ax.images) == 2 for ax in figure.axes) == 7
    assert sum(len(ax.images) == 1 for ax in figure.axes) == 1
    with pytest.raises(ValueError, match="1 to 8"):
        plots.plot_explanation(explanation, n=9)


def test_maps_fill_up_with_probable_concepts_when_few_speak_for_the_class(explanation: Explanation) -> None:
    lonely = replace(explanation, contribution_KM=-explanation.contribution_KM.abs())
    assert lonely.top_concepts(6) == ()
    figure = plots.plot_explanation(lonely, n=3)
    drawn = [ax.texts[0].get_text() for ax in figure.axes if len(ax.images) == 2]
    assert drawn == [e.name for e in lonely.top_concepts(3, by="probability")]


def test_a_comparison_shows_both_states(explanation: Explanation) -> None:
    changed = explanation.intervene({"red wing": 0.0, "crest": 1.0})
    figure = changed.plot()
    before, after = changed.before, changed
    assert before is not None
    concepts, classes = figure.axes[1:]
    ends = [float(line.get_xdata()[0]) for line in concepts.lines if line.get_marker() == "o"]  # pyright: ignore
    expected = [float(e.concept_M[j]) for j in sorted((0, 5), key=lambda j: -abs(float(before.concept_M[j] - after.concept_M[j])))
                for e in (before, after)]  # fmt: skip
    assert ends == pytest.approx(expected)
    bars = [bar.get_width() for bar in classes.patches]  # pyright: ignore
    names = [label.get_text() for label in classes.get_yticklabels()]
    assert sorted(names) == sorted(explanation.class_names)
    order = [explanation.class_names.index(name) for name in names]
    assert bars[0::2] == pytest.approx(before.class_K[order].tolist())
    assert bars[1::2] == pytest.approx(after.class_K[order].tolist())
    with pytest.raises(ValueError, match=r"call explanation\.intervene"):
        comparison.plot_comparison(explanation)


def test_a_grid_has_a_row_for_each_picture_and_refuses_what_does_not_fit(picture: Tensor) -> None:
    maps = torch.rand(2, 3, 4, 4)
    figure = plots.plot_heatmap_grid([picture, picture[:, :, :40]], maps, concept_names=["a", "b", "c"])
    assert [len(ax.images) for ax in figure.axes] == [1, 2, 2, 2] * 2
    heat = np.asarray(figure.axes[6].images[1].get_array())
    expected = upsample((maps[1, 1] / maps[1, 1].max())[None], (48, 40))[0].numpy()
    np.testing.assert_allclose(heat[..., 3], 0.85 * expected, atol=1e-5)
    with pytest.raises(ValueError, match="do not fit maps"):
        plots.plot_heatmap_grid([picture], maps, concept_names=["a", "b", "c"])


def test_large_pictures_are_shown_small_and_empty_maps_without_heat(explanation: Explanation) -> None:
    big = replace(explanation, picture_3HW=torch.zeros(3, 900, 1600, dtype=torch.uint8), heatmaps_MHW=torch.zeros(6, 4, 4))
    (ax,) = plots.plot_overlay(big, "crest").axes
    assert np.asarray(ax.images[1].get_array()).shape == (360, 640, 4)
    assert np.asarray(ax.images[1].get_array())[..., 3].max() == 0
    assert not ax.patches
    assert not ax.lines


def test_notebooks_get_a_png_and_pyplot_is_left_alone(explanation: Explanation) -> None:
    import subprocess
    import sys

    shown = Image.open(io.BytesIO(explanation._repr_png_()))
    assert shown.format == "PNG"
    assert shown.size[0] > 800
    code = "import sys, dotcbm.explain.plots; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(("value", "text"), [(0.0, "0 %"), (0.002, "< 1 %"), (0.5, "50 %"), (0.997, "> 99 %"), (1.0, "100 %")])
def test_percentages_do_not_round_to_certainty(value: float, text: str) -> None:
    assert style.percent(value) == text


def test_wrapping_keeps_lines_inside_and_marks_what_is_cut() -> None:
    assert style.wrapped("red wing", inches=2, size=9) == "red wing"
    assert style.wrapped("has bill shape hooked seabird", inches=1.2, size=9).count("\n") == 1
    assert style.wrapped("one two three four five six seven eight nine", inches=1.0, size=9).endswith("…")
    assert style.wrapped("Donaudampfschifffahrtsgesellschaft", inches=1.0, size=9).endswith("…")
