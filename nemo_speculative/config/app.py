"""The start of every recipe: turns a command line into a typed job.

Hydra composes ``conf/``; a configuration that it or the schema refuses is one line on standard error and exit code 1.
"""

import contextlib
import dataclasses
import difflib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from nemo_speculative.config import schema
from nemo_speculative.config.expressions import register_resolvers
from nemo_speculative.config.groups import CONF, help_text, options, register_schemas
from nemo_speculative.config.renames import KEYS
from nemo_speculative.utils.errors import NO_RESTART_FILE, PeerLostError, UserError, print_error

NOT_AN_OPTION = "Config group override must be"
UNUSED_GROUP = re.compile(
    r"Could not override '([^']+)'\.\s(?:Did you mean to override (.+)\?|No match .*)\n"
    r"To append to your default list use \+(.+)"
)
"""Hydra's error for a group that the root does not compose. Its advice, ``+``, would be refused by the schema."""

register_schemas()
register_resolvers()


def recipe(config_name: str) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Turns ``main(job)`` into a program whose command line is ``conf/<config_name>.yaml`` and overrides of it.

    ``job`` is the validated dataclass of the root schema.  In a multirun each job with an ``output_dir`` writes to
    one of its own, ``<output_dir>/<number>``.
    """

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def task(config: DictConfig) -> None:
            with _one_line_errors():  # here too, since Hydra would print a line of its own first
                main(to_job(config))

        hydra_main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)

        def program() -> None:
            if {"--help", "-h"} & set(sys.argv[1:]):
                print(help_text(config_name, main.__globals__["__doc__"]))
            else:
                run_program(hydra_main)

        functools.update_wrapper(program, main)
        return program

    return decorate


def to_job(config: DictConfig) -> Any:
    """The typed job of a composed configuration; raises UserError for a missing, unknown or contradictory key."""
    _check_no_added_keys(config, "")
    if "output_dir" in config and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        with open_dict(config):
            config.output_dir = f"{config.output_dir}/{HydraConfig.get().job.num}"
    try:
        job: Any = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is not set: give it on the command line, {error.full_key}=…") from None
    except InterpolationResolutionError as error:
        raise _user_error_within(error) or error from None
    if isinstance(job, schema.TrainJob):
        job.draft = job.draft.with_config_file()
    return job


def _check_no_added_keys(config: Any, prefix: str) -> None:
    """Refuses keys that Hydra's ``+key=value`` added outside the schema, since nothing would read them."""
    schema_class: Any = OmegaConf.get_type(config)
    if not isinstance(config, DictConfig) or not dataclasses.is_dataclass(schema_class):
        return
    known = [f.name for f in dataclasses.fields(schema_class)]
    for key in map(str, config):
        if key not in known:
            raise UserError(f"{prefix}{key}: {_unknown(f'{prefix}{key}', known)}")
        if not OmegaConf.is_missing(config, key) and not OmegaConf.is_interpolation(config, key):
            _check_no_added_keys(config[key], f"{prefix}{key}.")


def run_program(program: Callable[[], None]) -> None:
    """Runs ``program``; a :class:`UserError` or an invalid configuration is one line and a nonzero exit code.

    A rank exits without waiting for threads: those of gloo sometimes abort the process while the interpreter exits.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints several lines of its own
    code = 0
    try:
        with _one_line_errors():
            program()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        code = end.code
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(code)
    if code:
        sys.exit(code)


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns an error that a user can mend into one line and a SystemExit."""
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        _refuse(_user_error_within(error) or UserError(explain(error, sys.argv[1:])))
    except ValueError as error:  # from Hydra, for a group with a number or null as its option
        if NOT_AN_OPTION not in str(error):
            raise
        _refuse(UserError(explain(error, sys.argv[1:])))
    except OSError as error:
        full = "; free some space there, and start again with the same command" if error.errno == errno.ENOSPC else ""
        print_error(f"{error.strerror or error}: {error.filename or ''}".removesuffix(": ") + full)
        sys.exit(1)
    except KeyboardInterrupt:
        print_error("interrupted; start again with the same command (a training with resume=auto)")
        sys.exit(130)


def _refuse(error: UserError) -> None:
    """Exits with ``error``, and tells the launcher if a restart would not help."""
    if NO_RESTART_FILE in os.environ and not isinstance(error, PeerLostError):
        with contextlib.suppress(OSError), open(os.environ[NO_RESTART_FILE], "a") as ranks:
            print(os.environ["RANK"], file=ranks)
    print_error(error)
    sys.exit(error.exit_code)


def _user_error_within(error: BaseException | None) -> UserError | None:
    """The UserError that OmegaConf or Hydra wrapped, if any."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def explain(error: Exception, overrides: list[str]) -> str:
    """One line for a configuration that Hydra or OmegaConf refused: the key, the finding and the remedy."""
    text = f"{error}\n{error.__cause__ or ''}"
    if NOT_AN_OPTION in text:
        for group, _, value in (override.partition("=") for override in overrides):
            if options(group) and value not in options(group):
                return f"{group}={value}: expected one of {', '.join(options(group))}"
    if unused := UNUSED_GROUP.match(text):
        group, similar, override = unused.groups()
        remedy = f"did you mean {similar!r}?" if similar else "leave it out; --help lists the groups"
        return f"{override}: this recipe has no group {group!r}; {remedy}"
    full_key = re.search(r"full_key: (\S+)", text)
    # If one override is a suffix of another, the error is about the longer one.
    where = max((o for o in overrides if o in text), key=len, default="") or (full_key[1] if full_key else "")
    if unknown := re.search(r"Key '([^']+)' not in '(\w+)'", text):
        name, schema_name = unknown.groups()
        if not hasattr(schema, schema_name):
            return f"{where or name}: unknown key {name!r}; a setting of Hydra's own: see https://hydra.cc"
        known = [f.name for f in dataclasses.fields(getattr(schema, schema_name))]
        return f"{where or name}: {_unknown(full_key[1] if full_key else name, known)}"
    noise = ("provider=", "full_key", "object_type", "reference_type", "Config search")
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines()]
    message = "; ".join(line for line in lines if line and not line.startswith(noise)).replace(":; ", ": ")
    return message if where in message else f"{where}: {message}"


def _unknown(key: str, known: list[str]) -> str:
    """The remedy for ``key`` in a group that has the keys ``known``."""
    if key in KEYS:
        return f"this key is now {KEYS[key]}"
    name = key.rpartition(".")[2]
    shown = [k for k in known if not k.startswith("_")]
    close = difflib.get_close_matches(name, shown, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(shown)}"
    return f"unknown key {name!r}; {hint}"
