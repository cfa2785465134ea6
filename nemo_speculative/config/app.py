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
from collections.abc import Callable
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from nemo_speculative.config import expressions, groups, schema
from nemo_speculative.config.conf_dir import CONF, options
from nemo_speculative.config.draft_config_file import apply_config_file
from nemo_speculative.config.help import help_text
from nemo_speculative.config.renames import KEYS
from nemo_speculative.utils.errors import NO_RESTART_FILE, PeerLostError, UserError, print_error

INTERRUPTED = 130
NOT_AN_OPTION = "Config group override must be"
UNUSED_GROUP = re.compile(
    r"Could not override '([^']+)'\.\s(?:Did you mean to override (.+)\?|No match .*)\n"
    r"To append to your default list use \+(.+)"
)
"""Hydra's error for a group that the root does not compose. Its advice, ``+``, would be refused by the schema."""

groups.register()
expressions.register()


def recipe(config_name: str) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Turns ``main(job)`` into a program whose command line is ``conf/<config_name>.yaml`` and overrides of it.

    ``job`` is the validated dataclass of the root schema.  In a multirun each job with an ``output_dir`` writes to
    one of its own, ``<output_dir>/<number>``.
    """

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def task(config: DictConfig) -> None:
            # Caught here, since Hydra would print a line of its own first.
            try:
                main(to_job(config))
            except UserError as error:
                _refuse(error)
            except OSError as error:
                _fail(_file_error(error), 1)
            except HydraException as error:  # raised by an object that Hydra instantiated
                cause = _user_error_within(error)
                if cause is None:
                    raise
                _refuse(cause)

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
    """The typed job of a composed configuration.

    Raises:
        UserError: a mandatory key is missing, a key was added that the schema lacks, or two keys contradict each other.
    """
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
        job.draft = apply_config_file(job.draft)
    return job


def _user_error_within(error: BaseException | None) -> UserError | None:
    """The UserError that OmegaConf or Hydra wrapped, if any."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


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
    """Runs ``program``; a :class:`UserError` or an invalid configuration is one line and a non-zero exit code."""
    # Otherwise Hydra prints several lines of its own.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        program()
    except UserError as error:
        _refuse(error)
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(UserError(explain(error, sys.argv[1:])))
    except ValueError as error:  # from Hydra, for a group with a number or null as its option
        if NOT_AN_OPTION not in str(error):
            raise
        _refuse(UserError(explain(error, sys.argv[1:])))
    except OSError as error:
        _fail(_file_error(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted; start again with the same command (a training with resume=auto)", INTERRUPTED)
    except SystemExit as exit_request:
        if isinstance(exit_request.code, int):
            _leave(exit_request.code)
        raise
    _leave(0)


def _file_error(error: OSError) -> str:
    message = f"{error.strerror or error}: {error.filename or ''}".removesuffix(": ")
    if error.errno == errno.ENOSPC:
        return f"{message}; free some space there, and start again with the same command"
    return message


def _leave(code: int) -> None:
    """Ends the program.

    A rank exits without waiting for threads: those of gloo sometimes abort the process while the interpreter exits.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        os._exit(code)
    if code:
        sys.exit(code)


def _refuse(error: UserError) -> None:
    """Ends with ``error``, and tells the launcher if a restart would not help."""
    if NO_RESTART_FILE in os.environ and not isinstance(error, PeerLostError):
        with contextlib.suppress(OSError), open(os.environ[NO_RESTART_FILE], "a") as ranks:
            print(os.environ["RANK"], file=ranks)
    _fail(str(error), error.exit_code)


def _fail(line: str, code: int) -> None:
    print_error(line)
    _leave(code)


def explain(error: Exception, overrides: list[str]) -> str:
    """One line for a configuration that Hydra or OmegaConf refused: the key, the finding and the remedy."""
    text = f"{error}\n{error.__cause__ or ''}"
    # If one override is a suffix of another, the error is about the longer one.
    override = max((o for o in overrides if o in text), key=len, default="")
    if NOT_AN_OPTION in text:
        override = next((o for o in overrides if _is_no_option(o)), "")
        return f"{override}: expected one of {', '.join(options(override.split('=')[0]))}"
    unused = UNUSED_GROUP.match(text)
    if unused:
        group, similar, override = unused.groups()
        remedy = f"did you mean {similar!r}?" if similar else "leave it out; --help lists the groups"
        return f"{override}: this recipe has no group {group!r}; {remedy}"
    full_key = re.search(r"full_key: (\S+)", text)
    where = override or (full_key[1] if full_key else "")
    unknown = re.search(r"Key '([^']+)' not in '(\w+)'", text)
    if unknown:
        name, schema_name = unknown.groups()
        key = full_key[1] if full_key else name
        if not hasattr(schema, schema_name):
            return f"{where or name}: unknown key {name!r}; a setting of Hydra's own: see https://hydra.cc"
        return f"{where or name}: {_unknown(key, [f.name for f in dataclasses.fields(getattr(schema, schema_name))])}"
    lines = [line.strip() for line in (str(error.__cause__ or error)).splitlines()]
    useful = [
        line
        for line in lines
        if line and not line.startswith(("provider=", "full_key", "object_type", "reference_type", "Config search"))
    ]
    message = "; ".join(useful).replace(":; ", ": ")
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


def _is_no_option(override: str) -> bool:
    """Whether ``override`` sets a group to something that is not one of its options."""
    group, _, value = override.partition("=")
    return bool(value) and bool(options(group)) and value not in options(group)
