"""Does the bundled model draw what the words say?

    python -m benchmarks.concepts [--trained-on cpu|gpu] [--steps 20] [--seeds 4] [--data out/concepts] [--threads 0]

"a {concept} on a {ground}" for every concept the model knows, four seeds, each on another ground, drawn through the
service from words alone; the independent judge names what it sees, of twice as many concepts as the model knows. Before
that the judge is judged, on scenes composed from seeds it never saw. Writes a contact sheet. Exit code 1 unless the
share named rightly reaches 50 % for weights trained on a CPU, 80 % on a GPU (the model's card says which), and the
judge's own share 95 %.
"""

import argparse
import asyncio
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks import judge as judging
from benchmarks.collages import GROUNDS, serving
from benchmarks.judge import HELD_OUT_SEED, LOOKS, NAMES, Composer, Judge, art, as_bytes
from benchmarks.measures import names

BARS = {"cpu": 0.5, "gpu": 0.8}
JUDGES_BAR = 0.95
# Held-out scenes of one object that the judge names; the object wholly in the frame, as the model's single ones are.
TRIALS, WHOLE = 400, 0.97


def alone(judge: Judge) -> float:
    """Share of held-out scenes of one object that the judge names as it names drawn ones."""
    composer = Composer(HELD_OUT_SEED + 1, plain=True)
    hits: list[bool] = []
    while len(hits) < TRIALS:
        found = composer.scenes(48)
        is_one = ((found.rendering_BK >= 0).sum(dim=1) == 1) & (found.shown_BK[:, 0] > WHOLE)
        truth = [NAMES[index // LOOKS] for index in found.rendering_BK[is_one, 0].tolist()]
        if truth:
            told = names(judge, as_bytes(found.x_B3HW[is_one]))
            hits += [name == right for name, right in zip(told, truth, strict=True)]
    return float(np.mean(hits))


def sheet(rows: Sequence[NDArray[np.uint8]]) -> Image.Image:
    """Rows of pictures [N, H, W, 3], three of them side by side."""
    strips = [np.concatenate(list(row), axis=1) for row in rows]
    lines = [
        np.concatenate(strips[first : first + 3], axis=1) for first in range(0, len(strips), 3)
    ]
    width = max(line.shape[1] for line in lines)
    return Image.fromarray(
        np.concatenate(
            [np.pad(line, ((0, 0), (0, width - line.shape[1]), (0, 0))) for line in lines]
        )
    )


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trained-on", choices=BARS, default="cpu")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument(
        "--data", type=Path, default=Path("out/concepts"), help="pictures are kept here"
    )
    parser.add_argument("--threads", type=int, default=0, help="of one operation, 0 for one a core")
    args = parser.parse_args()
    judge = judging.load()
    own = judging.report(judge)["concept, plain"]
    whole = alone(judge)
    print(
        f"the judge, {len(NAMES)} concepts (chance {1 / len(NAMES):.1%}): {own:.1%} of crops of held-out scenes, ",
        end="",
    )
    print(f"{whole:.1%} of held-out scenes of one object; bar {JUDGES_BAR:.0%}")
    grounds = list(GROUNDS)
    rows, shares = [], []
    async with serving(args.data, threads=args.threads) as service:
        for index, concept in enumerate(art.CONCEPTS.values()):
            pictures = [
                await service.imagine(
                    concept, grounds[(index + seed) % len(grounds)], steps=args.steps, seed=seed
                )
                for seed in range(args.seeds)
            ]
            told = names(judge, np.stack(pictures))
            rows.append(np.stack(pictures))
            shares.append(np.mean([name == concept for name in told]))
            wrong = Counter(name for name in told if name != concept)
            seen = ", ".join(f"{name} {count}" for name, count in wrong.items())
            print(f"{concept:14s} {shares[-1]:6.0%}   {seen}", flush=True)
    path = args.data / "concepts.png"
    sheet(rows).save(path)
    share, bar = float(np.mean(shares)), BARS[args.trained_on]
    print(
        f"named rightly: {share:.1%}; bar for weights trained on a {args.trained_on.upper()}: {bar:.0%}; {path}"
    )
    return 0 if share >= bar and min(own, whole) >= JUDGES_BAR else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
