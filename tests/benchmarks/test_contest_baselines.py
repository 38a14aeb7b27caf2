# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from model_helpers import BACKBONE
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors
from torch import nn

from benchmarks.contest import baselines
from benchmarks.contest.detectors import DETECTORS, TRAINED


@pytest.fixture
def embeddings():
    return nn.functional.normalize(torch.randn(60, 256), dim=1)


def fitted(name, embeddings):
    model = baselines.MODELS[name](BACKBONE, (), pre_trained=False)
    dims = model.embedding.dims
    model.fit(embeddings[:40, :dims])
    return model, embeddings[40:, :dims], embeddings[:40, :dims]


def test_knn_agrees_with_sklearn(embeddings):
    model, test, train = fitted("KNN", embeddings)
    length = test.norm(dim=1), train.norm(dim=1)
    model.fit(train / length[1][:, None])
    expected = NearestNeighbors(n_neighbors=5, metric="cosine").fit(train.numpy()).kneighbors(test.numpy())[0].mean(1)
    np.testing.assert_allclose(model.distance(test / length[0][:, None]).numpy(), expected, atol=1e-5)


def test_mahalanobis_agrees_with_sklearn(embeddings):
    model, test, train = fitted("Mahalanobis", embeddings)
    expected = LedoitWolf().fit(train.double().numpy()).mahalanobis(test.double().numpy())
    np.testing.assert_allclose(model.distance(test).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("images", [40, 9])
def test_ppca_is_a_gaussian(embeddings, images):
    model, test, train = fitted("PPCA", embeddings)
    model.most = 12
    train = train[:images].double()
    model.fit(train)
    k, dims = len(model.subspace.components), train.shape[1]
    assert k == min(12, images // 2)
    values, vectors = np.linalg.eigh(np.cov(train.numpy().T))
    values[: dims - k] = values[: dims - k].mean()
    gaussian = multivariate_normal(train.mean(0).numpy(), vectors * values @ vectors.T)
    expected = -gaussian.logpdf(test.double().numpy()) / dims
    np.testing.assert_allclose(model.distance(test).numpy(), expected, rtol=1e-4 if images == 40 else 1e-3)


@pytest.mark.parametrize("trained", TRAINED)
def test_a_variant_differs_in_its_arguments(trained):
    built = {}
    for name in (trained, TRAINED[trained]):
        detector = DETECTORS[name]
        built[name] = detector.build("test_efficientnet", 64, "industrial", pre_trained=False)
        assert detector.ours != bool(detector.variant_of)
    assert list(built[trained].model.flow.parameters())
    assert not list(built[TRAINED[trained]].model.flow.parameters())
    assert type(built[trained]) is type(built[TRAINED[trained]])
