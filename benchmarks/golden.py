"""Golden pictures: what the bundled weights draw, committed, so that other weights or other arithmetic are noticed.

    python -m benchmarks.golden            # compares; exit code 1 where a value differs by more than 2 of 255
    python -m benchmarks.golden --write    # after training: draws them anew

A stock diffusers pipeline draws them, so that they judge the weights and not our sampler.
"""

import argparse
import sys

from PIL import Image

from testing.golden import ALLOWED, GOLDEN, difference, draw


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    drawn = draw()
    if arguments.write:
        GOLDEN.mkdir(exist_ok=True)
        for name, picture_HWC in drawn.items():
            Image.fromarray(picture_HWC).save(GOLDEN / f"{name}.png", optimize=True)
    differences = {name: difference(name, picture_HWC) for name, picture_HWC in drawn.items()}
    for name, most in differences.items():
        print(f"{name:16} largest difference {most} of 255, allowed {ALLOWED}")
    sys.exit(max(differences.values()) > ALLOWED)


if __name__ == "__main__":
    main()
