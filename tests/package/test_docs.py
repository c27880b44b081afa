"""The documentation builds without a warning, and no page or link is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(tmp_path / "trees"), "-b", "html"]
    done = subprocess.run(
        [*command, "docs", str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):  # search.md would be Sphinx's own search page
        title = re.match(r"# (.+)", page.read_text(encoding="utf-8"))
        html = (tmp_path / "site" / page.with_suffix(".html").name).read_text(encoding="utf-8")
        assert title is None or f"<h1>{title[1]}<a" in html.replace("\u2019", "'"), page.name
    api = (tmp_path / "site/api.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in api for name in ("saeopt.load", "saeopt.train_run", "saeopt.saes.base.SAE.encode"))


def test_pages_are_called_by_their_titles() -> None:
    pages = sorted((ROOT / "docs").glob("*.md"))
    assert pages
    assert not [page.name for page in pages if re.search(r"\[`?[\w-]+\.md`?\]\(", page.read_text(encoding="utf-8"))]


def test_links_of_the_readme_lead_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text(encoding="utf-8"))
        assert not [link for link in links if not (ROOT / link).exists()], page


def test_the_comparison_quotes_the_measured_tables() -> None:
    """Means ± standard deviations per architecture and library stand in docs/recipes.md, whose rows name both."""
    recipes = (ROOT / "docs/recipes.md").read_text(encoding="utf-8").splitlines()
    measured = [line for line in recipes if "±" in line and ": CE" not in line]
    quality = (ROOT / "docs/comparison.md").read_text(encoding="utf-8").partition("## Speed")[0]
    rows = [line.strip("| ").split(" | ") for line in quality.splitlines() if "±" in line]
    assert len(rows) == 5
    for kind, *cells in rows:
        for library, cell in zip(("saeopt", "sae-lens", "dictionary_learning"), cells, strict=True):
            assert any(line.startswith(f"| {kind}, {library}") and f" {cell} " in line for line in measured), (
                kind,
                cell,
            )
