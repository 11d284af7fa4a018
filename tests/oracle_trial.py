"""The embedded oracle beside real ones, on articles that do not ship: `python tests/oracle_trial.py FOLDER`.

FOLDER holds scored articles, `<filter>.jsonl`, and where the same articles were scored again, rows of id, oracle and
dimensions, `<filter>_relabelled.jsonl`. The embedded oracle gets the samples that ship as examples, or 100 of the
articles where none ship, and is judged by up to 1,000 others, none a near-duplicate of an example. Printed are rank
correlations (Spearman), beside what the articles' length alone would give, and how far the real oracles agree.
"""
import argparse
import random
import sys
import tempfile
from pathlib import Path

import numpy as np
from leximl.calibration import labeller_agreement
from leximl.core import DataError, Quarantine, read_jsonl, write_jsonl
from leximl.data import article_text, duplicate_families, read_scored_articles, sample_file
from leximl.filters import find_filter, read_filter
from leximl.metrics import spearman
from leximl.oracles import EmbeddedOracle

EXAMPLES, JUDGED, RESAMPLES = 100, 1000, 1000


def scored(path: Path, filter: str) -> list[dict]:
    "The scored articles of a file that can be used."
    names = list(read_filter(filter).definition.dimensions)
    return read_scored_articles([path], f"{filter}_analysis", names, Quarantine())


def split(filter: str, path: Path, folder: Path) -> tuple[Path | str, list[dict], int]:
    "Examples, the articles to judge by, and how many examples there are."
    rows = scored(path, filter)
    random.Random(0).shuffle(rows)
    try: known, examples = scored(sample_file(filter), filter), ""
    except DataError:
        known, rows, examples = rows[:EXAMPLES], rows[EXAMPLES:], folder/"examples.jsonl"
        raw = {str(row["id"]): row for _, row in read_jsonl(path, Quarantine()) if "id" in row}
        write_jsonl(examples, [raw[row["id"]] for row in known])
    families = duplicate_families([article_text(row) for row in [*known, *rows]])
    taken = set(families[:len(known)])
    fresh = [row for row, family in zip(rows, families[len(known):]) if family not in taken]
    return examples, fresh[:JUDGED], len(known)


def correlations(predicted: np.ndarray, true: np.ndarray) -> list[float]:
    "Spearman of each dimension [K]; a constant one counts as 0."
    return [spearman(predicted[:, k], true[:, k]) or 0.0 for k in range(true.shape[1])]


def judge(filter: str, path: Path, folder: Path) -> None:
    "Print the embedded oracle's rank correlations for one filter."
    examples, rows, known = split(filter, path, folder)
    true = np.array([row["labels"] for row in rows])
    answers = EmbeddedOracle(read_filter(filter), examples).score(rows)
    predicted = np.array([list(answer.dimensions.values()) for answer in answers])
    length = np.tile([[len(row["content"].split())] for row in rows], true.shape[1])
    found, draw = correlations(predicted, true), np.random.default_rng(0)
    resampled = [np.mean(correlations(predicted[part], true[part]))
                 for part in (draw.integers(0, len(rows), len(rows)) for _ in range(RESAMPLES))]
    low, high = np.percentile(resampled, [2.5, 97.5])
    print(f"{filter}: {known} examples, {len(rows)} judged: {np.mean(found):.3f} ({low:.3f} to {high:.3f}); length "
          f"alone {np.mean(correlations(length, true)):.3f}; error {abs(predicted - true).mean():.2f}, of a constant "
          f"{abs(np.median(true, axis=0) - true).mean():.2f}", flush=True)
    for name, value in zip(answers[0].dimensions, found): print(f"  {name:28}{value:6.2f}")


def agree(path: Path) -> None:
    "Print how far the oracles of a file agree."
    found = labeller_agreement(row for _, row in read_jsonl(path))
    print(f"{path.stem}: {found['articles']} articles, {found['n']} pairs of labels, MAE {found['mae']}")
    for name, one in found["dimensions"].items():
        print(f"  {name:28}{one['mae']!s:24} Pearson {one['pearson']:.2f}  Spearman {one['spearman']:.2f}  "
              f"kappa {one['kappa']:.2f}")


def main() -> int:
    "Judge every filter that the folder has articles for."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    paths = [path for path in sorted(folder.glob("*.jsonl")) if not path.stem.endswith("_relabelled")]
    if not paths: print(f"skipped: {folder} holds no scored articles")
    for path in paths:
        find_filter(path.stem)
        with tempfile.TemporaryDirectory() as place: judge(path.stem, path, Path(place))
        if (again := path.with_name(f"{path.stem}_relabelled.jsonl")).exists(): agree(again)
    return 0


if __name__ == "__main__":
    sys.exit(main())
