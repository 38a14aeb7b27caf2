# SPDX-License-Identifier: Apache-2.0
"""Every detector through anomalib's engine: fit, test, predict, checkpoints, export."""

import math

import numpy as np
import pytest
import torch
from anomalib.data import Folder, ImageBatch, MVTecAD
from anomalib.metrics import AUROC as AnomalibAUROC
from anomalib.metrics import Evaluator
from anomalib.models import Padim, get_model, list_models
from lightning.pytorch import Callback
from model_helpers import DETECTORS, compile_model, data, embedding_flow, engine, lowered_layers, pixel_flow
from PIL import Image
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score

from anomalib_flowood import EmbeddingFlow, PixelFlow
from anomalib_flowood.models.components import ConformalPostProcessor, TrainingDivergedError

each_detector = pytest.mark.parametrize("name", DETECTORS)


class Raw(Callback):
    """Keeps what the detector gives before the post-processor."""

    def __init__(self):
        self.scores, self.labels, self.sources = [], [], []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.scores += outputs.pred_score.tolist()
        self.labels += batch.gt_label.int().tolist()
        self.sources += batch.source


@each_detector
def test_fit_test_and_predict(name, tmp_path):
    raw, module, detector = Raw(), data(tmp_path), DETECTORS[name]()
    run = engine(tmp_path, callbacks=[raw])
    run.fit(detector, datamodule=module)
    assert run.trainer.current_epoch == 2

    (metrics,) = run.test(detector, datamodule=module, verbose=False)
    assert metrics["image_AUROC"] == pytest.approx(roc_auc_score(raw.labels, raw.scores), abs=1e-6)
    assert metrics["image_AUROC"] > 0.9
    assert set(raw.sources) == {"ramps", "squares"}
    assert {"image_FPR95", "image_F1Score"} <= set(metrics)

    predictions = run.predict(detector, datamodule=module, return_predictions=True)
    scores = torch.cat([batch.pred_score for batch in predictions])
    labels = torch.cat([batch.pred_label for batch in predictions])
    assert ((scores >= 0) & (scores <= 1)).all()
    assert torch.equal(labels, scores > 0.5)
    assert np.array_equal(scores.argsort(stable=True), torch.tensor(raw.scores).argsort(stable=True))


@each_detector
def test_the_final_weights_scores_of_the_validation_images_calibrate(name, tmp_path):
    module, detector = data(tmp_path, val_split_ratio=0.5), DETECTORS[name]()
    detector.post_processor = ConformalPostProcessor(alpha=0.1)
    engine(tmp_path).fit(detector, datamodule=module)
    detector.eval()
    batch = module.val_data.__getitems__(list(range(len(module.val_data))))
    with torch.no_grad():
        scores = detector.model(detector.pre_processor.transform(batch.image)).pred_score
    calibration = detector.post_processor.calibration
    # Stored feature maps have half precision.
    torch.testing.assert_close(calibration, scores.sort().values, rtol=1e-3, atol=0.02 * float(scores.std()))
    assert (calibration > detector.post_processor.image_threshold).sum() == 5  # the seventh would be 7 / 61 > 0.1


def test_a_nan_validation_score_sets_no_threshold(tmp_path):
    detector = pixel_flow()

    class Break(Callback):
        def on_validation_start(self, trainer, pl_module):
            if not trainer.sanity_checking:
                torch.nn.init.constant_(pl_module.model.flow[1].subnet.layers[-1].bias, 1e38)

    with pytest.raises(ValueError, match="NaN or infinite score or map, so no threshold can be set"):
        engine(tmp_path, callbacks=[Break()]).fit(detector, datamodule=data(tmp_path))


@each_detector
@pytest.mark.parametrize(("trainer", "epochs"), [({}, 2), ({"max_epochs": 3}, 3), ({"max_steps": 5}, None)])
def test_the_trainers_limit_is_obeyed_and_the_models_is_the_default(name, trainer, epochs, tmp_path):
    run = engine(tmp_path, **trainer)
    run.fit(DETECTORS[name](), datamodule=data(tmp_path))
    if "max_steps" in trainer:
        assert run.trainer.global_step == 5
        epochs = math.ceil(5 / run.trainer.num_training_batches)
    assert run.trainer.current_epoch == epochs


def test_an_explicit_thousand_epochs_is_a_thousand(tmp_path):
    run = engine(tmp_path, max_epochs=1000)
    detector = pixel_flow()

    class EndsTheFit(Callback):
        def on_train_start(self, trainer, pl_module):
            self.planned = trainer.max_epochs
            trainer.should_stop = True

    stop = EndsTheFit()
    run._cache.args["callbacks"].append(stop)
    run.fit(detector, datamodule=data(tmp_path))
    assert stop.planned == 1000


@each_detector
def test_checkpoints_load_without_pickled_code(name, tmp_path):
    detector, module = DETECTORS[name](), data(tmp_path)
    run = engine(tmp_path)
    run.fit(detector, datamodule=module)
    path = run.trainer.checkpoint_callback.best_model_path
    torch.load(path, weights_only=True)
    again = type(detector).load_from_checkpoint(path).eval()
    assert again.hparams == detector.hparams
    images = torch.rand(3, 3, 20, 30)
    with torch.no_grad():
        assert torch.equal(again(images).pred_score, detector.eval()(images).pred_score)
    (from_path,) = run.test(DETECTORS[name](), datamodule=module, ckpt_path=path, verbose=False)
    (from_memory,) = run.test(detector, datamodule=module, verbose=False)
    assert from_path == from_memory


def test_a_fit_resumes_from_a_checkpoint(tmp_path):
    detector, module = embedding_flow(max_epochs=2), data(tmp_path)
    run = engine(tmp_path)
    run.fit(detector, datamodule=module)
    path = run.trainer.checkpoint_callback.best_model_path
    resumed = embedding_flow(max_epochs=4)
    run = engine(tmp_path)
    run.fit(resumed, datamodule=module, ckpt_path=path)
    assert run.trainer.current_epoch == 4
    for after, before in zip(resumed.model.gaussians, detector.model.gaussians, strict=True):
        assert torch.equal(after.components, before.components)


def test_a_checkpoint_of_another_class_is_refused(tmp_path):
    module, run = data(tmp_path), engine(tmp_path)
    run.fit(embedding_flow(max_epochs=1), datamodule=module)
    path = run.trainer.checkpoint_callback.best_model_path
    message = "written by EmbeddingFlow, so PixelFlow cannot load it; load it with anomalib_flowood.EmbeddingFlow"
    with pytest.raises(ValueError, match=message):
        PixelFlow.load_from_checkpoint(path)
    with pytest.raises(ValueError, match=message):
        engine(tmp_path).test(pixel_flow(), datamodule=module, ckpt_path=path)


def test_a_checkpoint_of_one_of_anomalibs_detectors_is_refused(tmp_path):
    run = engine(tmp_path)
    detector = Padim(
        backbone="test_efficientnet", layers=["blocks.1"], pre_trained=False, n_features=8, visualizer=False
    )
    run.fit(detector, datamodule=data(tmp_path))
    with pytest.raises(ValueError, match="not written by a detector of anomalib_flowood"):
        EmbeddingFlow.load_from_checkpoint(run.trainer.checkpoint_callback.best_model_path)


@each_detector
def test_a_diverged_training_stops_and_keeps_the_last_good_checkpoint(name, tmp_path):
    detector, module = DETECTORS[name](max_epochs=5), data(tmp_path)

    class Break(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                torch.nn.init.constant_([*pl_module.model.flow.parameters()][-1], float("nan"))

    run = engine(tmp_path, callbacks=[Break()])
    with pytest.raises(TrainingDivergedError, match=r"loss is nan in epoch 2, batch 0.*last good checkpoint is kept"):
        run.fit(detector, datamodule=module)
    path = run.trainer.checkpoint_callback.best_model_path
    again = type(detector)(**{**detector.hparams, "learning_rate": 1e-4})
    if name == "feature_map_flow":  # whose whitening is fitted to the last weights alone: it can go on
        engine(tmp_path).fit(again, datamodule=module, ckpt_path=path)
        assert again.post_processor.calibrated
    else:
        again = type(detector).load_from_checkpoint(path)
    assert all(torch.isfinite(parameter).all() for parameter in again.parameters())


def test_weights_that_broke_in_the_last_step_do_not_reach_a_checkpoint(tmp_path):
    class Break(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and trainer.is_last_batch:
                torch.nn.init.constant_(pl_module.model.flow[-1].scale, float("nan"))

    run = engine(tmp_path, callbacks=[Break()], limit_val_batches=0)
    with pytest.raises(TrainingDivergedError, match="weights of module_list.4.scale are NaN or infinite"):
        run.fit(pixel_flow(max_epochs=3), datamodule=data(tmp_path))
    PixelFlow.load_from_checkpoint(run.trainer.checkpoint_callback.best_model_path)


@pytest.mark.parametrize("export_type", ["torch", "onnx", "openvino"])
@each_detector
def test_a_detector_that_was_never_fitted_is_not_exported(name, export_type, tmp_path):
    with pytest.raises(NotFittedError, match="was never fitted, so there is nothing to export"):
        engine(tmp_path).export(DETECTORS[name](), export_type, export_root=tmp_path)


@pytest.mark.parametrize("method", ["test", "validate", "predict"])
@each_detector
def test_a_detector_that_was_never_fitted_judges_nothing(name, method, tmp_path):
    detector = DETECTORS[name]()
    with pytest.raises(NotFittedError, match=f"was never fitted, so there is nothing to {method}.*ckpt_path"):
        getattr(engine(tmp_path), method)(detector, datamodule=data(tmp_path))
    assert not detector.post_processor.calibrated


@each_detector
def test_torch_export_agrees(name, cases):
    again = torch.load(cases(name).export("torch"), weights_only=False)["model"]
    images = torch.rand(4, 3, 31, 17)
    with torch.no_grad():
        assert torch.equal(again(images).pred_score, cases(name).detector(images).pred_score)


@each_detector
def test_onnx_and_openvino_exports_agree_with_the_tested_scores(name, cases):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is the extra anomalib-flowood[export]")
    pytest.importorskip("openvino", reason="OpenVINO export is the extra anomalib-flowood[export]")
    detector, onnx_path, ir_path = cases(name).detector, cases(name).export("onnx"), cases(name).export("openvino")
    session = onnxruntime.InferenceSession(str(onnx_path))
    names = [output.name for output in session.get_outputs()]
    models = [compile_model(ir_path, precision) for precision in (None, "bf16", "f32")]
    assert not any(lowered_layers(model) for model in models)
    torch.manual_seed(0)  # of pixels that are resized, one in some thousands lies between two grey levels of PixelFlow
    for size in ((12, 12), (32, 32), (50, 41), (9, 10)):  # at, below and above the detector's own
        images = torch.rand(5, 3, *size)
        batch = ImageBatch(image=detector.pre_processor.transform(images))
        with torch.no_grad():  # as in anomalib's test loop
            batch.update(**detector.model(batch.image)._asdict())
        detector.post_processor.post_process_batch(batch)
        for outputs in (
            dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True)),
            *(model(images.numpy()) for model in models),
        ):
            np.testing.assert_allclose(outputs["pred_score"], batch.pred_score, rtol=1e-4)
            assert np.array_equal(outputs["pred_label"], batch.pred_label)
            if batch.anomaly_map is not None:
                exported = np.squeeze(outputs["anomaly_map"], axis=1)
                # Noise is off by thousands of deviations, between which single precision leaves less of a pixel.
                np.testing.assert_allclose(exported, batch.anomaly_map, rtol=1e-4, atol=1e-4)


def test_without_validation_scores_stay_raw_and_there_are_no_labels(tmp_path, caplog):
    detector, module = pixel_flow(), data(tmp_path)
    run = engine(tmp_path, limit_val_batches=0)
    run.fit(detector, datamodule=module)
    (batch, *_) = run.predict(detector, datamodule=module, return_predictions=True)
    assert batch.pred_label is None
    with torch.no_grad():
        torch.testing.assert_close(batch.pred_score, detector.eval().model(batch.image).pred_score)
    run.export(detector, "onnx", export_root=tmp_path)
    assert "the exported model gives raw scores and no labels" in caplog.text


def test_anomalibs_own_auroc_is_right_on_our_scores(tmp_path):
    # torchmetrics applies a sigmoid to scores outside of [0, 1]; ours lie inside.
    raw = Raw()
    evaluator = Evaluator(test_metrics=[AnomalibAUROC(fields=["pred_score", "gt_label"], prefix="theirs_")])
    detector, module = pixel_flow(evaluator=evaluator), data(tmp_path)
    run = engine(tmp_path, callbacks=[raw])
    run.fit(detector, datamodule=module)
    (metrics,) = run.test(detector, datamodule=module, verbose=False)
    assert metrics["theirs_AUROC"] == pytest.approx(roc_auc_score(raw.labels, raw.scores), abs=1e-6)


def save(folder, images):
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")


@pytest.fixture(scope="module")
def image_folders(tmp_path_factory):
    """A folder laid out as MVTec AD is."""
    root = tmp_path_factory.mktemp("mvtec") / "part"
    rng = np.random.default_rng(0)
    plain = rng.integers(90, 110, (80, 20, 24, 3), dtype=np.uint8)
    defect = plain[:20].copy()
    defect[:, 5:12, 5:12] = 250
    save(root / "train" / "good", plain[:40])
    save(root / "test" / "good", plain[40:])
    save(root / "test" / "spot", defect)
    mask = np.zeros((20, 20, 24), dtype=np.uint8)
    mask[:, 5:12, 5:12] = 255
    (root / "ground_truth" / "spot").mkdir(parents=True)
    for number, image in enumerate(mask):
        Image.fromarray(image).save(root / "ground_truth" / "spot" / f"{number:03d}_mask.png")
    return root


@each_detector
@pytest.mark.parametrize("kind", ["Folder", "MVTecAD"])
@pytest.mark.parametrize("workers", [0, 2])
def test_anomalibs_own_data_modules(name, kind, workers, image_folders, tmp_path):
    sizes = {"train_batch_size": 16, "eval_batch_size": 16, "num_workers": workers}
    if kind == "Folder":
        module = Folder(
            name="part", root=image_folders, normal_dir="train/good", abnormal_dir="test/spot",
            normal_test_dir="test/good", seed=0, **sizes,
        )  # fmt: skip
    else:
        module = MVTecAD(root=image_folders.parent, category="part", **sizes)
    detector = DETECTORS[name]()
    run = engine(tmp_path)
    run.fit(detector, datamodule=module)
    (metrics,) = run.test(detector, datamodule=module, verbose=False)
    assert metrics["image_AUROC"] > 0.9
    assert detector.post_processor.calibrated


@each_detector
def test_plain_data_loaders_work_too(name, tmp_path):
    module = data(tmp_path)
    module.setup()
    detector = DETECTORS[name]()
    run = engine(tmp_path)
    run.fit(detector, train_dataloaders=module.train_dataloader(), val_dataloaders=module.val_dataloader())
    (metrics,) = run.test(detector, dataloaders=module.test_dataloader(), verbose=False)
    assert metrics["image_AUROC"] > 0.9


def test_anomalib_knows_the_detectors():
    assert {"pixel_flow", "embedding_flow", "feature_map_flow"} <= list_models()
    assert isinstance(get_model("pixel_flow"), PixelFlow)
    assert isinstance(get_model({"class_path": "PixelFlow", "init_args": {"channels": 1}}), PixelFlow)
    assert isinstance(get_model({"class_path": "anomalib_flowood.PixelFlow"}), PixelFlow)


@pytest.mark.parametrize(("clip", "norm"), [({}, 50), ({"gradient_clip_val": 1e-3}, 1e-3)])
def test_gradients_are_clipped_as_the_trainer_says(clip, norm, tmp_path):
    norms = []

    class Norm(Callback):
        def on_after_backward(self, trainer, pl_module):
            for parameter in pl_module.model.flow.parameters():
                parameter.grad = torch.full_like(parameter, 10.0)

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            gradients = [p.grad for p in pl_module.model.flow.parameters() if p.grad is not None]
            if gradients:
                norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    engine(tmp_path, callbacks=[Norm()], max_epochs=2, **clip).fit(pixel_flow(), datamodule=data(tmp_path))
    assert norms
    assert norms == pytest.approx([norm] * len(norms), rel=1e-3)


@pytest.mark.parametrize("name", ["embedding_flow", "feature_map_flow"])
def test_without_couplings_a_detector_is_fitted_in_one_epoch(name, tmp_path):
    module, detector, run = data(tmp_path), DETECTORS[name](coupling_layers=0, max_epochs=9), engine(tmp_path)
    run.fit(detector, datamodule=module)
    assert run.trainer.current_epoch == 1
    assert run.test(detector, datamodule=module, verbose=False)[0]["image_AUROC"] > 0.9
    again = type(detector).load_from_checkpoint(run.trainer.checkpoint_callback.best_model_path)
    images = torch.rand(3, 3, *detector.hparams["image_size"])
    with torch.no_grad():
        torch.testing.assert_close(again.eval().model.log_prob(images), detector.eval().model.log_prob(images))
