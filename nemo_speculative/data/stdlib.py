"""Conversations about Python's standard library, made of its docstrings, signatures and sources.

The built-in example (``model=tiny``) needs text that is on every machine, is the same on another machine with the same
Python, and in which the answer can be learned from the question.  Every answer therefore starts with the name in the
question, and many questions contain the ``def`` line that the answer builds on.
"""

import ast
import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from nemo_speculative.config.schema import DataConfig
from nemo_speculative.data.conversations import Conversation, ConversationList, Split, shuffled

SKIPPED_PACKAGES = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo", "pydoc_data"}
MAX_CHARS = 500
"""Most characters of a docstring or source in an answer."""


def _conversations_in(node: ast.AST, module: str, prefix: str, lines: list[str]) -> Iterator[Conversation]:
    """Conversations about the public documented classes and functions in ``node``, in their order in the file."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) or child.name.startswith("_"):
            continue
        name, doc = f"{prefix}.{child.name}", ast.get_docstring(child)
        if doc:
            source = "\n".join(line[child.col_offset :] for line in lines[child.lineno - 1 : child.end_lineno])
            yield from _conversations_about(name, module, _header(child), doc, source)
        if isinstance(child, ast.ClassDef):
            yield from _conversations_in(child, module, name, lines)


def _header(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    return f"def {node.name}({ast.unparse(node.args)}):"


def _cut(text: str, limit: int) -> str:
    """The first ``limit`` characters, ending at a line or a word."""
    if len(text) <= limit:
        return text
    head = text[:limit]
    return head[: max(head.rfind("\n"), head.rfind(" "), 1)].rstrip()


def _conversations_about(name: str, module: str, header: str, doc: str, source: str) -> Iterator[Conversation]:
    """The questions that the ``def`` or ``class`` of a ``header`` can answer, each a conversation of one turn."""
    doc = " ".join(_cut(doc, MAX_CHARS).split())
    first = doc.split(". ")[0].rstrip(".") + "."
    kind = "class" if header.startswith("class") else "function"
    turns = {
        "doc": (f"What does {name} do?", f"Its documentation says: {doc}"),
        "brief": (f"In one sentence, what is {name} for?", f"In one sentence: {first}"),
    }
    if kind == "function":
        known = f"{header}\n" if len(name) % 2 else ""
        question = f"{known}Which parameters does {name} take?"
        turns["signature"] = question, f"It is called with these parameters:\n{header}"
    if len(source) <= MAX_CHARS:
        question = f"Show me the source of {name.rsplit('.', 1)[-1]} in {module}.\n{header}"
        turns["source"] = question, f"This is its source:\n{source}"
    for turn, (question, answer) in turns.items():
        answer = f"{name} is a {kind} of the module {module}. {answer}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        yield Conversation(f"{name}/{turn}", messages, f"the standard library's {module}")


@functools.cache
def stdlib_conversations(held_out: bool) -> list[Conversation]:
    """All conversations of one side of the split, ordered by module, without repeated ids.

    The split is by top-level module, so that no held-out answer has a sibling in the training set.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    by_id: dict[str, Conversation] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        parts = module.split(".")
        if SKIPPED_PACKAGES & set(relative.parts) or any(part.startswith("_") for part in parts):
            continue
        if (hashlib.sha256(f"0:{parts[0]}".encode()).digest()[0] < 26) == held_out:
            text = path.read_text(encoding="utf-8", errors="ignore")
            by_id |= {c.id: c for c in _conversations_in(ast.parse(text), module, module, text.splitlines())}
    return list(by_id.values())


def load_stdlib(config: DataConfig, seed: int) -> Split:
    """Questions about Python's standard library, split by module."""
    training, held_out = (ConversationList(stdlib_conversations(held_out=side)) for side in (False, True))
    return Split(shuffled(training, seed)[: config.max_conversations], shuffled(held_out, seed))
