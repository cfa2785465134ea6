"""Conversations on the standard library."""

import ast

import pytest

from nemo_speculative.config.schema import DataConfig
from nemo_speculative.data import stdlib
from nemo_speculative.data.conversations import ConversationList, Split, TokenRow, shuffled
from nemo_speculative.data.stdlib import load_stdlib, stdlib_conversations


@pytest.fixture(scope="module")
def sides():
    return stdlib_conversations(held_out=False), stdlib_conversations(held_out=True)


def top_level(conversation) -> str:
    return conversation.id.split(".")[0]


def test_held_out_modules_are_disjoint_from_those_trained_on(sides):
    training, held_out = ({top_level(c) for c in side} for side in sides)
    assert training
    assert held_out
    assert not training & held_out


def test_both_sides_are_of_a_useful_size(sides):
    training, held_out = map(len, sides)
    assert training > 5000
    assert 0.02 < held_out / (training + held_out) < 0.3


def test_ids_are_unique_over_both_sides(sides):
    ids = [c.id for side in sides for c in side]
    assert len(set(ids)) == len(ids)


def test_the_same_again(sides):
    assert stdlib_conversations(held_out=True) == sides[1]


def test_every_conversation_is_a_question_and_an_answer_that_opens_with_the_name(sides):
    for conversation in sides[1]:
        assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
        assert all(m["content"].strip() for m in conversation.messages)
        name = conversation.id.rsplit("/", 1)[0]
        assert conversation.messages[1]["content"].startswith(f"{name} is a ")


def test_nothing_is_private_or_from_a_test_package(sides):
    for side in sides:
        for conversation in side:
            parts = conversation.id.rsplit("/", 1)[0].split(".")
            assert not any(part.startswith("_") for part in parts), conversation.id
            assert parts[0] not in ("test", "idlelib", "site-packages")


MODULE = '''
class Cup(Base, meta.Other):
    """A cup. It holds tea."""

    def fill(self, tea: str = "green", *, hot=True) -> None:
        """Fills it.

        To the brim.
        """
        self.tea = tea

    def _secret(self):
        """Not shown."""

    def undocumented(self):
        pass

async def brew(leaves):
    """Brews. Slowly. With care."""
'''


@pytest.fixture
def questions() -> dict[str, tuple[str, str]]:
    """Question and answer by id."""
    found = stdlib._conversations_in(ast.parse(MODULE), "kitchen", "kitchen", MODULE.splitlines())
    return {c.id: tuple(m["content"] for m in c.messages) for c in found}


def test_what_is_documented_and_public_is_found(questions):
    assert list(dict.fromkeys(name.split("/")[0] for name in questions)) == [
        "kitchen.Cup", "kitchen.Cup.fill", "kitchen.brew"
    ]  # fmt: skip
    assert questions["kitchen.Cup/source"][0] == "Show me the source of Cup in kitchen.\nclass Cup(Base, meta.Other):"
    question, answer = questions["kitchen.Cup.fill/source"]
    assert question.endswith("\ndef fill(self, tea: str='green', *, hot=True):")
    assert "This is its source:\ndef fill(self" in answer and "\n    self.tea = tea" in answer


def test_what_is_asked_about_a_function(questions):
    kinds = [name.split("/")[1] for name in questions if name.startswith("kitchen.brew/")]
    assert kinds == ["doc", "brief", "signature", "source"]
    assert questions["kitchen.brew/brief"] == (
        "In one sentence, what is kitchen.brew for?",
        "kitchen.brew is a function of the module kitchen. In one sentence: Brews.",
    )
    assert questions["kitchen.brew/signature"][1].endswith("It is called with these parameters:\ndef brew(leaves):")


def test_a_class_has_no_parameters_to_ask_for(questions):
    kinds = [name.split("/")[1] for name in questions if name.startswith("kitchen.Cup/")]
    assert kinds == ["doc", "brief", "source"]


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("short", 10, "short"),
        ("two words", 6, "two"),
        ("a\nbc d", 3, "a"),
        ("unbroken", 3, "u"),
        ("ab cd ", 6, "ab cd "),
    ],
)
def test_a_long_text_is_cut_at_a_word_or_a_line(text, limit, expected):
    assert stdlib._cut(text, limit) == expected


def test_the_standard_library_source_shuffles_and_limits(monkeypatch):
    sides = {
        held_out: [TokenRow(f"{name}{n}", [n], [True], "here") for n in range(count)]
        for held_out, name, count in ((False, "t", 50), (True, "h", 20))
    }
    monkeypatch.setattr(stdlib, "stdlib_conversations", lambda held_out: sides[held_out])
    split = load_stdlib(DataConfig(path=None, max_conversations=30), seed=1)
    assert isinstance(split, Split)
    assert len({row.id for row in split.training}) == 30
    assert [row.id for row in split.training] == [row.id for row in shuffled(ConversationList(sides[False]), 1)][:30]
    assert sorted(row.id for row in split.held_out) == sorted(row.id for row in sides[True])
