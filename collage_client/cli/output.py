"""Where words go: results to standard output, as text or as JSON; everything on the way to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from collage_client.cli.progress import Progress


class Output:
    """One command's output. With `is_json`, standard output holds JSON and nothing else; `is_quiet` drops progress."""

    def __init__(self, *, is_json: bool, is_quiet: bool) -> None:
        self.is_json = is_json
        self._is_quiet = is_quiet

    def tell(self, text: str, tree: Mapping[str, Any]) -> None:
        """A result: `text` for people, `tree` for programs, indented."""
        print(json.dumps(tree, indent=2, ensure_ascii=False) if self.is_json else text, flush=True)

    def line(self, tree: Mapping[str, Any]) -> None:
        """One of many results, for programs: an object a line."""
        print(json.dumps(tree, ensure_ascii=False), flush=True)

    def note(self, text: str) -> None:
        """Something on the way."""
        if not self._is_quiet:
            print(text, file=sys.stderr, flush=True)

    def fail(self, text: str, tree: Mapping[str, Any]) -> None:
        """What went wrong; quiet or not."""
        print(text, file=sys.stderr, flush=True)
        if self.is_json:
            self.tell("", {"error": tree})

    def progress(self, title: str = "") -> Progress:
        """Shows one job's events, or none of them."""
        return Progress(None if self._is_quiet else sys.stderr, title)


def tree(message: Message) -> dict[str, Any]:
    """A message as plain values. Zeros are written out: a dial of 0 is a decision, not an absence."""
    found: dict[str, Any] = json_format.MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    if found.get("seed") is not None:
        found["seed"] = int(found["seed"])
    return found
