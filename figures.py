"""From recorded runs to tables and figures: python figures.py runs --out figures.

Writes page.md, a CSV a table and an image a figure to --out. Reads the records only, never wandb.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
from arguments import WHOLE
from report import page, records
from utils import Parser, UserError, as_command, one_of, path, replacing


def main(argv: list[str]) -> int:
    """Write the page. Returns the exit status. Raises UserError."""
    parser = Parser(prog="figures.py", description="From recorded runs to tables and figures.", allow_abbrev=False)
    add = parser.add_argument
    add("runs_dir", metavar="RUNS_DIR", type=path, help="run records, at any depth below it")
    add("--out", metavar="DIR", type=path, default=Path("figures"), help="default: figures")
    rule = "passes before the check for ε (default: as critical runs, or 11)"
    add("--min_epochs", metavar="N", type=WHOLE, help=rule)
    add("--format", **one_of("png", "pdf"), default="png", help="of the figures (default: png)")
    args = parser.parse_args(argv)
    runs = records.runs(args.runs_dir)
    if runs.empty:
        allowed = "a directory with at least one run that has ended"
        raise UserError(f"argument RUNS_DIR: got {str(args.runs_dir)!r}, allowed is {allowed}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        text = page.write(runs, args.out, args.format, args.min_epochs)
        with replacing(args.out / "page.md") as file:
            file.write(text.encode())
    except OSError as error:
        allowed = f"a directory to write in ({error})"
        raise UserError(f"argument --out: got {str(args.out)!r}, allowed is {allowed}") from error
    print(f"written: {args.out / 'page.md'}")
    return 0


if __name__ == "__main__":
    as_command(main)
