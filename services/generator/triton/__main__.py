"""`python -m services.generator.triton`: writes a model repository, and asks servers whether they truly answer."""

import argparse
import sys
from pathlib import Path

from services.common.errors import CollageError
from services.common.models_file import read_sources
from services.common.settings import GeneratorSettings, InvalidSetting, read
from services.common.telemetry import start_logging
from services.common.weights import ModelError
from services.generator.folder_card import FolderCard, read_catalog
from services.generator.triton import repository, wire
from services.generator.triton.servers import Servers
from services.generator.triton.stages import probe as look

PROBE_S = 10.0


def main() -> int:
    """Answers the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m services.generator.triton", description=__doc__
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    write = verbs.add_parser("write", help="write the repository of COLLAGE_MODELS")
    write.add_argument("folder", type=Path, metavar="REPOSITORY")
    for stage in wire.STAGES:
        write.add_argument(
            f"--{stage.replace('_', '-')}",
            type=int,
            default=1,
            metavar="N",
            help="instances of it, each with its own weights (default: 1)",
        )
    probe = verbs.add_parser("probe", help="exit 0 when every stage of every model answers")
    probe.add_argument("address", metavar="HOST:PORT")
    arguments = parser.parse_args()
    start_logging("triton", level="WARNING")
    try:
        settings = read(GeneratorSettings)
        if arguments.verb == "probe":
            servers = Servers([arguments.address], patience_s=PROBE_S)
            for source in read_sources(settings.models):
                look(FolderCard.read(source, is_elsewhere=True), servers)
            return 0
        names = repository.write(
            read_catalog(settings.models).cards,
            arguments.folder,
            threads=settings.threads or 1,
            instances={stage: getattr(arguments, stage) for stage in wire.STAGES},
        )
    except (InvalidSetting, ModelError, CollageError, OSError) as error:
        sys.stderr.write(f"triton: {error}\n")
        return 2 if isinstance(error, InvalidSetting) else 1
    sys.stdout.write("\n".join([*names, ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
