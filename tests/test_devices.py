# SPDX-License-Identifier: Apache-2.0
"""Detectors on a device that is not the CPU: a pretended one everywhere, and the GPU where there is one. Precisions."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from model_helpers import (
    BACKBONE,
    DETECTORS,
    data,
    embedding_flow,
    engine,
    feature_map_flow,
    idx_folder,
    pixel_flow,
    products_folder,
)
from pretend_device import PretendAccelerator, pretend_device
from torchvision.transforms.v2 import ColorJitter

from anomalib_flowood import OneClass
from anomalib_flowood.explain import explain
from anomalib_flowood.flows import Whitening
from anomalib_flowood.models.components import backbone_pre_processor, rotations
from anomalib_flowood.scores import SCORES, DensityOfStates, Ensemble, LocalIntrinsicDimension
from benchmarks.contest.baselines import MODELS, Baseline

TINY = {"max_epochs": 1}
BUILD = {
    "pixel_flow": lambda **kwargs: pixel_flow(image_size=(6, 6), **TINY, **kwargs),  # for Jacobians
    "embedding_flow": lambda **kwargs: embedding_flow(**TINY, **kwargs),
    "feature_map_flow": lambda **kwargs: feature_map_flow(**TINY, **kwargs),
}
WITH_SCORES = [
    *(("pixel_flow", score) for score in SCORES),
    *(("embedding_flow", name) for name, score in SCORES.items() if not score.pixels_only),
]


@pytest.fixture(params=["pretend", *(["cuda"] if torch.cuda.is_available() else [])])
def away(request):
    """A device, and what puts Lightning's trainer there."""
    if request.param == "cuda":
        yield SimpleNamespace(device=torch.device("cuda"), trainer=lambda: {"accelerator": "gpu"})
        return
    with pretend_device() as device:
        yield SimpleNamespace(
            device=device,
            trainer=lambda: {"accelerator": PretendAccelerator(), "strategy": SingleDeviceStrategy(device)},
        )


@pytest.fixture
def images(tmp_path):
    """Few images: 22 calibrate."""
    for name, texture in (("ramps", "plain"), ("squares", "square")):
        idx_folder(tmp_path / name, texture, train=110, test=8)
    return data(tmp_path)


def is_away(detector, away):
    return all(t.device.type == away.device.type for t in (*detector.parameters(), *detector.buffers()))


def batch_of(module):
    return next(iter(module.test_dataloader())).image.as_subclass(torch.Tensor)


@torch.no_grad()
def outputs(detector, images):
    """What a detector says of images, which it gets on its own device."""
    model, images = detector.eval().model, images.to(detector.device)
    prepared = detector.pre_processor.transform(images)
    predicted = detector(images)
    said = {"log_prob": model.log_prob(prepared), "bits": model.bits_per_dim(prepared), "raw": model(prepared)}
    said["raw"], said["map"] = said["raw"].pred_score, said["raw"].anomaly_map
    said |= {"score": predicted.pred_score, "label": predicted.pred_label}
    said = {name: value for name, value in said.items() if value is not None}
    assert all(value.device.type == detector.device.type for value in said.values())
    return {name: value.cpu().float() for name, value in said.items()}


def says_the_same_everywhere(detector, away, images):
    """The device computes what the CPU does; in double precision, since flows multiply what CUDA rounds differently."""
    here = outputs(detector.cpu().double(), images.double())
    there = outputs(detector.to(away.device), images.double())
    assert is_away(detector, away)
    detector.cpu().float().to(away.device)
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("kind", "score"), [*WITH_SCORES, ("feature_map_flow", None)])
def test_fit_test_and_predict_run_there_with_every_score(kind, score, away, images, tmp_path, monkeypatch):
    monkeypatch.setattr(LocalIntrinsicDimension, "fit_images", 8)
    monkeypatch.setattr(Ensemble, "size", 2)
    detector, module = BUILD[kind](**({"score": score} if score else {})), images
    run = engine(tmp_path, **away.trainer())
    run.fit(detector, datamodule=module)
    tested = run.test(detector, datamodule=module)
    assert 0 <= tested[0]["image_AUROC"] <= 1
    assert all(batch.p_value is not None for batch in run.predict(detector, dataloaders=module.test_dataloader()))
    says_the_same_everywhere(detector, away, batch_of(module))

    # A checkpoint from there is one for anywhere.
    path = run.trainer.checkpoint_callback.best_model_path
    loaded = type(detector).load_from_checkpoint(path, map_location="cpu")
    assert loaded.device.type == "cpu"
    before, after = outputs(detector.cpu(), batch_of(module)), outputs(loaded, batch_of(module))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", DETECTORS)
def test_what_was_fitted_there_goes_on_here_and_back(kind, away, images, tmp_path):
    detector, module = BUILD[kind](), images
    engine(tmp_path, **away.trainer()).fit(detector, datamodule=module)
    fitted = detector.post_processor.calibration.cpu().clone()
    engine(tmp_path).validate(detector, datamodule=module)
    torch.testing.assert_close(detector.post_processor.calibration, fitted, rtol=1e-3, atol=1e-4)
    engine(tmp_path, **away.trainer()).validate(detector, datamodule=module)
    torch.testing.assert_close(detector.post_processor.calibration.cpu(), fitted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["embedding_flow", "feature_map_flow"])
def test_features_are_extracted_anew_there_where_images_are_augmented(kind, away, images, tmp_path):
    detector, module = BUILD[kind](), data(tmp_path, train_augmentations=ColorJitter(0.1))
    engine(tmp_path, **away.trainer()).fit(detector, datamodule=module)
    says_the_same_everywhere(detector, away, batch_of(module))


@pytest.fixture
def two_products(tmp_path):
    """Images of two kinds, of one fewer than of the other: its covariances have fewer directions."""
    folder = products_folder(tmp_path / "products")
    for path in sorted((folder / "train" / "good").iterdir())[64:]:
        path.unlink()
    (folder / "test" / "bad").mkdir()
    for path in sorted((folder / "test" / "good").iterdir())[::4]:
        path.rename(folder / "test" / "bad" / path.name)
    return OneClass(folder, "good", val_split_ratio=0.3)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", ["embedding_flow", "feature_map_flow"])
def test_kinds_of_images_and_turned_copies_are_fitted_there(kind, turned, away, two_products, tmp_path, monkeypatch):
    monkeypatch.setattr(rotations, "LIMIT", 1.0)  # every turn fits
    detector, module = BUILD[kind](image_size=(48, 48), kind_images=10, rotations=turned), two_products
    run = engine(tmp_path, **away.trainer())
    run.fit(detector, datamodule=module)
    sizes = detector.model.kinds.of_points.bincount().tolist()
    assert len(sizes) == 2
    assert sizes[0] > sizes[1]
    run.test(detector, datamodule=module)
    assert all(batch.p_value is not None for batch in run.predict(detector, dataloaders=module.test_dataloader()))
    says_the_same_everywhere(detector, away, batch_of(module))
    assert explain(detector, module, tmp_path / "page", max_images=8).is_file()


@pytest.mark.parametrize(
    ("kind", "score"),
    [*(("pixel_flow", score) for score in SCORES), ("embedding_flow", "nll"), ("feature_map_flow", None)],
)
def test_a_device_needs_no_float64(kind, score, images, two_products, tmp_path, monkeypatch):
    """Apple's MPS has none."""
    monkeypatch.setattr(LocalIntrinsicDimension, "fit_images", 8)
    monkeypatch.setattr(Ensemble, "size", 2)
    of_kinds = {} if kind == "pixel_flow" else {"image_size": (48, 48), "kind_images": 10}
    module = two_products if of_kinds else images
    torch.manual_seed(0)
    detector = BUILD[kind](**({"score": score} if score else {}), **of_kinds)
    with pretend_device(doubles=False) as device:
        with pytest.raises(TypeError, match="float64"):
            torch.ones(3, device=device).double()
        run = engine(tmp_path, accelerator=PretendAccelerator(), strategy=SingleDeviceStrategy(device))
        run.fit(detector, datamodule=module)
        run.test(detector, datamodule=module)
        assert all(batch.p_value is not None for batch in run.predict(detector, dataloaders=module.test_dataloader()))
        there = outputs(detector.to(device), batch_of(module))
        if score in ("nll", None):
            assert explain(detector, module, tmp_path / "page", max_images=8).is_file()
        detector.cpu()
    for name, value in outputs(detector, batch_of(module)).items():
        torch.testing.assert_close(there[name], value, rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", ["pixel_flow", "embedding_flow"])
def test_a_score_is_fitted_there_without_training(kind, away, images, tmp_path):
    detector, module = BUILD[kind](score="typicality"), images
    engine(tmp_path).fit(detector, datamodule=module)
    mean = detector.model.scorer.mean.clone()
    detector.to(away.device).fit_score(module.train_dataloader())
    assert detector.model.scorer.mean.device.type == away.device.type
    torch.testing.assert_close(detector.model.scorer.mean.cpu(), mean, rtol=1e-3, atol=1e-4)


def test_a_score_learns_in_main_memory(away, images, tmp_path, monkeypatch):
    """CUDA's median, which comes with a place, is refused where a trainer is to be deterministic."""
    seen = []
    learn = DensityOfStates.fit_statistics
    monkeypatch.setattr(
        DensityOfStates, "fit_statistics", lambda self, found: (seen.append(found.device.type), learn(self, found))
    )
    detector = BUILD["pixel_flow"](score="density_of_states")
    engine(tmp_path, **away.trainer()).fit(detector, datamodule=images)
    assert seen == ["cpu"]


@pytest.mark.parametrize("kind", DETECTORS)
def test_detectors_are_explained_there(kind, away, images, tmp_path):
    detector, module = DETECTORS[kind](), images
    detector.model.fitted.fill_(True)
    if kind != "pixel_flow":
        engine(tmp_path).fit(detector, datamodule=module)
    assert explain(detector.to(away.device), module, tmp_path / "page", max_images=8).is_file()
    assert is_away(detector, away)


@pytest.mark.parametrize(
    "arguments",
    [
        *({"mask": mask, "native": native} for mask in ("cycle", "channel") for native in (True, False)),
        {"mask": "checkerboard", "subnet": "resnet", "batch_norm": True},
        {"mask": "horizontal", "subnet": "highway"},
        {"architecture": "realnvp"},
        {"architecture": "glow", "coupling_layers": 1},
        {"architecture": "glow", "coupling_layers": 1, "subnet": "conv_bottleneck"},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_flows_of_pixels_train_and_draw_there(arguments, away):
    defaults = {"channels": 3, "hidden_channels": 8, "coupling_layers": 2}
    detector = pixel_flow(**{**defaults, **arguments}).to(away.device)
    images = torch.rand(4, 3, 12, 12)
    inputs = detector.model.inputs(images.to(away.device), noisy=True)
    detector.model.density(inputs).log_prob.mean().backward()
    gradients = [parameter.grad for parameter in detector.model.flow.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.device.type == away.device.type for gradient in gradients)
    says_the_same_everywhere(detector, away, images)
    drawn = detector.model.sample(3, 0.9, torch.Generator(away.device).manual_seed(0))
    assert (drawn.device.type, drawn.shape) == (away.device.type, (3, 3, 12, 12))
    assert detector.model.sample(2).device.type == away.device.type


@pytest.mark.parametrize("name", MODELS)
def test_baselines_of_the_contest_run_there(name, away, images, tmp_path, monkeypatch):
    size = (48, 48)
    monkeypatch.setitem(MODELS, name, partial(MODELS[name], pre_trained=False))
    around = {"pre_processor": backbone_pre_processor(BACKBONE, size), "post_processor": False, "evaluator": False}
    detector = Baseline(name, BACKBONE, size, visualizer=False, **around)
    run = engine(tmp_path, **away.trainer())
    run.fit(detector, datamodule=images)
    predictions = run.predict(detector, dataloaders=images.test_dataloader())
    assert torch.cat([batch.pred_score.cpu() for batch in predictions]).isfinite().all()


def test_a_forgotten_move_fails_there(away):
    there, here = torch.ones(3).to(away.device), torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="same device"):
        torch.stack([there.sum(), here.sum()])
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=away.device, generator=torch.Generator())
    assert (there + here.sum() == there * 4).all()
    assert there[torch.tensor([0, 2])].shape == (2,)
    assert torch.equal(there.cpu(), here)


@pytest.mark.parametrize("block", [1, 4])
def test_of_maps_their_blocks_alone_are_brought_to_main_memory(block, away, monkeypatch):
    maps = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    here, there = (Whitening([(3, 8, 8)], 4, block=block) for _ in range(2))
    here.fit(maps)
    brought, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (brought.append(self.numel()), cpu(self))[1])
    there.to(away.device).fit(maps.to(away.device))
    assert max(brought) == maps.numel() // block**2
    monkeypatch.undo()
    torch.testing.assert_close(there.whitened(maps.to(away.device)).cpu(), here.whitened(maps))


# -- precision ----------------------------------------------------------------------------------------------------

MIXED = ["bf16-mixed", "16-mixed"]
PLACES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def precise(place, precision):
    """What gives Lightning's trainer a precision on a device."""
    if place == "cuda":
        return {"accelerator": "gpu", "precision": precision}
    if precision == "16-mixed":  # by its name, Lightning takes bf16-mixed on the CPU
        return {"plugins": [MixedPrecision(precision, "cpu")]}
    return {"precision": precision}


class Norms(Callback):
    """The norm of the gradients before and after they are clipped, of each step."""

    def __init__(self):
        self.before, self.after = [], []

    def norm(self, pl_module):
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        return float(torch.stack([gradient.float().norm() for gradient in gradients]).norm())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append(self.norm(pl_module))

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if self.before:
            self.after.append(self.norm(pl_module))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", MIXED)
@pytest.mark.parametrize("clip", [None, 0.01])
def test_gradients_are_clipped_as_they_are_and_not_times_the_loss_scale(place, precision, clip, images, tmp_path):
    norms = {}
    for bits in ("32-true", precision):
        torch.manual_seed(0)
        norms[bits] = Norms()
        trainer = precise(place, bits) | {"callbacks": [norms[bits]], "gradient_clip_val": clip}
        engine(tmp_path, **trainer).fit(BUILD["pixel_flow"](), datamodule=images)
    for mixed, full in zip(norms[precision].before, norms["32-true"].before, strict=True):
        assert mixed == pytest.approx(full, rel=0.1)
    for mixed in norms[precision].after:
        assert mixed <= (clip or 50) * 1.01


@torch.no_grad()
def raw_scores(run, detector, module):
    return torch.cat([batch.raw_score.cpu() for batch in run.predict(detector, dataloaders=module.test_dataloader())])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("precision", [*MIXED, "64-true"])
@pytest.mark.parametrize("kind", BUILD)
def test_scores_do_not_depend_on_the_precision_of_the_trainer(kind, precision, place, images, tmp_path):
    detector = BUILD[kind]()
    run = engine(tmp_path, **precise(place, precision))
    run.fit(detector, datamodule=images)
    assert run.test(detector, datamodule=images)[0]["image_AUROC"] > 0.8
    scores = raw_scores(run, detector, images)
    if precision == "64-true":
        with pytest.raises(ValueError, match=r"64 bits.*float\(\)"):
            run.export(detector, export_type="onnx", export_root=tmp_path)
    full = raw_scores(engine(tmp_path, accelerator="gpu" if place == "cuda" else "cpu"), detector.float(), images)
    torch.testing.assert_close(full, scores.float(), rtol=1e-3 if precision == "64-true" else 1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("kind", BUILD)
def test_weights_of_16_bits_are_refused_before_anything_happens(kind, precision, tmp_path):
    detector = BUILD[kind]()
    for what in ("fit", "validate", "test", "predict"):
        with pytest.raises(ValueError, match=rf"{precision}.*bf16-mixed"):
            getattr(engine(tmp_path, precision=precision), what)(detector, datamodule=data(tmp_path))
        assert next(detector.parameters()).dtype == torch.float32
    size = detector.hparams["image_size"]
    with pytest.raises(ValueError, match=r"torch\.bfloat16.*bf16-mixed"):
        detector.bfloat16().model.log_prob(torch.rand(2, 3, *size))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", [*BUILD, "glow", "realnvp"])
def test_autocast_leaves_densities_alone(kind, place, images, tmp_path):
    detector = pixel_flow(architecture=kind) if kind in ("glow", "realnvp") else BUILD[kind]()
    engine(tmp_path).fit(detector, datamodule=images)
    detector.eval().to(place)
    batch = detector.pre_processor.transform(batch_of(images).to(place))
    with torch.no_grad():
        full = detector.model.log_prob(batch)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(place, dtype=dtype):
                torch.testing.assert_close(detector.model.log_prob(batch), full, rtol=1e-6, atol=1e-5)
            with torch.autocast(place, dtype=dtype):
                trained = detector.train().model.density(detector.inputs_of(ImageBatch(image=batch))).log_prob
            detector.eval()
            assert trained.dtype == torch.float32
            assert not torch.equal(trained, full)  # s,t-networks in 16 bits
            torch.testing.assert_close(trained, full, rtol=2e-2, atol=1)
