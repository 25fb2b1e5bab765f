"""How often a finding is false, and how often the interval and the list of best layers hold the truth.

python tests/benchmarks/findings.py [--simulations 2000] [--samples 2000] [--layers 12] [--shares 0 .5 .9 .999]
    [--part findings compare best]

Losses are made of a normal variable of each sample, shared by all layers and moments, and one of their own, so that the
share of the first tells how alike layers are. What is counted is false in its world: layers do not differ, or differ by
exactly one point where an absence would be claimed. Half an hour.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_probes.report.findings import Finding, Kind, find
from lightning_probes.report.outcomes import Outcomes
from lightning_probes.report.paired import best_layers, compare_losses
from lightning_probes.tasks.intervals import NORMAL, wilson_interval
from lightning_probes.tasks.kinds import words_of

MOMENTS = 5
SHARES = (0.0, 0.5, 0.9, 0.999)
"""How much of a loss layers share; the most of it lets equivalence within a point be seen on few samples."""

TESTED = (Kind.BYPASS, Kind.BASELINE, Kind.WORSE, Kind.BEST, Kind.EXIT, Kind.NOTHING, Kind.FRONT, Kind.START)


def losses_of(errors: Tensor, samples: int, share: float, is_binary: bool, generator: torch.Generator) -> Tensor:
    """Losses ``(*errors.shape, samples)`` whose means are ``errors``: answers, or numbers with a long tail."""
    common = torch.randn(samples, generator=generator)
    own = torch.randn(*errors.shape, samples, generator=generator)
    normal = math.sqrt(share) * common + math.sqrt(1 - share) * own
    if is_binary:
        limits: Tensor = torch.special.ndtri(errors.double())
        return (normal < limits[..., None]).float()
    return errors[..., None].float() * (0.7 * normal - 0.7**2 / 2).exp()


class World(NamedTuple):
    """What is true: errors of the baseline and of layers, at the start and from then on; and what is false to say."""

    title: str
    baseline: float
    start: Callable[[int], Tensor]
    now: Callable[[int], Tensor]
    is_false: Callable[[Finding], bool]


def is_difference(finding: Finding) -> bool:
    """Whether a finding claims that something differs."""
    return finding.kind in (Kind.BYPASS, Kind.WORSE, Kind.FRONT) or (
        finding.kind is Kind.BEST and finding.p is not None
    )


def apart(layers: int, value: float, first: float | None = None, last: float | None = None) -> Tensor:
    """Errors that are equal, but perhaps for the first and the last layer."""
    errors = torch.full((layers,), value)
    errors[0], errors[-1] = (value if x is None else x for x in (first, last))
    return errors


WORLDS = [
    World(
        "no difference",
        0.9,
        lambda k: apart(k, 0.3),
        lambda k: apart(k, 0.3),
        lambda finding: is_difference(finding) or finding.kind is Kind.BASELINE,
    ),
    World(
        "no difference, at the front's level",
        0.9,
        lambda k: apart(k, 0.6, first=0.3),
        lambda k: apart(k, 0.6, first=0.3),
        lambda finding: finding.kind in (Kind.BYPASS, Kind.WORSE, Kind.FRONT, Kind.BASELINE),
    ),
    World(
        "absences wrong by a point",
        0.51,
        lambda k: apart(k, 0.51, last=0.5),
        lambda k: apart(k, 0.5, last=0.49),
        lambda finding: finding.kind in (Kind.BASELINE, Kind.EXIT, Kind.START, Kind.WORSE, Kind.BYPASS),
    ),
    World(
        "a span that gains a point",
        0.9,
        lambda k: apart(k, 0.5),
        lambda k: apart(k, 0.49, first=0.5, last=0.45),
        lambda finding: finding.kind is Kind.EXIT or (finding.kind is Kind.NOTHING and "layer 1" in finding.layers),
    ),
]


def row(layer: int, losses: Tensor, weights: Tensor, is_binary: bool) -> dict[str, Any]:
    """A row of a report, with the interval of its error."""
    total = float(weights.sum())
    error = float(losses @ weights) / total
    if is_binary:
        low, high = wilson_interval(error * total, total)
    else:
        half = NORMAL * float(((losses - error) * weights).square().sum().sqrt()) / total
        low, high = error - half, error + half
    about = {"layer": f"layer {layer}", "depth": layer, "features": 8, "samples": len(losses)}
    return {**about, "value": error, "low": low, "high": high, "fitted_on": {"data": "train", "samples": 1000}}


def world_of(
    world: World, samples: int, layers: int, share: float, is_binary: bool, generator: torch.Generator
) -> dict[str, Any]:
    """The arguments of ``find`` in one sample of a world."""
    errors = torch.stack([world.start(layers), *[world.now(layers)] * (MOMENTS - 1), apart(layers, world.baseline)])
    losses = losses_of(errors, samples, share, is_binary, generator)
    answers = torch.randint(1, 6, (samples,), generator=generator).float()
    weights = torch.ones(samples) if is_binary else answers
    names = tuple(f"layer {i}" for i in range(layers))
    start, now = (Outcomes(names, losses[i], weights, is_binary, constant=losses[-1, 0]) for i in (0, MOMENTS - 1))
    curves = {
        (i, 10 * i): {name: row(j, losses[i, j], weights, is_binary) for j, name in enumerate(names)}
        for i in range(MOMENTS)
    }
    return {"curves": curves, "now": now, "start": start, "baseline": world.baseline}


def false_findings(
    world: World, simulations: int, samples: int, layers: int, share: float, is_binary: bool, seed: int = 0
) -> dict[str, Counter[str]]:
    """How often a finding of each kind is false, and any, with what each sample got and without."""
    generator = torch.Generator().manual_seed(seed)
    words = words_of("classification")
    counts: dict[str, Counter[str]] = {"paired": Counter(), "no constant": Counter(), "unpaired": Counter()}
    for _ in range(simulations):
        known = world_of(world, samples, layers, share, is_binary, generator)
        less = {
            "paired": known,
            "no constant": known | {"now": replace(known["now"], constant=None)},
            "unpaired": known | {"now": None, "start": None},
        }
        for name, given in less.items():
            false = {finding.kind.value for finding in find(words=words, **given) if world.is_false(finding)}
            counts[name].update([*false, *(["any"] if false else [])])
    return counts


def show_findings(args: argparse.Namespace) -> None:
    """Print how often findings are false."""
    kinds = [kind.value for kind in TESTED]
    print(f"false positives, % of {args.simulations:,} simulations of {args.samples:,} samples, {args.layers} layers")
    print(f"{'':<70}" + "".join(f"{kind:>10}" for kind in [*kinds, "any"]))
    most = 0.0
    for world in WORLDS:
        for is_binary in (True, False):
            for share in args.shares:
                found = false_findings(world, args.simulations, args.samples, args.layers, share, is_binary)
                for how, counts in found.items():
                    title = f"{world.title}, {'answers' if is_binary else 'numbers'}, shared {share}, {how}"
                    rates = [100 * counts[kind] / args.simulations for kind in [*kinds, "any"]]
                    most = max(most, rates[-1])
                    print(f"{title:<70}" + "".join(f"{rate:>10.2f}" for rate in rates), flush=True)
    print(f"the most of all: {most:.2f} % (at most 6)")


def coverage_of_answers(
    only: tuple[float, float], samples: int, simulations: int, seed: int = 0
) -> tuple[float, float, float]:
    """How often the interval holds the difference; the same where 20 samples are discordant, and how often they are."""
    generator = torch.Generator().manual_seed(seed)
    held, held_there, there = 0, 0, 0
    for _ in range(simulations):
        drawn = torch.rand(samples, generator=generator)
        first, second = drawn < only[0], (drawn >= only[0]) & (drawn < sum(only))
        found = compare_losses(first.float(), second.float(), torch.ones(samples), True)
        holds, is_many = found.low <= only[0] - only[1] <= found.high, (found.discordant or 0) >= 20
        held, held_there, there = held + holds, held_there + (holds and is_many), there + is_many
    return held / simulations, held_there / max(there, 1), there / simulations


def coverage_of_numbers(samples: int, share: float, gap: float, simulations: int, seed: int = 0) -> float:
    """How often the interval of the bootstrap holds the difference."""
    generator = torch.Generator().manual_seed(seed)
    held = 0
    for _ in range(simulations):
        losses = losses_of(torch.tensor([0.5 + gap, 0.5]), samples, share, False, generator)
        weights = torch.randint(1, 6, (samples,), generator=generator).float()
        found = compare_losses(losses[0], losses[1], weights, False)
        held += found.low <= gap <= found.high
    return held / simulations


def show_coverage(args: argparse.Namespace) -> None:
    """Print how often intervals hold the difference."""
    print(f"\nintervals, % of {args.simulations:,} simulations that hold the difference (93 to 98)")
    for samples in (200, 1_000, 10_000):
        for expected in (2, 5, 10, 20, 50, 200):
            for part in (0.5, 0.7, 0.9):
                discordant = expected / samples
                if discordant > 0.5:
                    continue
                only = (discordant * part, discordant * (1 - part))
                held, there, often = coverage_of_answers(only, samples, args.simulations)
                seen = f", {100 * there:.1f} where 20 are ({100 * often:.0f} % of them)" if often > 0.05 else ""
                print(
                    f"{samples:,} answers, {expected} discordant, {part:.0%} of them one way: {100 * held:.1f}{seen}",
                    flush=True,
                )
    for samples in (50, 200, 500):
        for share in (0.0, 0.9):
            for gap in (0.0, 0.1):
                held = coverage_of_numbers(samples, share, gap, args.simulations)
                print(f"{samples:,} numbers, shared {share}, {gap} apart: {100 * held:.1f}", flush=True)


def coverage_of_best(
    errors: Tensor, samples: int, share: float, is_binary: bool, simulations: int, seed: int = 0
) -> tuple[float, float]:
    """How often the list of best layers holds the first, and how long it is."""
    generator = torch.Generator().manual_seed(seed)
    names = tuple(map(str, range(len(errors))))
    held, length = 0, 0
    for _ in range(simulations):
        losses = losses_of(errors, samples, share, is_binary, generator)
        listed = best_layers(Outcomes(names, losses, torch.ones(samples), is_binary))
        held, length = held + ("0" in listed), length + len(listed)
    return held / simulations, length / simulations


def show_best(args: argparse.Namespace) -> None:
    """Print how often the list of best layers holds the truly best."""
    print(
        f"\nbest layers, % of {args.simulations:,} simulations whose list holds the best (at least 95); how many it has"
    )
    for layers in (2, 5, 20, 50):
        for is_binary in (True, False):
            for share in (0.0, 0.5, 0.9):
                for gap in (0.0, 0.02):
                    errors = apart(layers, 0.3, first=0.3 - gap)
                    held, length = coverage_of_best(errors, 1_000, share, is_binary, args.simulations)
                    what = "answers" if is_binary else "numbers"
                    title = f"{layers} layers, {what}, shared {share}, best by {100 * gap:.0f} points"
                    print(f"{title:<60}{100 * held:>7.2f}{length:>7.1f}", flush=True)


PARTS = {"findings": show_findings, "compare": show_coverage, "best": show_best}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=2_000)
    parser.add_argument("--samples", type=int, default=2_000)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="how much of a loss layers share")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_args(argv)
    for part in args.part:
        PARTS[part](args)


if __name__ == "__main__":
    main()
