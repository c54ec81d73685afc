"""The ladder: what each part of the method adds, on held-out collages.

    python -m benchmarks.ladder [--quick] [--words 40] [--collages 40] [--steps 20] [--data out/ladder] [--threads 0]

Forty collages of mixed artists' cut-outs, each drawn on every rung: composite only, SDEdit with one noise for all, then
one after the other attention control, learned words, per-layer structure, per-layer noise. Everything goes through the
service; an independent judge (`benchmarks.judge`) names what came out. A rung that this checkout or its weights do not
have is reported as not available. Then the noise dial, SDEdit's against full control's; pairs of one concept in two
looks at noise 0.9 with and without learned words, by which nothing was chosen, as the words' recipe was by pairs of the
rungs' cut-outs; structure on every second layer, in three times as many collages; and redo. Intervals are 95 %
bootstrap intervals over collages; a rung beats the one before when the interval of the paired difference lies above
zero. Writes docs/ladder.md and docs/ladder.png (with --quick into the data folder) and prints the same; exit code 1
when a bar is missed or a rung is not available.
"""

import argparse
import asyncio
import math
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from benchmarks import judge as judging
from benchmarks.collages import (
    PAIRS_SEEDS,
    Cutout,
    Dials,
    Drawn,
    Scene,
    Service,
    pairs,
    pool,
    scenes,
    serving,
)
from benchmarks.judge import FIFTH, Judge
from benchmarks.measures import Likeness, layer_edges, likeness, measure
from services.common.models_file import BUNDLED
from services.diffusion.networks import load
from services.generator.stages import TorchStages

DOCS = Path(__file__).parents[1] / "docs"
# Noise of every layer on the rungs that have one noise for all, where pixels alone explain nothing, and where they
# explain so much that what is still missed is the painter's, or the judge's.
UNIFORM, FREE, CLOSE = 0.8, 0.9, 0.5
DIAL = (0.3, 0.5, 0.8, 0.9)
# Layers whose words are learned in one call.
TOGETHER = 8
# The kind of structure, and how far guidance strengthens it.
STRUCTURE, EMPHASIS = "canny", 1.0
RESAMPLES = 2000
# The bar of words: at least this share nearest to its own layer, and so many times as often as without words.
NEAREST, TIMES = 0.75, 2.0
# The bar of structure: edges agree so many times as well with it as without; asked of so many times the collages, as
# forty tell a neighbour's share of it to within 0.04 only.
SHARPER, MORE = 1.3, 3

Values = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """A step of the ladder: its dials, or why it is not available, and the measure it exists for."""

    name: str
    dials: Dials | str
    axis: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @classmethod
    def of(cls, values: Values, statistic: Callable[[Values], float] = np.mean) -> "Interval":
        """Resamples the last axis, one entry a collage; one that has nothing to measure is left out."""
        values = values[..., ~np.isnan(values).reshape(-1, values.shape[-1]).any(axis=0)]
        count = values.shape[-1]
        if not count:
            return cls(mean=math.nan, low=math.nan, high=math.nan)
        rng = np.random.default_rng(0)
        found = [statistic(values[..., rng.integers(0, count, count)]) for _ in range(RESAMPLES)]
        low, high = np.percentile(found, (2.5, 97.5))
        return cls(mean=float(statistic(values)), low=float(low), high=float(high))


class Bench:
    """Draws and measures; what was drawn is kept for the sheet."""

    def __init__(self, service: Service, judge: Judge, stages: TorchStages, steps: int) -> None:
        self._service = service
        self._judge = judge
        self._stages = stages
        self._steps = steps
        self._measured: dict[tuple[Scene, Dials], dict[str, float]] = {}
        self.pictures: dict[tuple[Scene, Dials], Drawn] = {}

    async def drawn(self, scene: Scene, dials: Dials) -> Drawn:
        """One picture, the same object for the same question."""
        if (scene, dials) not in self.pictures:
            self.pictures[scene, dials] = await self._service.draw(scene, dials, steps=self._steps)
        return self.pictures[scene, dials]

    async def measured(self, cases: Sequence[Scene], dials: Dials) -> dict[str, Values]:
        """Each measure's value for each collage."""
        rows = []
        for scene in cases:
            if (scene, dials) not in self._measured:
                drawn = await self.drawn(scene, dials)
                through_HWC = self._through(drawn.composite_HWC)
                self._measured[scene, dials] = measure(self._judge, scene, drawn, through_HWC)
            rows.append(self._measured[scene, dials])
        return {name: np.asarray([row[name] for row in rows]) for name in rows[0]}

    async def likenesses(self, cases: Sequence[Scene], dials: Dials) -> list[list[Likeness]]:
        """For each collage, which rendering each object is nearest to."""
        found = []
        for scene in cases:
            drawn = await self.drawn(scene, dials)
            layers = range(len(scene.pieces))
            found.append([likeness(self._judge, scene, drawn, index) for index in layers])
        return found

    async def redone(self, cases: Sequence[Scene], dials: Dials) -> tuple[Values, Values]:
        """Share of pixels outside a redone layer that kept their bytes, and of those inside that changed."""
        kept, changed = [], []
        for number, scene in enumerate(cases):
            index = number % len(scene.pieces)
            parent = self.pictures[scene, dials]
            again = replace(dials, noise=UNIFORM)
            drawn = await self._service.redo(scene, again, parent.png, index, self._steps)
            same_HW = (drawn.picture_HWC == parent.picture_HWC).all(axis=2)
            inside_HW = drawn.mask_LHW[index] > 0
            kept.append(float(same_HW[~inside_HW].mean()))
            changed.append(1 - float(same_HW[inside_HW].mean()))
        return np.asarray(kept), np.asarray(changed)

    def _through(self, composite_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        z_1Chw = self._stages.encode_image(torch.from_numpy(composite_HWC.copy())[None])
        return np.asarray(self._stages.decode_image(z_1Chw)[0].numpy())


async def learned(service: Service, cutouts: Sequence[Cutout]) -> tuple[frozenset[Cutout], str]:
    """The cut-outs that have words now, and why there are none, or not all."""
    done: set[Cutout] = set()
    for first in range(0, len(cutouts), TOGETHER):
        group = cutouts[first : first + TOGETHER]
        began_s = time.monotonic()
        if reason := await service.learn(group):
            return frozenset(done), reason
        done |= set(group)
        note(f"{len(done)} of {len(cutouts)} words, {time.monotonic() - began_s:.0f} s")
    return frozenset(done), ""


def ladder(words: frozenset[Cutout], no_words: str, kinds: Sequence[str]) -> list[Rung]:
    """The rungs, each with all before it that are available."""
    structure = STRUCTURE if STRUCTURE in kinds else ""
    lacks = "" if structure else f"the weights have no ControlNet for {STRUCTURE}"
    sdedit = Dials(noise=UNIFORM)
    control = replace(sdedit, control=None)
    worded = replace(control, words=words)
    structured = replace(worded, structure=structure, emphasis=EMPHASIS)
    return [
        Rung(name="composite only", dials=Dials(noise=0.0), axis=""),
        Rung(name="SDEdit", dials=sdedit, axis="harmony"),
        Rung(name="+ attention control", dials=control, axis="right"),
        Rung(name="+ learned words", dials=worded if words else no_words, axis="own nearest"),
        Rung(name="+ per-layer structure", dials=lacks or structured, axis="edges"),
        Rung(name="+ per-layer noise", dials=replace(structured, noise=None), axis="adherence"),
    ]


def gap(points: Values) -> float:
    """How far full control's fidelity lies above the best that SDEdit's curve has at that harmony or more.

    points: [full, then the curve's in the order of the dial; (fidelity, harmony); collage]. Beyond the curve's most
    harmonious point it has what it had there.
    """
    means = points.mean(axis=2)
    (fidelity, harmonious), curve = means[0], means[1:]
    reached = [a for a, b in curve if b >= harmonious]
    for (first, low), (second, high) in pairwise(curve):
        if (low < harmonious) != (high < harmonious):
            reached.append(first + (second - first) * (harmonious - low) / (high - low))
    return float(fidelity - (max(reached) if reached else curve[curve[:, 1].argmax(), 0]))


class Report:
    """Lines for people and for docs/ladder.md at once, and the bars."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.missed: list[str] = []

    def say(self, line: str = "") -> None:
        """One line."""
        print(line, flush=True)
        self.lines.append(line)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table in Markdown."""
        self.say(f"| {' | '.join(head)} |")
        self.say(f"|{'---|' * len(head)}")
        for row in rows:
            self.say(f"| {' | '.join(row)} |")
        self.say()

    def bar(self, name: str, *, holds: bool, found: str) -> None:
        """Whether a bar holds, and by what."""
        self.say(f"- {'holds' if holds else '**missed**'}: {name}: {found}")
        if not holds:
            self.missed.append(name)


GROUPS = {
    "Spatial": ("right", "filled", "missing", "leaked", "again"),
    "Appearance and structure": ("own nearest", "own nearest, pixels", "margin", "edges"),
    "Harmony": ("one look", "shadow", "shadow cells", "seamless"),
    "Together": ("fidelity", "harmony", "adherence"),
}


async def climb(
    bench: Bench, report: Report, cases: Sequence[Scene], rungs: Sequence[Rung]
) -> None:
    """Every rung, its intervals, and whether it beats the one before."""
    values: dict[str, dict[str, Values]] = {}
    for rung in rungs:
        if isinstance(rung.dials, Dials):
            values[rung.name] = await timed(bench.measured(cases, rung.dials), rung.name)
    for title, names in GROUPS.items():
        report.say(f"### {title}\n")
        rows = []
        for rung in rungs:
            found = values.get(rung.name)
            cells = [str(Interval.of(found[name])) if found else "—" for name in names]
            rows.append([rung.name, *cells])
        report.table(["rung", *names], rows)
    report.say("### Each rung against the one before, paired\n")
    before = ""
    for rung in rungs:
        if isinstance(rung.dials, str):
            report.bar(rung.name, holds=False, found=f"not available: {rung.dials}")
            continue
        if before:
            difference = values[rung.name][rung.axis] - values[before][rung.axis]
            interval = Interval.of(difference)
            name = f"{rung.name} beats {before} on {rung.axis}"
            report.bar(name, holds=interval.low > 0, found=f"{interval}")
        before = rung.name
    report.say()


async def sweep(
    bench: Bench, report: Report, cases: Sequence[Scene], full: Dials, dial: Sequence[float]
) -> dict[str, Values]:
    """Both curves over the noise dial: [noise, (fidelity, harmony), collage] of each."""
    curves = {}
    for name, dials in (("SDEdit", Dials(noise=0.0)), ("full control", full)):
        found = []
        for noise in dial:
            label = f"{name}, noise {noise:g}"
            values = await timed(bench.measured(cases, replace(dials, noise=noise)), label)
            found.append([values["fidelity"], values["harmony"]])
        curves[name] = np.asarray(found)
    still = await bench.measured(cases, Dials(noise=0.0))
    composite = np.asarray([[still["fidelity"], still["harmony"]]])
    report.say("## Fidelity against harmony over the noise dial\n")
    rows = []
    verdicts = []
    for index, noise in enumerate(dial):
        points = np.concatenate(
            [curves["full control"][index : index + 1], composite, curves["SDEdit"]]
        )
        above = Interval.of(points, gap)
        verdicts.append(above.high >= 0)
        rows.append(
            [
                f"{noise:g}",
                *(
                    str(Interval.of(curves[name][index, axis]))
                    for name in curves
                    for axis in (0, 1)
                ),
                str(above),
            ]
        )
    report.table(
        [
            "noise",
            "SDEdit: fidelity",
            "harmony",
            "full control: fidelity",
            "harmony",
            "above the curve",
        ],
        rows,
    )
    report.say("![fidelity against harmony](ladder.png)\n")
    below = [f"{noise:g}" for noise, holds in zip(dial, verdicts, strict=True) if not holds]
    report.bar(
        "full control is on or above SDEdit's curve at every noise",
        holds=not below,
        found=f"below at {', '.join(below)}" if below else "nowhere below it outside the interval",
    )
    report.say()
    return {"composite": composite, **curves}


def is_fifth(cutout: Cutout) -> bool:
    """Whether the fifth look drew it."""
    return cutout.look == FIFTH.name


# What is asked of an object: how it was drawn, its own cut-out, and the other one's in the picture; None: not asked.
QUESTIONS: dict[str, Callable[[Likeness, Cutout, Cutout], bool | None]] = {
    "own nearest": lambda each, own, other: each.own,
    "own nearest, known looks": lambda each, own, other: None if is_fifth(own) else each.own,
    "own nearest, fifth look": lambda each, own, other: each.own if is_fifth(own) else None,
    "own nearest, by pixels": lambda each, own, other: each.own_pixels,
    "nearest to the picture's other layer": lambda each, own, other: each.nearest == other.look,
}


async def resemble(
    bench: Bench,
    report: Report,
    cases: Sequence[Scene],
    words: frozenset[Cutout],
    structure: str,
) -> None:
    """Whether objects drawn nearly from nothing are their own layers'; beside it, what structure of a kind adds."""
    report.say(f"## Appearance at noise {FREE:g}: one concept in two looks side by side\n")
    plain = Dials(noise=FREE, control=None)
    settings = {"without words": plain}
    if words:
        cases = [scene for scene in cases if words.issuperset(each.cutout for each in scene.pieces)]
        settings["with words"] = replace(plain, words=words)
    if structure:
        settings |= {
            f"{name}, {structure}": replace(dials, structure=structure, emphasis=EMPHASIS)
            for name, dials in settings.items()
        }
    if words:
        close = replace(settings["with words"], noise=CLOSE)
        settings[f"with words, noise {CLOSE:g}"] = close
    answers: dict[str, dict[str, Interval]] = {}
    for name, dials in settings.items():
        found = await timed(bench.likenesses(cases, dials), name)
        shares: dict[str, list[float]] = {question: [] for question in QUESTIONS}
        for scene, (left, right) in zip(cases, found, strict=True):
            one, two = (piece.cutout for piece in scene.pieces)
            for question, ask in QUESTIONS.items():
                told = [ask(left, one, two), ask(right, two, one)]
                heard = [answer for answer in told if answer is not None]
                shares[question].append(float(np.mean(heard)) if heard else math.nan)
        shares["own nearest, both of a picture"] = [
            float(all(each.own for each in layers)) for layers in found
        ]
        answers[name] = {
            question: Interval.of(np.asarray(values)) for question, values in shares.items()
        }
    questions = answers["without words"]
    rows = [
        [question, *(str(each[question]) for each in answers.values())] for question in questions
    ]
    report.table([f"{len(cases)} pictures", *answers], rows)
    if not words:
        report.bar("learned words bring out their own layer", holds=False, found="not available")
        return
    names = ("without words", "with words")
    without, with_words = (answers[name]["own nearest"].mean for name in names)
    report.bar(
        f"with words at least {NEAREST:.0%} are nearest to their own layer, and {TIMES:g} times as many as without",
        holds=with_words >= max(NEAREST, TIMES * without),
        found=f"{with_words:.1%} against {without:.1%}",
    )
    before, after = (answers[name]["own nearest, both of a picture"] for name in names)
    report.bar(
        "both layers of one concept keep their looks more often with words",
        holds=after.low > before.mean,
        found=f"{after} against {before}",
    )
    report.say()


async def structured(bench: Bench, report: Report, cases: Sequence[Scene]) -> None:
    """Whether structure draws the edges of the layers that have it, and leaves the others alone.

    Every collage is drawn without, and twice with structure on every second layer, with emphasis and without: each
    layer is once one that has it and once one beside those.
    """
    report.say(f"## Structure at noise {FREE:g}: on every second layer, {len(cases)} collages\n")
    plain = Dials(noise=FREE, control=None)
    rows, times, moved = [], {}, {}
    for emphasis in (0.0, EMPHASIS):
        for where, pairs_N2 in (await _halves(bench, cases, plain, emphasis)).items():
            without, with_it = pairs_N2.T
            name = f"{where}, emphasis {emphasis:g}"
            times[name] = Interval.of(pairs_N2.T, lambda x: float(x[1].mean() / x[0].mean()))
            moved[name] = Interval.of(with_it - without)
            cells = (Interval.of(without), Interval.of(with_it), times[name], moved[name])
            rows.append([name, *map(str, cells)])
    report.table(["edges", "without", "with", "times", "difference, paired"], rows)
    *_, inside, beside = times
    report.bar(
        f"edges agree at least {SHARPER:g} times as well in {inside}",
        holds=times[inside].mean >= SHARPER,
        found=f"{times[inside].mean:.2f}",
    )
    report.bar(
        f"edges in {beside} stay as they are",
        holds=moved[beside].low <= 0 <= moved[beside].high,
        found=f"{moved[beside]}",
    )
    report.say()


async def _halves(
    bench: Bench, cases: Sequence[Scene], plain: Dials, emphasis: float
) -> dict[str, Values]:
    """How well edges agree without structure and with it, [collage, 2], in layers that have it and in those beside."""
    turns = [replace(plain, structure=STRUCTURE, emphasis=emphasis, only=turn) for turn in (0, 1)]
    found: dict[str, list[Values]] = {"layers with structure": [], "layers beside them": []}
    for scene in cases:
        without_L, *with_TL = [
            np.asarray(layer_edges(await bench.drawn(scene, dials))) for dials in (plain, *turns)
        ]
        for name, is_inside in zip(found, (True, False), strict=True):
            counted_TL = [
                ~np.isnan(without_L)
                & np.asarray([turn.is_structured(k) == is_inside for k in range(len(without_L))])
                for turn in turns
            ]
            pairs_2N = np.concatenate(
                [
                    [without_L[counted_L], with_L[counted_L]]
                    for with_L, counted_L in zip(with_TL, counted_TL, strict=True)
                ],
                axis=1,
            )
            found[name].append(pairs_2N.mean(axis=1) if pairs_2N.size else np.full(2, math.nan))
    return {name: np.asarray(values) for name, values in found.items()}


def draw_curves(curves: Mapping[str, Values], dial: Sequence[float], path: Path) -> None:
    """The figure: a point a noise value, its interval in both directions."""
    width, height, left, top, right, bottom = 1200, 800, 110, 40, 40, 100
    ink, colours = (
        (40, 40, 40),
        {"composite": (120, 120, 120), "SDEdit": (200, 90, 40), "full control": (30, 90, 200)},
    )
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(22)

    def at(harmonious: float, fidelity: float) -> tuple[float, float]:
        x = left + (width - left - right) * harmonious
        return x, height - bottom - (height - top - bottom) * fidelity

    for tick in np.linspace(0, 1, 11):
        draw.line([at(tick, 0), at(tick, 1)], fill=(230, 230, 230))
        draw.line([at(0, tick), at(1, tick)], fill=(230, 230, 230))
        if round(tick * 10) % 2 == 0:
            draw.text((at(tick, 0)[0], height - bottom + 12), f"{tick:.1f}", ink, font, anchor="ma")
            draw.text((left - 12, at(0, tick)[1]), f"{tick:.1f}", ink, font, anchor="rm")
    draw.text(
        (width / 2, height - 20),
        "harmony: one look, shadows, borders that sit",
        ink,
        font,
        anchor="md",
    )
    draw.text((left, 6), "fidelity: right object, own rendering, own edges", ink, font)
    for row, (name, values) in enumerate(curves.items()):
        points = []
        for index, (fidelity, harmonious) in enumerate(values):
            f, h = Interval.of(fidelity), Interval.of(harmonious)
            draw.line([at(h.low, f.mean), at(h.high, f.mean)], fill=colours[name], width=1)
            draw.line([at(h.mean, f.low), at(h.mean, f.high)], fill=colours[name], width=1)
            x, y = at(h.mean, f.mean)
            draw.ellipse((x - 6, y - 6, x + 6, y + 6), fill=colours[name])
            label = "" if name == "composite" else f"{dial[index]:g}"
            draw.text((x + 10, y - 12), label, colours[name], font, anchor="lb")
            points.append((x, y))
        if len(points) > 1:
            draw.line(points, fill=colours[name], width=3)
        draw.text((width - right - 10, top + 10 + 30 * row), name, colours[name], font, anchor="ra")
    sheet.save(path, optimize=True)


def draw_sheet(bench: Bench, cases: Sequence[Scene], rungs: Sequence[Rung], path: Path) -> None:
    """A column a collage, a row a rung."""
    dials = [rung.dials for rung in rungs if isinstance(rung.dials, Dials)]
    rows = [
        np.concatenate([bench.pictures[scene, each].picture_HWC for scene in cases], axis=1)
        for each in dials
    ]
    Image.fromarray(np.concatenate(rows)).save(path)


async def timed(work: Awaitable[T], name: str) -> T:
    began_s = time.monotonic()
    result = await work
    note(f"{name}: {time.monotonic() - began_s:.0f} s")
    return result


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--collages", type=int, default=40)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--words", type=int, default=40, help="learn words for so many of the rungs' cut-outs"
    )
    parser.add_argument(
        "--quick", action="store_true", help="4 collages and pairs, 16 words, 2 noise values"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("out/ladder"), help="words and pictures are kept here"
    )
    parser.add_argument("--threads", type=int, default=0, help="of one operation, 0 for one a core")
    args = parser.parse_args()
    count, limit, dial = args.collages, args.words, DIAL
    both = [scene for seed in PAIRS_SEEDS for scene in pairs(seed)]
    if args.quick:
        count, limit, dial, both = 4, 8, (0.5, 0.8), both[:4]
    began_s = time.monotonic()
    judge = judging.load()
    report = Report()
    report.say("# The ladder\n")
    async with serving(args.data, threads=args.threads) as service:
        words, reason = await learned(service, pool()[:limit])
        twins = list(dict.fromkeys(piece.cutout for scene in both for piece in scene.pieces))
        words_of_twins, reason_of_twins = await learned(service, twins if words else [])
        kinds = service.model.control_kinds
        rungs = ladder(words, reason or "no words were asked for", kinds)
        stages = TorchStages(load(BUNDLED, dtype=torch.float32, device=torch.device("cpu")))
        bench = Bench(service, judge, stages, args.steps)
        cases = scenes(count)
        full = rungs[-1].dials
        assert isinstance(full, Dials)
        report.say(
            f"Written by `python -m benchmarks.ladder`: {count} collages, {args.steps} steps, noise {UNIFORM:g} where "
            f"there is one for all, {len(words | words_of_twins)} learned words, weights {service.model.digest[:12]}. "
            "What is measured is told in `benchmarks/measures.py`, who judges in `benchmarks/judge.py`. Means with "
            "95 % bootstrap intervals over collages.\n"
        )
        for lacking in filter(None, (reason, reason_of_twins)):
            report.bar("every word that was asked for is learned", holds=False, found=lacking)
        report.say("## The judge on pictures it never saw\n")
        report.table(
            ["", "share right"],
            [[name, f"{value:.3f}"] for name, value in judging.report(judge).items()],
        )
        report.say("## The rungs\n")
        await climb(bench, report, cases, rungs)
        curves = await sweep(bench, report, cases, full, dial)
        structure = STRUCTURE if STRUCTURE in kinds else ""
        await resemble(bench, report, both, words_of_twins, structure)
        if structure:
            await timed(structured(bench, report, scenes(MORE * count)), "structure")
        kept, changed = await timed(bench.redone(cases, full), "redo")
        report.say("## Redo\n")
        report.bar(
            "outside the redone layer every pixel keeps its bytes",
            holds=bool((kept == 1).all()),
            found=f"{kept.mean():.4%} kept, {changed.mean():.1%} of the pixels inside changed",
        )
    folder = args.data if args.quick else DOCS
    draw_curves(curves, dial, folder / "ladder.png")
    draw_sheet(bench, cases, rungs, args.data / "sheet.png")
    (folder / "ladder.md").write_text("\n".join(report.lines).rstrip() + "\n")
    note(f"{time.monotonic() - began_s:.0f} s in all; sheet in {args.data / 'sheet.png'}")
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
