"""From recorded runs to the paper's tables and figures, beside the published numbers: figures.py RUNS_DIR --out DIR.

Reads the run records only (never wandb) and trusts none of them: whatever is damaged is named and left out.
Runs of different data set or network never share a figure, those of different lr or β only the comparison of all
settings; SGD, which has no β, joins every β.
"""

import argparse
from pathlib import Path

import matplotlib

from converters import number
from files import replacing
from messages import usable_streams
from report import comparison_page, page, records
from report.groups import groups


def build_parser():
    """Return the parser. Its errors are one line, as main.py's, and exit status 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("runs_dir", metavar="RUNS_DIR", type=Path, help="run records, at any depth below it")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("figures"), help="default: figures")
    eps = number(float, "a number > 0", lambda value: value > 0)
    text = "these ε instead of the recorded ones, from the gradient histories"
    parser.add_argument("--eps", metavar="EPS", type=eps, nargs="+", help=text)
    return parser


def main(argv=None):
    """Read RUNS_DIR, write DIR. Exit status 2, and nothing written, for a bad argument or no usable run."""
    usable_streams()
    matplotlib.use("Agg")
    parser = build_parser()
    args = parser.parse_args(argv)
    given = f"argument RUNS_DIR: got {str(args.runs_dir)!r}, allowed is a directory with at least one usable run"
    if not args.runs_dir.is_dir():
        parser.error(f"{given}; this is no directory")
    runs, damaged = records.read(args.runs_dir)
    if runs.empty:
        parser.error("; ".join([given, *(f"{name}: {reason}" for name, reason in list(damaged.items())[:3])]))
    if args.eps:
        runs, unable = records.with_eps(runs, args.eps)
        damaged |= unable
    for eps in args.eps or []:
        if not any(eps in known for known in runs["to_eps"]):
            allowed = "what a critical run recorded, or holds in a sound gradient_norms.f32"
            parser.error(f"argument --eps: got {eps:g}, allowed is {allowed}")
    lines = [f"left out: {name}: {reason}" for name, reason in damaged.items()]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        text = page.METHOD + "".join(page.write(group, args.out) for group in groups(runs))
        text += comparison_page.write_all(runs, args.out)
        text += "\n## what could not be read\n\n" + page.bullets(lines)
        with replacing(args.out / "report.md") as file:
            file.write(text.encode())
    except OSError as error:
        parser.error(f"argument --out: got {str(args.out)!r}, allowed is a directory to write in ({error.strerror})")
    print(*lines, f"written: {args.out / 'report.md'}", sep="\n")


if __name__ == "__main__":
    main()
