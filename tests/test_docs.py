"""The pages of docs/: glossary, examples, flags and links. As a script it writes the glossary anew."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from measure.quantities import QUANTITIES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))
GLOSSARY = re.compile(r"(<!-- glossary: ([\w ]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


# What a notebook is to us: streams that are no files, a backend of its own, %run, and a process that goes on.
NOTEBOOK = """
import runpy, sys, types
sys.stdout = sys.stderr = types.SimpleNamespace(write=sys.stdout.write, flush=sys.stdout.flush)
{program}
for command in ("figures.py runs --out out", "main.py --lr=0"):
    program, *sys.argv[1:] = command.split()
    try:
        runpy.run_path(f"{root}/{{program}}", run_name="__main__")
    except SystemExit as end:
        print(end.code, end=", ")
import matplotlib
print(matplotlib.get_backend())
"""


def glossary(groups):
    """The table of the numbers of these groups, as Markdown."""
    lines = ["| name | symbol | unit | meaning | source |", "|---|---|---|---|---|"]
    for group in groups:
        lines.append(f"| **{group}** | | | | |")
        for q in (q for q in QUANTITIES.values() if q.group == group):
            cells = f"`{q.name}`{' ±' if q.has_se else ''}", q.symbol, q.unit, q.meaning, q.source
            lines.append("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|")
    return "\n".join(lines) + "\n"


def with_glossary(text):
    """A page with its glossary written anew."""
    return GLOSSARY.sub(lambda found: found[1] + glossary(found[2].split()) + found[3], text)


def blocks(page, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def test_the_glossary_is_that_of_quantities_py():
    pages, groups = [page.read_text() for page in PAGES], {q.group for q in QUANTITIES.values()}
    assert [with_glossary(text) for text in pages] == pages, "run: PYTHONPATH=. python tests/test_docs.py"
    assert {group for text in pages for found in GLOSSARY.findall(text) for group in found[1].split()} == groups


def test_the_example_of_measuring_runs(capsys):
    names = {}
    for block in blocks("measuring.md", "python"):
        exec(block, names)
    assert len(capsys.readouterr().out.split()) == 9
    gradient = names["objective"].full_gradient(names["chunks"], 1000)  # of the last block's loss, with weight decay
    for p, g, without in zip(names["model"].parameters(), gradient, names["full"], strict=True):
        assert (g - without - 5e-4 * p).abs().max() < 1e-6


def test_the_example_of_reading_records_runs_outside_of_the_repository(tmp_path):
    (program,) = blocks("record.md", "python")
    for said, meant in (("/path/to/this/repository", ROOT), ("/path/to/runs", ROOT / "results" / "runs")):
        assert said in program
        program = program.replace(said, str(meant))
    env = os.environ | {"MPLBACKEND": "module://nowhere"}
    shutil.copytree(next((ROOT / "results" / "runs").iterdir()), tmp_path / "runs" / "r")
    (tmp_path / "nowhere.py").write_text("from matplotlib.backends.backend_agg import *\n")
    done = subprocess.run([sys.executable, "-c", NOTEBOOK.format(program=program, root=ROOT)], cwd=tmp_path, env=env,
                          capture_output=True, text=True)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "") and "left out" not in done.stdout, done
    assert "written: out/page.md" in done.stdout and done.stdout.endswith("module://nowhere\n")
    assert "0, error: argument --lr: got '0'" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        heads = re.findall(r"^#+ (.*)", target.read_text(), flags=re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_exists(page):
    files = [ROOT / "arguments.py", ROOT / "figures.py", ROOT / "bench.py", *ROOT.glob("scripts/*.py")]
    known = set(re.findall(r'"--(\w+)"', " ".join(path.read_text() for path in files)))
    known |= {f"{flag}s" for flag in known}  # the lists of a sweep
    known |= {"array", "time", "lr_decay", "weight_decay", "cpus"}  # of sbatch; of the recipes
    assert set(re.findall(r"(?<![\w-])--(\w+)", page.read_text())) <= known


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_glossary(path.read_text()))
