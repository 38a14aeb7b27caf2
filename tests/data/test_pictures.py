# SPDX-License-Identifier: Apache-2.0
"""Where pictures of results go."""

import pytest
from torch.utils.data import Dataset

from anomalib_flowood.data.pictures import _common_folder, _name


class Files(Dataset):
    image_filenames = ("/one/good/000.png", "/two/good/000.png")


def test_images_on_several_drives_have_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(paths: object) -> str:
        msg = f"Paths don't have the same drive: {paths}"
        raise ValueError(msg)

    monkeypatch.setattr("os.path.commonpath", refuse)
    common = _common_folder(Files())
    assert [str(_name(path, common)) for path in Files.image_filenames] == ["one/good/000.png", "two/good/000.png"]
