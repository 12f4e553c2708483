"""The table at the end of scripts/quickstart.sh, from the CSV files of figures.py: quickstart.py FIGURES."""

import sys
from pathlib import Path

import pandas as pd


def over_b(table: pd.DataFrame, cell) -> str:
    """A line of text an optimizer, a column a batch size. cell: the text of one row."""
    sizes = sorted(table["b"].unique())
    lines = ["  b      " + "".join(f"{b:>9}" for b in sizes)]
    for label, rows in table.groupby("label", sort=False):
        cells = {row.b: cell(row) for row in rows.itertuples()}
        lines.append(f"  {label:7}" + "".join(f"{cells.get(b, '–'):>9}" for b in sizes))
    return "\n".join(lines)


def main(folder: Path) -> None:
    """Print the table."""
    accuracy, delta, stars = (
        pd.read_csv(next(folder.glob(f"*_{name}.csv"))) for name in ("accuracy", "delta", "critical_batch_size")
    )
    seeds = accuracy["seeds"].max()
    print("\nMNIST-1D (generated signals, not images), means over", seeds, "seeds.\n")
    print("Test accuracy (%) of an MLP when it fits its training data; * one that did not fit in 10,000 updates:")
    print(over_b(accuracy, lambda row: f"{row.accuracy_mean:.1f}{'*' if row.unfit else ' '}"))
    for label, rows in accuracy.groupby("label", sort=False):
        best = rows[rows["unfit"] == 0].nlargest(1, "accuracy_mean")
        for b, value in zip(best["b"], best["accuracy_mean"], strict=True):  # none, if none fits
            inside = "inside" if rows["b"].min() < b < rows["b"].max() else "at the edge of"
            print(f"  {label}: highest {value:.1f} % at b = {b}, {inside} the grid")
    delta = delta[delta["epoch"] > 0].assign(whole=lambda rows: rows["epoch"].astype(int))
    common = delta.groupby("whole").size()  # settings measured in each epoch
    shown = delta[delta["whole"] == common[common == common.max()].index.max()]
    print(f"\nDegree of smoothing δ in epoch {int(shown['epoch'].min()) + 1}, measured (and by the paper's formula):")
    print(over_b(shown, lambda row: f"{row.delta_mean:.2f} ({row.delta_formula:.1f})".rjust(11)))
    print("\nCritical batch size b* of softmax regression (fewest gradients until mean ‖g‖ is at most ε):")
    for row in stars.itertuples():
        inside = "" if row.inside else ", at the edge of what was reached"
        print(f"  {row.label:7} ε = {row.eps:g}: b* = {row.b_star}, {row.sfo:,.0f} gradients{inside}")
    print(f"\nFigures and all tables: {folder / 'page.md'}. What was measured on CIFAR-100: results/README.md.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
