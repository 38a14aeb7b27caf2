# SPDX-License-Identifier: Apache-2.0
"""Lightning model of FeatureMapFlow."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch.trainer.states import TrainerFn
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from torchvision.transforms.v2 import Resize

from anomalib_flowood import processes
from anomalib_flowood.checks import check_sizes
from anomalib_flowood.flows import CONTEXTS, MASKS, SCALES, SUBNETS, draw
from anomalib_flowood.metrics import AUPRO, AUROC, PerSetEvaluator
from anomalib_flowood.models.components import (
    ExactPreProcessor,
    FlowModule,
    FrozenFeatures,
    backbone_pre_processor,
    kinds,
)
from anomalib_flowood.models.components.damage import DamagedImages
from anomalib_flowood.models.components.flow_module import image_metrics
from anomalib_flowood.models.components.folds import SCORED
from anomalib_flowood.models.components.weights import checksum
from anomalib_flowood.names import lists_names
from anomalib_flowood.scores.evidence import LEAST_DAMAGED
from anomalib_flowood.trainers import training_loaders

from .layer_flows import POSITION
from .torch_model import FeatureMapFlowModel

logger = logging.getLogger(__name__)

_DAMAGED_OF_KIND = 20
"""Images of each kind that are damaged if there are several; with one kind as many as are scored."""

_FITTED_TILES = 1000
"""Tiles that a fit uses: as many as the most images to which the whitening is fitted."""


@lists_names(masks=MASKS, subnets=SUBNETS, contexts=CONTEXTS, scales=SCALES)
class FeatureMapFlow(FrozenFeatures, FlowModule, AnomalibModule):
    """Density of the feature maps of a frozen, pretrained network: scores images, and localises what is anomalous.

    The score of an image combines several kinds of evidence, weighted by how well each tells damaged copies of up to
    100 training images, more if there are many kinds of images.

    Args:
        backbone: A timm name, or ``local-dir:FOLDER`` for a folder with weights.
        map_layers: Layers whose maps are shown, by timm's module names or indices; their most anomalous positions are
            evidence. ``None`` for the last ones of stride 8 and 16, or less.
        score_layers: Layers whose maps are evidence as a whole, an empty list for none; ``None`` for the last one of
            stride 32, or less. There is one flow for each layer in either list.
        pre_trained: Whether to load the backbone's weights.
        image_size: Height and width to which images are resized, unless a ``pre_processor`` says otherwise.
        subspace_dim: Principal directions to which each layer's descriptors are reduced.
        layout_dims: Principal directions of whole maps that are whitened after the flow; at most one for every two
            training images.
        mask: ``position`` for a flow on single positions with weights that all of them share; or the coupling mask of a
            flow on whole maps: {masks}.
        context: What a flow on positions knows of the rest of the image: {contexts}.
        subnet: s,t-network: {subnets}; for single positions a fully connected one, ``mlp`` or ``bottleneck``.
        bottleneck_dim: Width of the squeeze in the ``bottleneck`` network, and in the context ``quadrant``.
        coupling_layers: Number of couplings, for example 10. By default there are none: the density is a whitened
            Gaussian, fitted in one pass without training.
        hidden_channels: Width of the s,t-networks.
        scale: Log-scales of the couplings: {scales}; with ``none`` they only shift.
        score_fraction: The share of a map's positions that count as its most anomalous ones.
        bank_size: Normal positions of the finest of ``map_layers`` that are kept in a memory bank; a coarser one keeps
            more, in inverse proportion to its size. The largest distance of an image's positions from their nearest
            ones in the bank is evidence. In the finest layer, the patch that is rarest for its place is evidence in
            place of the most anomalous positions. 0 for no bank.
        kind_images: The fewest training images of a *kind* of normal image, such as one of several products: kinds are
            groups of images that have nothing in common for the backbone, and each has its own whitening. They are
            found without labels, and a fit says how many there are. 0 for one kind. Not with tiles.
        rotations: Whether to fit to few images (500 at most) also rotated by 180°, and by 90° and 270° if they are
            square, provided that rotated images are as near to the others as the images are. Not with tiles.
        tile_size: Height and width of tiles into which large images are cut; ``image_size`` is then that of whole
            images. ``None`` for no tiles.
        tile_stride: The largest step from one tile to the next; if it is smaller than a tile, tiles overlap, and their
            maps are averaged. ``None`` for ``tile_size``.
        feature_noise: Standard deviation of the Gaussian noise on reduced maps in training, which prevents overfitting
            to few images.
        cache_gib: Memory for stored features, in GiB; more go to a temporary file.
        max_epochs: Epochs to train if the trainer sets no limit. An epoch of a flow on positions has as many steps as
            it takes to draw as many positions as the coarsest of ``map_layers`` has in all images, 500 at most; with
            context ``quadrant``, or with a mask of whole maps, it sees every image once.
        learning_rate: Adam's learning rate at the start; it follows a cosine down to zero.
        pre_processor: anomalib's; by default images are resized and normalised as in the backbone's training.
        post_processor: anomalib's; by default labels are conformal at alpha = 0.05, from normal validation images.
        evaluator: anomalib's; by default AUROC, FPR95 and F1 of images, and AUROC and AUPRO of pixels.
        visualizer: anomalib's; by default it draws every test image's map.

    Raises:
        ValueError: If a name is unknown, or the configuration makes no sense.
        BackboneUnavailableError: If the backbone's weights cannot be had.
    """

    model: FeatureMapFlowModel
    reference_images = 10_000
    """Most images among which kinds are found; the whitening is fitted to fewer."""
    least_images = 3

    readable_since = "0.2.0"

    may_change = FrozenFeatures.may_change | {"feature_noise", "cache_gib"}

    def __init__(
        self,
        backbone: str = "tf_efficientnet_lite0",
        map_layers: Sequence[str | int] | None = None,
        score_layers: Sequence[str | int] | None = None,
        pre_trained: bool = True,
        image_size: tuple[int, int] = (320, 320),
        subspace_dim: int = 64,
        layout_dims: int = 256,
        mask: str = POSITION,
        context: str = "mean",
        subnet: str = "mlp",
        bottleneck_dim: int = 16,
        coupling_layers: int = 0,
        hidden_channels: int = 256,
        scale: str = "none",
        score_fraction: float = 0.01,
        bank_size: int = 1000,
        kind_images: int = 20,
        rotations: bool = True,
        tile_size: tuple[int, int] | None = None,
        tile_stride: tuple[int, int] | None = None,
        feature_noise: float = 0.3,
        cache_gib: float = 2.0,
        max_epochs: int = 10,
        learning_rate: float = 3e-3,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            pre_processor=(
                _pre_processor(backbone, image_size, tile_size) if self.takes_default(pre_processor) else pre_processor
            ),
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        image_size = self.resized_to(image_size, pre_processor)
        check_sizes(self.hparams)
        self.max_epochs = max_epochs
        self.learning_rate = learning_rate
        self.cache_gib = cache_gib
        self.rotations = rotations and tile_size is None
        self.feature_noise = feature_noise
        self.model = FeatureMapFlowModel(
            backbone,
            map_layers,
            score_layers,
            image_size,
            pre_trained=pre_trained,
            subspace_dim=subspace_dim,
            layout_dims=layout_dims,
            mask=mask,
            context=context,
            subnet=subnet,
            bottleneck_dim=bottleneck_dim,
            coupling_layers=coupling_layers,
            hidden_channels=hidden_channels,
            scale=scale,
            score_fraction=score_fraction,
            bank_size=bank_size,
            kind_images=kind_images,
            tile_size=tile_size,
            tile_stride=tile_stride,
        )
        self.images_at_once = 1 if tile_size else FlowModule.images_at_once
        self._reference: tuple[Tensor, ...] = ()
        self._copies = 1
        self._damaged: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self._whitened: tuple[int, ...] | None = None

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return the image metrics of all our detectors but bits per dimension; of pixels AUROC and AUPRO, given masks.

        anomalib's tiled ensemble takes no metric without a value, as bits per dimension would be.
        """
        pixels = [metric(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False) for metric in (AUROC, AUPRO)]
        return PerSetEvaluator(test_metrics=[*image_metrics(), *pixels])

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Draw the map of every test image, like anomalib's detectors."""
        return ImageVisualizer()

    def check_number(self, images: int) -> None:
        """Check the number of training images, also for each layer's directions; see :class:`FrozenFeatures`."""
        super().check_number(images)
        for layer in self.model.layers:
            layer.check_number(images)  # type: ignore[operator]

    @property
    def takes_bytes(self) -> bool:
        """Whether images may stay bytes: with tiles, which become floats later, and no pre-processor but ours."""
        transform = getattr(self.pre_processor, "transform", None)
        return self.model.tiles is not None and (transform is None or type(transform) is Resize)

    def judged(self, batch: Any) -> tuple[InferenceBatch, Tensor]:
        """See :meth:`FlowModule.judged`; with tiles, some of them at a time."""
        return super().judged(batch) if self.model.tiles is None else self.model.judged(batch.image)

    def extract_training(self, images: Tensor, batch: int, total: int) -> tuple[Tensor, ...]:
        """Return the feature maps of training images, in half precision to save memory.

        With tiles, only some are used, drawn at random for each image.
        """
        tiles = self.model.tiles
        if tiles is None:
            return _halved(self.extract(images))
        count = min(len(tiles), math.ceil(_FITTED_TILES / total))
        generator = torch.Generator().manual_seed(batch)  # the same tiles in a resumed fit
        which = [torch.randperm(len(tiles), generator=generator)[:count].tolist() for _ in images]
        return _halved(self.model.extract(images, which))

    def _validate_on_stored(self) -> None:
        """Store the features of validation images, except with tiles, of which there are too many."""
        if self.model.tiles is None:
            super()._validate_on_stored()

    def _check_exportable(self) -> None:
        super()._check_exportable()
        if self.model.tiles is not None:
            msg = (
                "A detector with tile_size cannot be exported to ONNX or OpenVINO: a graph would hold all tiles at "
                "once. Export type torch works, and so does the checkpoint: anomalib_flowood.load takes either."
            )
            raise ValueError(msg)

    def fit_features(self, features: tuple[Tensor, ...], copies: int = 1) -> None:
        """Fit descriptors and principal subspaces, for which copies of an image count like images."""
        del copies
        self.model.fit_features(features)

    def keep_reference(self, features: tuple[Tensor, ...], copies: int) -> None:
        """Keep the reduced maps and the mean features for the whitening."""
        self._reference, self._copies = features, copies
        self._whitened = None

    def _train_on_stored(self) -> None:
        """Also extract features of damaged copies of some training images, by which evidence is weighted.

        Not with tiles, nor where the stored features are not those of each image, as if their number is limited.
        """
        loaders = training_loaders(self.trainer)
        super()._train_on_stored()
        loader = loaders[0]
        images = len(self._reference[0]) // self._copies if self._reference else 0
        stored = images == len(loader.dataset) and processes.in_order(loader)
        if self.model.tiles is not None or not stored or images < LEAST_DAMAGED:
            return
        found = self.model.kinds.find(images, self._reference[-1][:: self._copies])
        each = max(_DAMAGED_OF_KIND, SCORED // len(found))
        of = torch.cat([some[draw(len(some), each)] for some in found]).sort().values
        copies = DataLoader(
            DamagedImages(Subset(loader.dataset, of.tolist())),
            batch_size=processes.batch_size_of(loader),
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
        )
        extracted, *_ = self._extract_all(copies, 1.0, "damaged-copy")
        room = self.cache_gib - self._kept_gib - extracted.taken_gib
        store = self._prepare_all(self.prepare_training, extracted.features, room)
        self._kept_gib += store.taken_gib
        self._damaged = of, store.features

    def prepare_training(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Prepare the features of training images, with the reduced maps in half precision."""
        maps = 2 * len(self.model.layers)
        prepared = self.prepare_features(features)
        return tuple(part.half() if place in range(0, maps, 2) else part for place, part in enumerate(prepared))

    def epoch_steps(self, images: int) -> int | None:
        """See :meth:`FeatureMapFlowModel.epoch_steps`; ``None`` if nothing is trained."""
        return self.model.epoch_steps(images) if self._trainable else None

    def inputs_of(self, batch: Any) -> tuple[Tensor, ...]:
        """Return what :meth:`FeatureMapFlowModel.prepare` returns for a batch, in the detector's precision."""
        return tuple(part.to(self.dtype) for part in super().inputs_of(batch))

    def training_inputs(self, batch: Any) -> tuple[Tensor, ...]:
        """Return the same, in the precision in which it is stored."""
        return super().inputs_of(batch)

    def training_loss(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the mean −log p per dimension of the flow's noisy input; nats, ``()``."""
        return self.model.loss(inputs, self.feature_noise)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Forget a whitening that a validation during the epoch has fitted."""
        if self._whitened is not None:
            self.forget_weights()
        return super().on_train_batch_start(batch, batch_idx)

    def forget_weights(self) -> None:
        """Forget the whitening, too."""
        super().forget_weights()
        self.model.forget_whitening()
        self.model.fitted.fill_(False)
        self._whitened = None

    def on_validation_start(self) -> None:
        """Fit the whitening for the last weights, before validation images are scored and calibrate."""
        super().on_validation_start()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._fit_whitening(ends=self._training_ends())

    def on_train_epoch_end(self) -> None:
        """Fit the whitening if no validation has done so."""
        super().on_train_epoch_end()
        self._fit_whitening(ends=self._training_ends())

    def on_train_end(self) -> None:
        """Fit the whitening if training ended during an epoch, or a callback has averaged weights."""
        super().on_train_end()
        self._fit_whitening(ends=True)
        self._reference, self._damaged = (), None  # releases the stored features

    def _fit_whitening(self, *, ends: bool) -> None:
        """Fit the whitening if the weights are the last ones; without it, scores are meaningless."""
        # Only once for the same weights, so that scores stay as the validation has calibrated them, to the last bit.
        weights = tuple(checksum(parameter) for parameter in self.model.flow.parameters()) if ends else None
        if ends and self._whitened != weights and self._reference:
            if self._shows_progress:
                logger.info("Fitting the whitening.")
            self._whitened = weights
            training = self.model.training
            self.model.eval()
            with Progress(transient=True, disable=not self._shows_progress) as progress:
                show = partial(progress.update, progress.add_task("Fitting the whitening", total=None), refresh=True)
                images = self.model.fit_whitening(self._reference, self._copies, show, self._damaged)
            self.model.train(training)
            kinds.report(images, "the whitening")
            if self._damaged is not None and not processes.rank():
                self._report_weights()
        self.model.fitted.fill_(self._whitened is not None)

    def _report_weights(self) -> None:
        """Log what each kind of evidence counts for; the mean over all kinds of images."""
        shares = self.model.evidence.shares.unflatten(-1, (1, -1)).flatten(0, -2).mean(0).tolist()
        named = sorted(zip(shares, self.model.evidence_names, strict=True), reverse=True)
        logger.info(
            "Evidence counts by how well it tells damaged copies of training images: %s.",
            ", ".join(f"{share:.0%} {name}" for share, name in named),
        )


def _halved(maps: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Convert to half precision, clamped to its range; infinite values are kept, and refused later."""
    return tuple(torch.where(layer.isinf(), layer, layer.clamp(-6e4, 6e4)).half() for layer in maps)


def _pre_processor(backbone: str, image_size: tuple[int, int], tile_size: tuple[int, int] | None) -> PreProcessor:
    """Return the backbone's pre-processor; with tiles only a resize, since the model normalises them."""
    if tile_size is None:
        return backbone_pre_processor(backbone, image_size)
    return ExactPreProcessor(Resize(image_size, antialias=True))
