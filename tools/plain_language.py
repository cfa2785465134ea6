"""Check of the words in code and docs: ``python -m tools.plain_language [FILE ...]``.

Lists mannerisms that a reader stumbles over, each with what to write instead: in docstrings, comments and string
literals of Python files, and in Markdown and YAML.  Without arguments it reads every file that git tracks.
"""

import ast
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

WORDS = {
    r"behind": "after",
    r"beside": "next to, in addition to, at the same time as",
    r"(?:nobody|somebody)": "no process, a user, a component: name it",
    r"(?:is|are|was|were) told": "is given, receives, is set to",
    r"so many": "a number, the given number of",
    r"goes on(?! to)": "resumes, continues",
    r"lies (?:in|on|where|there|beside|outside)": "is stored in, is in",
    r"(?:verdict|courtroom)s?": "the field's term",
    r"(?:normalis|tokenis|quantis|initialis|optimis|serialis|summaris|materialis|synchronis)(?:e|es|ed|er|ing|ation)s?":
        "American spelling: -ize",
    r"(?:behaviour|neighbour|colour|honour|favour)(?:s|ed|ing|ite)?": "American spelling: -or",
    r"(?:licence|modell|labell|cancell|travell)(?:ed|ing|s)?": "American spelling",
}  # fmt: skip
"""Regular expressions of words, and what to say instead."""
OPENERS = re.compile(r"(?:What|Of|Those|Who|Whose|Whom)\b")
"""First words of a docstring that names no thing."""
ALLOWED = re.compile(r"(?:plain-language: ok|\bmodelling_\w+|colour=|\.cancelled\b)")
SKIPPED = ("tests/", "requirements", "LICENSE", "tools/plain_language.py")
"""Tests may quote anything; this file lists the words."""

PATTERN = re.compile("|".join(rf"(?P<w{n}>\b{word}\b)" for n, word in enumerate(WORDS)), re.IGNORECASE)


def problems(name: str, text: str) -> Iterator[str]:
    """One line for each word of the list in a file, as ``file:line: word: say instead``."""
    for line, prose in _prose(name, text):
        for offset, part in enumerate(prose.splitlines()):
            for match in () if ALLOWED.search(part) else PATTERN.finditer(part):
                instead = list(WORDS.values())[int((match.lastgroup or "w0")[1:])]
                yield f"{name}:{line + offset}: {match[0]!r}: say {instead}"
    if name.endswith(".py"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node) or ""
                if OPENERS.match(docstring):
                    line = getattr(node, "lineno", 1)
                    yield f"{name}:{line}: docstring opens with {docstring.split()[0]!r}: say what the thing is or does"


def _prose(name: str, text: str) -> Iterator[tuple[int, str]]:
    """Line numbers and texts of what a person reads: of Python only strings and comments, else all."""
    if not name.endswith(".py"):
        yield 1, re.sub(r"`[^`\n]*`", lambda code: " " * len(code[0]), text)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            yield token.start[0], re.sub(r"``[^`\n]*``", lambda code: " " * len(code[0]), token.string)


def main(arguments: list[str]) -> int:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split()
    names = arguments or [n for n in tracked if n.endswith((".py", ".md", ".yaml")) and not n.startswith(SKIPPED)]
    found = [line for name in names if Path(name).is_file() for line in problems(name, Path(name).read_text())]
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
