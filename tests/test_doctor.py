# SPDX-License-Identifier: Apache-2.0
"""``flowood doctor``: what is there, what is missing, and the command that brings it."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from anomalib_flowood.cli import doctor, main

REQUIRES = [
    "numpy>=1",
    "pyyaml>=99",
    "no-such-package<2",
    'openvino>=9999; extra == "export"',
    'no-such-extra-package; extra == "export"',
    'numpy>=1; extra == "offline"',
    'anomalib-flowood[export]; extra == "more"',
    'no-such-test-package; extra == "test"',
    'no-such-docs-package; extra == "docs"',
    'no-such-windows-package; sys_platform == "nowhere"',
]


@pytest.fixture
def requirements(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "requires", lambda name: {"anomalib-flowood": REQUIRES}[name])
    for name in ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_missing_has_a_remedy_and_a_status(requirements, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    missing = out.partition("missing, and required\n")[2].split("to get")[0].split()
    assert missing == ["pyyaml>=99", "no-such-package<2"]
    assert "\n  pip install 'pyyaml>=99' 'no-such-package<2'\n" in out
    assert out.endswith("  pip install 'anomalib-flowood[export,more]'\n")
    assert "  more: lacks openvino>=9999, no-such-extra-package\n" in out
    assert "  offline: complete\n" in out
    assert "no-such-extra-package" in out
    assert not {"docs", "test"} & {line.strip().partition(":")[0] for line in out.splitlines()}
    assert "windows" not in out
    assert f"  torch         {version('torch')}\n" in out


def test_it_is_well_without_extras(requirements, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "requires", lambda _: [REQUIRES[0], *REQUIRES[3:]])
    main(["doctor"])
    out = capsys.readouterr().out
    assert out.endswith("Everything that is required is here.\n")
    assert "export: lacks openvino>=9999, no-such-extra-package\n" in out


def test_a_package_that_is_not_installed(monkeypatch, requirements, capsys):
    def absent(name: str):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", absent)
    monkeypatch.setattr(doctor, "version", absent)
    with pytest.raises(SystemExit):
        main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] == ["anomalib-flowood"]
    assert found["remedies"] == ["pip install 'anomalib-flowood'"]


def test_weights_in_caches_and_folders(requirements, monkeypatch):
    (requirements / "cache/huggingface/hub/models--timm--resnet18.a1_in1k/snapshots/0").mkdir(parents=True)
    (requirements / "cache/huggingface/hub/models--other--x/snapshots/0").mkdir(parents=True)
    (requirements / "cache/torch/hub/checkpoints").mkdir(parents=True)
    (requirements / "cache/torch/hub/checkpoints/net.pth").touch()
    (requirements / "backbones/mine").mkdir(parents=True)
    (requirements / "backbones/mine/config.json").touch()
    weights = doctor.examine().weights
    assert ["resnet18.a1_in1k"] in weights.values()
    assert ["net.pth"] in weights.values()
    assert ["local-dir:backbones/mine"] in weights.values()
    monkeypatch.setenv("HF_HUB_CACHE", str(requirements / "elsewhere"))
    assert ["resnet18.a1_in1k"] not in doctor.examine().weights.values()


def test_a_cache_of_another_user_is_none(requirements, monkeypatch):
    def refuse(folder, pattern):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "glob", refuse)
    monkeypatch.setattr(doctor, "_nvidia", list)
    assert not any(where.startswith("cache") for where in doctor.examine().weights)


@pytest.mark.parametrize(("built", "said"), [(True, "GPU: A Card"), (False, "GPU: A Card, for which PyTorch was not")])
def test_gpus_are_named(built, said, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho A Card\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(doctor, "_built_for_cuda", lambda: built)
    assert any(device.startswith(said) for device in doctor.examine().devices)


def test_a_broken_driver_is_no_gpu(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho failed to talk to the driver\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert not any("GPU: failed" in device for device in doctor.examine().devices)
