# SPDX-License-Identifier: Apache-2.0
import logging

import pytest
import torch
from model_helpers import data, embedding_flow, engine, feature_map_flow

from anomalib_flowood.models.components.frozen_features import FeatureStore


@pytest.mark.parametrize("cache_gib", [1.0, 0.0])
def test_stored_features_are_what_was_put_in(cache_gib, caplog):
    store, parts = FeatureStore(10, cache_gib), [torch.randn(4, 2, 3).half(), torch.randn(5, 2, 3).half()]
    with caplog.at_level(logging.WARNING):
        for part in parts:
            store.append((part, part.sum((1, 2))))
    assert torch.equal(store.features[0], torch.cat(parts))
    assert store.features[1].shape == (9,)
    assert ("kept in a temporary file" in caplog.text) == (cache_gib == 0)


def test_a_fit_with_features_on_disk_is_the_same_fit(tmp_path):
    fitted = []
    for cache_gib in (1.0, 1e-6):
        torch.manual_seed(0)
        detector = feature_map_flow(cache_gib=cache_gib)
        engine(tmp_path).fit(detector, datamodule=data(tmp_path))
        fitted.append(detector)
    for ours, theirs in zip(fitted[0].model.flow.parameters(), fitted[1].model.flow.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_loaders_may_be_given_in_the_place_of_a_data_module(tmp_path):
    module = data(tmp_path)
    module.prepare_data()
    module.setup()
    fitted = []
    for training, validation in (
        (module.train_dataloader(), module.val_dataloader()),
        ([module.train_dataloader()], [module.val_dataloader()]),
    ):
        torch.manual_seed(0)
        detector = embedding_flow(max_epochs=1)
        engine(tmp_path).fit(detector, train_dataloaders=training, val_dataloaders=validation)
        assert len(detector.post_processor.calibration) == len(module.val_data)
        fitted.append(detector)
    for ours, theirs in zip(*(detector.model.parameters() for detector in fitted), strict=True):
        assert torch.equal(ours, theirs)


def test_several_loaders_are_refused(tmp_path):
    module = data(tmp_path)
    module.prepare_data()
    module.setup()
    loaders = [module.train_dataloader(), module.train_dataloader()]
    with pytest.raises(ValueError, match="takes one DataLoader of training images, got DataLoader, DataLoader"):
        engine(tmp_path).fit(embedding_flow(), train_dataloaders=loaders, val_dataloaders=module.val_dataloader())
