"""The list "EAGLE-3 in six files" of docs/architecture.md names what one loss and its gradient really execute."""

import re
import sys
from pathlib import Path

from tests.algorithms.cases import eagle3, lay_out, make_documents

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "nemo_speculative"
MOST_FILES, MOST_LINES = 6, 1400


def traced(function):
    """The files of the package whose functions ``function`` calls, in this thread."""
    files = set()

    def record(frame, event, _argument):
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE):
            files.add(str(file.relative_to(ROOT)))

    before = sys.getprofile()
    sys.setprofile(record)
    try:
        function()
    finally:
        sys.setprofile(before)
    return files


def listed():
    """The rows of the list: file and number of lines."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page.split("## EAGLE-3 in six files, in reading order\n")[1].split("\n## ")[0]
    return re.findall(r"^\d\. `([^`]+)` \((\d+) lines\)", section, re.MULTILINE)


def test_one_eagle3_loss_and_its_gradient_enter_the_listed_files():
    case = eagle3(draft_vocab=9)
    draft, objective = case.make_draft(), case.make_objective()
    batch, output = lay_out([make_documents([13, 9, 21])], 48)
    schedule = objective.schedule(batch)

    def step():
        # The backward pass of the CPU runs in the calling thread.
        objective.loss(draft, schedule, output, schedule.counts).loss.backward()

    files = traced(step)
    assert files == {f"nemo_speculative/algorithms/{name}" for name, _ in listed()}
    assert len(files) <= MOST_FILES
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) <= MOST_LINES


def test_the_listed_numbers_of_lines_are_true():
    for name, lines in listed():
        assert len((PACKAGE / "algorithms" / name).read_text().splitlines()) == int(lines), name
