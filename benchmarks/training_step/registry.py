"""The implementations by name, without importing any of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any

from benchmarks.training_step.case import Case, Setup
from benchmarks.training_step.implementations.base import Implementation
from nemo_speculative.utils.errors import UsageError

PACKAGE = "benchmarks.training_step.implementations"
MEDIUM = "medium"


@dataclass(frozen=True)
class Variant:
    """A variant of an implementation."""

    needs: str
    """Options of the command line that it requires, for error messages."""
    fits: Callable[[Case], bool]


VARIANTS = {
    # torch's float32 matmul precision "medium", which this project uses where it is exact
    MEDIUM: Variant("--dtype float32", lambda case: case.dtype == "float32"),
    # AutoModel's packing, which is off by default
    "packed": Variant("--lengths sharegpt", lambda case: case.lengths == "sharegpt"),
    # draft.depth_sampling=geometric
    "geometric": Variant("more than one step", lambda case: case.num_steps > 1),
    # speculators with a trained head, which it freezes by default
    "head": Variant("--draft eagle3", lambda case: case.draft == "eagle3"),
}


@dataclass(frozen=True)
class Known:
    """The capabilities of an implementation."""

    classes: Mapping[str, str]
    """``module.Class`` for each draft algorithm that it supports."""
    variants: tuple[str, ...] = ()
    peer: bool = False
    """Whether it runs in the peers' environment."""
    lengths: tuple[str, ...] = ("full",)


def _known(classes: dict[str, str], *variants: str, **values: Any) -> Known:
    return Known(MappingProxyType(classes), variants, **values)


EVERY_LENGTH = ("full", "sharegpt")
IMPLEMENTATIONS = {
    "ours": _known({"eagle3": "own.Ours", "eagle1": "own.Ours"}, "geometric", lengths=EVERY_LENGTH),
    "target": _known({"eagle3": "own.Target", "eagle1": "own.Target"}, lengths=EVERY_LENGTH),
    "textbook": _known({"eagle3": "own.Textbook"}),
    "automodel": _known(
        {"eagle3": "automodel.AutoModelEagle3", "eagle1": "automodel.AutoModelEagle1"}, MEDIUM, "packed",
        peer=True, lengths=EVERY_LENGTH,
    ),
    "specforge": _known({"eagle3": "specforge.SpecForge"}, MEDIUM, peer=True),
    "speculators": _known({"eagle3": "speculators.Speculators"}, MEDIUM, "head", peer=True),
}  # fmt: skip
USUAL = (
    "ours", "ours:geometric", "target", "textbook", "automodel", "automodel:medium", "automodel:packed",
    "automodel:packed:medium", "specforge", "speculators",
)  # fmt: skip


@dataclass(frozen=True)
class Chosen:
    """An implementation with its variants, written ``name:variant:variant``."""

    text: str

    @property
    def name(self) -> str:
        return self.text.split(":")[0]

    @property
    def variants(self) -> frozenset[str]:
        return frozenset(self.text.split(":")[1:])

    @property
    def known(self) -> Known:
        return IMPLEMENTATIONS[self.name]

    def misfit(self, case: Case) -> str | None:
        """The reason why it cannot run ``case``, or None if it can."""
        if case.draft not in self.known.classes:
            return f"{self.name} has no {case.draft}; it has {' and '.join(self.known.classes)}"
        if case.lengths not in self.known.lengths:
            return f"{self.name} is not compared with --lengths {case.lengths}"
        unfit = [name for name in sorted(self.variants) if not VARIANTS[name].fits(case)]
        return f"{self.text}: {unfit[0]} needs {VARIANTS[unfit[0]].needs}" if unfit else None

    def build(self, setup: Setup) -> Implementation:
        module, _, class_name = self.known.classes[setup.case.draft].partition(".")
        return getattr(import_module(f"{PACKAGE}.{module}"), class_name)(setup, self.variants - {MEDIUM})


def parse_chosen(text: str) -> Chosen:
    """Parses a name with variants, such as ``automodel:packed:medium``.

    Raises:
        UsageError: the implementation or its variant does not exist.
    """
    name, *variants = text.split(":")
    if name not in IMPLEMENTATIONS:
        raise UsageError(
            f"--implementations: {name!r} is unknown; expected one or more of {', '.join(IMPLEMENTATIONS)}"
        )
    known = IMPLEMENTATIONS[name].variants
    if unknown := [variant for variant in variants if variant not in known]:
        has = " and ".join(known) or "none"
        raise UsageError(f"--implementations: {name} has no variant {unknown[0]!r}; it has {has}")
    return Chosen(text)


def usual(case: Case, peers: bool) -> list[Chosen]:
    """All implementations that fit ``case``; the peers only if their environment exists."""
    everything = [parse_chosen(text) for text in USUAL]
    return [chosen for chosen in everything if chosen.misfit(case) is None and (peers or not chosen.known.peer)]
