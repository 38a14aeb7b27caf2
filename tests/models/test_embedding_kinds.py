# SPDX-License-Identifier: Apache-2.0
"""EmbeddingFlow and kinds of normal images: to each a density of its own, in checkpoints and exports, too."""

import logging
import math

import pytest
import torch
from model_helpers import BACKBONE, Case, check_exports, embedding_flow, engine, products, products_folder

from anomalib_flowood import EmbeddingFlow, OneClass
from anomalib_flowood.models.embedding_flow import EmbeddingFlowModel


def model(**kwargs):
    torch.manual_seed(0)
    small = {"layers": (1, 2), "image_size": (48, 48), "pre_trained": False, "map_dims": 4, "subspace_dim": 9}
    return EmbeddingFlowModel(BACKBONE, **{**small, "modes": 2, "kind_images": 10, **kwargs}).double().eval()


@torch.no_grad()
@pytest.mark.parametrize("layers", [(1, 2), ()], ids=str)
def test_each_kind_has_the_density_of_a_fit_to_it_alone(layers):
    detector, new = model(layers=layers), products(4, seed=1)
    features = detector.extract(products(20))
    assert detector.fit_features(features) == [20, 20]
    mixed = torch.arange(8).view(2, 4).T.flatten()
    found, contributions = detector.log_prob(new[mixed]), detector.contributions(new[mixed])
    assert contributions.kind.tolist() == [0, 1] * 4
    embeddings, shares = detector.embedding(features), []
    for number in range(2):
        detector.fit_embeddings(embeddings[20 * number : 20 * number + 20])
        detector.kinds.forget()
        rows, here = torch.arange(4 * number, 4 * number + 4), torch.arange(number, 8, 2)
        share = found[here] - detector.log_prob(new[rows])
        torch.testing.assert_close(share, share[:1].expand(4), rtol=0, atol=1e-6)
        shares.append(float(share[0]))
        # Up to a constant of each kind, and to the other modes, which are farther away.
        own = detector.contributions(new[rows]).nats.nansum(1)
        torch.testing.assert_close(contributions.nats[here].nansum(1), own)
    assert math.log(sum(map(math.exp, shares))) == pytest.approx(0, abs=1e-6)


@torch.no_grad()
def test_one_threshold_is_as_strict_for_every_kind():
    """Though one product varies more, so that its images are less likely by far."""
    detector, new = model(), products(60, seed=1)
    detector.fit_features(detector.extract(products(60)))
    log_prob = detector.log_prob(new).unflatten(0, (2, 60))
    assert abs(log_prob[0].mean() - log_prob[1].mean()) < log_prob.std(1).min()
    # The score says how far out an image is among those of its kind that nothing was fitted to.
    score = detector(new).pred_score.unflatten(0, (2, 60))
    assert (score.mean(1).abs() < 0.5).all()
    assert ((score.std(1) > 0.5) & (score.std(1) < 1.5)).all()
    torch.testing.assert_close(detector.unseen.location + score * detector.unseen.spread, -log_prob / detector.dims)
    assert not detector.scores_are_likelihoods
    alone = []
    for number in range(2):
        detector.fit_features(detector.extract(products(60)[60 * number : 60 * number + 60]))
        alone.append(detector.log_prob(new[60 * number : 60 * number + 60]).mean())
    assert abs(alone[0] - alone[1]) > 4 * log_prob.std(1).max()


@torch.no_grad()
def test_copies_of_an_image_are_of_its_kind():
    """Otherwise the nearest of each would be its own copies, and every image a kind."""
    detector, images = model(), products(12)
    features = detector.extract(images.repeat_interleave(4, 0) + 0.01 * torch.rand(96, 3, 48, 48, dtype=torch.float64))
    assert detector.fit_features(features, copies=4) == [12, 12]
    assert len(detector.kinds.points) == 24
    assert len(detector.base.centres) == 2
    expected = detector.embedding(features)[:48, : detector.embedding.part_dims[0]].mean(0)
    torch.testing.assert_close(detector.gaussians[0].mean[0], expected)


@torch.no_grad()
def test_all_images_count_where_some_of_them_are_compared(monkeypatch):
    from anomalib_flowood.models.components import kinds

    monkeypatch.setattr(kinds, "_LOOKED_AT", 60)
    monkeypatch.setattr(kinds, "_FITTED", 20)
    detector = model()
    features = detector.extract(products(50))
    assert detector.fit_features(features) == [50, 50]
    assert len(detector.kinds.points) == 40
    expected = detector.embedding(features)[50:, : detector.embedding.part_dims[0]].mean(0)
    torch.testing.assert_close(detector.gaussians[0].mean[1], expected)


@torch.no_grad()
def test_there_is_one_density_where_no_kinds_are_wanted():
    detector = model(kind_images=0)
    assert detector.fit_features(detector.extract(products(20))) == [40]
    assert detector.gaussians[0].mean.ndim == 1
    assert len(detector.prepare(detector.extract(products(2)))) == 2
    assert detector.contributions(products(2)).kind is None
    assert detector.scores_are_likelihoods
    images = products(2)
    torch.testing.assert_close(detector(images).pred_score, -detector.log_prob(images) / detector.dims)


def parts(folder):
    return OneClass(folder, "good", val_split_ratio=0.3)


def detector(**kwargs) -> EmbeddingFlow:
    return embedding_flow(**{"image_size": (48, 48), "kind_images": 10, "modes": 2, **kwargs})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return products_folder(tmp_path_factory.mktemp("products"))


@pytest.fixture(scope="module")
def case(folder, tmp_path_factory):
    """A detector of both products with a trained flow, its checkpoint and its exports."""
    torch.manual_seed(0)
    return Case(tmp_path_factory.mktemp("case"), detector(coupling_layers=2), parts(folder))


def test_a_fit_says_how_many_kinds_it_found(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    engine(tmp_path).fit(detector(coupling_layers=0), datamodule=parts(folder))
    assert "The training images are of 2 kinds that have nothing to do with each other, and the density" in caplog.text


def test_a_checkpoint_keeps_them(case):
    assert len(case.detector.model.base.centres) == 2
    images = products(3, seed=4).float()
    with torch.no_grad():
        expected = case.detector.model(images).pred_score
        found = EmbeddingFlow.load_from_checkpoint(case.checkpoint).eval().model(images).pred_score
    assert torch.equal(found, expected)


def test_exports_judge_a_batch_of_several_kinds(case):
    check_exports(case, products(3, seed=4).float()[[0, 3, 1, 4, 5]].numpy())


@pytest.mark.parametrize("score", ["density_of_states", "latent_norm", "ensemble"])
def test_other_scores_are_of_the_density_of_the_kind(folder, tmp_path, score):
    torch.manual_seed(0)
    fitted = detector(coupling_layers=2, score=score)
    engine(tmp_path, max_epochs=1).fit(fitted, datamodule=parts(folder))
    images = products(2, seed=4).float()
    with torch.no_grad():
        found = fitted.eval().model(images).pred_score
        alone = torch.cat([fitted.model(image[None]).pred_score for image in images])
    assert found.isfinite().all()
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_a_resumed_fit_is_the_same(folder, tmp_path):
    def trained(epochs, **kwargs):
        torch.manual_seed(0)
        run, fitted = engine(tmp_path, max_epochs=epochs), detector(coupling_layers=2)
        run.fit(fitted, datamodule=parts(folder), **kwargs)
        return run, fitted

    run, _ = trained(1)
    _, again = trained(2, ckpt_path=run.trainer.checkpoint_callback.best_model_path)
    _, whole = trained(2)
    for name, values in whole.model.state_dict().items():
        if name.startswith(("kinds.", "gaussians.", "base.")):
            assert torch.equal(values, again.model.state_dict()[name]), name
