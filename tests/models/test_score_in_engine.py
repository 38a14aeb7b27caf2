# SPDX-License-Identifier: Apache-2.0
"""Every score through anomalib's engine: fitted in training, calibrated, saved, put on a checkpoint, exported."""

from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from model_helpers import data, embedding_flow, engine, pixel_flow
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score

from anomalib_flowood.scores import SCORES, LikelihoodRatio, LocalIntrinsicDimension

# Small images, since the Jacobian has the square of their dimension.
BUILD = {
    "pixel_flow": lambda **kwargs: pixel_flow(image_size=(6, 6), **kwargs),
    "embedding_flow": embedding_flow,
}
CASES = [
    *(("pixel_flow", score) for score in SCORES),
    *(("embedding_flow", name) for name, score in SCORES.items() if not score.pixels_only),
]
TRAINED_BESIDE = ["likelihood_ratio", "ensemble"]
ALONE = [case for case in CASES if case[1] not in TRAINED_BESIDE]

each_case = pytest.mark.parametrize(("kind", "score"), CASES)
each_score_of_one_flow = pytest.mark.parametrize(("kind", "score"), ALONE)


class Raw(Callback):
    """Keeps the test scores before the post-processor, and whether the score is fitted when a validation ends."""

    def __init__(self):
        self.scores, self.labels, self.ready, self.val_loss = [], [], [], []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.scores += outputs.pred_score.tolist()
        self.labels += batch.gt_label.int().tolist()

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.ready.append(pl_module.model.scorer.ready)
            self.val_loss.append(float(trainer.callback_metrics["val_loss"]))


def fit(folder, detector, **trainer):
    """Fit and say what came of it."""
    raw, module = Raw(), data(folder)
    callbacks = [raw, *trainer.pop("callbacks", [])]
    run = engine(folder, callbacks=callbacks, **trainer)
    torch.manual_seed(1)
    run.fit(detector, datamodule=module)
    path = run.trainer.checkpoint_callback.best_model_path
    return SimpleNamespace(detector=detector.eval(), module=module, run=run, path=path, raw=raw)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Detectors by kind and score, each fitted once; without random weights of their scores, all with the same flow."""
    done = {}

    def get(kind, score):
        if (kind, score) not in done:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(f"{kind}-{score}")
            case = fit(folder, BUILD[kind](score=score))
            (case.metrics,) = case.run.test(case.detector, datamodule=case.module, verbose=False)
            done[kind, score] = case
        return done[kind, score]

    return get


def pre_processed(detector, dataset):
    batch = dataset.__getitems__(list(range(len(dataset))))
    return detector.pre_processor.transform(batch.image)


@torch.no_grad()
def scores_of(detector, dataset):
    """Raw scores and −log p per dimension of a data set's images."""
    model, images = detector.model, pre_processed(detector, dataset)
    return model(images).pred_score, -model.log_prob(images) / model.dims


# -- training with a score ---------------------------------------------------------------------------------------


@each_case
def test_the_calibration_is_of_this_score(kind, score, trained):
    case = trained(kind, score)
    scores, nll = scores_of(case.detector, case.module.val_data)
    calibration = case.detector.post_processor.calibration
    assert len(calibration) == 24
    torch.testing.assert_close(calibration, scores.sort().values, rtol=1e-3, atol=1e-3 * float(scores.std()))
    assert torch.allclose(calibration, nll.sort().values, rtol=1e-5, atol=0) == (score == "nll")


@each_case
def test_the_validation_loss_is_the_negative_log_likelihood_whatever_the_score(kind, score, trained):
    case = trained(kind, score)
    nll = scores_of(case.detector, case.module.val_data)[1]
    assert case.raw.val_loss[-1] == pytest.approx(float(nll.mean()), rel=1e-4)


@each_case
def test_the_tested_auroc_is_that_of_the_raw_scores(kind, score, trained):
    case = trained(kind, score)
    assert case.metrics["image_AUROC"] == pytest.approx(roc_auc_score(case.raw.labels, case.raw.scores), abs=1e-6)
    assert any(key.startswith("BitsPerDim") for key in case.metrics) == (score == "nll")


@each_case
def test_a_checkpoint_gives_the_same_scores_and_p_values(kind, score, trained):
    case = trained(kind, score)
    torch.load(case.path, weights_only=True)
    again = type(case.detector).load_from_checkpoint(case.path).eval()
    assert again.hparams["score"] == score
    with torch.no_grad():
        for detector in (again, case.detector):
            batch = next(iter(case.module.test_dataloader()))
            batch.update(**detector.model(detector.pre_processor.transform(batch.image))._asdict())
            detector.post_processor.post_process_batch(batch)
            if detector is again:
                expected = batch
    assert torch.equal(batch.raw_score, expected.raw_score)
    assert torch.equal(batch.p_value, expected.p_value)
    assert torch.equal(batch.pred_label, expected.pred_label)


@pytest.mark.parametrize("kind", BUILD)
def test_the_score_is_fitted_in_the_last_epoch_alone(kind, trained):
    assert trained(kind, "typicality").raw.ready == [False, True]
    assert trained(kind, "nll").raw.ready == [True, True]


@pytest.mark.parametrize("kind", BUILD)
def test_typicality_is_about_the_mean_of_the_training_images(kind, trained):
    case = trained(kind, "typicality")
    nll = scores_of(case.detector, case.module.train_data)[1]
    assert float(case.detector.model.scorer.mean) == pytest.approx(float(nll.mean()), rel=1e-5)


@pytest.mark.parametrize(("kind", "score"), [case for case in CASES if case[1] in TRAINED_BESIDE])
def test_other_flows_train_beside_the_detectors_which_trains_as_if_alone(kind, score, trained, tmp_path, monkeypatch):
    # The noise of the background flow's images would otherwise shift that of the detector's.
    original = LikelihoodRatio.training_loss

    def forked(self, *args):
        with torch.random.fork_rng():
            return original(self, *args)

    monkeypatch.setattr(LikelihoodRatio, "training_loss", forked)
    alone = trained(kind, "nll").detector
    torch.manual_seed(0)
    start = BUILD[kind]()
    detector = BUILD[kind](score=score)
    detector.model.load_state_dict(start.model.state_dict(), strict=False)  # all but the score's flows
    before = [[p.detach().clone() for p in flow.parameters()] for flow in detector.model.scorer.flows]
    fit(tmp_path, detector)
    for name, parameter in detector.model.flow.named_parameters():
        torch.testing.assert_close(parameter, alone.model.flow.get_parameter(name), rtol=1e-5, atol=1e-6)
    for flow, old in zip(detector.model.scorer.flows, before, strict=True):
        new = list(flow.parameters())
        changed = [not torch.equal(a, b) for a, b in zip(old, new, strict=True) if b.requires_grad]
        assert sum(changed) > len(changed) / 2
    # They learn: training images, with the noise that they are trained with, are more likely than at the start.
    images = pre_processed(detector, trained(kind, "nll").module.train_data)
    with torch.no_grad():
        inputs = detector.model.inputs(images.repeat(20, 1, 1, 1))
        if kind == "embedding_flow":
            inputs = (detector.model.blur(inputs[0]), *inputs[1:])
        for flow, old in zip(detector.model.scorer.flows, before, strict=True):
            learned = detector.model.density(inputs, flow).log_prob.mean()
            torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(old), flow.parameters())
            assert learned > detector.model.density(inputs, flow).log_prob.mean()


def test_a_second_fit_forgets_the_first(tmp_path):
    first = fit(tmp_path, pixel_flow(score="typicality"))
    mean = float(first.detector.model.scorer.mean)
    again = fit(tmp_path, first.detector, max_epochs=2)
    assert again.raw.ready == [False, True]
    nll = scores_of(again.detector, again.module.train_data)[1]
    assert float(again.detector.model.scorer.mean) == pytest.approx(float(nll.mean()), rel=1e-5)
    assert abs(float(nll.mean()) - mean) > 0.01


def check_checkpoint(case, path, calibrated=True):
    """Its score was fitted with its own weights, and the calibration is of that score."""
    detector = type(case.detector).load_from_checkpoint(path).eval()
    nll = scores_of(detector, case.module.train_data)[1]
    assert float(detector.model.scorer.mean) == pytest.approx(float(nll.mean()), rel=1e-5)
    assert detector.post_processor.calibrated == calibrated
    if calibrated:
        scores = scores_of(detector, case.module.val_data)[0].sort().values
        torch.testing.assert_close(detector.post_processor.calibration, scores, rtol=1e-3, atol=1e-5)
    return float(detector.model.scorer.mean)


def test_where_the_best_checkpoint_is_chosen_each_has_its_score(tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=-1)
    case = fit(tmp_path, pixel_flow(score="typicality"), callbacks=[keep])
    assert case.raw.ready == [True, True]
    first, second = (check_checkpoint(case, path) for path in sorted(tmp_path.glob("epoch*.ckpt")))
    assert first > second + 0.001


@pytest.mark.parametrize("trainer", [{"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}])
def test_the_best_checkpoint_without_a_validation_has_its_score_too(trainer, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", monitor="train_loss", save_top_k=-1, save_on_train_epoch_end=True)
    case = fit(tmp_path, pixel_flow(score="typicality"), max_epochs=3, callbacks=[keep], **trainer)
    means = [
        check_checkpoint(case, path, calibrated=bool(trainer.get("check_val_every_n_epoch")) and number == 1)
        for number, path in enumerate(sorted(tmp_path.glob("epoch*.ckpt")))
    ]
    assert len(set(means)) == 3


def test_early_stopping_leaves_a_fitted_score(tmp_path):
    stop = EarlyStopping("val_loss", patience=1, min_delta=1e6)
    case = fit(tmp_path, pixel_flow(score="typicality", max_epochs=9), callbacks=[stop])
    assert case.run.trainer.current_epoch == 2
    assert case.raw.ready == [True, True]
    check_checkpoint(case, case.path)


@pytest.mark.parametrize("steps", [3, 5])
def test_a_limit_in_steps_leaves_a_fitted_score(steps, tmp_path):
    # Three steps make an epoch.
    case = fit(tmp_path, pixel_flow(score="typicality"), max_steps=steps)
    assert case.run.trainer.global_step == steps
    nll = scores_of(case.detector, case.module.train_data)[1]
    assert float(case.detector.model.scorer.mean) == pytest.approx(float(nll.mean()), rel=1e-5)
    assert case.detector.post_processor.calibrated == (steps == 3)


def test_a_limit_in_time_leaves_a_fitted_score(tmp_path):
    case = fit(tmp_path, pixel_flow(score="typicality"), callbacks=[Timer(timedelta(microseconds=1))])
    assert case.run.trainer.global_step < 6
    nll = scores_of(case.detector, case.module.train_data)[1]
    assert float(case.detector.model.scorer.mean) == pytest.approx(float(nll.mean()), rel=1e-5)


@pytest.mark.parametrize("kind", BUILD)
def test_without_validation_the_score_is_fitted_and_not_calibrated(kind, tmp_path):
    case = fit(tmp_path, BUILD[kind](score="typicality"), limit_val_batches=0)
    nll = scores_of(case.detector, case.module.train_data)[1]
    assert float(case.detector.model.scorer.mean) == pytest.approx(float(nll.mean()), rel=1e-5)
    assert not case.detector.post_processor.calibrated
    saved = type(case.detector).load_from_checkpoint(case.path)
    assert saved.model.scorer.ready
    assert torch.equal(saved.model.scorer.mean, case.detector.model.scorer.mean)


def test_a_calibration_by_what_stood_in_for_the_score_is_forgotten(tmp_path):
    case = fit(tmp_path, pixel_flow(score="typicality"), max_epochs=3, check_val_every_n_epoch=2)
    assert case.raw.ready == [False]
    assert case.detector.model.scorer.ready
    assert not case.detector.post_processor.calibrated
    case.run.validate(case.detector, datamodule=case.module, verbose=False)
    scores = scores_of(case.detector, case.module.val_data)[0].sort().values
    torch.testing.assert_close(case.detector.post_processor.calibration, scores, rtol=1e-3, atol=1e-5)


# -- a score for a trained checkpoint ----------------------------------------------------------------------------


@each_score_of_one_flow
def test_a_score_put_on_a_checkpoint_is_the_one_that_training_with_it_gives(
    kind, score, trained, tmp_path, monkeypatch
):
    # On all training images, and not a random choice.
    lid_of_all = score == "lid"
    if lid_of_all:
        monkeypatch.setattr(LocalIntrinsicDimension, "fit_images", 96)
        torch.manual_seed(0)
        case = fit(tmp_path, BUILD[kind](score=score))
    else:
        case = trained(kind, score)
    checkpoint = trained(kind, "nll").path
    detector = type(case.detector).load_from_checkpoint(checkpoint, score=score)
    for name, parameter in case.detector.model.flow.named_parameters():
        assert torch.equal(parameter, detector.model.flow.get_parameter(name))
    assert detector.model.scorer.ready == (not SCORES[score].fit_images)
    assert detector.post_processor.calibrated == (score == "nll")

    detector.fit_score(case.module.train_dataloader())
    engine(tmp_path).validate(detector, datamodule=case.module, verbose=False)
    detector.eval()
    expected, given = (scores_of(each, case.module.test_data)[0] for each in (case.detector, detector))
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        detector.post_processor.calibration, case.detector.post_processor.calibration, rtol=1e-4, atol=1e-4
    )
    assert float(expected.std()) > 0.002  # else they would agree whatever they are


@pytest.mark.parametrize("before", ["typicality", "ensemble"])
@pytest.mark.parametrize("after", ["density_of_states", "nll"])
def test_any_score_may_be_exchanged_for_one_of_a_single_flow(before, after, trained):
    case = trained("pixel_flow", before)
    detector = type(case.detector).load_from_checkpoint(case.path, score=after).eval()
    assert not detector.post_processor.calibrated
    detector.fit_score(case.module.train_dataloader())
    scores, nll = scores_of(detector, case.module.test_data)
    torch.testing.assert_close(nll, scores_of(case.detector, case.module.test_data)[1])
    assert torch.isfinite(scores).all()
    assert torch.equal(scores, nll) == (after == "nll")


def test_an_unfitted_score_is_not_tested(trained, tmp_path):
    case = trained("pixel_flow", "nll")
    detector = BUILD["pixel_flow"](score="typicality")
    with pytest.raises(NotFittedError, match="score 'typicality' has not been fitted.*`flowood score`"):
        engine(tmp_path).test(detector, datamodule=case.module, ckpt_path=case.path, verbose=False)


@pytest.mark.parametrize("score", TRAINED_BESIDE)
def test_scores_that_train_flows_need_a_checkpoint_trained_with_them(score, trained):
    case = trained("pixel_flow", "typicality")
    message = (
        f"'{score}' compares flows that train together.*trained with score 'typicality'. Train with score '{score}'"
    )
    with pytest.raises(ValueError, match=message):
        type(case.detector).load_from_checkpoint(case.path, score=score)


def test_fitting_drops_a_calibration_of_other_scores(trained):
    case = trained("pixel_flow", "typicality")
    detector = type(case.detector).load_from_checkpoint(case.path)
    assert detector.post_processor.calibrated
    detector.fit_score(case.module.train_dataloader())
    assert not detector.post_processor.calibrated


def test_fitting_needs_no_trainer_and_leaves_the_mode_alone(trained):
    case = trained("pixel_flow", "typicality")
    for mode in (True, False):
        detector = type(case.detector).load_from_checkpoint(trained("pixel_flow", "nll").path, score="typicality")
        detector.train(mode)
        detector.fit_score(case.module.train_dataloader())
        assert detector.model.training == detector.model.flow.training == mode
        torch.testing.assert_close(detector.model.scorer.mean, case.detector.model.scorer.mean)


# -- export ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "score"),
    [("pixel_flow", "typicality"), ("embedding_flow", "density_of_states")],
)
def test_an_exported_score_agrees(kind, score, trained, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is the extra anomalib-flowood[export]")
    detector = trained(kind, score).detector
    detector.check_exports = False  # which is what follows
    session = onnxruntime.InferenceSession(str(engine(tmp_path).export(detector, "onnx", export_root=tmp_path)))
    images = torch.rand(5, 3, 20, 17)
    with torch.no_grad():
        expected = detector(images)
    pred_score, pred_label = session.run(["pred_score", "pred_label"], {"input": images.numpy()})
    np.testing.assert_allclose(pred_score, expected.pred_score, rtol=1e-4)
    assert np.array_equal(pred_label, expected.pred_label)


@pytest.mark.parametrize("score", ["complexity", "orientation", "lid", "density_of_states"])
def test_what_cannot_be_exported_says_what_can(score, trained, tmp_path):
    detector = trained("pixel_flow", score).detector
    for export_type in ("onnx", "openvino"):
        with pytest.raises(ValueError, match=f"The score '{score}' cannot be exported") as caught:
            engine(tmp_path).export(detector, export_type, export_root=tmp_path)
        assert "can: nll, typicality, likelihood_ratio, latent_norm, ensemble. `flowood score`" in str(caught.value)
    exported = torch.load(engine(tmp_path).export(detector, "torch", export_root=tmp_path), weights_only=False)["model"]
    images = torch.rand(4, 3, 20, 17)
    with torch.no_grad():
        assert torch.equal(exported(images).pred_score, detector(images).pred_score)
