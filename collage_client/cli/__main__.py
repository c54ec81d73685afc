"""`python -m collage_client.cli`: the command `collage` where it is not on the path."""

import sys

from collage_client.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
