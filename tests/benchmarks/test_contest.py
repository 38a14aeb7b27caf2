# SPDX-License-Identifier: Apache-2.0
import math
import shutil
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data.datasets.image import mvtecad
from model_helpers import BACKBONE
from PIL import Image
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import nn

from anomalib_flowood import FeatureMapFlow
from anomalib_flowood.features import PooledAndMaps, create_backbone, create_feature_maps
from anomalib_flowood.metrics import auroc
from anomalib_flowood.models.embedding_flow import EmbeddingFlowModel
from benchmarks.contest import baselines, contest, detectors, report
from benchmarks.contest.memo import Memo
from benchmarks.results import append_rows, finished, read_rows

# -- memo -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def memo(tmp_path):
    with Memo(tmp_path) as memo:
        yield memo


def maps_network(layers=(1, 2)):
    torch.manual_seed(3)
    return create_feature_maps(BACKBONE, layers, pre_trained=False)


@pytest.mark.parametrize("network", ["maps", "head"])
def test_memo_gives_what_the_plain_module_gives(memo, network):
    def make():
        torch.manual_seed(3)
        return maps_network() if network == "maps" else create_backbone(BACKBONE, pre_trained=False, num_classes=0)

    plain, module = make(), make()
    assert memo.attach(nn.ModuleDict({"inner": module})) == 1
    images = torch.randn(20, 3, 32, 32)
    with torch.no_grad():
        expected = plain(images)
        for batch in (images[:7], images, images.flip(0), images.contiguous(memory_format=torch.channels_last)):
            got = module(batch)
            want = plain(batch)
            assert type(got) is type(want)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        again = module(images)
    first = expected if isinstance(expected, torch.Tensor) else expected[0]
    assert (again if isinstance(again, torch.Tensor) else again[0]).is_contiguous()
    assert first.shape == (again if isinstance(again, torch.Tensor) else again[0]).shape


def test_memo_counts_and_measures(memo):
    module = maps_network()
    memo.attach(module)
    images = torch.randn(5, 3, 32, 32)
    account = memo.account()
    with torch.no_grad():
        module(torch.cat([images, images[:2]]))  # the same image twice in a batch is computed once, and is no hit
    assert (account.hits, account.computed, account.saved) == (0, 5, 0.0)
    account = memo.account()
    with torch.no_grad():
        module(torch.cat([images[:3], torch.randn(1, 3, 32, 32)]))
    assert (account.hits, account.computed) == (3, 1)
    assert account.saved > 0


def test_memo_is_shared_by_equal_backbones_only(memo):
    same, other, more = maps_network(), maps_network(), maps_network((1, 3))
    torch.manual_seed(9)
    weights = create_feature_maps(BACKBONE, (1, 2), pre_trained=False)
    for module in (same, other, more, weights):
        memo.attach(module)
    images = torch.randn(2, 3, 32, 32)
    account = memo.account()
    with torch.no_grad():
        first = same(images)
        assert torch.equal(other(images)[0], first[0])
        assert account.hits == 2
        more(images)
        weights(images)
        same(torch.randn(2, 3, 48, 48))
    assert account.hits == 2


def test_memo_tells_pooled_features_with_other_maps_apart(memo):
    networks = []
    for layers in ((1,), (2,), (1, 2)):
        torch.manual_seed(3)
        networks.append(PooledAndMaps(BACKBONE, layers, pre_trained=False).eval())
        assert memo.attach(networks[-1]) == 1
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        one, two, both = (network(images) for network in networks)
        assert memo.account().hits == 0
        again = networks[0](images)
    assert one[1].shape != two[1].shape
    torch.testing.assert_close(both, [one[0], one[1], two[1]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, one)


def test_memo_steps_aside(memo):
    module = maps_network()
    memo.attach(module)
    images = torch.randn(2, 3, 32, 32)
    account = memo.account()
    with torch.no_grad():
        module.train()
        module(images)
        module.eval()
        with memo.off():
            module(images)
    wanted = images.clone().requires_grad_()
    module(wanted)[0].sum().backward()
    assert wanted.grad is not None
    assert account.computed == account.hits == 0


def test_memo_mixes_inference_mode_and_training(memo):
    module = maps_network()
    memo.attach(module)
    images = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        inside = module(images + 0)[0]
    outside = module(images)[0]
    assert torch.equal(inside, outside)
    (outside * torch.ones((), requires_grad=True)).sum().backward()  # not an inference tensor
    module(torch.randn(1, 3, 32, 32))


def test_memo_full_computes_on(tmp_path):
    module, plain = maps_network(), maps_network()
    with Memo(tmp_path, capacity=3) as memo:
        memo.attach(module)
        images = torch.randn(5, 3, 32, 32)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(module(images)[1], plain(images)[1], rtol=1e-4, atol=1e-5)
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


# -- baselines ------------------------------------------------------------------------------------------------------

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


# -- rules ----------------------------------------------------------------------------------------------------------


def test_levelled_off():
    assert not contest.levelled_off([10, 9, 8, 7, 6])
    assert not contest.levelled_off([10, 10, 10])
    assert contest.levelled_off([10, 10, 10, 9.999])
    assert contest.levelled_off([-10, -10.01, -10.02, -10.03])  # less than half a percent
    assert not contest.levelled_off([-10, -10.1, -10.2, -10.3])


def test_pixel_auroc_agrees_with_ranks():
    maps = torch.randn(6, 20, 20).round(decimals=1)  # ties
    masks = torch.zeros(6, 20, 20, dtype=torch.uint8)
    masks[3:, 5:9, 5:9] = 1
    maps[3:, 5:9, 5:9] += 1
    expected = roc_auc_score(masks.flatten().numpy(), maps.flatten().numpy())
    assert contest.pixel_auroc(maps, masks) == pytest.approx(expected)
    assert auroc(maps, masks.int()) == pytest.approx(expected)
    perfect = contest.pixel_metrics(masks.float(), masks)
    assert perfect["pixel_auroc"] == pytest.approx(1)
    assert perfect["aupro"] == pytest.approx(1)
    assert contest.pixel_metrics(maps, torch.zeros_like(masks)) == {}


def test_peak_memory_sees_what_is_taken():
    if contest.PeakMemory.now() is None:
        pytest.skip("peak memory is read from /proc, which this system lacks")
    with contest.PeakMemory(0.001) as memory:
        block = torch.ones(2**26)
        del block
    assert 0.2 < memory.gib < 0.6


def test_the_plan_covers_the_contest():
    options = contest.Options(parts=("one_class", "cross"))
    jobs = contest.plan(options)
    count = {name: sum(job.detector.name == name for job in jobs) for name in detectors.DETECTORS}
    assert count["EmbeddingFlow"] == 3 * 22
    assert count["KNN"] == count["Patchcore"] == 22
    # Class 0 of each set alone.
    assert [count[name] for name in contest.TRAIN_LONG] == [2, 2, 2]
    keys = [key for job in jobs for key in job.keys(options.parts)]
    assert len(keys) == len(set(keys))
    named = contest.plan(replace(options, parts=("one_class",), tasks=("mnist class 1",), detectors=("KNN",)))
    assert [job.task.name for job in named] == ["mnist class 1"]
    with pytest.raises(ValueError, match="no detector 'Nobody'"):
        contest.plan(replace(options, detectors=("Nobody",)))
    with pytest.raises(ValueError, match="Nothing to run"):
        contest.plan(replace(options, parts=("industrial",)))


def test_only_detectors_on_embeddings_run_on_what_was_left_out():
    jobs = contest.plan(contest.Options(parts=("left_out",)))
    count = {name: sum(job.detector.name == name for job in jobs) for name in detectors.DETECTORS}
    assert {name: number for name, number in count.items() if number} == {
        "EmbeddingFlow": 60,
        **dict.fromkeys(("KNN", "Mahalanobis", "PPCA", "GaussianMixture"), 20),
    }
    assert len({key for job in jobs for key in job.keys(("left_out",))}) == len(jobs)


def test_the_class_that_is_left_out_is_the_anomalous_one(tmp_path):
    for value, name in enumerate(("ant", "bee", "cat")):
        for split, count in (("train", 6), ("test", 4)):
            folder = tmp_path / "animals" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("L", (8, 8), 100 * value + number).save(folder / f"{number}.png")
    data = contest.LeftOut(str(tmp_path / "animals"), 1, val_split_ratio=0.25, test_limit=3)
    data.prepare_data()
    data.setup()
    values = [int(item.image[0, 0, 0] * 255) // 100 for part in (data.train_data, data.val_data) for item in part]
    assert sorted(values) == [0] * 6 + [2] * 6
    batch = next(iter(data.test_dataloader()))
    bee = (batch.image[:, 0, 0, 0] * 255).round() // 100 == 1
    assert torch.equal(batch.gt_label, bee)
    assert batch.gt_label.sum() == 3
    assert len(batch.gt_label) == 6


def test_ablation_changes_one_thing_at_a_time():
    variants = detectors.one_change()
    assert next(iter(variants)) == "defaults"
    assert {"mask=checkerboard", "subnet=mlp", "bottleneck_dim=8", "layers=blocks.4+blocks.6"} <= set(variants)
    assert "mask=checkerboard, subnet=resnet" not in detectors.one_change()


def test_ablation_has_every_mask_with_every_network_on_every_layer():
    cells = list(product(detectors.PRODUCT_MASKS, detectors.PRODUCT_NETWORKS, detectors.PRODUCT_LAYERS))
    names = [detectors.product_variant(*cell).name for cell in cells]
    assert len(set(names)) == len(cells) == 40
    assert set(names) <= set(detectors.ablation())
    assert "mask=checkerboard, subnet=resnet" in names
    assert "defaults" in names
    assert "mask=checkerboard, subnet=resnet, layers=blocks.6" in names
    changed = detectors.ablation()["mask=horizontal, bottleneck_dim=8, layers=blocks.6"].build.keywords
    assert changed == {"mask": "horizontal", "bottleneck_dim": 8, "layers": ("blocks.6",)}


def test_full_precision_changes_the_stored_features_alone():
    small = {"subspace_dim": 4, "layout_dims": 4, "bottleneck_dim": 3, "hidden_channels": 8}
    usual = FeatureMapFlow(BACKBONE, (1, 2), False, (32, 32), **small)
    full = detectors.FullPrecision(BACKBONE, (1, 2), False, (32, 32), **small)
    full.load_state_dict(usual.state_dict())
    images = torch.rand(9, 3, 32, 32)
    with torch.no_grad():
        for model, dtype in ((usual, torch.float16), (full, torch.float32)):
            features = model.extract(images)
            model.fit_features(features)
            assert {layer.dtype for layer in (*features, *model.prepare_features(features))} == {dtype}
        assert full.model.log_prob(images) == pytest.approx(usual.model.log_prob(images), rel=0.02)


# -- whole fits -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Grey noise; the broken ones have a bright square."""
    rng = np.random.default_rng(0)
    root = tmp_path / "plates"
    for place, count in {"train/good": 24, "test/good": 5, "test/spot": 6}.items():
        (root / place).mkdir(parents=True)
        for number in range(count):
            pixels = rng.normal(100, 12, (40, 40, 3))
            mask = np.zeros((40, 40), np.uint8)
            if place == "test/spot":
                corner = 4 + 3 * number
                pixels[corner : corner + 12, corner : corner + 12] += 130
                mask[corner : corner + 12, corner : corner + 12] = 255
                (root / "ground_truth/spot").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(root / f"ground_truth/spot/{number:03}.png")
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / place / f"{number:03}.jpg")
    return root


@pytest.fixture
def small_contest(monkeypatch):
    """Two detectors on the network for tests, without weights."""
    calls = []

    def flow(backbone, size, kind):
        calls.append("flow")
        return FeatureMapFlow(
            BACKBONE, (1, 2), False, (size, size), subspace_dim=4, coupling_layers=2, hidden_channels=8,
            bottleneck_dim=3, max_epochs=1, **detectors.components(BACKBONE, size),
        )  # fmt: skip

    def knn(backbone, size, kind):
        calls.append("knn")
        return baselines.Baseline("KNN", BACKBONE, (size, size), **detectors.components(BACKBONE, size))

    monkeypatch.setitem(baselines.MODELS, "KNN", partial(baselines.KNNModel, **SMALL))
    monkeypatch.setattr(contest, "MAP_SIZE", 48)
    chosen = {
        "FeatureMapFlow": detectors.Detector("FeatureMapFlow", flow, ours=True),
        "KNN": detectors.Detector("KNN", knn, maps=False),
    }
    monkeypatch.setattr(contest, "DETECTORS", chosen)
    return calls


def test_run_report_resume_retry(tmp_path, folder, small_contest, monkeypatch):
    into, output = tmp_path / "into", tmp_path / "out"
    into.mkdir()
    (into / "README.md").write_text("before\n<!-- contest: begin -->\nold\n<!-- contest: end -->\nafter\n")
    options = contest.Options(output, ("industrial",), folder, seeds=(0,), backbone="local-dir:none")
    good = contest.DETECTORS["KNN"]

    def broken(*_):
        raise RuntimeError("out of order\nand more")

    monkeypatch.setitem(contest.DETECTORS, "KNN", replace(good, build=broken))
    rows = contest.run(options).set_index("detector")
    assert rows.loc["KNN", "error"] == "RuntimeError: out of order"
    assert "out of order" in (output / "errors.log").read_text()
    flow = rows.loc["FeatureMapFlow"]
    assert flow["train_images"] == 22  # two are held out
    assert flow["test_images"] == 11
    assert 0 <= flow["auroc"] <= 1
    assert flow["pixel_auroc"] > 0.5
    assert flow["epochs"] == 1
    assert flow["images_per_s"] > 0

    monkeypatch.setitem(contest.DETECTORS, "KNN", good)
    rows = contest.run(options).set_index("detector")
    assert small_contest == ["flow", "knn"]  # the finished row was not run again, the failed one was
    assert rows["error"].isna().all()
    assert len(rows) == 2
    contest.run(options)
    assert small_contest == ["flow", "knn"]

    written = report.write(output, into)
    assert into / "maps.png" in written
    text = (into / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| FeatureMapFlow |" in text
    assert "![plates" in text
    assert "old" not in text
    report.write(output, into)
    assert (into / "README.md").read_text() == text


def as_visa(folder, root, category="candle"):
    """The images of ``folder`` as VisA is laid out before anomalib splits it."""
    lines = ["object,split,label,image,mask"]
    for place, label, kind in (
        ("train/good", "normal", "Normal"), ("test/good", "normal", "Normal"), ("test/spot", "anomaly", "Anomaly"),
    ):  # fmt: skip
        split = place.partition("/")[0]
        for path in sorted((folder / place).iterdir()):
            image = Path(category, "Data/Images", kind, f"{split}_{path.name}")
            (root / image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / image)
            mask = ""
            if kind == "Anomaly":
                mask = Path(category, "Data/Masks/Anomaly", f"{split}_{path.stem}.png")
                (root / mask).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / "ground_truth/spot" / f"{path.stem}.png", root / mask)
            lines.append(f"{category},{split},{label},{image},{mask}")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\n".join(lines) + "\n")
    return root


def test_mvtec_and_visa(folder, tmp_path, small_contest):
    mvtec = tmp_path / "MVTecAD"
    for category in ("bottle", "cable"):
        shutil.copytree(folder, mvtec / category)
    options = contest.Options(
        tmp_path / "out", ("industrial",), seeds=(0,), categories=("bottle", "candle"), backbone="local-dir:none",
        mvtec=mvtec, visa=as_visa(folder, tmp_path / "visa"),
    )  # fmt: skip
    rows = contest.run(options)
    assert rows["error"].isna().all()
    assert sorted(set(rows["task"])) == ["mvtec/bottle", "visa/candle"]
    assert (rows["train_images"] == 22).all()  # a tenth of 24 is held out
    assert (rows["test_images"] == 11).all()
    assert rows[["auroc", "pixel_auroc", "aupro"]].loc[rows["detector"] == "FeatureMapFlow"].notna().all(axis=None)


def test_the_test_images_are_never_used_to_validate(folder):
    data = contest.IndustrialFolder(folder.parent, folder.name, **contest.HELD_OUT)
    data.setup()
    assert len(data.train_data) + len(data.val_data) == 24
    assert all("/train/good/" in path for path in data.val_data.samples["image_path"])
    assert len(data.test_data) == 11
    assert mvtecad.IMG_EXTENSIONS == (".png", ".PNG")


def test_one_class_rows_for_another_data_set(tmp_path, small_contest, monkeypatch):
    from model_helpers import idx_folder

    idx_folder(tmp_path / "a", "plain")
    for name, texture in (("fashion_mnist", "plain"), ("mnist", "square")):
        if not (tmp_path / name).exists():
            idx_folder(tmp_path / name, texture, seed=len(name))
    inside, outside = contest.CrossDataset, str(tmp_path / "mnist")
    task = contest.Task(
        "one_class",
        "ramps class 0",
        "one_class",
        partial(inside, tmp_path / "fashion_mnist", [tmp_path / "a"]),
        "mnist",
    )
    monkeypatch.setattr(
        contest, "CrossDataset", lambda first, others, root, test_limit: inside(outside, [tmp_path / "a"])
    )
    job = contest.Job(task, contest.DETECTORS["KNN"], 0)
    with Memo(tmp_path) as memo:
        rows = contest.run_job(job, "local-dir:none", memo, contest.Options(tmp_path, ("one_class", "cross")))
    assert [row["part"] for row in rows] == ["one_class", "cross"]
    assert rows[1]["task"] == "ramps class 0 -> mnist"
    assert rows[1]["test_images"] == 80
    assert rows[1]["auroc"] > 0.9


def test_training_stops_in_time(tmp_path, folder, monkeypatch):
    """FastFlow and its kind on a network without weights: the rule ends them, and the loss is a number."""
    build = partial(detectors.DETECTORS["Patchflow"].build, BACKBONE, 64, "industrial")
    create = detectors.timm.create_model
    monkeypatch.setattr(
        detectors.timm, "create_model", lambda *args, **kw: create(*args, **{**kw, "pretrained": False})
    )
    detector = replace(detectors.DETECTORS["Patchflow"], build=lambda *_: build())
    task = contest.Task(
        "industrial", "plates", "industrial", partial(contest.IndustrialFolder, folder.parent, "plates")
    )
    task = replace(task, data=partial(contest.IndustrialFolder, folder.parent, "plates", **contest.HELD_OUT))
    options = contest.Options(tmp_path, ("industrial",), cap=0.0)
    with Memo(tmp_path) as memo:
        (row,) = contest.run_job(contest.Job(task, detector, 1), "", memo, options)
    assert row["stopped_by"] == "time"
    assert 0 < row["epochs"] <= 1


def test_held_out_losses_leave_no_trace(monkeypatch):
    create = detectors.timm.create_model
    monkeypatch.setattr(
        detectors.timm, "create_model", lambda *args, **kw: create(*args, **{**kw, "pretrained": False})
    )
    images = torch.randn(3, 3, 64, 64)
    for name in ("Fastflow", "Patchflow", "Cflow"):
        detector = detectors.DETECTORS[name]
        model = detector.build(BACKBONE, 64, "industrial").train()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with torch.no_grad():
            loss = detector.held_out_loss(model, images)
            assert torch.equal(loss, detector.held_out_loss(model, images))
        assert torch.isfinite(loss)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert model.model.training


def test_quick_coreset_is_the_coreset():
    embedding = torch.randn(400, 30)
    chosen = []
    for update in (detectors.KCenterGreedy.update_distances, detectors._distances_by_product):
        torch.manual_seed(0)
        sampler = detectors.KCenterGreedy(embedding=embedding, sampling_ratio=0.1)
        sampler.model.random_state = 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(detectors.KCenterGreedy, "update_distances", update)
            chosen.append(sampler.select_coreset_idxs())
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 40


# -- report ---------------------------------------------------------------------------------------------------------


def rows_of(part, task, detector, seed, **values):
    blank = dict.fromkeys(contest.COLUMNS, "")
    return {**blank, "part": part, "task": task, "detector": detector, "seed": seed, **values}


def test_tables_from_a_few_rows(tmp_path):
    cost = {"fit_s": 12.0, "images_per_s": 100.0, "peak_gib": 0.5, "train_images": 600, "test_images": 400}
    rows = [
        rows_of("industrial", "tiles", "FeatureMapFlow", 0, auroc=0.9, fpr95=0.2, aupro=0.8, **cost),
        rows_of("industrial", "tiles", "FeatureMapFlow", 1, auroc=0.94, fpr95=0.1, aupro=0.8, **cost),
        rows_of("industrial", "tiles", "Padim", 0, auroc=0.85, fpr95=0.3, aupro=0.9, **cost),
        rows_of("industrial", "tiles", "Fastflow", 0, auroc=0.8, epochs=12, stopped_by="time", **cost),
        rows_of("industrial", "tiles", "Dfm", 0, error="ValueError: broken"),
        rows_of("ablation", "tiles", "mask=channel", 0, auroc=0.7, aupro=0.6, **cost),
        rows_of("ablation", "tiles", "mask=channel, subnet=mlp", 0, auroc=0.71, aupro=0.61, **cost),
    ]
    for number in range(4):
        value = 0.5 + 0.1 * number
        for name in ("EmbeddingFlow", "KNN"):
            better = 0.05 * (name == "EmbeddingFlow")
            task = f"mnist class {number}"
            rows.append(rows_of("one_class", task, name, 0, auroc=value + better, **cost))
            rows.append(rows_of("cross", f"{task} -> fashion_mnist", name, 0, auroc=value, **cost))
        rows.append(rows_of("left_out", f"mnist without class {number}", "PPCA", 0, auroc=value, **cost))
    append_rows(tmp_path, rows, contest.COLUMNS)
    text = report.tables(read_rows(tmp_path))
    assert "mnist, mean over 4 tasks:" in text
    assert "| PPCA | 0.650 |" in text
    assert "| FeatureMapFlow | **0.920 ± 0.028** | **0.150** |" in text
    assert "| Padim | 0.850 | 0.300 | – | 0.900 |" in text
    assert "Fastflow: 12.0 epochs, stopped by: 1 × time." in text
    assert "Failed: Dfm on tiles." in text
    assert "| EmbeddingFlow | **0.700** | **0.650** | **0.750** |" in text  # all, even, odd classes
    assert "| KNN | 0.650 | 0.600 | 0.700 |" in text
    assert "mnist, 1 class → fashion" in text
    assert "| mask=channel | 0.700 |" in text
    assert "| mask=channel, subnet=mlp |" not in text
    assert "| channel | – | – | 0.700 / 0.600 | 0.710 / 0.610 | – |" in text
    assert max(map(len, text.splitlines())) <= 100
    report.write(tmp_path, tmp_path / "into")
    assert (tmp_path / "into/cost.png").stat().st_size > 5000


def test_a_picture_outlives_its_maps(tmp_path):
    cost = {"fit_s": 12.0, "train_images": 600, "test_images": 400}
    append_rows(tmp_path, [rows_of("industrial", "tiles", "Padim", 0, auroc=0.8, **cost)], contest.COLUMNS)
    into = tmp_path / "into"
    into.mkdir()
    (into / "README.md").write_text("<!-- contest: begin -->\n<!-- contest: end -->\n", encoding="utf-8")
    report.write(tmp_path, into)
    assert "maps.png" not in (into / "README.md").read_text(encoding="utf-8")
    (into / "maps.png").write_bytes(b"drawn elsewhere")
    report.write(tmp_path, into)
    assert "![tiles: images, ground truth, maps](maps.png)" in (into / "README.md").read_text(encoding="utf-8")
    assert (into / "maps.png").read_bytes() == b"drawn elsewhere"


def test_no_rows(tmp_path):
    with pytest.raises(FileNotFoundError, match="no rows"):
        report.write(tmp_path)
    assert finished(tmp_path) == set()
    assert isinstance(read_rows(tmp_path), pd.DataFrame)
