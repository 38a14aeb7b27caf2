# SPDX-License-Identifier: Apache-2.0
"""Runs a frozen backbone on each image once, whichever detector asks.

All detectors of a contest stand on the same frozen weights, and most of a contest's time would go into computing the
same feature maps again. A :class:`Memo` answers for the backbone inside of a detector: what it has seen it reads from a
file, what is new it computes and keeps. It counts what was read, and measures what computing takes, so that the time
saved can be put back on every detector's account. In a folder of its own the files outlive the command, see
:mod:`.stores`.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .stores import CAPACITY, Shelf, Store, lock

CHUNK = 16
"""Images that go through a backbone at once, as in ``anomalib_flowood.features.run_backbone``."""


@dataclass
class Account:
    """What the memo has done since :meth:`Memo.account` was called."""

    hits: int = 0
    """Images read, not computed."""
    saved: float = 0.0
    """Seconds that their computation would have taken."""
    computed: int = 0
    """Images computed."""
    seconds_per_image: dict[Path, float] = field(default_factory=dict)
    """What the outputs that were asked for take to compute, by their store."""


class Memo:
    """Outputs of frozen backbones for the images that they have seen.

    Args:
        folder: Where to make the temporary folder; the system's place by default.
        capacity: The most images to keep for each kind of output; what comes later is computed every time.
        kept: A folder that outlives the memo, in the place of a temporary one: a later memo reads what this one has
            computed. While another process works with it, it is left alone, and the memo is a temporary one.
        gib: The most that a kept folder may hold. Beyond that the stores that nobody has asked for the longest are
            removed, and where that is not enough nothing more is kept.

    Example:
        >>> with Memo() as memo:
        ...     count = memo.attach(detector)  # doctest: +SKIP
    """

    def __init__(
        self, folder: str | Path | None = None, capacity: int = CAPACITY, kept: Path | None = None, gib: float = 8.0
    ) -> None:
        self.capacity = capacity
        self.enabled = True
        self._lock = None if kept is None else lock(kept)
        self.lasts = self._lock is not None
        self.folder = kept if kept is not None and self.lasts else Path(mkdtemp(prefix="flowood-memo-", dir=folder))
        self._shelf = Shelf(self.folder, int(gib * 2**30) if self.lasts else None)
        self._stores: dict[tuple, Store] = {}
        self._account = Account()

    def __enter__(self) -> Memo:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything, and remove the files of a temporary folder."""
        for store in self._stores.values():
            store.close()
        self._stores.clear()
        if self._lock is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            self._lock.release()

    def account(self) -> Account:
        """Open a new account and return it; it is filled from now on."""
        self._account = Account()
        return self._account

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the backbones compute everything for a while, and keep nothing."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def attach(self, detector: nn.Module) -> int:
        """Answer for every timm backbone inside of a detector.

        Args:
            detector: Any module; its backbones are those outermost parts that carry timm's ``feature_info`` or
                ``pretrained_cfg``.

        Returns:
            How many backbones were found.
        """
        found: list[str] = []
        for name, module in detector.named_modules():
            if any(not outer or name.startswith(f"{outer}.") for outer in found):
                continue
            if hasattr(module, "feature_info") or hasattr(module, "pretrained_cfg"):
                found.append(name)
                self._wrap(module)
        return len(found)

    def _wrap(self, module: nn.Module) -> None:
        plain = module.forward
        identity = _identity(module)

        def forward(images: Tensor, *args: Any, **kwargs: Any) -> Any:
            if args or kwargs or not self.enabled or _must_compute(module, images):
                return plain(images, *args, **kwargs)
            return self._look_up(plain, identity, images)

        module.forward = forward

    def _look_up(self, plain: Callable, identity: tuple, images: Tensor) -> Tensor | list[Tensor]:
        kind = (identity, (*images.shape[1:], images.dtype))
        store = self._stores.get(kind)
        if store is None:
            store = self._stores[kind] = self._shelf.store(kind, self.capacity)
        # Inference tensors must not get into the files' tensors, which outlive a test loop.
        with torch.inference_mode(mode=False), torch.no_grad():
            keys = [hashlib.blake2b(image.numpy().data, digest_size=16).digest() for image in images.contiguous()]
            known = [store.rows.get(key) for key in keys]
            places: dict[bytes, int] = {}  # an image that comes twice in a batch is computed once
            for place, (key, row) in enumerate(zip(keys, known, strict=True)):
                if row is None:
                    places.setdefault(key, place)
            fresh = self._compute(plain, store, images, list(places.values()))
            self._shelf.keep(store, list(places), fresh)
            hits = sum(row is not None for row in known)
            self._account.hits += hits
            self._account.saved += hits * store.seconds_per_image
            self._account.seconds_per_image[store.folder] = store.seconds_per_image

            number = {key: position for position, key in enumerate(places)}
            old = [place for place, row in enumerate(known) if row is not None]
            new = [place for place, row in enumerate(known) if row is None]
            outputs = []
            for position, column in enumerate(store.columns):
                output = torch.empty((len(images), *column.shape[1:]), dtype=column.dtype)
                if old:
                    output[old] = column[[row for row in known if row is not None]]
                if new:
                    output[new] = fresh[position][[number[keys[place]] for place in new]]
                outputs.append(output)
        return outputs[0] if store.single else outputs

    def _compute(self, plain: Callable, store: Store, images: Tensor, places: list[int]) -> list[Tensor]:
        parts: list[list[Tensor]] = []
        start = time.perf_counter()
        for chunk in torch.tensor(places, dtype=torch.long).split(CHUNK) if places else ():
            output = plain(images[chunk].contiguous(memory_format=torch.channels_last))
            store.single = isinstance(output, Tensor)
            parts.append([output] if isinstance(output, Tensor) else list(output))
        store.seconds += time.perf_counter() - start
        store.computed += len(places)
        self._account.computed += len(places)
        return [torch.cat(column).contiguous() for column in zip(*parts, strict=True)]


def _must_compute(module: nn.Module, images: Tensor) -> bool:
    """Whether the outputs are wanted with a graph behind them, or may differ from one call to the next."""
    if torch.compiler.is_compiling() or module.training or images.device.type != "cpu" or not len(images):
        return True
    wants = images.requires_grad or any(parameter.requires_grad for parameter in module.parameters())
    return torch.is_grad_enabled() and wants


def _identity(module: nn.Module) -> tuple:
    """Tell backbones apart: the class, what it returns, its weights, and what computes with them."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    info = getattr(module, "feature_info", None)
    indices = tuple(getattr(info, "out_indices", ())) or tuple(getattr(module, "indices", ()))
    head = (getattr(module, "num_classes", None), type(getattr(module, "global_pool", None)).__name__)
    return type(module).__name__, indices, head, digest.hexdigest(), timm.__version__, torch.__version__
