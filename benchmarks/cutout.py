"""How well and how fast objects are cut out: `python -m benchmarks.cutout [SIDE]`.

Every object of examples/art is photographed over a clouded ground of its own, cut out, and held against the truth: how
far its edge is off, seen on black, grey and white, and how far the object's colours are there, both of 255. `network`
is the network's alpha over the picture's own pixels, `refined` what `CutOut` gives. Seconds are of one core.
"""

import sys
import time
from collections.abc import Iterable

import numpy as np

from services.compositor.cutout import NothingFound, cut, open_cutters
from services.compositor.network import resized
from testing.photographs import ART, halo, photograph


def main() -> None:
    side = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    cutter = open_cutters("", threads=1)["u2netp"]
    rows = []
    print(f"{'object':30}{'network':>16}{'refined':>16}{'seconds':>10}")
    names = [path.stem for path in sorted(ART.glob("*.png")) if "feathered" not in path.stem]
    for seed, name in enumerate(names):
        truth = photograph(name, side=side, seed=seed)
        (map_hw,) = cutter.opened.run(truth.pixels_HW3)
        first_HW = resized(map_hw.reshape(map_hw.shape[-2:]), width=side, height=side)
        plain_HW4 = np.dstack([truth.pixels_HW3, np.rint(first_HW * 255).astype(np.uint8)])
        opaque_HW4 = np.dstack([truth.pixels_HW3, np.full((side, side), 255, np.uint8)])
        start = time.process_time()
        try:
            found_HW4 = cut(cutter, opaque_HW4)
        except NothingFound:
            print(f"{name:30}  nothing found")
            continue
        seconds = time.process_time() - start
        rows.append((*halo(plain_HW4, truth), *halo(found_HW4, truth), seconds))
        print(_row(name, rows[-1]))
    print(_row("mean", np.mean(rows, axis=0)))


def _row(name: str, numbers: Iterable[float]) -> str:
    return f"{name:30}" + "".join(f"{each:8.2f}" for each in numbers)


if __name__ == "__main__":
    main()
