from nemo_speculative.utils.tables import markdown_table, text_table


def test_text_columns_are_aligned_without_trailing_spaces():
    rows = [("name", "1", "note"), ("", "234", ""), ("longer", "5", "x")]
    assert text_table(rows, "lrl").splitlines() == ["name      1  note", "        234", "longer    5  x"]
    assert text_table([], "ll") == ""


def test_a_markdown_table_is_aligned_as_text_too():
    assert markdown_table(("a", "number"), [("long cell", "1")]).splitlines() == [
        "| a         | number |",
        "| ---       | ---    |",
        "| long cell | 1      |",
    ]
