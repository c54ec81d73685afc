"""Collage files: `collage.yaml`, the JSON form of the `Collage` message with picture paths relative to the file.

`load` reads one and names every mistake by field and line, `attach` puts the pictures' bytes in, `fit` makes it another
size, `save` writes a self-contained copy. One schema: what the message does not know, a file may not say. A file may
come from a stranger: it names pictures in its own folder, and no content of it costs more than a message.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
import yaml
from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from collage.v1 import blob_pb2, collage_pb2
from collage_client import _disk
from collage_client._errors import FieldViolation, InvalidInput

FILE_NAME = "collage.yaml"
# The contract's form of a layer name, which becomes part of file names.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_SUFFIXES = ((b"\x89PNG", ".png"), (b"\xff\xd8\xff", ".jpg"), (b"RIFF", ".webp"))
_EXPECTED = {
    FieldDescriptor.CPPTYPE_DOUBLE: "a number",
    FieldDescriptor.CPPTYPE_INT32: "a whole number",
    FieldDescriptor.CPPTYPE_INT64: "a whole number",
    FieldDescriptor.CPPTYPE_UINT64: "a whole number, 0 or more",
    FieldDescriptor.CPPTYPE_BOOL: "true or false",
    FieldDescriptor.CPPTYPE_STRING: "text (in quotes if it looks like something else)",
}


def load(
    path: str | os.PathLike[str], *, allow: Sequence[str | os.PathLike[str]] = ()
) -> collage_pb2.Collage:
    """Reads a collage file, or the `collage.yaml` of a folder.

    Picture paths in the answer start from the current folder; they are PNG, JPEG or WebP files of at most 64 MiB.
    Raises `InvalidInput` with every unknown field, wrong type and wrong picture, each with its field path, file and
    line.

    Args:
        path: the file or folder.
        allow: folders besides the file's own from which it may name pictures; links are followed before it is asked.
    """
    file = _file(Path(path))
    try:
        text = _disk.text(file)
    except _disk.Unreadable as error:
        raise InvalidInput.in_field(_disk.shown(str(file)), str(error), reason="FILE") from error
    return _Reader(file, [file.parent, *map(Path, allow)]).collage(text)


def attach(collage: collage_pb2.Collage) -> collage_pb2.Collage:
    """A copy with each picture's bytes in place of its path. Raises `InvalidInput` for an unreadable one."""
    copy = collage_pb2.Collage()
    copy.CopyFrom(collage)
    for field, picture in pictures(copy):
        if picture.WhichOneof("source") == "path":
            try:
                picture.data = _disk.picture(Path(picture.path))
            except _disk.Unreadable as error:
                raise InvalidInput.in_field(f"{field}.path", str(error), reason="FILE") from error
    return copy


def fit(collage: collage_pb2.Collage, width: int, height: int) -> collage_pb2.Collage:
    """A copy on a canvas of that size in pixels: all layers are scaled alike, as large as fits, about its centre."""
    copy = collage_pb2.Collage()
    copy.CopyFrom(collage)
    copy.size.width, copy.size.height = width, height
    before = collage.size
    if not before.width or not before.height or before == copy.size:
        return copy
    scale = min(width / before.width, height / before.height)
    for layer in copy.layers:
        transform = layer.transform
        if transform.HasField("x"):
            transform.x = (transform.x - before.width / 2) * scale + width / 2
        if transform.HasField("y"):
            transform.y = (transform.y - before.height / 2) * scale + height / 2
        transform.scale = (transform.scale if transform.HasField("scale") else 1.0) * scale
    return copy


def save(collage: collage_pb2.Collage, folder: Path) -> list[Path]:
    """Writes `collage.yaml` into a folder, its inline pictures beside it in `layers/`.

    Pictures that are paths or blobs stay what they are. Returns the paths written, the collage file last.
    """
    written = []
    for name, data in parts(collage).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
        written.append(target)
    return written


def parts(collage: collage_pb2.Collage) -> dict[str, bytes]:
    """The files that hold a collage, by their names in its folder: inline pictures, and the collage file last.

    Raises `InvalidInput` for a layer name that the contract does not allow, which would be part of a file's name.
    """
    copy = collage_pb2.Collage()
    copy.CopyFrom(collage)
    found = {}
    targets = {"background": copy.background.image}
    for layer in copy.layers:
        stem = f"layers/{file_stem(layer.name)}"
        targets[stem] = layer.image
        # No layer's name has a dot.
        targets |= {
            f"{stem}.structure-{number}": structure.image
            for number, structure in enumerate(layer.structure)
        }
    for stem, image in targets.items():
        if image.WhichOneof("source") != "data":
            continue
        suffix = next((end for magic, end in _SUFFIXES if image.data.startswith(magic)), ".bin")
        found[f"{stem}{suffix}"] = image.data
        image.path = f"{stem}{suffix}"
    tree = json_format.MessageToDict(copy, preserving_proto_field_name=True)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)
    return {**found, FILE_NAME: text.encode()}


def pictures(collage: collage_pb2.Collage) -> list[tuple[str, blob_pb2.Image]]:
    """Every picture of a collage (not copied) with its field path."""
    found = []
    for index, layer in enumerate(collage.layers):
        found.append((f"collage.layers[{index}].image", layer.image))
        found += [
            (f"collage.layers[{index}].structure[{number}].image", structure.image)
            for number, structure in enumerate(layer.structure)
            if structure.HasField("image")
        ]
    if collage.background.WhichOneof("kind") == "image":
        found.append(("collage.background.image", collage.background.image))
    return found


def place(path: Path, field: str) -> str:
    """Where a collage file says something: "FILE, line 12" for a field path such as `collage.layers[2].noise`.

    A field that is not in the file is where its parent is; "" when the path is not about the collage.
    """
    # A job's fields are named from its work: `redo.collage.layers[2].noise`.
    about = re.fullmatch(r"(?:\w+\.)?collage\b(.*)", field)
    if not about:
        return ""
    file = _file(path)
    try:
        node, _ = _disk.document(_disk.text(file))
    except (_disk.Unreadable, yaml.YAMLError):
        return ""
    line = 1
    for name, index in re.findall(r"\.(\w+)|\[(\d+)\]", about[1]):
        if isinstance(node, yaml.SequenceNode) and index and int(index) < len(node.value):
            node = node.value[int(index)]
            line = node.start_mark.line + 1
        elif isinstance(node, yaml.MappingNode):
            keys = (name, _camel(name))
            pair = next((pair for pair in node.value if pair[0].value in keys), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        else:
            break
    return f"{file}, line {line}"


def file_stem(name: str) -> str:
    """A layer name as part of a file name. Raises `InvalidInput` for one that the contract does not allow."""
    if not _NAME.fullmatch(name):
        text = f"{name!r} is no layer name: 1 to 64 of A-Z a-z 0-9 _ -"
        raise InvalidInput.in_field("collage.layers.name", text, reason="LAYER_NAME")
    return name


class _Reader:
    """Turns one YAML document into a Collage, gathering mistakes on the way."""

    def __init__(self, file: Path, within: Sequence[Path]) -> None:
        self._file = file
        self._within = within
        self._loader: yaml.SafeLoader
        self._violations: list[FieldViolation] = []

    def collage(self, text: str) -> collage_pb2.Collage:
        collage = collage_pb2.Collage()
        try:
            node, self._loader = _disk.document(text)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            parts = [part for part in (error.context, error.problem) if part]
            told = f"{_disk.shown(', '.join(parts))} ({self._file}, line {line})"
            raise InvalidInput.in_field("", told, reason="FILE") from error
        except yaml.YAMLError as error:
            told = f"{self._file}: {_disk.shown(str(error))}"
            raise InvalidInput.in_field("", told, reason="FILE") from error
        if node is None:
            raise InvalidInput.in_field("collage", f"{self._file} is empty", reason="FILE")
        self._message(node, collage, "collage")
        if self._violations:
            raise InvalidInput(
                f"{self._file} is no collage file",
                code=grpc.StatusCode.INVALID_ARGUMENT,
                reason="FILE",
                field_violations=tuple(self._violations),
            )
        return collage

    def _wrong(self, node: yaml.Node, field: str, text: str) -> None:
        place = f"{self._file}, line {node.start_mark.line + 1}"
        self._violations.append(FieldViolation(field=field, description=f"{text} ({place})"))

    def _message(self, node: yaml.Node, message: Message, where: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            self._wrong(node, where, "must hold fields, written `name: value`")
            return
        fields = message.DESCRIPTOR.fields
        known = {field.json_name: field for field in fields}
        known |= {field.name: field for field in fields}
        seen: set[str] = set()
        for key_node, value_node in node.value:
            is_name = isinstance(key_node, yaml.ScalarNode)
            key = _disk.shown(key_node.value) if is_name else "(a list or fields)"
            found = known.get(key)
            if found is None:
                near = difflib.get_close_matches(key, known, n=1)
                names = ", ".join(field.name for field in fields)
                hint = f"did you mean {near[0]}?" if near else f"known here: {names}"
                self._wrong(key_node, f"{where}.{key}", f"unknown field; {hint}")
                continue
            # Two members of a oneof exclude each other as surely as a field excludes itself.
            group = found.containing_oneof.name if found.containing_oneof else found.name
            if group in seen:
                self._wrong(key_node, f"{where}.{key}", "given twice, or beside its alternative")
                continue
            seen.add(group)
            if not _is_null(value_node):
                self._field(value_node, message, found, f"{where}.{found.name}")

    def _field(self, node: yaml.Node, message: Message, field: Any, where: str) -> None:
        if not field.is_repeated:
            if field.message_type is None:
                self._scalar(node, message, field, where)
            else:
                target = getattr(message, field.name)
                target.SetInParent()
                self._message(node, target, where)
        elif not isinstance(node, yaml.SequenceNode):
            self._wrong(node, where, "must be a list")
        else:
            for index, item in enumerate(node.value):
                self._message(item, getattr(message, field.name).add(), f"{where}[{index}]")

    def _scalar(self, node: yaml.Node, message: Message, field: Any, where: str) -> None:
        value: Any = node.value
        is_bool = field.cpp_type == FieldDescriptor.CPPTYPE_BOOL
        try:
            if not isinstance(node, yaml.ScalarNode):
                raise ValueError("a list or fields where a value belongs")
            value = self._loader.construct_object(node)  # type: ignore[no-untyped-call]
            if isinstance(value, bool) and not is_bool:
                raise ValueError("a truth value where none belongs")
            json_format.ParseDict({field.name: value}, message)
        # What YAML takes for a date, or a number, may be none: the 99th of a month, a number of 5000 digits.
        except (
            *(json_format.ParseError, yaml.YAMLError),
            *(TypeError, ValueError, OverflowError),
        ) as error:
            shown = "a list or fields"
            if isinstance(node, yaml.ScalarNode):
                # Python writes no number of so many digits.
                is_huge = isinstance(value, int) and value.bit_length() > 4096
                shown = _disk.shown(node.value if is_huge else repr(value))
            if isinstance(error, yaml.MarkedYAMLError) and error.problem:
                shown += f": {_disk.shown(error.problem)}"
            # Other tools' -1 for "any".
            hint = "; leave it out for a drawn one" if field.name == "seed" else ""
            self._wrong(node, where, f"must be {_EXPECTED[field.cpp_type]}, not {shown}{hint}")
            return
        if isinstance(message, blob_pb2.Image) and field.name == "path":
            picture = self._file.parent / message.path
            message.path = str(picture)
            if problem := _disk.problem_of_picture(picture, self._within):
                self._wrong(node, where, problem)


def _file(path: Path) -> Path:
    try:
        return path / FILE_NAME if path.is_dir() else path
    # A name that is too long.
    except OSError:
        return path


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"
