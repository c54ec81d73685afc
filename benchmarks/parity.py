"""Bar 2: without control and with one noise for all, we are diffusers' img2img pipeline, bit for bit.

Five folders of toy models are made on the spot, one of them distilled for few steps; every sampler, several
strengths, with and without guidance, two pictures a call, fp32, one thread of a CPU: other dtypes and devices are not
compared. First columns: largest difference of latents and pictures to `StableDiffusionImg2ImgPipeline` or
`StableDiffusionXLImg2ImgPipeline`. Next columns: the noise map against the exact-level injection of `inject`, with
strengths 0 and 1 only, and with five. Last columns: with one layer over the whole canvas that uses one ControlNet at
scale 1, or two of them at other scales and for a part of the steps, against the ControlNet pipelines of the same two.
Exit code 1 if anything differs. (UniPC's corrector would undo a hold that ends midway; ours leaves held cells alone,
which a stock pipeline cannot be told, so for it the five strengths are not compared.)

    python -m benchmarks.parity
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from services.generator.schedule import SAMPLERS
from testing import toy
from testing.parity import STRUCTURES, Case


def rows() -> Iterator[tuple[str, str, dict[str, float]]]:
    """Model, sampler, differences."""
    with tempfile.TemporaryDirectory() as folder:
        for make in (toy.sd1, toy.sd2, toy.sdxl, toy.mini, toy.lcm):
            case = Case(make(Path(folder) / make.__name__))
            for sampler in SAMPLERS if make is not toy.lcm else ("lcm",):
                yield make.__name__, sampler, case.differences(sampler)


def main() -> int:
    torch.set_num_threads(1)
    kinds = ("latents", "pictures", "map 0/1", "map 0..1", *STRUCTURES)
    print(f"{'model':6} {'sampler':16}" + "".join(f"{kind:>10}" for kind in kinds))
    is_equal = True
    for model, sampler, differences in rows():
        cells = [f"{differences[kind]:.3g}" if kind in differences else "–" for kind in kinds]
        print(f"{model:6} {sampler:16}" + "".join(f"{cell:>10}" for cell in cells), flush=True)
        is_equal &= not any(differences.values())
    print("equal" if is_equal else "NOT equal")
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
