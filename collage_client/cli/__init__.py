"""The command `collage`: what people type. `command` reads arguments, `actions` does the work, `report` says it."""

from collage_client.cli.command import main

__all__ = ["main"]
