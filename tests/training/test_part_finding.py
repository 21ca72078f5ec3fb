"""Parts are found before the training, once, from the training pictures alone."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from fakes.source import TinySource
from lightning.pytorch import Callback

from dotcbm.encoders.image import ImageEncoder
from dotcbm.hub import from_pretrained, save_pretrained
from dotcbm.models.dot_cbm import SEARCH_TRAVEL, DotCBM
from dotcbm.models.object_core import CORES
from dotcbm.training import part_finding

parts = partial(DotCBM, num_parts=2, num_clusterings=2, part_width=8)
class_parts = partial(parts, learn_places="none")


def without_places(data):
    """Masks and points of no picture can be read."""
    for split, dataset in data._datasets.items():
        data._datasets[split] = replace(dataset, read_foreground=None, read_part_masks=None, points_NP3=None, box_N4=None)
    return data


def fitted(run, **settings):
    task = run.task(**{"bottleneck": parts, **settings})
    run.trainer(epochs=2).fit(task, datamodule=run.data())
    return task


def test_a_run_finds_parts_and_explains_itself(run):
    task = fitted(run)
    bottleneck = task.model.bottleneck
    assert bool(bottleneck.found)
    torch.testing.assert_close(bottleneck.part_CE.norm(dim=1), torch.ones(4))
    assert bottleneck.detail_width == task.encoder.detail_width > 0
    output = task.model.predict([torch.randint(0, 255, (3, 70, 60), dtype=torch.uint8)])
    torch.testing.assert_close(output.evidence_BNM.sum(1) + bottleneck.concept.bias, output.concept_logit_BM, atol=1e-4, rtol=1e-4)


def test_the_core_is_chosen_where_none_is_given(run):
    chosen, given = fitted(run, bottleneck=class_parts), run.task(bottleneck=partial(parts, core=0.35))
    run.trainer(epochs=1, directory="given").fit(given, datamodule=run.data())
    assert float(chosen.model.bottleneck.core_at) in torch.tensor(CORES).tolist()
    assert float(given.model.bottleneck.core_at) == pytest.approx(0.35)


def test_concepts_of_pictures_learn_their_places_in_the_widest_core(run):
    bottleneck = fitted(run).model.bottleneck
    assert bottleneck.learns
    assert float(bottleneck.core_at) == CORES[-1]
    moved_M = bottleneck.query_ME.abs().amax(1) > 0
    assert torch.equal(moved_M, bottleneck.learned_M)


def test_the_same_parts_with_and_without_a_cache(run):
    cached, read_each_time = fitted(run), run.task(bottleneck=parts)
    run.trainer(epochs=2, directory="other").fit(read_each_time, datamodule=run.data(cache_dir=None))
    same = cached.model.bottleneck, read_each_time.model.bottleneck
    torch.testing.assert_close(same[0].part_CE, same[1].part_CE, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(same[0].share_GC, same[1].share_GC, atol=1e-2, rtol=1e-2)


def test_neither_masks_nor_points_are_read(run):
    task, data = run.task(bottleneck=parts), run.data()
    data.use_encoder(task.encoder)
    for split in ("train", "val"):
        data.dataset(split)
    run.trainer(epochs=1, directory="blind").fit(task, datamodule=without_places(data))
    torch.testing.assert_close(task.model.bottleneck.share_GC, fitted(run).model.bottleneck.share_GC)


def test_a_resumed_run_keeps_its_parts(run, monkeypatch):
    task = fitted(run)
    monkeypatch.setattr("dotcbm.training.task.prepare_parts", lambda *a, **b: pytest.fail("the checkpoint brought the parts"))
    resumed = run.task(bottleneck=parts)
    run.trainer(epochs=3).fit(resumed, datamodule=run.data(), ckpt_path=str(run.folder / "run" / "last.ckpt"))
    assert torch.equal(resumed.model.bottleneck.part_CE, task.model.bottleneck.part_CE)


def test_a_saved_model_predicts_the_same(run, tmp_path):
    model = fitted(run).model
    save_pretrained(model, tmp_path / "saved")
    again = from_pretrained(tmp_path / "saved")
    picture = [torch.randint(0, 255, (3, 70, 60), dtype=torch.uint8)]
    torch.testing.assert_close(again.predict(picture).class_logit_BK, model.predict(picture).class_logit_BK)


def test_a_trainable_encoder_is_refused_before_training(run):
    encoder = ImageEncoder("timm/test_resnet", pretrained=False, image_size=64, trainable=True)
    with pytest.raises(ValueError, match=r"finds its parts in the features of a frozen encoder.*PublishedDotCBM"):
        run.trainer().fit(run.task(bottleneck=parts, encoder=encoder), datamodule=run.data(cache_dir=None))


def test_an_encoder_without_details_serves_too(run):
    encoder = ImageEncoder("timm/test_resnet", pretrained=False, image_size=64, detail=False)
    assert encoder.detail_width == 0
    task = fitted(run, encoder=encoder)
    assert bool(task.model.bottleneck.found)
    assert task.model.bottleneck.detail_width == 0


def test_pictures_are_drawn_evenly_from_the_classes(monkeypatch):
    monkeypatch.setattr(part_finding, "_MOST", 9)
    label_N = torch.tensor([0] * 50 + [1] * 4 + [2] * 3)
    rows = part_finding._drawn(label_N, seed=0)
    assert torch.bincount(label_N[rows]).tolist() == [3, 3, 3]
    assert torch.equal(rows, rows.sort().values)
    assert torch.equal(rows, part_finding._drawn(label_N, seed=0))


def test_the_source_of_the_tests_has_groups_to_find():
    assert len(TinySource().concepts.group_index_M().unique()) > 1


def test_training_on_what_is_read_once_is_the_same_training(run, monkeypatch):
    encoder = ImageEncoder("timm/test_resnet", pretrained=False, image_size=128)  # more patches than groups
    condensed = fitted(run, encoder=encoder, bottleneck=class_parts)
    batch = next(iter(condensed.data.train_dataloader()))
    assert batch.features.read_BGX is not None
    monkeypatch.setattr(DotCBM, "condense", None)
    whole = run.task(bottleneck=class_parts, encoder=encoder)
    run.trainer(epochs=2, directory="whole").fit(whole, datamodule=run.data())
    assert next(iter(whole.data.train_dataloader())).features.read_BGX is None
    # Adam makes steps of its rate from the rounding of a channel that never varies: predictions are compared, not weights.
    picture = [torch.randint(0, 255, (3, 70, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))]
    one, other = condensed.model.predict(picture), whole.model.predict(picture)
    torch.testing.assert_close(one.concept_logit_BM, other.concept_logit_BM, atol=2e-2, rtol=1e-2)


def test_two_models_in_turn_on_the_same_data_read_their_own_parts(run):
    data = run.data()
    first, second = run.task(bottleneck=parts), run.task(bottleneck=partial(DotCBM, num_parts=3, num_clusterings=1, part_width=8))
    run.trainer(epochs=1, directory="first").fit(first, datamodule=data)
    run.trainer(epochs=1, directory="second").fit(second, datamodule=data)
    alone = run.task(bottleneck=partial(DotCBM, num_parts=3, num_clusterings=1, part_width=8))
    run.trainer(epochs=1, directory="alone").fit(alone, datamodule=run.data())
    torch.testing.assert_close(second.model.bottleneck.concept.weight, alone.model.bottleneck.concept.weight)


@pytest.mark.parametrize("settings", [{}, {"lr_halve_every": 0}, {"lr": 0.3}])
@pytest.mark.parametrize(
    "limits", [{"epochs": 2}, {"epochs": 5}, {"epochs": 4, "accumulate_grad_batches": 2}, {"epochs": -1, "max_steps": 7}]
)
def test_queries_travel_as_far_however_many_steps_there_are(run, settings, limits):
    class Sum(Callback):
        total, num_steps = 0.0, 0

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            queries = [group for group in optimizer.param_groups if any(p is task.model.bottleneck.query_ME for p in group["params"])]
            self.total += queries[0]["lr"]
            self.num_steps += 1

    seen = Sum()
    task = run.task(**{"bottleneck": partial(parts, learn_places="all"), **settings})
    run.trainer(seen, **limits).fit(task, datamodule=run.data())
    assert seen.total == pytest.approx(SEARCH_TRAVEL, rel=0.02)
    assert seen.num_steps > 2


def test_a_query_that_is_not_learned_is_not_trained(run):
    task = run.task(bottleneck=class_parts)
    run.trainer(epochs=1).fit(task, datamodule=run.data())
    assert not any(p is task.model.bottleneck.query_ME for group in task.trainer.optimizers[0].param_groups for p in group["params"])
