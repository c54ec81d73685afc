"""Bar 5: operations and bytes that a step takes outside the networks.

    python -m benchmarks.operations [--sampler euler] [--base WORKTREE]

The bundled model on its own canvas with 1, 8 and 32 layers that use every dial, with guidance, one picture; with and
without a ControlNet on every layer. Counted is what torch dispatches in a step, views among it, but for the first
two steps of a job; `outside` is what happens outside the forward passes of U-Net and ControlNet, `in control` what
attention control adds inside the U-Net's (less than nothing where it makes once what a stock U-Net makes each step),
`bytes` what is newly allocated outside. With `--base` the same is counted with the code of another worktree, and the
exit code is 1 unless `outside`, and `outside` and `in control` together, are at most half of it everywhere.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LAYERS = (1, 8, 32)
STEPS = 6
# Steps of a job before those that are counted: what a job makes once is made in them.
FIRST = 2
WORD = "sushi"


class Counter(TorchDispatchMode):
    """Counts operations inside and outside the networks' forward passes, and bytes allocated outside."""

    def __init__(self) -> None:
        super().__init__()
        self.outside = self.inside = self.bytes = self.depth = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        answer = func(*args, **(kwargs or {}))
        if self.depth:
            self.inside += 1
            return answer
        self.outside += 1
        given = {_storage(each) for each in tree_leaves((args, kwargs)) if _is_tensor(each)}
        made = {
            _storage(each): each.untyped_storage().nbytes()
            for each in tree_leaves(answer)
            if _is_tensor(each)
        }
        self.bytes += sum(size for storage, size in made.items() if storage not in given)
        return answer

    @contextmanager
    def watching(self, networks: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Knows meanwhile when one of these is at work."""

        def enter(*_: Any) -> None:
            self.depth += 1

        def leave(*_: Any) -> None:
            self.depth -= 1

        hooks = [network.register_forward_pre_hook(enter) for network in networks]
        hooks += [network.register_forward_hook(leave) for network in networks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def count(sampler: str) -> list[dict[str, Any]]:
    """What a step takes with the code that is found first, by layers and structure."""
    # Here, because which worktree they are of is decided by whoever starts this process.
    from diffusers import ControlNetModel

    from benchmarks.overhead import mini
    from benchmarks.structure import KIND, add_controlnet
    from services.common.collage import Dials, Sampling, Structure
    from services.common.plate import Plate
    from services.generator.conditioning import LayerControl, prepare
    from services.generator.sampler import Run, step
    from services.generator.stages import TorchStages

    networks: list[torch.nn.Module] = []
    loaded = ControlNetModel.from_pretrained

    def noted(*args: Any, **options: Any) -> Any:
        networks.append(loaded(*args, **options))
        return networks[-1]

    ControlNetModel.from_pretrained = noted
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model = add_controlnet(mini(), Path(folder))
        stages = TorchStages(model)
        stages.load_controlnets([KIND])
        networks.append(model.unet)
        height, width = model.facts.native.height, model.facts.native.width
        rows, columns = height // model.facts.latent_factor, width // model.facts.latent_factor
        rng = np.random.default_rng(0)
        sampling = Sampling(
            model="", sampler=sampler, steps=STEPS, guidance_scale=5.0, images=1, seed=0
        )

        def dials_of(dial: float) -> dict[str, Any]:
            """As this tree has them; one before it may have them as fields of the control itself."""
            pair = {"attract": dial, "repel": dial}
            is_own = "dials" in {each.name for each in fields(LayerControl)}
            return {"dials": Dials(noise=1.0, **pair)} if is_own else pair

        def drawn(layers: int, dial: float, structures: tuple[Structure, ...]) -> Counter:
            tile = np.broadcast_to(np.arange(columns) * layers // columns, (rows, columns))
            plate = Plate(
                composite_HWC=rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
                visible_Lhw=np.stack([tile == layer for layer in range(layers)]).astype(np.float32),
                strength_hw=np.linspace(1.0, 0.3, layers)[tile],
                release_HW=np.full((height, width), 255, np.uint8),
                control={KIND: rng.integers(0, 256, (height, width, 3), dtype=np.uint8)},
            )
            layer_controls = [
                LayerControl(
                    text_start=index * (len(WORD) + 1),
                    text_end=index * (len(WORD) + 1) + len(WORD),
                    **dials_of(dial),
                    seed=index,
                    structures=structures,
                )
                for index in range(layers)
            ]
            conditioning = prepare(
                stages,
                prompt=" ".join([WORD] * layers),
                negative_prompt="",
                guidance_scale=sampling.guidance_scale,
                layers=layer_controls,
            )
            run = Run.begin(stages, plate=plate, conditioning=conditioning, sampling=sampling)
            for _ in range(FIRST):
                step(stages, [run])
            counter = Counter()
            with counter.watching(networks), counter:
                while not run.is_done:
                    step(stages, [run])
            return counter

        for structures in ((), (Structure(kind=KIND, scale=0.8),)):
            for layers in LAYERS:
                plain, controlled = drawn(layers, 0.0, structures), drawn(layers, 0.5, structures)
                found.append(
                    {
                        "layers": layers,
                        "structure": bool(structures),
                        "outside": controlled.outside // (STEPS - FIRST),
                        "in control": (controlled.inside - plain.inside) // (STEPS - FIRST),
                        "bytes": controlled.bytes // (STEPS - FIRST),
                    }
                )
    return found


def count_with(worktree: Path, sampler: str) -> list[dict[str, Any]]:
    """The same with the code of a worktree."""
    path = os.pathsep.join(map(str, (worktree, worktree / "protos")))
    # Not as a module, and not with this file's folder on the path: both are this worktree's.
    command = [sys.executable, "-P", __file__, "--sampler", sampler, "--json"]
    answer = subprocess.run(
        command,
        cwd=worktree,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=True,
    )
    counted: list[dict[str, Any]] = json.loads(answer.stdout.splitlines()[-1])
    return counted


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--base", type=Path, help="a worktree to compare with")
    parser.add_argument("--json", action="store_true", help="print this worktree's as JSON")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.json:
        print(json.dumps(count(arguments.sampler)))
        return 0
    ours = count_with(Path(__file__).parents[1], arguments.sampler)
    base = count_with(arguments.base.resolve(), arguments.sampler) if arguments.base else None
    columns = ("outside", "in control", "bytes")
    print(f"{'layers':>6} {'structure':>9}" + "".join(f"{each:>27}" for each in columns))
    is_half = True
    for index, row in enumerate(ours):
        cells = [
            f"{row[each]}" + (f" (base {base[index][each]})" if base else "") for each in columns
        ]
        told = "yes" if row["structure"] else "no"
        print(f"{row['layers']:>6} {told:>9}" + "".join(f"{cell:>27}" for cell in cells))
        if base is not None:
            (outside, control), (old_outside, old_control) = (
                (each["outside"], each["in control"]) for each in (row, base[index])
            )
            is_half &= 2 * outside <= old_outside
            is_half &= 2 * (outside + control) <= old_outside + old_control
    if base is not None:
        print("at most half everywhere" if is_half else "NOT at most half everywhere")
    return 0 if is_half else 1


if __name__ == "__main__":
    sys.exit(main())
