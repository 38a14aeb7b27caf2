# SPDX-License-Identifier: Apache-2.0
"""`--data FOLDER`: a folder is all that a training, a test and a prediction need."""

import json
import logging
import os
import re
import shlex
import shutil
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from model_helpers import BACKBONE
from PIL import Image

from anomalib_flowood import CrossDataset, OneClass
from anomalib_flowood.cli import main
from anomalib_flowood.cli.commands import FlowoodCLI
from anomalib_flowood.cli.detector import _with_detector
from anomalib_flowood.cli.folders import _with_data_module
from anomalib_flowood.data import PathDataset
from anomalib_flowood.models import DEFAULT_DETECTOR

SMALLER = [
    f"--model.backbone={BACKBONE}",
    "--model.pre_trained=false",
    "--model.image_size=[32, 32]",
    "--model.subspace_dim=8",
]


def images(folder: Path, count: int, mean: float = 90) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(int(mean))
    for number in range(count):
        pixels = rng.normal(mean, 20, (24, 20 + 8 * (number % 2))).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02}.png")


def mvtec(folder: Path) -> None:
    images(folder / "train/good", 20)
    images(folder / "test/good", 4, 91)
    images(folder / "test/scratch", 5, 200)


def kinds(folder: Path) -> None:
    images(folder / "OK", 20)
    images(folder / "scratch", 5, 200)


def flat(folder: Path) -> None:
    images(folder, 20)


def flat_and_kinds(folder: Path) -> None:
    images(folder / "train", 20)
    images(folder / "test/normal", 4, 91)
    images(folder / "test/scratch", 5, 200)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("layout", "parts", "sources"),
    [
        (mvtec, (15, 5), {"good": 4, "scratch": 5}),
        (kinds, (12, 4), {"OK": 4, "scratch": 5}),  # all that are not normal are tested on
        (flat, (12, 4), {"good": 4}),
        (flat_and_kinds, (15, 5), {"normal": 4, "scratch": 5}),
    ],
)
def test_a_folder_says_which_images_are_normal(layout, parts, sources, here):
    layout(here / "parts")
    module = OneClass("parts")
    module.setup()
    assert (len(module.train_data), len(module.val_data)) == parts
    samples = module.test_data.samples
    assert samples["source"].value_counts().to_dict() == sources
    assert (samples["label_index"] == (samples["source"] == "scratch")).all()
    assert module.category == "parts"
    fitted = {*module.train_data.samples["image_path"], *module.val_data.samples["image_path"]}
    assert not fitted & {*samples["image_path"]}


def several(folder: Path) -> None:
    for name in ("bolt", "nut"):
        mvtec(folder / name)


def one_within(folder: Path) -> None:
    mvtec(folder / "bolt")


def nobody_knows(folder: Path) -> None:
    images(folder / "cats", 3)
    images(folder / "dogs", 3)


def unlabelled_test(folder: Path) -> None:
    images(folder / "train", 4)
    images(folder / "test", 4)


@pytest.mark.parametrize("name", ["validation", "val"])
def test_images_for_validation_calibrate_and_all_others_are_fitted_to(name, here, caplog):
    mvtec(here / "parts")
    images(here / f"parts/{name}/good", 3)
    images(here / f"parts/{name}/bent", 2)
    images(here / "parts/more/good", 2)
    module = OneClass("parts", train_limit=18)
    module.setup("fit")
    assert {Path(path).parent for path in module.val_data.samples["image_path"]} == {Path(f"parts/{name}/good")}
    assert (len(module.train_data), len(module.val_data)) == (18, 3)
    assert (module.val_data.samples["label_index"] == 0).all()
    (said,) = [message for message in caplog.messages if "are read" in message]
    assert f"Of parts, only train, {name}, test and masks are read, not more. Images in {name} calibrate" in said
    assert module.how_to_hold_out(20).startswith(f"put 17 more normal images to the 3 in parts/{name}")
    crossed = CrossDataset("parts", ["parts/test/scratch"])
    crossed.setup("fit")
    assert (len(crossed.train_data), len(crossed.val_data)) == (20, 5)  # all that is there is normal


def mvtec_ad_2(folder: Path) -> None:
    images(folder / "train/good", 20)
    images(folder / "validation/good", 5, 91)
    images(folder / "test_public/good", 4, 92)
    images(folder / "test_public/bad", 5, 200)
    for path in sorted((folder / "test_public/bad").iterdir()):
        masks = folder / "test_public/ground_truth/bad"
        masks.mkdir(parents=True, exist_ok=True)
        Image.new("L", Image.open(path).size, 255).save(masks / f"{path.stem}_mask.png")
    images(folder / "test_private", 3)


@pytest.mark.parametrize("name", ["test_public", "test", "Test"])
def test_mvtec_ad_2_is_read_with_its_masks_which_are_no_kind(name, here, caplog):
    mvtec_ad_2(here / "parts")
    (here / "parts/test_public").rename(here / "parts" / name)
    (here / "parts/train").rename(here / "parts" / ("Train" if name == "Test" else "train"))
    module = OneClass("parts")
    module.setup("fit")
    assert (len(module.train_data), len(module.val_data)) == (20, 5)
    samples = module.test_data.samples
    assert samples["source"].value_counts().to_dict() == {"good": 4, "bad": 5}
    assert [bool(item.gt_mask.any()) for item in module.test_data] == [source == "bad" for source in samples["source"]]
    (said,) = [message for message in caplog.messages if "are read" in message]
    assert "are read, not test_private. " in said


def test_a_whole_product_is_no_normal_class(here):
    several(here / "parts")
    with pytest.raises(ValueError, match=r"parts holds another folder of images \(nut\): give parts/nut\."):
        OneClass("parts", normal_class="nut").setup()


def test_a_single_image_is_too_few(here):
    images(here / "parts", 1)
    with pytest.raises(ValueError, match=r"'good' has no training images in 'parts'\. What there is was left for the"):
        OneClass("parts").setup()


def test_what_is_not_read_of_a_folder_is_named(here, caplog):
    mvtec(here / "parts")
    images(here / "parts/validation/good", 3)
    (here / "parts/notes").mkdir()
    module = OneClass("parts", root=here, val_split_ratio=0.25)
    module.setup("fit")
    assert (len(module.train_data), len(module.val_data)) == (15, 5)
    (said,) = [message for message in caplog.messages if "are read" in message]
    assert said.startswith("Of parts, only train, test and masks are read, not validation. Images that are held out")


def test_trains_are_a_class_where_there_is_no_test(here):
    images(here / "parts/Train", 10)
    images(here / "parts/Car", 3, 200)
    module = OneClass("parts", "Train")
    module.setup("fit")
    assert module.test_data.samples["source"].value_counts().to_dict() == {"Train": 2, "Car": 3}


def test_a_class_that_is_named_may_lie_in_several_folders(here):
    visa(here / "parts")
    module = OneClass("parts", "candle")
    module.setup("fit")
    assert len(module.train_data) + len(module.val_data) + len(module.test_data) == 11


def masks_beside(folder: Path) -> None:
    mvtec(folder)
    for path in sorted((folder / "test/scratch").iterdir())[:3]:
        Image.open(path).save(path.with_suffix(".jpg"))
    for path in sorted((folder / "train/good").iterdir())[:2]:
        Image.open(path).save(path.with_stem(f"{path.stem}_GT"))


def test_masks_among_the_images_are_named(here, caplog):
    masks_beside(here / "parts")
    OneClass("parts").setup("fit")
    said = [message for message in caplog.messages if "named like masks" in message]
    assert len(said) == 2
    assert "masks: 2 of 22 (parts/train/good/00_GT.png beside 00.png, parts/train/good/01_GT.png beside 01" in said[0]
    assert "masks: 3 of 12 (parts/test/scratch/00.png beside 00.jpg, " in said[1]
    caplog.clear()
    PathDataset(here / "parts/test")
    assert ["3 of 12" in message for message in caplog.messages if "named like masks" in message] == [True]


def visa(folder: Path) -> None:
    images(folder / "candle/Data/Images/Normal", 5)
    images(folder / "candle/Data/Images/Anomaly", 3, 200)
    images(folder / "candle/Data/Masks/Anomaly", 3, 255)


def labels_in_train(folder: Path) -> None:
    images(folder / "Train", 4)
    images(folder / "Train/Label", 4)
    images(folder / "Test", 4)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            visa,
            r"Which images below parts/candle are normal\? They lie in parts/candle/Data/Images/Anomaly, "
            r"parts/candle/Data/Images/Normal, .* if all are normal, say so with normal_class",
        ),
        (labels_in_train, r"Which class of parts is normal: '\.' or 'Label'\? .*'\.' is the images beside these"),
        (several, r"parts holds several folders of images \(bolt, nut\): give one of them"),
        (one_within, r"parts holds another folder of images \(bolt\): give parts/bolt\."),
        (nobody_knows, r"Which class of parts is normal: 'cats' or 'dogs'\? Say so with normal_class"),
        (unlabelled_test, r"The images in parts/test lie in no sub-folder: nothing says which are normal"),
    ],
)
def test_a_folder_that_does_not_say_it_is_named_with_the_layouts(layout, message, here):
    layout(here / "parts")
    with pytest.raises(ValueError, match=message) as caught:
        OneClass("parts").setup()
    assert "train/good, test/good and test/KIND (as MVTec AD)" in str(caught.value)


def test_a_data_set_with_a_name_needs_its_class():
    with pytest.raises(ValueError, match="Which class of fashion_mnist is normal"):
        OneClass("fashion_mnist")


def test_a_folder_is_enough_for_every_command_and_each_says_what_is_next(here, capsys, caplog):
    mvtec(here / "parts")
    images(here / "new", 3, 200)
    caplog.set_level(logging.INFO)
    main(["train", "--data", "./parts", *SMALLER, "--trainer.accelerator=cpu"])
    out = capsys.readouterr().out
    assert f"15 images are few, and will do: {DEFAULT_DETECTOR} trains nothing, but fits." in caplog.messages
    run = Path("results", DEFAULT_DETECTOR, "OneClass/parts/v0")
    assert re.search(r"image_AUROC\W+[\d.]+", out)
    assert f"Results and checkpoint: {run}\n" in out
    following = [shlex.split(line)[1:] for line in re.findall(r"(?:Next:| {5}) (flowood .*)", out)]
    predict, export = following
    checkpoint = predict[-1]
    assert checkpoint == str(run / "weights/lightning/model.ckpt")
    report = shlex.split(re.search(r"As a page: flowood (report .*)", out)[1])

    capsys.readouterr()
    main([*predict, "--trainer.accelerator=cpu", "--data", "new"])  # the checkpoint knows all that training was told
    (path,) = here.rglob("predictions.csv")
    assert len(pd.read_csv(path)) == 3
    out = capsys.readouterr().out
    settings = json.loads((path.parent / "run.json").read_text())["settings"]
    assert re.fullmatch(r"Called anomalous: \d of 3 images .*; if all were normal, expected: .*", settings["decision"])
    assert f"{settings['decision']}\n" in out
    assert f"Drift: p = {settings['drift_p_value']:.2g}," in out
    assert "run.json beside them has all settings, and the decision." in out
    export[export.index("--export_type") + 1] = "torch"
    main(export)
    assert (run / "weights/torch/model.pt").is_file()
    main(report)
    assert (run / "report/index.html").is_file()
    capsys.readouterr()
    main(["validate", "--data=parts", "--ckpt_path", checkpoint, "--trainer.accelerator=cpu"])
    main(["test", "--data=parts", "--ckpt_path", checkpoint, "--trainer.accelerator=cpu"])
    out = capsys.readouterr().out
    assert "image_AUROC" in out
    (record,) = run.glob("test/*/run.json")
    decision = json.loads(record.read_text())["settings"]["decision"]
    assert re.match(
        r"At a level of 16.7.% .*: \d of 4 normal images raise .* \d of 5 anomalous images are found", decision
    )
    assert f"{decision}\n5 held-out normal images allow no level below 17 %; 20 would allow 5 %.\n" in out


@pytest.mark.parametrize(
    ("data", "detector"),
    [
        ("./parts", "FeatureMapFlow"),
        ("OneClass", "FeatureMapFlow"),
        ("CrossDataset", "EmbeddingFlow"),
        ("anomalib_flowood.data.CrossDataset", "EmbeddingFlow"),
    ],
)
def test_the_default_detector_is_of_the_data(data, detector, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({"data": {"class_path": data}}))
    for given in (["--data", data], [f"--data={data}"], ["--config", str(file)]):
        assert _with_detector(["train", *given])[:3] == ["train", "--model", f"anomalib_flowood.models.{detector}"]
    file.write_text(json.dumps({"class_path": data}))
    assert _with_detector(["train", "--data", str(file)])[2].endswith(detector)
    file.write_text(json.dumps({"data": data}))
    assert _with_detector(["train", "--config", str(file)])[2].endswith(detector)
    assert _with_detector(["train", "--data", data, "--model=PixelFlow"])[1:] == ["--data", data, "--model=PixelFlow"]


def test_a_training_that_has_ended_is_not_taken_for_a_new_one(here, capsys, caplog):
    mvtec(here / "parts")
    train = ["train", "--data", "./parts", *SMALLER, "--trainer.accelerator=cpu"]
    main(train)
    runs = Path("results", DEFAULT_DETECTOR, "OneClass/parts")
    checkpoint = runs / "v0/weights/lightning/model.ckpt"
    capsys.readouterr()
    main([*train, "--ckpt_path", str(checkpoint), "--model.visualizer=false"])
    assert (runs / "v1/results.csv").is_file()
    assert f"The checkpoint {checkpoint.resolve()} is of a training that has ended" in caplog.text
    assert f"Results: {runs / 'v1'}\n" in capsys.readouterr().out
    assert (runs / "latest/weights/lightning/model.ckpt").samefile(checkpoint)


def test_normal_images_alone_are_enough_and_what_is_not_defined_is_said_once(here, capsys, caplog):
    flat(here / "parts")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(["train", "--data", "parts", *SMALLER, "--trainer.accelerator=cpu"])
    assert not [str(warning.message) for warning in caught if "not defined" in str(warning.message)]
    out = capsys.readouterr().out
    assert re.search(r"image_AUROC\W+not defined", out)
    assert "The test split of parts has no anomalous images: AUROC is undefined." in caplog.messages
    assert re.search(r": \d of 4 normal images raise an alarm \(.*expected: at most 20", out)
    assert "Next: flowood predict" in out


def test_arguments_of_the_data_follow_the_folder_and_another_detector_is_named(here, capsys, caplog):
    nobody_knows(here / "parts")
    for number in range(3, 6):
        Image.new("L", (20, 20), 80 + number).save(f"parts/cats/{number}.png")
    small = ["--model.image_size=[8, 8]", "--model.channels=1", "--model.max_epochs=1", "--trainer.accelerator=cpu"]
    main(["fit", "--model", "PixelFlow", *small, "--data", "parts", "--data.normal_class", "cats"])
    assert "Next: flowood predict --data NEW_IMAGES --ckpt_path results/PixelFlow/" in capsys.readouterr().out
    assert Path("results/PixelFlow/OneClass/parts-cats").is_dir()
    (said,) = [text for text in caplog.messages if "few to train a flow on" in text]
    assert re.search(rf"^4 images .* network will do with them: .*{DEFAULT_DETECTOR}.*, without couplings", said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "./prats"], "There is no folder ./prats (looked for it from "),
        (["--data", "prats"], "Unknown folder or data module 'prats'. Did you mean 'parts'"),
        (["--data", ""], "No data are named: give a folder."),
        (["--data="], "No data are named: give a folder."),
        (["--data=OneClas"], "Did you mean 'OneClass'"),
        ([], "There are no images to train on: name their folder (--data FOLDER)"),
        (["--data", "parts/0.png"], "parts/0.png is a file, but describes no data module: give a folder."),
        (["--data=parts/list.csv"], "parts/list.csv is a file, but describes no data module: give a folder."),
        (["--config", "parts/image.yaml"], "0.png is a file, but describes no data module: give a folder."),
    ],
)
def test_what_is_no_folder_is_said_before_anything_is_loaded(arguments, message, here, capsys):
    (here / "parts").mkdir()
    Image.new("L", (4, 4)).save(here / "parts/0.png")
    (here / "parts/list.csv").write_text("image,label\n0.png,0\n")
    (here / "parts/image.yaml").write_text("data: 0.png\n")
    with pytest.raises(SystemExit) as caught:
        main(["train", *arguments])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert "test/KIND (as MVTec AD)" in error


@pytest.mark.parametrize("name", ["🎈", "a: b", "null", 'it\'s "5"', "a\nb", "a\\b"])
def test_a_folder_in_a_configuration_may_have_any_name(name, here):
    (here / name).mkdir()
    written = yaml.safe_dump({"data": f"./{name}"}, allow_unicode=True)
    assert yaml.safe_load(_with_data_module(written, here))["data"]["init_args"] == {"dataset": name}


@pytest.mark.parametrize("name", ["./🎈", "./a: b", "./null", "#1", "./1e3", "./a #2", "./parts", "./[a]", "./a\\b"])
def test_a_folder_on_the_command_line_may_have_any_name(name, here):
    mvtec(here / name)
    given = ["--data", name, "--data.train_limit=18", "--trainer.accelerator=cpu"]
    config = FlowoodCLI(["fit", "--model=EmbeddingFlow", *given, *SMALLER], run=False).config["fit"]
    assert str(Path(config["data"]["init_args"]["dataset"])) == str(Path(name))
    assert config["data"]["init_args"]["train_limit"] == 18


@pytest.mark.parametrize("given", [["--ckpt_path=#c/model.ckpt"], ["--ckpt_path", "#c/model.ckpt"]])
def test_a_checkpoint_whose_path_begins_like_a_comment_is_not_passed_over(given, cases, here):
    mvtec(here / "parts")
    (here / "#c").mkdir()
    shutil.copy(cases("embedding_flow").checkpoint, here / "#c/model.ckpt")
    config = FlowoodCLI(["fit", "--data=parts", "--trainer.accelerator=cpu", *given], run=False).config["fit"]
    assert Path(config["ckpt_path"]) == Path("#c/model.ckpt")


def test_a_folder_that_no_configuration_can_name_is_refused(here, capsys):
    name = os.fsdecode(b"sch\xe4den")
    mvtec(here / name)
    with pytest.raises(SystemExit):
        main(["train", "--data", name])
    assert "is not in UTF-8, as configurations are" in capsys.readouterr().err


def test_a_folder_in_a_configuration_is_seen_from_where_the_command_runs(here, capsys):
    mvtec(here / "parts")
    file = here / "files/detector.yaml"
    file.parent.mkdir()
    file.write_text("trainer: {accelerator: cpu}\ndata: ./parts  # ours\nseed_everything: 0\n")
    main(["fit", "--config", str(file), *SMALLER, "--data.val_split_ratio=0.4"])
    (config,) = here.rglob("config.yaml")
    data = yaml.safe_load(config.read_text())["data"]
    assert data["class_path"].endswith("OneClass")
    assert data["init_args"]["dataset"] == "parts"
    assert data["init_args"]["val_split_ratio"] == 0.4
    capsys.readouterr()
    for written, said in (("./nowhere", f"There is no folder ./nowhere (looked for it from {here})."),
                          ("part", "Unknown folder or data module 'part'. Did you mean 'parts'?")):  # fmt: skip
        file.write_text(f"data: {written}\n")
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(file)])
        err = capsys.readouterr().err
        assert said in err
        assert "Traceback" not in err
    (file.parent / "data.yaml").write_text("class_path: OneClass\ninit_args: {dataset: parts, train_limit: 1}\n")
    file.write_text("data: data.yaml\n")  # seen from the other file, as by jsonargparse
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(file), *SMALLER])
    assert "needs at least 2 training images" in capsys.readouterr().err
