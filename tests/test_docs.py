"""What the documentation says is what the repository does."""

import re
from pathlib import Path

import pytest

from tools.configuration_reference import reference

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_configuration_reference_is_the_schema():
    """Mend with: python -m tools.configuration_reference > docs/configuration.md"""
    assert (ROOT / "docs" / "configuration.md").read_text() == reference()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_and_targets_that_are_named_exist(page):
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert target in targets, target
    for path in re.findall(r"`((?:recipes|conf|docs|tests|nemo_speculative|benchmarks)/[\w./]+)`", text):
        assert (ROOT / path.rstrip("/")).exists(), path


def test_ci_runs_the_readmes_own_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text() and "`make test`" in (ROOT / "README.md").read_text()
