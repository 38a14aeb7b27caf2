# SPDX-License-Identifier: Apache-2.0
"""Scores of all detectors and baselines on fixed weights and images, kept from one version to the next.

Weights and images are drawn by NumPy, whose generator gives the same numbers everywhere. What a fit found when the file
was written lies in it, so that scores can be compared to the last digits on any machine; that a fit finds the same is
compared less strictly.

`python tests/golden/golden_cases.py` writes the file anew, and with the names of cases after it these alone, which only
a change that means to change scores may do.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from model_helpers import BACKBONE  # noqa: E402

from anomalib_flowood.models.embedding_flow import EmbeddingFlowModel  # noqa: E402
from anomalib_flowood.models.feature_map_flow import FeatureMapFlowModel  # noqa: E402
from anomalib_flowood.models.pixel_flow import PixelFlowModel  # noqa: E402
from anomalib_flowood.scores import SCORES  # noqa: E402
from benchmarks.contest.baselines import MODELS  # noqa: E402

FILE = Path(__file__).with_name("golden.npz")

Arrays = dict[str, np.ndarray]


def images(count: int, size: int, seed: int) -> Tensor:
    """8-bit colour images of four kinds: ramps of a direction each, noise, and in some a square."""
    rng = np.random.default_rng(seed)
    across = np.linspace(0, 1, size)
    ramps = [np.outer(up, left) for up in (across, across[::-1]) for left in (across, across[::-1])]
    values = np.stack([ramps[n % 4] for n in range(count)])[:, None] * rng.uniform(60, 140, (count, 3, 1, 1))
    values = values + rng.normal(80, 12, values.shape)
    values[::5, :, size // 4 : size // 2, size // 4 : size // 2] += 50
    return torch.from_numpy(values.round().clip(0, 255) / 255)


def fill(module: nn.Module, seed: int, gain: float = 1.0) -> None:
    """Draw all parameters, in their order: the same for flows of the same architecture, whatever they are called."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = gain / np.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.1
            values = scale * rng.standard_normal(tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(values))


def fill_backbone(network: nn.Module) -> None:
    rng = np.random.default_rng(7)
    with torch.no_grad():
        for module in network.modules():
            for parameter in module.parameters(recurse=False):
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    continue  # ones and zeros
                scale = 1.4 / np.sqrt(max(1, parameter[0].numel())) if parameter.ndim > 1 else 0.1
                parameter.copy_(torch.from_numpy(scale * rng.standard_normal(tuple(parameter.shape))))


# -- pixels ----------------------------------------------------------------------------------------------------------


def pixel_case(score: str = "nll", channels: int = 1, **kwargs) -> Callable[[torch.dtype, Arrays | None], Arrays]:
    def run(dtype: torch.dtype, kept: Arrays | None) -> Arrays:
        del kept  # what scores learn is robust: quantiles, means
        small = {"hidden_channels": 12, "bottleneck_dim": 3, "score": score}
        model = PixelFlowModel((8, 8), channels, **{**small, **kwargs}).to(dtype).eval()
        for number, flow in enumerate(model.trained_flows):
            fill(flow, number)
        with torch.no_grad():
            model.scorer.fit(model, [model.inputs(images(24, 8, 1).to(dtype))])
            test = images(6, 8, 2).to(dtype)
            density = model.density(model.inputs(test))
            return {
                "log_prob": model.log_prob(test),
                "score": model(test).pred_score,
                "bits": model.bits_per_dim(test),
                "radius": density.radius,
                "parts": density.parts,
            }

    return run


# -- embeddings and maps ---------------------------------------------------------------------------------------------


def embedding_model(**kwargs) -> EmbeddingFlowModel:
    small = {"layers": (1, 2), "subspace_dim": 8, "map_dims": 5, "modes": 3, "coupling_layers": 3}
    small |= {"hidden_channels": 8, "bottleneck_dim": 3, "image_size": (48, 48), "pre_trained": False}
    return EmbeddingFlowModel(BACKBONE, **{**small, **kwargs})


def embedding_case(**kwargs) -> Callable[[torch.dtype, Arrays | None], Arrays]:
    def run(dtype: torch.dtype, kept: Arrays | None) -> Arrays:
        model = embedding_model(**kwargs).double().eval()
        fill_backbone(model.embedding.network)
        with torch.no_grad():
            if not kept:
                model.fit_features(model.extract(images(24, 48, 3)))  # each has a direction in the file
            else:
                restore_shapes(model.gaussians, kept)
                restore(embedding_state(model), kept)
            fill(model.flow, 0)
            fitted = {} if kept else keep_fitted(embedding_state(model))
            model.to(dtype)
            model.scorer.fit(model, [model.inputs(images(24, 48, 3).to(dtype))])
            test = images(6, 48, 4).to(dtype)
            density = model.density(model.inputs(test))
            return fitted | {
                "log_prob": model.log_prob(test),
                "score": model(test).pred_score,
                "radius": density.radius,
                "parts": density.parts,
                "embedding": model.embed(test),
            }

    return run


def map_model(**kwargs) -> FeatureMapFlowModel:
    small = {"map_layers": (1, 2), "score_layers": (2,), "image_size": (48, 56), "subspace_dim": 4, "layout_dims": 3}
    small |= {"coupling_layers": 4, "hidden_channels": 8, "bottleneck_dim": 3, "bank_size": 0, "pre_trained": False}
    return FeatureMapFlowModel(BACKBONE, **{**small, **kwargs})


def map_images(count: int, seed: int) -> Tensor:
    return torch.nn.functional.pad(images(count, 48, seed), (4, 4, 0, 0), mode="reflect")


def map_case(**kwargs) -> Callable[[torch.dtype, Arrays | None], Arrays]:
    def run(dtype: torch.dtype, kept: Arrays | None) -> Arrays:
        model = map_model(**kwargs).double().eval()
        fill_backbone(model.backbone)
        with torch.no_grad():
            features = model.extract(map_images(40, 5)) if not kept else ()
            if not kept:
                model.fit_features(features)
            for number, flow in enumerate(model.flow.flows):
                fill(flow, number, gain=0.5)
            if not kept:
                model.fit_whitening(model.prepare(tuple(layer[:16] for layer in features)))
            else:
                restore_shapes((layer.layout for layer in model.layers), kept, "layout_")
                restore_shapes((layer.nearest for layer in model.layers if layer.nearest is not None), kept, "nearest_")
                restore_shapes((model.means.gaussian,), kept, "means_")
                restore(map_state(model), kept)
            fitted = {} if kept else keep_fitted(map_state(model))
            model.to(dtype)
            test = map_images(6, 6).to(dtype)
            reduced = model.reduce(model.extract(test))
            density = model.density(reduced)
            result = model(test)
            maps = {f"map {number}": layer for number, layer in enumerate(model.layer_maps(reduced))}
            return (
                fitted
                | maps
                | {
                    "log_prob": model.log_prob(test),
                    "score": result.pred_score,
                    "anomaly map": result.anomaly_map[:, :, ::3, ::3],
                    "radius": density.radius,
                    "parts": density.parts,
                }
            )

    return run


# -- what the present version calls its parts ------------------------------------------------------------------------


def embedding_state(model: EmbeddingFlowModel) -> dict[str, Tensor]:
    maps = {
        f"map_{name}_{number}": getattr(layout, name)
        for number, layout in enumerate(model.embedding.layouts)
        for name in ("mean", "directions")
    }
    gaussians = {
        f"{name}_{number}": value
        for number, gaussian in enumerate(model.gaussians)
        for name, value in gaussian.state_dict().items()
    }
    return maps | gaussians | {"centres": model.base.centres, "log_weights": model.base.log_weights}


def map_state(model: FeatureMapFlowModel) -> dict[str, Tensor]:
    state = {f"score_{name}": getattr(model.evidence, name) for name in model.evidence.of_kind}
    state |= {f"means_{name}_0": value for name, value in model.means.gaussian.state_dict().items()}
    for number, layer in enumerate(model.layers):
        state[f"scale_{number}"] = layer.descriptors.scale
        state |= {f"map_{name}_{number}": getattr(layer, name) for name in ("location", "spread")}
        for name in ("mean", "components", "variances", "tail_variance"):
            state[f"{name}_{number}"] = getattr(layer.subspace, name)
        for name in ("mean", "factors"):
            state[f"positions_{name}_{number}"] = getattr(layer.positions, name)
        state |= {f"layout_{name}_{number}": value for name, value in layer.layout.state_dict().items()}
        if layer.nearest is not None:
            state |= {f"nearest_{name}_{number}": value for name, value in layer.nearest.state_dict().items()}
        if layer.rare is not None:
            state[f"rare_usual_{number}"] = layer.rare.usual
    return state


def keep_fitted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"fitted {name}": value.clone() for name, value in state.items()}


def restore(state: dict[str, Tensor], kept: Arrays) -> None:
    for name, value in state.items():
        value.copy_(torch.from_numpy(kept[f"fitted {name}"]))


def restore_shapes(modules: Iterable[nn.Module], kept: Arrays, prefix: str = "") -> None:
    """Let modules have as many directions as their fit had found, before they are restored."""
    for number, module in enumerate(modules):
        names = module.state_dict()
        module.load_state_dict({name: torch.from_numpy(kept[f"fitted {prefix}{name}_{number}"]) for name in names})


# -- baselines of the contest: fitted, then scored --------------------------------------------------------------------


def baseline_case(name: str) -> Callable[[torch.dtype, Arrays | None], Arrays]:
    def run(dtype: torch.dtype, kept: Arrays | None) -> Arrays:
        del kept
        small = {"image_size": (48, 48), "pre_trained": False}
        small |= {f"{kind}layers": (1, 2) for kind in (("map_", "score_") if name == "GaussianMap" else ("",))}
        if name in MODELS:
            model = MODELS[name](BACKBONE, map_dims=4, **small, **({"subspace_dim": 6} if name == "PPCA" else {}))
        elif name == "GaussianMap":
            model = FeatureMapFlowModel(BACKBONE, subspace_dim=6, coupling_layers=0, bank_size=0, **small)
        else:
            model = EmbeddingFlowModel(BACKBONE, subspace_dim=6, map_dims=4, coupling_layers=0, **small)
        model = model.double().eval()
        fill_backbone(model.backbone if name == "GaussianMap" else model.embedding.network)
        with torch.no_grad():
            features = model.extract(images(60, 48, 3))
            if name == "GaussianMap":
                features = tuple(layer.half().double() for layer in features)  # as FeatureMapFlow keeps them
            model.fit_features(features)
            if name == "GaussianMap":
                model.fit_whitening(model.prepare(features))
            return {"score": model(images(6, 48, 4).to(dtype)).pred_score}

    return run


CASES: dict[str, Callable[[torch.dtype, Arrays | None], Arrays]] = {
    **{f"pixels {mask}": pixel_case(mask=mask) for mask in ("checkerboard", "channel", "horizontal", "cycle")},
    "pixels masked form": pixel_case(mask="cycle", native=False, channels=3, coupling_layers=4),
    **{f"pixels {net}": pixel_case(subnet=net, coupling_layers=3) for net in ("resnet", "highway", "mlp")},
    "pixels realnvp": pixel_case(architecture="realnvp", channels=3, num_blocks=1, coupling_layers=2),
    "pixels glow": pixel_case(architecture="glow", channels=3, num_blocks=1, coupling_layers=2),
    **{f"pixels {score}": pixel_case(score, coupling_layers=4) for score in SCORES if score != "nll"},
    "embeddings": embedding_case(),
    "embeddings pooled": embedding_case(layers=(), modes=1, feature_noise=0.0, subnet="bottleneck"),
    "embeddings typicality": embedding_case(score="typicality", feature_noise=0.3),
    "maps": map_case(),
    "maps quadrant": map_case(context="quadrant", subnet="bottleneck", scale="tanh"),
    "maps cycle": map_case(mask="cycle", subnet="bottleneck"),
    "maps checkerboard": map_case(mask="checkerboard", subnet="resnet", scale="tanh", score_fraction=0.3),
    "maps without layout": map_case(layout_dims=0, mask="channel", scale="tanh", score_layers=()),
    "maps without couplings": map_case(coupling_layers=0),
    "maps memory bank": map_case(coupling_layers=0, bank_size=30),
    **{f"baseline {name}": baseline_case(name) for name in (*MODELS, "GaussianMixture", "GaussianMap")},
}

SCORE_OF = {**{f"pixels {score}": score for score in SCORES}, "embeddings typicality": "typicality"}


def results(case: str, dtype: torch.dtype, kept: Arrays | None = None) -> Arrays:
    torch.manual_seed(0)
    return {name: value.numpy() for name, value in CASES[case](dtype, kept).items()}


def keep(case: str) -> Arrays:
    with np.load(FILE) as file:
        start = f"{case}/"
        return {name.removeprefix(start): file[name] for name in file.files if name.startswith(start)}


def write(cases: list[str]) -> None:
    with np.load(FILE) as file:
        arrays = {name: file[name] for name in file.files if name.partition("/")[0] not in cases}
    arrays |= {f"{case}/{name}": value for case in cases for name, value in results(case, torch.float64).items()}
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    write(sys.argv[1:] or list(CASES))
