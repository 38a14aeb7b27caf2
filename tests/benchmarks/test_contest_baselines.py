# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch
from model_helpers import BACKBONE
from sklearn.covariance import LedoitWolf
from sklearn.neighbors import NearestNeighbors
from torch import nn

from anomalib_flowood.models.embedding_flow import EmbeddingFlowModel
from benchmarks.contest import baselines

SMALL = {"pre_trained": False, "subspace_dim": 8}


@pytest.fixture
def embeddings():
    return nn.functional.normalize(torch.randn(60, 256), dim=1)


def fitted(name, embeddings):
    model = baselines.MODELS[name](BACKBONE, (), **SMALL)
    model.fit((embeddings[:40, : model.dims],))
    return model, embeddings[40:, : model.dims], embeddings[:40, : model.dims]


def test_knn_agrees_with_sklearn(embeddings):
    model, test, train = fitted("KNN", embeddings)
    length = test.norm(dim=1), train.norm(dim=1)
    model.fit((train / length[1][:, None],))
    expected = NearestNeighbors(n_neighbors=5, metric="cosine").fit(train.numpy()).kneighbors(test.numpy())[0].mean(1)
    np.testing.assert_allclose(model.distance(test / length[0][:, None]).numpy(), expected, atol=1e-5)


def test_mahalanobis_agrees_with_sklearn(embeddings):
    model, test, train = fitted("Mahalanobis", embeddings)
    expected = LedoitWolf().fit(train.double().numpy()).mahalanobis(test.double().numpy())
    np.testing.assert_allclose(model.distance(test).numpy(), expected, rtol=1e-6)


def test_ppca_is_the_density_of_its_gaussian(embeddings):
    model, test, _ = fitted("PPCA", embeddings)
    directions = model.components.double()
    rest = torch.eye(model.dims, dtype=torch.float64) - directions.T @ directions
    covariance = directions.T @ torch.diag(model.variances.double()) @ directions + model.tail_variance.double() * rest
    gaussian = torch.distributions.MultivariateNormal(model.mean.double(), covariance)
    expected = -gaussian.log_prob(test.double()) / model.dims
    torch.testing.assert_close(model.distance(test).double(), expected, rtol=1e-3, atol=1e-3)


def test_gaussian_mixture_is_embedding_flow_before_it_trains(embeddings):
    model, test, train = fitted("GaussianMixture", embeddings)
    flow = EmbeddingFlowModel(BACKBONE, (), **SMALL)
    flow.fit_subspace(train)
    assert len(flow.centres.unique(dim=0)) > 4  # of 40 images: 4 for each clustering
    with torch.no_grad():
        torch.testing.assert_close(model.distance(test), -flow.density(flow.project(test)).log_prob / flow.dims)


def test_gaussian_map_is_a_whitened_gaussian():
    small = {"pre_trained": False, "subspace_dim": 4, "hidden_channels": 8, "bottleneck_dim": 3, "tail": False}
    model = baselines.GaussianMapModel(BACKBONE, (1, 2), (48, 48), **small).eval()
    images = torch.randn(12, 3, 48, 48)
    with torch.no_grad():
        model.fit(model.observe(images))
        reduced = model.reduce(model.extract(images))
        # The flow is the identity: a standard normal of the whitened maps, times the Jacobian of the whitening.
        expected = sum(
            -0.5 * (layer.square() + math.log(2 * math.pi)).flatten(1).sum(1)
            - model._log_scale(number).expand_as(layer[0]).sum()
            for number, layer in enumerate(reduced)
        )
        torch.testing.assert_close(model.log_prob(images), expected, rtol=1e-4, atol=1e-2)
        assert model(images).anomaly_map.shape == (12, 1, 48, 48)
