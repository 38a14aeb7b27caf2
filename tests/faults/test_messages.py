# SPDX-License-Identifier: Apache-2.0
"""Broken files and wrong values are named, with the remedy, before anything is done."""

import codecs
import errno
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import Folder, MVTecAD
from anomalib.models import Padim
from lightning.pytorch.trainer.states import TrainerFn
from model_helpers import DETECTORS, data, engine, pixel_flow
from PIL import Image
from safetensors.torch import save_file

from anomalib_flowood import EmbeddingFlow, OneClass, load
from anomalib_flowood.benchmark import can_be_mended, out_of_memory, readable
from anomalib_flowood.cli import commands, configs, main
from anomalib_flowood.cli.results import ResultsCLI
from anomalib_flowood.configuration import check_arguments, read_configuration
from anomalib_flowood.data import decoding, read_image
from anomalib_flowood.features import create_backbone

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
BROKEN = {
    "UTF-16": ("model: PixelFlow\n".encode("utf-16"), r"a\.yaml is in UTF-16\. Save it as UTF-8"),
    "Latin-1": ("name: Größe\n".encode("latin-1"), r"a\.yaml is not in UTF-8 \(byte 8 is 0xf6\)\. Save it as UTF-8"),
    "a zero": (b"model: \0\n", r"a\.yaml is not valid YAML: unacceptable character"),
    "a bracket": (b"model: [a\n", r"a\.yaml is not valid YAML: .*line 1"),
    "a billion aliases": (BOMB.encode(), r"a\.yaml has more than 100,000 values, aliases written out \(line 5\)"),
    "a circle": (b"a: &a [1, *a]\n", r"a\.yaml repeats \*a before its end \(line 1\)"),
    "a well": (b"[" * 200 + b"]" * 200, r"a\.yaml is nested more than 100 times"),
    "an object": (b"a: !!python/object/apply:os.getcwd []\n", r"a\.yaml is not valid YAML: could not determine"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_configurations_are_named_at_once(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, message = BROKEN[kind]
    (tmp_path / "a.yaml").write_bytes(content)
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        read_configuration("a.yaml")
    if kind != "an object":  # which the parser meets, and refuses
        for arguments in (["train", "--config", "a.yaml"], ["test", "--data=a.yaml"], ["benchmark", "-c", "a.yaml"]):
            with pytest.raises(ValueError, match=message):
                check_arguments(arguments)
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--config", "a.yaml"])
        assert "flowood: a.yaml" in capsys.readouterr().err
    assert time.perf_counter() - begun < 1


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (["--model", "PixelFlow"], "--model PixelFlow stands before --config a.yaml, where model is .*EmbeddingFlow"),
        (
            ["--trainer.max_epochs=3"],
            "--trainer.max_epochs 3 stands .* is 7, .*: put --trainer.max_epochs behind",
        ),
        (["--model.image_size", "[64, 64]"], r"where model.image_size is \[32, 32\]"),
        (["--data", "./parts"], "where data is ./others"),
    ],
)
def test_an_option_that_a_file_behind_it_would_replace_is_refused(before, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(
        "model: {class_path: anomalib_flowood.EmbeddingFlow, init_args: {image_size: [32, 32]}}\n"
        "trainer: {max_epochs: 7, gradient_clip_val: 0.001, logger: {class_path: null}}\ndata: ./others\n"
    )
    with pytest.raises(ValueError, match=message):
        check_arguments(["train", *before, "--config", "a.yaml"])
    check_arguments(["train", "--config", "a.yaml", *before])
    same = ["--model=EmbeddingFlow", "--trainer.max_epochs", "7", "--model.image_size=[32,32]", "--data", "./others"]
    check_arguments(["train", *same, "--model.backbone", "resnet18", "--trainer.devices", "{", "--config=a.yaml"])
    check_arguments(["train", "--trainer.gradient_clip_val", "1e-3", "--trainer.logger=false", "--config", "a.yaml"])


@pytest.mark.parametrize("option", ["--config", "--data", "--model", "--trainer"])
def test_a_configuration_file_that_is_not_there_is_named_with_what_writes_some(option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for given in ([option, "configs/data/gone.yaml"], [f"{option}=configs/data/gone.yaml"]):
        with pytest.raises(SystemExit, match="2"):
            main(["train", *given])
        said = capsys.readouterr().err
        assert said.startswith("flowood: There is no configuration file configs/data/gone.yaml (looked for it from ")
        assert "`flowood configs ./configs` writes" in said
    (tmp_path / "parts.yaml").mkdir()  # a folder of images may be called so, and what is written need not be there
    check_arguments(["train", "--data", "parts.yaml", "--output", "new.yaml"])


def test_a_byte_order_mark_and_aliases_that_people_write_are_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(codecs.BOM_UTF8 + b"a: &a {x: 1}\nb: {<<: *a, y: 2}\n")
    assert read_configuration(path) == {"a": {"x": 1}, "b": {"x": 1, "y": 2}}


def test_values_that_no_loader_takes_are_named_with_the_data_module(tmp_path):
    for argument, least, value in [("train_batch_size", 1, 0), ("eval_batch_size", 1, -2), ("num_workers", 0, -1)]:
        with pytest.raises(ValueError, match=rf"{argument} of \w+ has to be at least {least}, got {value}"):
            data(tmp_path, **{argument: value})
    with pytest.raises(ValueError, match=r"seed of CrossDataset has to be at least 0, got -1"):
        data(tmp_path, seed=-1)
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        Image.fromarray(np.full((12, 12, 3), 60 * number, np.uint8)).save(images / f"{number}.png")
    foreign = Folder("ours", root=tmp_path, normal_dir="images", val_split_mode="from_train", train_batch_size=0)
    with pytest.raises(ValueError, match=r"train_batch_size of Folder has to be at least 1, got 0"):
        engine(tmp_path).fit(pixel_flow(), datamodule=foreign)


@pytest.fixture
def backbone(tmp_path):
    """A folder as `flowood backbone` writes it, of a network too small to be of use, and its own description."""
    network = create_backbone("test_resnet", pre_trained=False)
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()}, tmp_path / "model.safetensors"
    )
    cfg = network.pretrained_cfg
    known = {key: cfg[key] for key in ("mean", "std", "input_size", "first_conv", "classifier")}
    description = {"architecture": "test_resnet", "num_classes": 1000, "pretrained_cfg": known}
    (tmp_path / "config.json").write_text(json.dumps(description))
    assert EmbeddingFlow(f"local-dir:{tmp_path}", layers=[]).model is not None
    return tmp_path, description


def test_broken_folders_of_backbones_are_named(backbone):
    folder, description = backbone
    name, config, weights = f"local-dir:{folder}", folder / "config.json", folder / "model.safetensors"
    for text, message in [
        ("{", r"config\.json is not valid JSON in UTF-8 .*`flowood backbone` writes such a file"),
        ("[]", r"config\.json describes no network that timm knows: it has no architecture"),
        ('{"architecture": "resnet0"}', r"config\.json describes no network .*: its architecture is 'resnet0'"),
        (json.dumps({**description, "pretrained_cfg": 3}), r"timm builds nothing from .*config\.json"),
    ]:
        config.write_text(text)
        with pytest.raises(ValueError, match=message):
            EmbeddingFlow(name, layers=[])
    config.write_bytes(json.dumps(description).encode("utf-16"))
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON in UTF-8"):
        EmbeddingFlow(name, layers=[])
    config.write_text(json.dumps(description))
    whole = weights.read_bytes()
    for content in (whole[:1000], b"", b"no weights at all", whole[: len(whole) // 2]):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=rf"The weights in the folder {folder} cannot be read, or .*copied"):
            EmbeddingFlow(name, layers=[])
    save_file({"conv1.0.weight": torch.zeros(3)}, weights)
    with pytest.raises(ValueError, match=rf"The weights in the folder {folder} .*are of another network"):
        EmbeddingFlow(name, layers=[])


def test_a_truncated_export_is_named(cases, tmp_path, monkeypatch):
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = cases("pixel_flow").detector.to_torch(tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.pt is not the file that .* it was not copied whole"):
        load(path)
    description = path.with_suffix(".json")
    known = json.loads(description.read_text())
    del known["files"]  # which earlier states of the version have not written
    description.write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"model\.pt cannot be loaded: is it whole, .* Export the model again"):
        load(path)


@pytest.mark.parametrize(
    ("command", "elsewhere"),
    [
        (["configs", "there"], "name another folder."),
        (["predict", "--data=.", "--ckpt_path=model.ckpt"], "name --output."),
        (["export", "--export_type=onnx", "--ckpt_path=model.ckpt"], "name --export_root."),
        (["train", "--data=."], "name --default_root_dir."),
        (["benchmark", "--config=bench"], "run it in another folder."),  # it has no such option
    ],
)
def test_a_place_that_may_not_be_written_is_named_with_the_option_for_another(command, elsewhere, monkeypatch, capsys):
    def forbidden(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/mnt/there")

    monkeypatch.setattr(configs, "run", forbidden)
    monkeypatch.setattr(commands, "FlowoodCLI", forbidden)
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert (
        f"flowood: /mnt/there may not be read or written (Permission denied). To write elsewhere, {elsewhere}" in said
    )


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("taken", "taken is a file, where a folder has to be. To write elsewhere, name another folder."),
        ("taken/mine", "taken is a file, where a folder has to be. To write elsewhere, name another folder."),
    ],
)
def test_a_file_where_a_folder_has_to_be_is_named(named, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    with pytest.raises(SystemExit) as ended:
        main(["configs", named])
    assert ended.value.code == 1
    assert f"flowood: {said}" in capsys.readouterr().err


def test_a_folder_where_a_file_has_to_be_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    monkeypatch.setattr(commands, "FlowoodCLI", lambda _args: Path("taken").read_bytes())
    with pytest.raises(SystemExit) as ended:
        main(["watch", "model.ckpt", "arriving", "--output=taken"])
    assert ended.value.code == 1
    assert "flowood: taken is a folder, where a file has to be. To write elsewhere, name --output." in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_masks_that_anomalib_cannot_lay_beside_images_are_said_so(kind, tmp_path):
    for name in (f"train/good/0.{kind}", f"test/good/0.{kind}", f"test/hole/0.{kind}", f"test/hole/1.{kind}"):
        (tmp_path / "nut" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / "nut" / name)
    (tmp_path / "nut/ground_truth/hole").mkdir(parents=True)
    for mask in ("0_mask.png", "1_mask.png")[: 2 if kind == "jpg" else 1]:
        Image.new("L", (8, 8)).save(tmp_path / "nut/ground_truth/hole" / mask)
    with pytest.raises(ValueError, match="equal len keys") as found:
        MVTecAD(tmp_path, category="nut").setup()
    said = readable(found.value)
    assert said.startswith("anomalib's data module finds another number of masks than of anomalous images.")
    assert "PNG images alone" in said
    assert "OneClass (--data FOLDER)" in said


@pytest.mark.skipif(int(pd.__version__.split(".")[0]) < 3, reason="anomalib fails with pandas 3 alone")
@pytest.mark.parametrize("module", ["MVTecLOCO", "MVTecAD2"])
def test_what_anomalibs_data_modules_fail_of_with_pandas_3_is_said(module, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = ["train/good/0", "train/good/1", "validation/good/0"]
    names += ["test/good/0", "test/dent/0", "ground_truth/dent/0/000"]
    names += ["test_public/good/0", "test_public/bad/0", "test_public/ground_truth/bad/0_mask"]
    for number, name in enumerate(names):
        path = Path("sets/can", f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 100 + number).save(path)
    data = ["--data", module, "--data.root=sets", "--data.category=can", "--data.num_workers=0"]
    small = ["--model.backbone=test_efficientnet", "--model.pre_trained=false", "--model.image_size=[32, 32]"]
    with pytest.raises(SystemExit):
        main(["train", "--model", "EmbeddingFlow", *small, *data, "--trainer.accelerator=cpu"])
    assert "flowood: anomalib's MVTecLOCO and MVTecAD2 fail with pandas 3" in capsys.readouterr().err


def test_a_folder_that_is_removed_under_a_shell_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--data", str(tmp_path)])
    assert (
        capsys.readouterr().err == "flowood: The folder that this runs in has been removed: change into another one.\n"
    )


def test_data_that_anomalib_cannot_download_are_said_to_be_missing(tmp_path, monkeypatch, capsys):
    def unreachable(*_args, **_kwargs):
        raise URLError(OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH)))

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    monkeypatch.setattr("anomalib.data.utils.download.urlretrieve", unreachable)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", "--model=PixelFlow", "--model.image_size=[8,8]", "--data=MVTecAD", "--trainer.accelerator=cpu"])
    said = capsys.readouterr().err
    assert "flowood: What is not here cannot be downloaded: [Errno 101] Network is unreachable. Put it where" in said


def test_a_backbones_folder_that_anomalibs_detectors_miss_is_said_with_the_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as found:
        Padim(backbone="local-dir:backbones/r18")
    said = "Config file not found: backbones/r18/config.json. `flowood backbone NAME FOLDER` writes such a folder."
    assert readable(found.value) == said
    assert readable(ValueError(said)) == said  # once
    Path("parts").mkdir()
    with pytest.raises(SystemExit):
        main(["train", "--model", "Padim", "--model.backbone=local-dir:backbones/r18", "--data", "parts"])
    assert f"flowood: {said}\n" in capsys.readouterr().err


def test_memory_that_ran_out_is_said_so_with_the_remedy():
    for request in (lambda: torch.empty(2**50), lambda: np.empty(2**50)):
        with pytest.raises((RuntimeError, MemoryError)) as found:
            request()
        assert out_of_memory(found.value)
        assert readable(found.value).startswith("Memory ran out: ")
        assert "Smaller batches (train_batch_size and eval_batch_size" in readable(found.value)
    assert readable(MemoryError()).startswith("Memory ran out: MemoryError. Smaller batches")  # Python's has no words
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_pillow_suspects_is_read_and_named_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(decoding, "_told", set())
    path = tmp_path / "large.png"
    Image.new("L", (40, 40)).save(path)
    for _ in range(2):
        assert read_image(path).shape == (1, 40, 40)
    assert read_image(path.read_bytes()).shape == (1, 40, 40)
    said = [record.getMessage() for record in caplog.records]
    assert [text[:60] for text in said] == [
        f"The image {path} has 1,600 pixels, above 1,000, where Pillow"[:60],
        "The image that was given has 1,600 pixels, above 1,000, where"[:60],
    ]
    assert "with more than 2,000 it would be refused" in said[0]


LEFT_ALONE = {
    "gloo": "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.1.1]:45678",
    "NCCL": "NCCL error in: ProcessGroupNCCL.cpp:2251, remote process exited or there was a network error, NCCL 2.27",
}


@pytest.mark.parametrize("backend", LEFT_ALONE)
def test_a_process_whose_other_was_killed_says_so_and_how_to_go_on(backend, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    error = RuntimeError(f"{LEFT_ALONE[backend]}\nException raised from readComplete")
    assert can_be_mended(error)
    assert readable(error) == f"Another process ended (killed? out of memory?): {LEFT_ALONE[backend]}"
    assert not can_be_mended(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    cli = object.__new__(ResultsCLI)
    trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING))
    cli.engine = SimpleNamespace(kept_checkpoint=lambda: tmp_path / "model.ckpt", trainer=trainer)
    with pytest.raises(RuntimeError, match="Exception raised"), cli.told_how_to_go_on():
        raise error
    assert capsys.readouterr().err == "Interrupted. The same command goes on from there with --ckpt_path model.ckpt\n"
    with pytest.raises(RuntimeError, match="shapes"), cli.told_how_to_go_on():
        raise RuntimeError("shapes")
    assert capsys.readouterr().err == ""


def test_several_products_are_told_where_they_belong(tmp_path):
    for number in range(30):
        (tmp_path / f"train/p{number:02}").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / f"train/p{number:02}/0.png")
    with pytest.raises(ValueError, match=r"Which class .* belong below train/good \(train/good/p29/…\)\."):
        OneClass(tmp_path).setup()


@pytest.mark.parametrize("build", DETECTORS.values())
def test_a_single_image_is_no_batch(build):
    detector = build(coupling_layers=0) if build is not pixel_flow else build()
    with pytest.raises(ValueError, match=r"Expected (a batch of )?images.*got \(3, \d+, \d+\)"):
        detector.eval()(torch.rand(3, 20, 20))


def test_images_that_are_all_the_same_are_told_of(tmp_path, caplog):
    (tmp_path / "same").mkdir()
    for number in range(30):
        Image.new("RGB", (16, 16), (90, 80, 70)).save(tmp_path / f"same/{number}.png")
    engine(tmp_path, max_epochs=1).fit(pixel_flow(), datamodule=OneClass(tmp_path / "same"))
    assert caplog.text.count("images of the first batch are the same, or constant") == 1
    caplog.clear()
    engine(tmp_path, max_epochs=1).fit(pixel_flow(), datamodule=data(tmp_path))
    assert "are the same" not in caplog.text
