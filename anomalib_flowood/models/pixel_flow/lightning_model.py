# SPDX-License-Identifier: Apache-2.0
"""Lightning model of PixelFlow."""

from __future__ import annotations

import logging
import math
from typing import Any

from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor
from torchvision.transforms.v2 import Resize

from anomalib_flowood.checks import check_sizes
from anomalib_flowood.flows import ARCHITECTURES, LOGIT_ALPHA, MASKS, SCALES, SUBNETS
from anomalib_flowood.models.components import ExactPreProcessor, FlowModule, KeptEpoch
from anomalib_flowood.names import lists_names
from anomalib_flowood.scores import SCORES

from .torch_model import PixelFlowModel

logger = logging.getLogger(__name__)

_EPOCHS_TIMES_ROOT = 900
"""Epochs for n images, times the square root of n."""
_MOST_EPOCHS = 100


@lists_names(
    architectures=ARCHITECTURES,
    masks=MASKS,
    native=[name for name, family in MASKS.items() if family.native],
    subnets=SUBNETS,
    fully_connected=[name for name, subnet in SUBNETS.items() if subnet.fully_connected],
    scores=SCORES,
    scales=SCALES,
)
class PixelFlow(KeptEpoch, FlowModule, AnomalibModule):
    """Normalizing flow on pixels, for small images.

    The defaults make a flow on pixels detect what does not belong: couplings with the cycle mask, whose s,t-networks
    squeeze each quadrant to a few numbers (Kirichenko et al. 2020, section 6). ``mask: checkerboard`` with
    ``subnet: resnet`` is the plain flow that rates digits as more likely than the clothes it was trained on.

    Args:
        image_size: Height and width to which images are resized, unless a ``pre_processor`` says otherwise.
        channels: 3 for colour, 1 for grey.
        architecture: {architectures}: couplings of one mask; checkerboard and channel couplings at several scales;
            ActNorm, 1×1 convolutions and channel couplings at several scales.
        scales: Number of scales of ``realnvp`` and ``glow``, which halve the image ``scales - 1`` and ``scales``
            times.
        mask: Coupling mask of ``single_scale``, ``cycle`` by default: {masks}. The other architectures have their own.
        native: With mask {native}, whether the networks see only the values that feed them (fast), and not the
            zero-masked image.
        subnet: s,t-network: {subnets}; by default ``bottleneck`` for ``single_scale``, ``resnet`` for ``realnvp``,
            ``highway`` for ``glow``, neither of which takes {fully_connected}.
        bottleneck_dim: Width of the squeeze in ``bottleneck`` and ``conv_bottleneck``; the paper's K.
        coupling_layers: Number of couplings (``single_scale``; default 8), of couplings in each group of ``realnvp``
            (default 3, and one more at the last scale), or of steps at each scale of ``glow`` (default 8).
        hidden_channels: Width of the s,t-networks: units, or channels of the convolutional ones. Default 256 for
            ``single_scale``, 64 for the others; ``realnvp`` doubles it with every squeeze.
        num_blocks: Blocks of ``resnet`` and ``highway``.
        batch_norm: Batch normalisation in ``resnet``.
        scale: Log-scales of the couplings: {scales}; ``none`` for additive couplings, which only shift values. The
            other layers of ``glow`` still scale.
        logit_alpha: Margin of the logit at black and white, above 0 and below 0.5. The literature uses 0.05, which
            gives fewer bits per dimension; 0.25 detects better by −log p.
        score: {scores}; ``nll`` is −log p. ``likelihood_ratio`` and ``ensemble`` train one and four more flows. See
            docs/scores.md.
        max_epochs: Epochs to train if the trainer sets no limit. By default it depends on the number of training
            images, see :meth:`epochs_for`. The weights of the best epoch are kept: see
            :class:`~anomalib_flowood.models.components.KeptEpoch`.
        learning_rate: Adam's learning rate at the start; it follows a cosine down to zero.
        pre_processor: anomalib's; by default images are resized, and not normalised.
        post_processor: anomalib's; by default labels are conformal at alpha = 0.05, from normal validation images.
        evaluator: anomalib's; by default AUROC and FPR95, also of each outside set, F1, bits per dimension.
        visualizer: anomalib's; none by default, since there is no anomaly map.

    Raises:
        ValueError: If the configuration makes no sense.
    """

    model: PixelFlowModel

    def __init__(
        self,
        image_size: tuple[int, int] = (32, 32),
        channels: int = 3,
        architecture: str = "single_scale",
        scales: int = 2,
        mask: str | None = None,
        native: bool = True,
        subnet: str | None = None,
        bottleneck_dim: int = 5,
        coupling_layers: int | None = None,
        hidden_channels: int | None = None,
        num_blocks: int = 2,
        batch_norm: bool = False,
        scale: str = "tanh",
        logit_alpha: float = LOGIT_ALPHA,
        score: str = "nll",
        max_epochs: int | None = None,
        learning_rate: float = 2e-3,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(
            pre_processor=self.configure_pre_processor(image_size) if pre_processor is True else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        image_size = self.resized_to(image_size, pre_processor)
        check_sizes(self.hparams)
        self.max_epochs = max_epochs
        self.learning_rate = learning_rate
        self.model = PixelFlowModel(
            image_size,
            channels,
            architecture=architecture,
            scales=scales,
            mask=mask,
            native=native,
            subnet=subnet,
            coupling_layers=coupling_layers,
            hidden_channels=hidden_channels,
            bottleneck_dim=bottleneck_dim,
            num_blocks=num_blocks,
            batch_norm=batch_norm,
            scale=scale,
            logit_alpha=logit_alpha,
            score=score,
        )

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Resize only: the flow models pixels, so they stay in [0, 1]."""
        return ExactPreProcessor(Resize(image_size or (32, 32), antialias=True))

    def epochs_for(self, images: int) -> int:
        """Return for how many epochs to train on a number of images: the fewer the images, the more epochs.

        With too many epochs a flow memorises its images. With 180, 900 and 9,000 images held-out ones
        had the fewest bits per dimension after about 40 to 80, 30 to 50 and 10 to 20 epochs.
        """
        return max(1, min(_MOST_EPOCHS, round(_EPOCHS_TIMES_ROOT / math.sqrt(max(1, images)))))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        """Warn if the training images are all the same, from which a flow learns no density."""
        images = batch.image
        if self.trainer.global_step == batch_idx == 0 and len(images) > 1 and bool((images == images[:1]).all()):
            logger.warning(
                "All %d images of the first batch are the same, or constant: what else is normal cannot be learned "
                "from them. Give more varied images.",
                len(images),
            )
        return super().on_train_batch_start(batch, batch_idx)

    def training_inputs(self, batch: Any) -> tuple[Tensor]:
        """Return images dequantised with noise, ``(N, C, H, W)``."""
        return self.model.inputs(batch.image, noisy=True)
