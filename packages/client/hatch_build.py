"""What the client's wheel holds lies beside it in the tree; an editable install points there and holds no copy."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ClientBuildHook(BuildHookInterface):
    """Adds the client and the contract to a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Of a standard wheel only."""
        if version == "standard":
            tree = Path(self.root).parents[1]
            build_data["force_include"][str(tree / "collage_client")] = "collage_client"
            build_data["force_include"][str(tree / "protos" / "collage")] = "collage"
