"""The pages of docs/: glossary, examples, flags and links. As a script it writes the glossary anew."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from measure.quantities import QUANTITIES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(ROOT.glob("docs/*.md"))
GLOSSARY = re.compile(r"(<!-- glossary: ([\w ]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


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
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "left out" not in done.stdout, done


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
