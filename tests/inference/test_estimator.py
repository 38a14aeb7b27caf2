# SPDX-License-Identifier: Apache-2.0
"""The detectors as scikit-learn has them."""

import gc
import os
import pickle
import subprocess
import sys
import weakref

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import check_estimator

from anomalib_flowood import EmbeddingFlow, FlowOutlierDetector
from anomalib_flowood.inference.loading import of_module
from anomalib_flowood.models.components.stored_features import FeatureDataset

SMALL = {"backbone": "test_efficientnet", "pre_trained": False, "image_size": (32, 32), "subspace_dim": 8}


def grey(count: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 20, (count, 32, 32), dtype=np.uint8)
    return noise + np.linspace(40, 180, 32).astype(np.uint8)


@pytest.fixture(scope="module")
def fitted() -> FlowOutlierDetector:
    return FlowOutlierDetector(arguments=SMALL).fit(grey(90, 0))


def test_signs_are_those_of_scikit_learn(fitted):
    normal, odd = grey(40, 1), 255 - grey(5, 2)
    scores = fitted.score_samples(np.concatenate([normal, odd]))
    assert scores[:40].min() > scores[40:].max()
    own = fitted.score_samples(normal)  # in batches of these alone, which some processors round otherwise
    assert np.allclose(own, scores[:40], atol=1e-4)
    decisions = fitted.decision_function(normal)
    assert np.array_equal(decisions, own - fitted.offset_)
    assert np.array_equal(fitted.predict(normal), np.where(decisions >= 0, 1, -1))
    assert (fitted.predict(odd) == -1).all()
    assert (fitted.predict(normal) == 1).mean() > 0.5
    found = of_module(fitted.module_).score(normal)
    assert np.array_equal(found.label, fitted.predict(normal) == -1)
    assert np.array_equal(-found.raw_score.astype(float), own)


def test_a_fitted_one_is_kept_and_repeated(fitted, tmp_path):
    images = grey(3, 3)
    kept = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(kept.score_samples(images), fitted.score_samples(images))
    for number, image in enumerate(grey(90, 0)):
        Image.fromarray(image).save(tmp_path / f"{number:02}.png")
    again = clone(fitted).fit(tmp_path)  # the same images from a folder
    assert np.array_equal(again.score_samples(images), fitted.score_samples(images))
    assert again.offset_ == fitted.offset_


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_samples_come_first_however_few_they_are(fitted, count):
    """Three and four grey images were one in colour."""
    images = grey(count, 6)
    for given in (images, torch.from_numpy(images), images[..., None].repeat(3, axis=3)):
        assert np.allclose(fitted.score_samples(given), fitted.score_samples(list(images)), atol=1e-4)
    assert len(fitted.predict(images)) == count


def test_images_of_a_generator_are_fitted_to_and_judged():
    images = grey(12, 4)
    one, other = FlowOutlierDetector(arguments=SMALL), FlowOutlierDetector(arguments=SMALL)
    assert np.array_equal(one.fit_predict(image[None] for image in images), other.fit_predict(images))


def test_a_table_is_no_image(fitted):
    with pytest.raises(ValueError, match=r"X of shape \(12, 1024\) is a table: images are"):
        fitted.predict(grey(12, 7).reshape(12, -1))


@pytest.mark.parametrize("kind", [str, object])
def test_arrays_of_paths_are_images(fitted, tmp_path, kind):
    images = grey(8, 5)
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    paths = np.array(sorted(map(str, tmp_path.iterdir())), dtype=kind)
    expected = fitted.score_samples(images[1:])
    assert np.allclose(fitted.score_samples(paths[1:]), expected, atol=1e-4)
    frame = pd.DataFrame({"path": paths})
    assert np.allclose(fitted.score_samples(frame[1:]), expected, atol=1e-4)  # it was the file "path"
    assert np.allclose(fitted.score_samples(frame["path"][1:]), expected, atol=1e-4)


def test_of_a_frame_with_several_columns_none_is_guessed(fitted):
    """There were twice as many labels as rows."""
    frame = pd.DataFrame({"path": ["a.png", "b.png", "c.png"], "mask": ["d.png", "e.png", "f.png"]})
    for given in (frame, frame.to_numpy()):
        with pytest.raises(ValueError, match=r"X of shape \(3, 2\) has 2 columns: give the one that holds the images'"):
            fitted.predict(given)
    with pytest.raises(ValueError, match=r"X of shape \(3, 4\) is a table"):
        fitted.predict(pd.DataFrame(np.zeros((3, 4))))


def test_a_random_state_is_what_it_is_in_scikit_learn():
    detector = FlowOutlierDetector(arguments=SMALL, alpha=0.2)
    offsets = [
        clone(detector).set_params(random_state=state).fit(grey(30, 0)).offset_
        for state in (np.random.RandomState(3), np.random.RandomState(3), np.random.RandomState(4), np.int64(3), 3)
    ]
    assert offsets[0] == offsets[1] != offsets[2]
    assert offsets[3] == offsets[4]
    for wrong in (-1, 2**40, 1.5, "a", np.random.default_rng(0)):
        with pytest.raises(ValueError, match="random_state is None, an integer of 32 bits from 0 on, or"):
            FlowOutlierDetector(random_state=wrong).fit(grey(30, 0))


def test_a_fit_says_nothing_that_nobody_can_act_on():
    code = (
        "import numpy as np\n"
        "from anomalib_flowood import FlowOutlierDetector\n"
        f"FlowOutlierDetector(arguments={SMALL}).fit(np.random.default_rng(0).random((90, 32, 32)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="Unknown detector 'EmbedingFlow'. Did you mean"):
        FlowOutlierDetector("EmbedingFlow").fit(grey(3, 0))
    with pytest.raises(ValueError, match="two normal images at least, and got 1"):
        FlowOutlierDetector().fit(grey(1, 0))
    with pytest.raises(ValueError, match=r"X of shape \(5, 1024\) is a table: .*Give X\.reshape\(len\(X\), H, W\)"):
        FlowOutlierDetector().fit(grey(5, 0).reshape(5, -1))
    with pytest.raises(NotFittedError):
        FlowOutlierDetector().predict(grey(1, 0))
    with pytest.raises(FileNotFoundError, match="There is no nowhere"):  # it was one image
        FlowOutlierDetector().fit("nowhere")


@pytest.mark.parametrize(
    ("folders", "others", "normal"),
    [
        (("good", "hole", "ground_truth/hole"), "ground_truth, hole", "good"),
        (("train/good", "test/good", "test/hole"), "test", "train/good"),
        (("train/OK", "train/Kratzer"), "Kratzer", "train/OK"),
        (("bolt/train/good", "bolt/test/good", "bolt/test/hole"), "test", "bolt/train/good"),
        (("Data/Images/Normal", "Data/Images/Anomaly", "Data/Masks/Anomaly"), "Anomaly", "Data/Images/Normal"),
    ],
)
def test_a_folder_that_holds_defects_too_is_refused_with_the_one_of_normal_images(folders, others, normal, tmp_path):
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(grey(1, 0)[0]).save(tmp_path / name / "0.png")
    with pytest.raises(ValueError, match=rf"not all images are normal: it holds {others}, too\. Fit to .*{normal}\.$"):
        FlowOutlierDetector(arguments=SMALL).fit(tmp_path)


@pytest.mark.parametrize("folders", [("good",), ("left", "right"), ("train/good",)])
def test_a_folder_of_normal_images_is_fitted_to(folders, tmp_path):
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
        for number, image in enumerate(grey(30, 0)):
            Image.fromarray(image).save(tmp_path / name / f"{number}.png")
    assert FlowOutlierDetector(arguments=SMALL).fit(str(tmp_path)).module_ is not None


@pytest.mark.parametrize(
    "name",
    [
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_estimator_tags_renamed",
        "check_get_params_invariance",
        "check_mixin_order",
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_set_params",
        "check_valid_tag_types",
    ],
)
def test_scikit_learn_checks_what_needs_no_table(name):
    """All other checks fit rows of any numbers: `check_estimator` leaves them out, since tags say "no table"."""
    getattr(estimator_checks, name)("FlowOutlierDetector", FlowOutlierDetector())


@pytest.mark.filterwarnings("ignore:Can't test estimator")
def test_scikit_learn_finds_nothing():
    assert {check["status"] for check in check_estimator(FlowOutlierDetector(), on_skip=None)} == {"passed"}


def test_too_few_images_are_said_in_terms_of_a_fit(caplog):
    FlowOutlierDetector(arguments=SMALL).fit(grey(30, 0))
    (said,) = [text for text in caplog.messages if "smallest p-value" in text]
    assert said.endswith("takes 20 of them: fit to 80 normal images, of which 20 are held out; there are 30.")
    with pytest.raises(ValueError, match=r"and there are 7\. Fit to 995 normal images, .*, or set alpha above 1/8"):
        FlowOutlierDetector(arguments=SMALL, alpha=0.01).fit(grey(30, 0))


def test_a_fit_leaves_the_process_as_it_was(monkeypatch):
    """A seed that Lightning keeps in the environment would be that of later trainers."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    before = dict(os.environ)
    numbers = torch.get_rng_state()
    FlowOutlierDetector(arguments=SMALL).fit(grey(90, 0))
    assert dict(os.environ) == before
    assert torch.equal(torch.get_rng_state(), numbers)


def _stored() -> list[FeatureDataset]:
    gc.collect()
    return [found for found in gc.get_objects() if type(found) is FeatureDataset]


def test_a_fitted_one_holds_no_images():
    others = _stored()  # of detectors that other tests hold
    images = grey(90, 0)
    kept = weakref.ref(images)
    fitted = FlowOutlierDetector("FeatureMapFlow", arguments={**SMALL, "map_layers": [1], "score_layers": []})
    fitted.fit(images)
    del images
    assert all(any(found is other for other in others) for found in _stored())
    assert kept() is None
    assert len(fitted.predict(grey(3, 1))) == 3


def test_ctrl_c_in_a_fit_is_a_keyboard_interrupt(monkeypatch, fitted):
    """Lightning makes the end of the process of it, which no notebook and no ``except KeyboardInterrupt`` is for."""

    def stopped(self, features, copies=1):
        raise KeyboardInterrupt

    detector = FlowOutlierDetector(arguments=SMALL).fit(grey(90, 0))
    with monkeypatch.context() as patched:
        patched.setattr(EmbeddingFlow, "fit_features", stopped)
        with pytest.raises(KeyboardInterrupt):
            detector.fit(grey(60, 1))
    images = grey(3, 3)
    assert np.array_equal(detector.score_samples(images), fitted.score_samples(images))  # of the fit before
    assert np.array_equal(detector.fit(grey(90, 0)).score_samples(images), fitted.score_samples(images))
