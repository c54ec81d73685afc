"""Small ONNX files whose answers are known, and the models.yaml that names them."""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# Of the pose network's dots: red says which keypoint it is, green that it is one.
LEVELS = tuple(14 * (number + 1) for number in range(17))
GREEN = 255
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Differences of the mean of R, G and B with the next pixel but one, across and down.
SOBEL = np.float32([[1, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4


def sobel(file: Path, *, size=("h", "w")) -> Path:
    """The larger of both slopes of the brightness, at most 1."""
    kernels = np.stack([SOBEL, SOBEL.T])[:, None].repeat(3, 1) / np.float32(3)
    nodes = [
        helper.make_node("Conv", ["x", "kernels"], ["slopes"], pads=[1, 1, 1, 1]),
        helper.make_node("Abs", ["slopes"], ["steep"]),
        helper.make_node("ReduceMax", ["steep"], ["most"], axes=[1], keepdims=1),
        helper.make_node("Min", ["most", "one"], ["y"]),
    ]
    return _save(file, nodes, {"kernels": kernels, "one": np.float32(1)}, size=size)


def brightness(file: Path, *, size=("h", "w"), times=1.0, keepdims=0) -> Path:
    """The mean of R, G and B."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1], keepdims=keepdims),
        helper.make_node("Mul", ["mean", "times"], ["y"]),
    ]
    return _save(file, nodes, {"times": np.float32(times)}, size=size)


def dots(file: Path, *, size=(80, 60), keypoints=17, names=("simcc_x", "simcc_y")) -> Path:
    """For each of 17 keypoints the place of the dot of its level, in half pixels; further keypoints are the last.

    It takes pictures with ImageNet's mean and deviation, R first. A dot of a level that is off by d counts 1 - 20 d.
    """
    levels = [LEVELS[min(number, 16)] for number in range(keypoints)]
    red = np.zeros((keypoints, 3, 1, 1), np.float32)
    red[:, 0] = _STD[0]
    green = np.zeros((1, 3, 1, 1), np.float32)
    green[:, 1] = _STD[1]
    constants = {
        "red": red,
        "levels": np.float32([_MEAN[0] - level / 255 for level in levels]),
        "green": green,
        "green_mean": np.float32([_MEAN[1]]),
        "least": np.float32(0.97),
        "slope": np.float32(-20),
        "one": np.float32(1),
        "zero": np.float32(0),
        "last": np.int64([-1]),
        "flat": np.int64([1, keypoints, -1]),
    }
    nodes = [
        helper.make_node("Conv", ["x", "red", "levels"], ["off"]),
        helper.make_node("Abs", ["off"], ["away"]),
        helper.make_node("Mul", ["away", "slope"], ["minus"]),
        helper.make_node("Add", ["minus", "one"], ["near"]),
        helper.make_node("Relu", ["near"], ["likely"]),
        helper.make_node("Conv", ["x", "green", "green_mean"], ["greens"]),
        helper.make_node("Greater", ["greens", "least"], ["is_dot"]),
        helper.make_node("Where", ["is_dot", "likely", "zero"], ["dots"]),
    ]
    for axis, name in ((2, names[0]), (3, names[1])):
        nodes += [
            helper.make_node("ReduceMax", ["dots"], [f"line{axis}"], axes=[axis], keepdims=0),
            helper.make_node("Unsqueeze", [f"line{axis}", "last"], [f"bin{axis}"]),
            helper.make_node("Concat", [f"bin{axis}"] * 2, [f"bins{axis}"], axis=3),
            helper.make_node("Reshape", [f"bins{axis}", "flat"], [name]),
        ]
    return _save(file, nodes, constants, size=size, outputs=names)


def models_file(
    folder: Path, detectors: dict, models: list | None = None, cutouts: dict | None = None
) -> str:
    """The path of a models.yaml with these detectors and cut-out models; files are relative to it."""
    content = {"models": models or [], "detectors": detectors, "cutouts": cutouts or {}}
    (folder / "models.yaml").write_text(json.dumps(content))
    return str(folder / "models.yaml")


def pointing(folder: Path, *, side=64, missing="") -> dict:
    """What models.yaml says of an encoder and a decoder in SAM 2's form, which are written into `folder`.

    The decoder gives all that is bright, then twice what of it lies on the first point's side, left or right.
    """
    names = ("image_embed", "high_res_feats_0", "high_res_feats_1")
    nodes = [
        helper.make_node("ReduceMean", ["x"], [names[0]], axes=[1], keepdims=1),
        *(helper.make_node("Identity", ["x"], [name]) for name in names[1:]),
    ]
    _save(folder / "encoder.onnx", nodes, {}, size=(side, side), outputs=names)
    taken = {
        **{
            name: [1, channels, side, side] for name, channels in zip(names, (1, 3, 3), strict=True)
        },
        "point_coords": ["l", "p", 2],
        "point_labels": ["l", "p"],
        "mask_input": ["l", 1, 256, 256],
        "has_mask_input": [1],
    }
    taken.pop(missing, None)
    constants = {
        "half": np.float32(0.5),
        "steep": np.float32(20),
        "never": np.float32(-10),
        "zero": np.float32(0),
        "from": np.int64([0, 0, 0]),
        "to": np.int64([1, 1, 1]),
        "middle": np.float32(side / 2),
        "columns": np.arange(side, dtype=np.float32) + np.float32(0.5 - side / 2),
    }
    nodes = [
        helper.make_node("Sub", [names[0], "half"], ["above"]),
        helper.make_node("Mul", ["above", "steep"], ["bright"]),
        helper.make_node("Slice", ["point_coords", "from", "to"], ["first"]),
        helper.make_node("Sub", ["first", "middle"], ["aside"]),
        helper.make_node("Mul", ["columns", "aside"], ["sides"]),
        helper.make_node("Greater", ["sides", "zero"], ["is_side"]),
        helper.make_node("Where", ["is_side", "bright", "never"], ["part"]),
        helper.make_node("Concat", ["bright", "part", "part"], ["masks"], axis=1),
    ]
    _save(folder / "decoder.onnx", nodes, constants, inputs=taken, outputs=("masks",))
    plain = {"mean": [0, 0, 0], "std": [1, 1, 1]}
    return {"file": "encoder.onnx", "decoder": "decoder.onnx", **plain}


def _save(
    file,
    nodes,
    constants,
    *,
    size=(),
    inputs=None,
    outputs=("y",),
    batch=1,
    channels=3,
    external=False,
):
    inputs = inputs or {"x": [batch, channels, *size]}
    graph = helper.make_graph(
        nodes,
        "known",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in inputs.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    # An older form than the installed one, which onnxruntime may not know yet.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, file, save_as_external_data=external, size_threshold=0)
    return file
