"""Train the bundled model: autoencoder, then denoiser with text encoder and edge ControlNet.

Takes --minutes of working time in all, so a slower machine takes fewer steps; a pause does not count. SIGTERM ends it
with a checkpoint; with --resume it goes on where it was. With --minutes 0 it exports what there is, trained or not.
"""

import argparse
from pathlib import Path

import art
import autoencoder
import denoiser
import networks
import torch
from scenes import Composer
from training import Run

# Each stage, and its share of the time.
STAGES = {
    "autoencoder": (autoencoder.train, 0.26),
    "denoiser": (denoiser.train, 0.74),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=networks.SIZES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=120.0, help="of all stages chosen")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, separated by commas")
    parser.add_argument("--work", type=Path, default=art.WORK, help="folder of the checkpoints")
    parser.add_argument("--weights", type=Path, help="the exported model, default WORK/weights")
    parser.add_argument("--start", type=Path, help="an exported folder whose weights to begin with")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    stages = arguments.stages.split(",")
    if unknown := set(stages) - set(STAGES):
        parser.error(f"--stages: {', '.join(sorted(unknown))} not among {', '.join(STAGES)}")
    size = networks.SIZES[arguments.size]
    composer = Composer(size.side, size.names, art.gallery(), torch.device(arguments.device))
    run = Run(
        size,
        composer,
        arguments.work,
        threads=arguments.threads,
        weights=arguments.weights,
        start=arguments.start,
        resume=arguments.resume,
    )
    run.stop_on_signal()
    whole = sum(STAGES[name][1] for name in stages)
    for name in STAGES:
        if name in stages and not run.is_stopped:
            train, share = STAGES[name]
            train(run, arguments.minutes * share / whole)


if __name__ == "__main__":
    main()
