"""Networks that look at pictures: an operator's ONNX files, run on the CPU by onnxruntime.

Main type: `Network`. What a file takes and gives is held to its form when it is opened. This module knows neither
layers nor what is drawn from what a network gives.

Suffixes: H, W pixels of any picture; h, w of what a network is shown; N = 1 picture; 3 = R, G, B.
"""

import hashlib
import math
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from services.common.models_file import MAX_DETECTOR_SIDE, MIN_DETECTOR_SIDE, DetectorSource
from services.common.operator_file import Place
from services.common.settings import InvalidSetting
from services.compositor.pose import KEYPOINTS

# Part of every digest: raise it when the same file is used for another picture.
VERSION = 1
# Of a network that takes any size and whose operator names none: what most are trained at.
DEFAULT_SIDE = 512
# What each network gave last is kept up to this size: a call that ran out of time goes on where it was when it is made
# again, and a layer that stays while others are moved is not looked at again.
MAX_KEPT_BYTES = 64 * 1024 * 1024
# The longest part of a library's message that is shown.
MOST_TOLD = 300
# What is read of what a network gives; nothing stands for the one output it has, or the first.
_OUTPUTS = {
    "edges": (),
    "depth": (),
    "pose": ("simcc_x", "simcc_y"),
    "cutout": (),
    "select": ("image_embed", "high_res_feats_0", "high_res_feats_1"),
}


class Network:
    """One ONNX file in memory, checked against what its operator says of it; all threads share it.

    width, height: of what it is shown, pixels. digest: of the file and its settings. outputs: what it gives, in order.
    """

    def __init__(self, source: DetectorSource, *, threads: int) -> None:
        self.source = source
        data = file_of(source.file, source.place.get("file"))
        self.digest = digest_of(source, data)
        self._session = session(data, source.file, source.place.get("file"), threads)
        self.outputs = _OUTPUTS[source.form] or (self._session.get_outputs()[0].name,)
        self._kept: OrderedDict[bytes, list[NDArray[np.float32]]] = OrderedDict()
        self._keeping = threading.Lock()
        self.width, self.height = self._input_size()
        self._check()

    def run(self, pixels_HW3: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        """What the network gives for a picture of any size; what is no number in it is 0. Not to be written to."""
        key = hashlib.sha256(f"{pixels_HW3.shape}".encode() + pixels_HW3.tobytes()).digest()
        with self._keeping:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        given = self._given(pixels_HW3)
        with self._keeping:
            self._kept[key] = given
            while sum(array.nbytes for each in self._kept.values() for array in each) > (
                MAX_KEPT_BYTES
            ):
                self._kept.popitem(last=False)
        return given

    def _given(self, pixels_HW3: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        shown_hw3 = resized(pixels_HW3, width=self.width, height=self.height)
        mean, std = (
            np.asarray(self.source.mean, np.float32),
            np.asarray(self.source.std, np.float32),
        )
        input_N3hw = ((shown_hw3 / np.float32(255) - mean) / std).transpose(2, 0, 1)[None]
        name = self._session.get_inputs()[0].name
        outputs = self._session.run(list(self.outputs), {name: np.ascontiguousarray(input_N3hw)})
        return [
            np.nan_to_num(np.asarray(output, np.float32), nan=0.0, posinf=0.0, neginf=0.0)
            for output in outputs
        ]

    def _input_size(self) -> tuple[int, int]:
        """Width and height of what it is shown."""
        source = self.source
        inputs = self._session.get_inputs()
        shape = list(inputs[0].shape) if inputs else []
        if (
            [each.type for each in inputs] != ["tensor(float)"]
            or len(shape) != 4
            or any(isinstance(shape[i], int) and shape[i] != size for i, size in ((0, 1), (1, 3)))
        ):
            found = ", ".join(f"{each.type} {each.shape}" for each in inputs)
            raise self._misfit(f"one input of float32, 1 x 3 x height x width; it takes {found}")
        height, width = shape[2:]
        if not isinstance(height, int) or not isinstance(width, int):
            if source.form == "pose":
                raise self._misfit(f"an input of one size; it takes {shape}")
            side = source.side or DEFAULT_SIDE
            return side, side
        if not all(MIN_DETECTOR_SIDE <= side <= MAX_DETECTOR_SIDE for side in (width, height)):
            raise self._misfit(
                f"an input with sides from {MIN_DETECTOR_SIDE} to {MAX_DETECTOR_SIDE}; "
                f"it takes {width} x {height}"
            )
        if source.side is not None:
            raise source.place.get("side").wrong(
                f"allowed: nothing, as the file takes {width} x {height} only"
            )
        return width, height

    def _check(self) -> None:
        """Refuses a file that does not give what its form says, for one grey picture."""
        names = [each.name for each in self._session.get_outputs()]
        if named := _OUTPUTS[self.source.form]:
            if not set(named) <= set(names):
                raise self._misfit(f"the outputs {' and '.join(named)}; it has {', '.join(names)}")
        # U2-Net and its like give coarser alphas behind the first.
        elif len(names) != 1 and self.source.form != "cutout":
            raise self._misfit(f"one output; it has {', '.join(names)}")
        try:
            shapes = [
                output.shape
                for output in self.run(np.full((self.height, self.width, 3), 128, np.uint8))
            ]
        # onnxruntime documents no closed set of what it raises.
        except Exception as error:
            told = f"a file that takes {self.width} x {self.height} pixels; it fails: {error}"
            place = self.source.place.get("file" if self.source.side is None else "side")
            raise place.wrong(f"required: {told[:MOST_TOLD]}") from error
        if self.source.form == "pose":
            if any(len(s) != 3 or s[0] != 1 or s[1] not in KEYPOINTS for s in shapes) or (
                shapes[0][1] != shapes[1][1]
            ):
                allowed = ", ".join(map(str, KEYPOINTS))
                raise self._misfit(
                    f"outputs of 1 x keypoints x bins, COCO's keypoints first, {allowed} in all; "
                    f"it gives {_told(shapes)}"
                )
        # Whether what an encoder gives is of use, its decoder shows.
        elif self.source.form != "select":
            (shape,) = shapes
            height, width = shape[-2:] if len(shape) > 1 else (0, 0)
            if (
                len(shape) not in (3, 4)
                or math.prod(shape[:-2]) != 1
                or not height
                or (height * self.width != width * self.height)
            ):
                raise self._misfit(
                    f"one map, 1 x 1 x height x width or 1 x height x width, of the input's shape; "
                    f"for {self.width} x {self.height} pixels it gives {_told(shapes)}"
                )

    def _misfit(self, required: str) -> InvalidSetting:
        return self.source.place.get("file").wrong(
            f"required for form {self.source.form}: {required}"
        )


def resized(pixels: NDArray[Any], *, width: int, height: int) -> NDArray[Any]:
    """Averaged where it gets smaller, interpolated where it gets larger, the same where it stays."""
    if pixels.shape[:2] == (height, width):
        return pixels
    shrinks = pixels.shape[0] > height
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(np.ascontiguousarray(pixels), (width, height), interpolation=how))


def file_of(file: Path, place: Place) -> bytes:
    """An ONNX file, which is named at `place`.

    Raises:
        InvalidSetting: it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        problem = f"required: an ONNX file; it cannot be read: {error.strerror}"
        raise place.wrong(problem) from error


def digest_of(source: DetectorSource, data: bytes) -> str:
    """Names a file and its settings."""
    told = (VERSION, source.form, source.side, source.mean, source.std, source.is_inverted)
    file = hashlib.sha256(data).hexdigest()
    return hashlib.sha256(f"{file} {told} {source.confidence}".encode()).hexdigest()


def session(data: bytes, file: Path, place: Place, threads: int) -> Any:
    """The network of a file that is named at `place`, ready to run.

    Raises:
        InvalidSetting: it is none, or onnxruntime is not installed.
    """
    try:
        # An extra: a compositor without networks needs it not.
        import onnxruntime
    except ImportError as error:
        raise place.wrong(
            "required for it: onnxruntime, of this package's extra compositor"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.use_deterministic_compute = True
    # What one large picture took is given back, and idle threads sleep.
    options.enable_cpu_mem_arena = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Weights in files of their own would have no part in the digest: nothing lies in this folder, which is a file.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(file)
    )
    # Errors are raised; its log would not be JSON lines.
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    # onnxruntime documents no closed set of what it raises.
    except Exception as error:
        problem = f"required: a whole ONNX file, its weights in it; onnxruntime says: {error}"
        raise place.wrong(problem[:MOST_TOLD]) from error


def _told(shapes: list[tuple[int, ...]]) -> str:
    return " and ".join(" x ".join(map(str, shape)) for shape in shapes)
