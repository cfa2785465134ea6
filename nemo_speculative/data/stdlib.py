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
from dataclasses import dataclass
from pathlib import Path

from nemo_speculative.config.schema import DataConfig
from nemo_speculative.data.conversations import Conversation, ConversationList, Split, shuffled

SKIPPED_PACKAGES = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "turtledemo", "pydoc_data"}
MAX_DOC_CHARS = 500
MAX_SOURCE_CHARS = 500


@dataclass(frozen=True)
class Definition:
    """A documented class or function of the standard library."""

    module: str
    name: str
    """Dotted, with its module: ``json.dumps``."""
    header: str
    """The ``def`` or ``class`` line."""
    doc: str
    source: str

    @property
    def top_level(self) -> str:
        return self.module.split(".")[0]


def definitions() -> Iterator[Definition]:
    """Every public documented definition, ordered by module and position in its file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_PACKAGES & set(relative.parts):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        if not any(part.startswith("_") for part in module.split(".")):
            text = path.read_text(encoding="utf-8", errors="ignore")
            yield from _definitions_in(ast.parse(text), module, module, text.splitlines())


def _definitions_in(node: ast.AST, module: str, prefix: str, lines: list[str]) -> Iterator[Definition]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) or child.name.startswith("_"):
            continue
        name, doc = f"{prefix}.{child.name}", ast.get_docstring(child)
        if doc:
            source = "\n".join(line[child.col_offset :] for line in lines[child.lineno - 1 : child.end_lineno])
            yield Definition(module, name, _header(child), doc, source)
        if isinstance(child, ast.ClassDef):
            yield from _definitions_in(child, module, name, lines)


def _header(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    return f"def {node.name}({ast.unparse(node.args)}):"


def is_held_out(definition: Definition) -> bool:
    """Splits by top-level module, so that no held-out answer has a sibling in the training set."""
    return hashlib.sha256(f"0:{definition.top_level}".encode()).digest()[0] < 26


def _cut(text: str, limit: int) -> str:
    """The first ``limit`` characters, ending at a line or a word."""
    if len(text) <= limit:
        return text
    head = text[:limit]
    return head[: max(head.rfind("\n"), head.rfind(" "), 1)].rstrip()


def conversations_about(d: Definition) -> Iterator[Conversation]:
    """The questions that a definition can answer, each a conversation of one turn."""
    short = d.name.rsplit(".", 1)[-1]
    doc = " ".join(_cut(d.doc, MAX_DOC_CHARS).split())
    first = doc.split(". ")[0].rstrip(".") + "."
    kind = "class" if d.header.startswith("class") else "function"
    about = f"{d.name} is a {kind} of the module {d.module}."
    yield _turn(d, "doc", f"What does {d.name} do?", f"{about} Its documentation says: {doc}")
    yield _turn(d, "brief", f"In one sentence, what is {d.name} for?", f"{about} In one sentence: {first}")
    if kind == "function":
        known = f"{d.header}\n" if len(d.name) % 2 else ""
        question = f"{known}Which parameters does {d.name} take?"
        yield _turn(d, "signature", question, f"{about} It is called with these parameters:\n{d.header}")
    if len(d.source) <= MAX_SOURCE_CHARS:
        question = f"Show me the source of {short} in {d.module}.\n{d.header}"
        yield _turn(d, "source", question, f"{about} This is its source:\n{d.source}")


def _turn(d: Definition, kind: str, question: str, answer: str) -> Conversation:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Conversation(f"{d.name}/{kind}", messages, f"the standard library's {d.module}")


@functools.cache
def stdlib_conversations(held_out: bool) -> list[Conversation]:
    """All conversations of one side of the split, in a fixed order, without repeated ids."""
    by_id = {c.id: c for d in definitions() if is_held_out(d) == held_out for c in conversations_about(d)}
    return list(by_id.values())


def load_stdlib(config: DataConfig, seed: int) -> Split:
    """Questions about Python's standard library, split by module."""
    training, held_out = (ConversationList(stdlib_conversations(held_out=side)) for side in (False, True))
    return Split(shuffled(training, seed)[: config.max_conversations], shuffled(held_out, seed))
