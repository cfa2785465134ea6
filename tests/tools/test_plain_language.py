"""The check of words: what it reports, and what it leaves alone."""

import pytest

from tools.plain_language import main, problems


def reports(name, text):
    return list(problems(name, text))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("# the token behind it\n", "behind"),
        ('x = "stored beside the other"\n', "beside"),
        ('"""A rank that is told its position."""\n', "is told"),
        ("# so many tokens\n", "so many"),
        ("# nobody reads it\n", "nobody"),
        ("# tokenised rows\n", "tokenised"),
    ],
)
def test_a_word_of_the_list_is_reported_with_its_line(text, word):
    (report,) = reports("a.py", f"y = 1\n{text}")
    assert report.startswith(f"a.py:2: {word!r}: say ")


@pytest.mark.parametrize("opener", ["What", "Of", "Those", "Who"])
def test_a_docstring_that_names_no_thing_is_reported(opener):
    (report,) = reports("a.py", f'def f():\n    """{opener} of a batch."""\n')
    assert report.startswith("a.py:1: docstring opens with")


def test_code_and_quoted_names_are_left_alone():
    assert not reports("a.py", "behind = 1\nprint(behind)  # ``behind`` is a name\n")
    assert not reports("a.md", "The option `beside` and whatever follows.\n")


def test_markdown_is_read_as_a_whole():
    assert reports("a.md", "one\ntwo goes on\n")[0].startswith("a.md:2: 'goes on'")


def test_the_program_fails_where_a_file_has_such_a_word(tmp_path, capsys):
    (tmp_path / "a.py").write_text("# nobody\n")
    assert main([str(tmp_path / "a.py")]) == 1 and "nobody" in capsys.readouterr().out
    (tmp_path / "a.py").write_text("# no process\n")
    assert main([str(tmp_path / "a.py")]) == 0
