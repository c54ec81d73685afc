"""The contract as descriptors, for programs that read it at run time: Envoy, and clients without generated code.

`python -m door.contract` writes them to standard output.
"""

import sys

from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import DescriptorProto, FileDescriptorSet
from google.rpc import error_details_pb2, status_pb2

from collage.v1 import collage_service_pb2


def descriptor_set() -> bytes:
    """A FileDescriptorSet of the service and of the details its errors carry, each file after those it imports."""
    found: dict[str, FileDescriptor] = {}

    def add(file: FileDescriptor) -> None:
        for each in file.dependencies:
            add(each)
        found.setdefault(file.name, file)

    for file in (collage_service_pb2, error_details_pb2, status_pb2):
        add(file.DESCRIPTOR)
    files = FileDescriptorSet()
    for each in found.values():
        copy = files.file.add()
        each.CopyToProto(copy)
        for message in copy.message_type:
            _name_in_json(message)
    return files.SerializeToString(deterministic=True)


def _name_in_json(message: DescriptorProto) -> None:
    """Puts in the fields' names in JSON, as a compiler does; generated code leaves them out."""
    for field in message.field:
        first, *more = field.name.split("_")
        field.json_name = first + "".join(each[:1].upper() + each[1:] for each in more)
    for nested in message.nested_type:
        _name_in_json(nested)


if __name__ == "__main__":
    sys.stdout.buffer.write(descriptor_set())
