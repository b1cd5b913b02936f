"""Turn frames into the images that the model sees: crop, resize, jitter and tile.

Training and acting use the same function.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torchvision.transforms.functional import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
)

from vla0.core.spec import JITTER, Observation, Spec
from vla0.errors import InputError

DEPTH_REMEDY = (
    "depth maps need a checkpoint trained with data.depth, pictures of 16 bits 8 of "
    "them: look which it is"
)
_ADJUST = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)


def compose(
    observation: Observation,
    spec: Spec,
    rng: np.random.Generator | None = None,
    jitter: tuple[float, float, float, float] = JITTER,
) -> list[np.ndarray]:
    """Make the images that the model sees.

    Depth maps become grey pictures, near black and far white. They are not jittered, because their
    greys are distances.

    Args:
        observation: Frames of all cameras of the Spec.
        spec: The Spec of the checkpoint.
        rng: None crops the centre and does not jitter, as in acting. A generator draws a crop and a
            jitter for each camera, the same for all its frames, as in training.
        jitter: Strengths of brightness, contrast, saturation and hue.

    Returns:
        One (image_size, image_size * cameras * history, 3) uint8 image if `spec.tile`, else one
        (image_size, image_size, 3) image for each frame.

    Raises:
        InputError: When a camera is missing, or its frames are not uint8 RGB of one size.
    """
    frames, spans = [], {camera: span for camera, *span in spec.depth}
    for camera in spec.cameras:
        stack = _frames(observation, camera, spec.history, spans.get(camera))
        place, adjust = _draw(rng, (0.0,) * 4 if camera in spans else jitter)
        frames += [_square(frame, spec, place, adjust) for frame in stack]
    return [np.concatenate(frames, axis=1)] if spec.tile else frames


def grey(depth: np.ndarray, near: float, far: float) -> np.ndarray:
    """Turn (..., h, w) depth maps into (..., h, w, 3) uint8 pictures: near is 0 and far is 255.

    Floats are metres and integers millimetres, as cameras give them and LeRobot reads them. Pixels
    without a measurement, where sensors write 0, infinity or NaN, become 255.
    """
    metres = depth.astype(np.float64) / (1.0 if np.issubdtype(depth.dtype, np.floating) else 1000.0)
    metres = np.where(np.isfinite(metres) & (metres > 0), metres, far)
    levels = np.rint(np.clip((metres - near) / (far - near), 0, 1) * 255).astype(np.uint8)
    return np.repeat(levels[..., None], 3, axis=-1)


def _frames(
    observation: Observation, camera: str, history: int, span: Sequence[float] | None = None
) -> np.ndarray:
    """Check a camera's frames and return them as (history, h, w, 3) uint8.

    span: near and far in metres, if the frames are depth maps.
    """
    if camera not in observation.images:
        got = f"cameras {sorted(observation.images)}"
        raise InputError(
            f"camera '{camera}'", got, "give {camera: array} with each of the checkpoint's cameras"
        )
    frames = np.asarray(observation.images[camera])
    if span is not None:
        frames = _depths(frames, camera, history)
        frames = grey(frames, *span)
    shape = "(h, w, 3)" if history == 1 else f"({history}, h, w, 3)"
    if history == 1 and frames.ndim == 3:
        frames = frames[None]
    if (
        frames.ndim != 4
        or frames.shape[0] != history
        or frames.shape[3] != 3
        or min(frames.shape) == 0
    ):
        raise InputError(
            f"'{camera}' of shape {shape}",
            f"shape {np.shape(observation.images[camera])}",
            "pass RGB frames, channels last",
        )
    if frames.dtype != np.uint8:
        shares = frames.dtype.kind == "f" and bool(np.all((frames >= 0) & (frames <= 1)))
        remedy = "multiply a 0-1 float image by 255 and convert" if shares else DEPTH_REMEDY
        got = f"{frames.dtype}, {np.nanmin(frames):g} to {np.nanmax(frames):g}"
        raise InputError(f"'{camera}' of dtype uint8", got, remedy)
    return frames


def _depths(frames: np.ndarray, camera: str, history: int) -> np.ndarray:
    """Check depth maps and return them as (h, w), or (history, h, w) with a history."""
    if frames.ndim > 2 and frames.shape[-1] == 1:
        frames = frames[..., 0]
    wide = np.issubdtype(frames.dtype, np.floating) or frames.dtype in (np.uint16, np.int32)
    if frames.ndim != (2 if history == 1 else 3) or not wide:
        raise InputError(
            f"'{camera}', depth maps (h, w) of metres as floats or millimetres as uint16",
            f"shape {frames.shape} of {frames.dtype}",
            "pass the sensor's depths, not a picture of them",
        )
    return frames


def _draw(rng, jitter):
    """Draw where to crop (two fractions of the free room) and the adjustments, in their order."""
    if rng is None:
        return (0.5, 0.5), []
    place = tuple(rng.random(2))
    order = [i for i in rng.permutation(4) if jitter[i] > 0]
    centre = (1.0, 1.0, 1.0, 0.0)
    return place, [(_ADJUST[i], centre[i] + rng.uniform(-jitter[i], jitter[i])) for i in order]


def _square(frame: np.ndarray, spec: Spec, place, adjust) -> np.ndarray:
    """Crop one frame at `place`, resize it to (image_size, image_size, 3) uint8 and adjust it."""
    height, width = frame.shape[:2]
    crop_h, crop_w = max(1, round(height * spec.crop)), max(1, round(width * spec.crop))
    top, left = round((height - crop_h) * place[0]), round((width - crop_w) * place[1])
    # Pillow copies an array that is not contiguous byte by byte: ten times as slowly, and it holds
    # up every other thread meanwhile.
    image = Image.fromarray(np.ascontiguousarray(frame[top : top + crop_h, left : left + crop_w]))
    image = image.resize((spec.image_size, spec.image_size), Image.Resampling.BILINEAR)
    for function, strength in adjust:
        image = function(image, strength)
    return np.array(image)
