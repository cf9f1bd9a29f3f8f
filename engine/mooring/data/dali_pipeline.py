"""The augmentation description as a DALI graph, with every random number an input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mooring.data.augment import Augmentation
from mooring.data.draws import Draws, draw
from mooring.data.render import normalisation
from mooring.errors import require

_DALI = "nvidia.dali"


def pipeline_inputs(augment: Augmentation, draws: Draws) -> dict[str, np.ndarray]:
    """Inputs of the graph for one view, name -> [B, ...], in order and only those that the graph has."""
    window = draws.window
    inputs = {
        "window_start": np.ascontiguousarray(window[:, :2]),
        "window_end": np.ascontiguousarray(window[:, 2:]),
        "flip": draws.flip.astype(np.int32),
    }
    if augment.rand_augment is not None:
        perspective = np.tile(np.eye(3, dtype=np.float32), (len(window), 1, 1))
        perspective[:, :2] = draws.warp
        inputs |= {
            "warps": draws.warps,
            "warp": perspective,
            "tones": (draws.keep_bits != 255) | (draws.solarise != 256),
            "keep_bits": draws.keep_bits,
            "solarise": draws.solarise,
        }
    if _has_gain(augment):
        inputs |= {"gain": draws.gain, "offset": draws.offset / np.float32(255)}
    if _has_chroma(augment):
        inputs |= {"chromas": draws.chromas, "chroma": draws.chroma}
    if augment.erasing is not None:
        inputs["erase_start"] = draws.erase[:, :2].astype(np.float32)
        inputs["erase_size"] = draws.erase[:, 2:].astype(np.float32)
    return inputs


def build_pipeline(
    augments: Sequence[Augmentation],
    feed: Callable[[], list[Any]],
    *,
    batch_size: int,
    threads: int,
    device: torch.device,
) -> Any:
    """Builds the graph: encoded files and drawn numbers in, [B, S, S, 3] float32 per view out.

    The pictures are decoded once, all views are cut from them. Costly stages that few pictures take (warp,
    tone curve, chroma matrix) run only on those that do.

    Args:
        augments: of the image itself, then of each further view.
        feed: returns the encoded files of a batch, then ``pipeline_inputs`` of each view; called ahead of
            the outputs; raises StopIteration at the end.
    """
    dali = require(_DALI, needed_for="data.source=dali")
    fn = require("nvidia.dali.fn", needed_for="data.source=dali")
    types = require("nvidia.dali.types", needed_for="data.source=dali")
    described = [_inputs(augment, types) for augment in augments]
    views = [_view(augment, fn, types, on_gpu=device.type == "cuda") for augment in augments]
    stages = list(zip(views, (names for names, _, _ in described), strict=True))

    def graph() -> tuple[Any, ...]:
        encoded, *numbers = fn.external_source(
            source=feed,
            num_outputs=1 + sum(len(names) for names, _, _ in described),
            dtype=[types.UINT8, *(dtype for _, dtypes, _ in described for dtype in dtypes)],
            ndim=[1, *(ndim for _, _, dimensions in described for ndim in dimensions)],
        )
        pictures = fn.decoders.image(encoded, device=_decoder(device), output_type=types.RGB)
        rest = iter(numbers)
        return tuple(view(pictures, {name: next(rest) for name in names}) for view, names in stages)

    return _built(dali, graph, batch_size, threads, device)


def _view(
    augment: Augmentation, fn: Any, types: Any, *, on_gpu: bool
) -> Callable[[Any, dict[str, Any]], Any]:
    """The stages from decoded pictures and drawn numbers to one view."""
    resampling = {
        "nearest": types.INTERP_NN,
        "bilinear": types.INTERP_LINEAR,
        "bicubic": types.INTERP_CUBIC,
        "lanczos": types.INTERP_LANCZOS3,
    }[augment.input.interpolation]
    side = augment.input.size
    mean, scale = normalisation(augment)
    has_rand_augment, has_erasing = augment.rand_augment is not None, augment.erasing is not None
    has_gain, has_chroma = _has_gain(augment), _has_chroma(augment)

    def warp(images: Any, matrix: Any) -> Any:
        fill = [float(value) for value in augment.mean_pixel]
        if on_gpu:
            return fn.warp_affine(
                images, matrix=matrix[:2], fill_value=fill, interp_type=types.INTERP_LINEAR, inverse_map=True
            )
        # on a CPU this one is OpenCV's, four times as fast as warp_affine
        return fn.experimental.warp_perspective(
            images, matrix=matrix, fill_value=fill, interp_type=types.INTERP_LINEAR, inverse_map=True
        )

    def augmented(pictures: Any, drawn: dict[str, Any]) -> Any:
        images = fn.resize(
            pictures,
            size=[side, side],
            roi_start=drawn["window_start"],
            roi_end=drawn["window_end"],
            interp_type=resampling,
            antialias=resampling != types.INTERP_NN,
        )
        if has_rand_augment:
            warps, matrix = drawn["warps"], drawn["warp"]
            tones, keep_bits, solarise = drawn["tones"], drawn["keep_bits"], drawn["solarise"]
            if warps:
                images = warp(images, matrix)
            if tones:
                kept = images & (keep_bits.gpu() if on_gpu else keep_bits)
                inverts = kept >= (solarise.gpu() if on_gpu else solarise)
                images = kept ^ (inverts * types.Constant(255, types.UINT8))
        if has_gain:
            images = fn.brightness_contrast(
                images,
                contrast=drawn["gain"],
                contrast_center=0.0,
                brightness_shift=drawn["offset"],
            )
        if has_chroma:
            chromas, chroma = drawn["chromas"], drawn["chroma"]
            if chromas:
                images = fn.coord_transform(images, M=chroma, dtype=types.UINT8)
        if has_erasing:
            images = fn.erase(
                images,
                anchor=drawn["erase_start"],
                shape=drawn["erase_size"],
                axes=[0, 1],
                fill_value=[float(value) for value in augment.mean_pixel],
            )
        return fn.crop_mirror_normalize(
            images,
            mirror=drawn["flip"],
            dtype=types.FLOAT,
            output_layout="HWC",
            mean=mean.tolist(),
            std=(1.0 / scale).tolist(),
        )

    return augmented


def decodes(encoded: np.ndarray, device: torch.device) -> bool:
    """Whether DALI can decode one file on a device."""
    dali = require(_DALI, needed_for="data.source=dali")
    fn = require("nvidia.dali.fn", needed_for="data.source=dali")
    types = require("nvidia.dali.types", needed_for="data.source=dali")

    def graph() -> tuple[Any, ...]:
        data = fn.external_source(source=lambda: [encoded], dtype=types.UINT8, ndim=1)
        return (fn.decoders.image(data, device=_decoder(device), output_type=types.RGB),)

    pipeline = _built(dali, graph, 1, 1, device)
    try:
        pipeline.run()
    except Exception:  # DALI maps its errors onto several Python types
        return False
    return True


def _decoder(device: torch.device) -> str:
    return "mixed" if device.type == "cuda" else "cpu"


def _inputs(augment: Augmentation, types: Any) -> tuple[list[str], list[Any], list[int]]:
    """Names, DALI types and dimensions of one view's inputs, read off a batch of one."""
    example = pipeline_inputs(augment, draw(augment, np.ones((1, 2)), np.zeros(1), seed=0, epoch=0))
    dali_types = {"float32": types.FLOAT, "int32": types.INT32, "int16": types.INT16, "uint8": types.UINT8}
    dali_types["bool"] = types.BOOL
    dtypes = [dali_types[value.dtype.name] for value in example.values()]
    return list(example), dtypes, [value.ndim - 1 for value in example.values()]


def _built(dali: Any, graph: Any, batch_size: int, threads: int, device: torch.device) -> Any:
    define = dali.pipeline_def(graph, enable_conditionals=True)
    pipeline = define(
        batch_size=batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if device.type == "cuda" else None,
        prefetch_queue_depth=2,
        exec_dynamic=True,
    )
    pipeline.build()
    return pipeline


def _has_gain(augment: Augmentation) -> bool:
    jitter = augment.jitter
    jittered = jitter is not None and (jitter.brightness != 0 or jitter.contrast != 0)
    return augment.rand_augment is not None or jittered


def _has_chroma(augment: Augmentation) -> bool:
    jitter = augment.jitter
    jittered = jitter is not None and (jitter.saturation != 0 or jitter.hue != 0)
    return augment.rand_augment is not None or jittered
