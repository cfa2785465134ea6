"""From a command line to a typed job: every recipe starts here.

Hydra composes ``conf/``; what it or the schema refuses becomes one line on standard error and exit code 1.
"""

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from nemo_speculative.config import schema
from nemo_speculative.errors import UserError

CONF = Path(__file__).parents[2] / "conf"
INTERRUPTED = 130

schema.register()


def recipe(config_name: str) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Turns ``main(job)`` into a program whose command line is ``conf/<config_name>.yaml`` and overrides of it.

    ``job`` is the validated dataclass of the root schema.  In a multirun each job writes to a directory of its own,
    ``<output_dir>/<number>``.
    """

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        @functools.wraps(main)
        def task(config: DictConfig) -> None:
            # Inside Hydra's own handling, which would print a line before the error's.
            try:
                main(to_job(config))
            except UserError as error:
                _fail(str(error), error.exit_code)

        hydra_main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)
        return functools.partial(run_program, hydra_main)

    return decorate


def to_job(config: DictConfig) -> Any:
    """The typed job of a composed configuration.

    Raises:
        UserError: a mandatory key is missing, or two keys contradict each other.
    """
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        with open_dict(config):
            config.output_dir = f"{config.output_dir}/{HydraConfig.get().job.num}"
    try:
        return OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} is not set: give it on the command line, {error.full_key}=…") from None


def run_program(program: Callable[[], None]) -> None:
    """Runs ``program``; a :class:`UserError` or a refused configuration is one line and a non-zero exit."""
    # Hydra prints several lines of its own otherwise.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        program()
    except UserError as error:
        _fail(str(error), error.exit_code)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(explain(error, sys.argv[1:]), 1)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)


def _fail(line: str, code: int) -> None:
    print(f"error: {' '.join(line.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def explain(error: Exception, overrides: list[str]) -> str:
    """One line for a configuration that Hydra or OmegaConf refused: the key, what was found, what to do."""
    text = f"{error}\n{error.__cause__ or ''}"
    override = next((o for o in overrides if o in text), "")
    unknown = re.search(r"Key '([^']+)' not in '(\w+)'", text)
    if unknown:
        name, schema_name = unknown.groups()
        return f"{override or name}: unknown key {name!r}; {_known_keys(name, schema_name)}"
    lines = [line.strip() for line in (str(error.__cause__ or error)).splitlines()]
    useful = [
        line
        for line in lines
        if line and not line.startswith(("provider=", "full_key", "object_type", "reference_type", "Config search"))
    ]
    message = "; ".join(useful).replace(":; ", ": ")
    return message if override in message else f"{override}: {message}"


def _known_keys(name: str, schema_name: str) -> str:
    fields = [f for f in getattr(schema, schema_name).__dataclass_fields__ if not f.startswith("_")]
    close = difflib.get_close_matches(name, fields, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(fields)}"
