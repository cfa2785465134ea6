"""What a preparation is asked to read, as the configuration says it, before anything of it is read."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from nemo_speculative.config.app import CONF, to_job
from nemo_speculative.config.schema import DataConfig, DatasetConfig, MixDataConfig, PrepareJob, SourceConfig
from nemo_speculative.prepare_data.readers import Part, hub_parts, local_parts, sha256
from nemo_speculative.utils.errors import UserError

HUB_KEYS = ("repository", "subset", "revision", "split", "held_out_split")
NO_CONTEXT_PARALLELISM = "data"


@dataclass(frozen=True)
class Source:
    """All the data, or one part of a mix."""

    key: str
    """Where it is configured."""
    name: str
    """What its rows say that they are of."""
    data: DataConfig
    weight: float = 1.0

    @property
    def of_hub(self) -> bool:
        return not self.data.path

    def parts(self) -> list[Part]:
        """Its files or tables.

        Raises:
            UserError: they cannot be had.
        """
        data = self.data
        if data.path:
            return local_parts(data.path, "data.path", data.split if isinstance(data, DatasetConfig) else None)
        if isinstance(data, DatasetConfig):
            return hub_parts(data.repository, data.split, data.subset, data.revision)
        raise UserError("data: nothing to prepare here; give a file or folder, or a dataset of conf/data")

    def held_out_parts(self) -> list[Part]:
        """Those that are held out, if it names any.

        Raises:
            UserError: they cannot be had.
        """
        data = self.data
        if data.held_out_path:
            return local_parts(data.held_out_path, "data.held_out_path", None)
        if isinstance(data, DatasetConfig) and data.held_out_split and self.of_hub:
            return hub_parts(data.repository, data.held_out_split, data.subset, data.revision)
        return []

    def asked(self) -> dict[str, Any]:
        """What the configuration says of it, by its keys; see :func:`asked_for`."""
        asked: dict[str, Any] = {"weight": self.weight}
        if isinstance(self.data, DatasetConfig):
            asked |= {key: getattr(self.data, key) for key in HUB_KEYS}
        asked["held_out_path"] = _content(self.held_out_parts()) if self.data.held_out_path else None
        # Where no file is named, whatever the dataset was prepared from will do: the hub, or a copy.
        return asked | ({"path": _content(self.parts())} if self.data.path else {})


def sources_of(job: PrepareJob) -> list[Source]:
    """Every source that the job asks for.

    Raises:
        UserError: two have the same name, or a mix is given a file that it would not read.
    """
    if not isinstance(job.data, MixDataConfig):
        return [Source(NO_CONTEXT_PARALLELISM, _name(job.data), job.data)]
    for key in ("path", "held_out_path"):
        if file := getattr(job.data, key):
            raise UserError(
                f"data.{key} is {file}, and a mix reads data.sources only, of which it holds out data.held_out_share; "
                f"leave data.{key} out"
            )
    sources = [_mixed(source) for source in job.data.sources]
    if len({source.name for source in sources}) < len(sources):
        raise UserError(f"data.sources: {', '.join(s.name for s in job.data.sources)}: give each a name of its own")
    return sources


def asked_for(sources: Sequence[Source], held_out_share: float) -> dict[str, Any]:
    """What the configuration asks for, by its keys; files by their content, wherever they lie.  Asks no hub.

    Raises:
        UserError: a file is not there.
    """
    asked: dict[str, Any] = {"data.held_out_share": held_out_share}
    if any(source.key != NO_CONTEXT_PARALLELISM for source in sources):
        asked["data.sources"] = [source.name for source in sources]
    for source in sources:
        asked |= {f"{source.key}.{key}": value for key, value in source.asked().items()}
    return asked


def _content(parts: Sequence[Part]) -> str:
    return "sha256:" + hashlib.sha256("".join(map(sha256, parts)).encode()).hexdigest()


def _mixed(source: SourceConfig) -> Source:
    options = {file.stem for file in (CONF / "data").glob("*.yaml")}
    data = _option(source.name) if source.name in options else DataConfig(path=source.name)
    if source.path:
        data.path = source.path
    name = source.name if source.path or source.name in options else _file_name(source.name)
    return Source(f"data.sources[{name}]", name, data, source.weight)


def _option(name: str) -> DataConfig:
    """What conf/data/<name>.yaml says."""
    if GlobalHydra.instance().is_initialized():
        return to_job(compose("prepare_data", overrides=[f"data={name}"])).data
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return to_job(compose("prepare_data", overrides=[f"data={name}"])).data


def _name(data: DataConfig) -> str:
    """Of the option of conf/data that names its repository; else of the repository, or of the file."""
    if not isinstance(data, DatasetConfig):
        return _file_name(data.path or "")
    options = sorted((CONF / "data").glob("*.yaml"))
    named = (option.stem for option in options if _repository(option) == data.repository)
    return next(named, _file_name(data.repository))


def _repository(option: Path) -> str | None:
    said: Any = OmegaConf.load(option)
    return said.get("repository")


def _file_name(path: str) -> str:
    name = Path(os.path.abspath(path)).name  # a link has a name of its own, which resolve() loses
    return name.partition(".")[0] or name
