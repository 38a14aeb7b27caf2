# SPDX-License-Identifier: Apache-2.0
"""Runs a frozen backbone on each image once, whichever detector asks.

All detectors of a contest stand on the same frozen weights, and most of a contest's time would go into computing the
same feature maps again. A :class:`Memo` answers for the backbone inside of a detector: what it has seen it reads from a
file, what is new it computes and keeps. It counts what was read, and measures what computing takes, so that the time
saved can be put back on every detector's account.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 16
"""Images that go through a backbone at once, as in ``anomalib_flowood.features.run_backbone``."""

CAPACITY = 40_000
"""Images kept for each kind of output. The files are sparse: only what is written takes space on the disk."""


def mapped(path: Path, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor of zeros that lives in a new sparse file, so that the system may move it out of memory."""
    with torch.inference_mode(mode=False):  # else it could not be written to outside of inference
        return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype).reshape(tuple(shape))


@dataclass
class _Store:
    """The outputs of one backbone, at one image shape."""

    folder: Path
    columns: list[Tensor] = field(default_factory=list)
    single: bool = False
    rows: dict[bytes, int] = field(default_factory=dict)
    computed: int = 0
    seconds: float = 0.0

    @property
    def seconds_per_image(self) -> float:
        return self.seconds / self.computed if self.computed else 0.0

    def open(self, outputs: Sequence[Tensor], capacity: int) -> None:
        self.folder.mkdir(parents=True)
        self.columns = [
            mapped(self.folder / f"{number}.bin", (capacity, *output.shape[1:]), output.dtype)
            for number, output in enumerate(outputs)
        ]


@dataclass
class Account:
    """What the memo has done since :meth:`Memo.account` was called."""

    hits: int = 0
    """Images read, not computed."""
    saved: float = 0.0
    """Seconds that their computation would have taken."""
    computed: int = 0
    """Images computed."""


class Memo:
    """Outputs of frozen backbones for the images that they have seen.

    Args:
        folder: Where to make the temporary folder; the system's place by default.
        capacity: The most images to keep for each kind of output; what comes later is computed every time.

    Example:
        >>> with Memo() as memo:
        ...     count = memo.attach(detector)  # doctest: +SKIP
    """

    def __init__(self, folder: str | Path | None = None, capacity: int = CAPACITY) -> None:
        self.folder = Path(mkdtemp(prefix="flowood-memo-", dir=folder))
        self.capacity = capacity
        self.enabled = True
        self._stores: dict[tuple, _Store] = {}
        self._account = Account()

    def __enter__(self) -> Memo:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget everything and remove the files."""
        self._stores.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

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
        shape = (*images.shape[1:], images.dtype)
        store = self._stores.get((identity, shape))
        if store is None:
            store = self._stores[identity, shape] = _Store(self.folder / str(len(self._stores)))
        # Inference tensors must not get into the files' tensors, which outlive a test loop.
        with torch.inference_mode(mode=False), torch.no_grad():
            keys = [hashlib.blake2b(image.numpy().data, digest_size=16).digest() for image in images.contiguous()]
            known = [store.rows.get(key) for key in keys]
            places: dict[bytes, int] = {}  # an image that comes twice in a batch is computed once
            for place, (key, row) in enumerate(zip(keys, known, strict=True)):
                if row is None:
                    places.setdefault(key, place)
            fresh = self._compute(plain, store, images, list(places.values()))
            self._keep(store, list(places), fresh)
            hits = sum(row is not None for row in known)
            self._account.hits += hits
            self._account.saved += hits * store.seconds_per_image

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

    def _compute(self, plain: Callable, store: _Store, images: Tensor, places: list[int]) -> list[Tensor]:
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

    def _keep(self, store: _Store, keys: list[bytes], fresh: list[Tensor]) -> None:
        if fresh and not store.columns:
            store.open(fresh, self.capacity)
        for number, key in enumerate(keys):
            row = len(store.rows)
            if row == self.capacity:
                return
            for column, output in zip(store.columns, fresh, strict=True):
                column[row] = output[number]
            store.rows[key] = row


def _must_compute(module: nn.Module, images: Tensor) -> bool:
    """Whether the outputs are wanted with a graph behind them, or may differ from one call to the next."""
    if torch.compiler.is_compiling() or module.training or images.device.type != "cpu" or not len(images):
        return True
    wants = images.requires_grad or any(parameter.requires_grad for parameter in module.parameters())
    return torch.is_grad_enabled() and wants


def _identity(module: nn.Module) -> tuple:
    """Tell backbones apart: the class, what it returns, and its weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    info = getattr(module, "feature_info", None)
    indices = tuple(getattr(info, "out_indices", ())) or tuple(getattr(module, "indices", ()))
    head = (getattr(module, "num_classes", None), type(getattr(module, "global_pool", None)).__name__)
    return type(module).__name__, indices, head, digest.digest()
