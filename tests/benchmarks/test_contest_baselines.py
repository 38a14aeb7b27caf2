# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from model_helpers import BACKBONE
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors
from torch import nn

from benchmarks.contest import baselines
from benchmarks.contest.detectors import DETECTORS


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


@pytest.mark.parametrize("name", ["PPCA", "GaussianMixture", "GaussianMap"])
def test_other_baselines_are_detectors_without_couplings(name):
    build, size = DETECTORS[name].build, 64
    detector = build("test_efficientnet", size, "industrial", pre_trained=False, subspace_dim=8)
    assert not list(detector.model.flow.parameters())
    assert not DETECTORS[name].ours
    if name == "PPCA":
        assert len(detector.model.base.centres.unique(dim=0)) == 1
        assert detector.model.feature_noise == 0
