# SPDX-License-Identifier: Apache-2.0
"""The server's process: a port that is free, a detector, uvicorn, and an end at which nothing is lost."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import numpy as np
import torch
import uvicorn

from anomalib_flowood.inference import load
from anomalib_flowood.serving.app import create_app
from anomalib_flowood.serving.limits import Limits
from anomalib_flowood.serving.metrics import total


def serve(
    model: str | Path, host: str, port: int, limits: Limits, drift_images: int, device: str | torch.device = "cpu"
) -> None:
    """Serve a detector until the process is stopped; what was accepted is answered first.

    Args:
        model: As for :func:`anomalib_flowood.load`.
        host: Address to listen on.
        port: Port; 0 for one that is free.
        limits: What requests may ask.
        drift_images: Of how many of the last images drift is tested.
        device: As for :func:`anomalib_flowood.load`.

    Raises:
        OSError: If the address is not to be had; before the detector is loaded.
        ValueError: If there is no such port; what else :func:`anomalib_flowood.load` raises.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Its protocol is named: asyncio turns Nagle's algorithm off for sockets that have one alone, and with it the end of
    # an answer waits 40 ms for the acknowledgement of its head.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        if sys.platform != "win32":  # where it would let two servers have one port
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            msg = f"Cannot listen on {host}, port {port}: {error.strerror}. Name another --host or --port."
            raise OSError(error.errno, msg) from error
        except OverflowError as error:
            msg = f"There is no port {port}: --port takes 0 to 65535."
            raise ValueError(msg) from error
        detector = load(model, device)
        if detector.size is not None:  # the first image prepares a graph, and shows what is missing
            detector.score(np.full((detector.size[0], detector.size[-1], 3), 128, np.uint8))
        app = create_app(detector, limits, drift_images)
        # h11, whose heads of requests are bounded, also where httptools is installed.
        config = uvicorn.Config(
            app, http="h11", loop="asyncio", lifespan="on", log_config=None, log_level="warning", access_log=False
        )
        server = _Told(config, f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}", model)
        try:
            server.run(sockets=[listening])
        finally:
            metrics = app.state.service.metrics
            answered, scored = total(metrics.requests), total(metrics.images)
            print(f"Stopped: {answered} requests were answered, {scored} images scored.", flush=True)


class _Told(uvicorn.Server):
    """Says where it is once it can be asked."""

    def __init__(self, config: uvicorn.Config, address: str, model: str | Path) -> None:
        super().__init__(config)
        self.address = address
        self.model = model

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"Serving {self.model} on {self.address}. Stop it with Ctrl-C: it first answers what waits.", flush=True)
