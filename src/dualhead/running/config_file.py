"""A run's settings from a file: the `config.json` of another run, or YAML or TOML written by hand."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dualhead.config import Config, merged
from dualhead.errors import RunError, SettingsError
from dualhead.running.config import RunConfig, planned

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise RunError("YAML files need the package PyYAML: pip install -e '.[yaml]' in the checkout") from error

    class Loader(yaml.SafeLoader):
        """Takes 1e-3 and 1e6 for numbers, as YAML 1.2, JSON and TOML do."""

    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(error) from error


_READERS: dict[str, Callable[[str], Any]] = {
    ".json": json.loads,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".toml": tomllib.loads,
}


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a file, unchecked, nested as RunConfig is.

    A JSON file is taken for the `config.json` of a run: its `run_dir` is left out, because that run lies there.

    Raises:
        RunError: it cannot be read, or holds something else.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise RunError(
            f"config {path}: expected a file that ends in {', '.join(_READERS)}, such as the config.json in a run's "
            f"directory"
        )
    try:
        settings = _READERS[suffix](Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"cannot read the settings in {path}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise RunError(f"{path}: expected settings by name, such as env and total_steps, got {settings!r:.200}")
    if suffix == ".json":
        settings.pop("run_dir", None)
    return settings


def config_from(path: str | os.PathLike[str], over: Mapping[str, Any]) -> RunConfig:
    """The checked settings of a new run, see `combined`. The file may come from a stranger, see `trust`.

    Raises:
        SettingsError: together they are not possible.
        RunError: as `combined`, or the file names what is not trusted.
    """
    from dualhead.running.environment import world_of  # imports torch, which `--help` does not need

    settings = combined(path, over)
    named = ("env", "env_args", "wrappers", "drop_observations", "encoder", "memory")
    _expect_trusted(RunConfig(**{name: settings[name] for name in named if name in settings}), path, over=over)
    return planned(**settings | world_of(settings["env"], settings))


def combined(path: str | os.PathLike[str], over: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a file, with those of `over`, which the user gave, in their place. Both are nested as RunConfig.

    With another environment, settings of the file's own one (`world`, `env_args`, `preset="tuned"`) are left out.

    Raises:
        SettingsError: another preset than that of the file.
        RunError: the file cannot be read, or needs what only Python can hand over.
    """
    settings = read_settings(path)
    given = {
        name: value.model_dump(exclude_unset=True) if isinstance(value, Config) else value
        for name, value in over.items()
    }
    made_in_python = settings.pop("env_from", "id"), settings.pop("learning_rate_from", "config")
    if "env" in given:
        if given["env"] != settings.get("env"):
            settings = {name: value for name, value in settings.items() if name not in ("world", "env_args")}
            if settings.get("preset") == "tuned":
                del settings["preset"]
    elif "env" not in settings:
        raise RunError(f"{path} names no environment: expected one, `env` there or ENV on the command line")
    elif made_in_python[0] != "id":
        raise RunError(
            f"the environment {settings['env']!r} in {path} was handed over in Python, as {made_in_python[0]}: name "
            f"another one, or dualhead.train(env, config={str(path)!r})"
        )
    rates = "learning_rate", "learning_rate_schedule"
    is_given = given.get("learning_rate_from") == "callable" or any(name in given.get("ppo", {}) for name in rates)
    if made_in_python[1] != "config" and not is_given:
        raise RunError(
            f"the learning rate of {path} was a schedule that Python handed over: give --learning-rate in its place, "
            f"or dualhead.train(config={str(path)!r}, learning_rate=...)"
        )
    preset = settings.get("preset")
    if preset is not None and given.get("preset", preset) != preset:
        raise SettingsError(
            [("preset", f"{path} holds the settings of {preset!r}; expected no other preset, got {given['preset']!r}")]
        )
    return merged(settings, given)


def _expect_trusted(config: RunConfig, path: str | os.PathLike[str], *, over: Mapping[str, Any]) -> None:
    """RunError where something that would be imported or called is named by the file alone."""
    from dualhead.running.trust import expect_trusted, is_trusted

    blank: dict[str, Any] = {"env": "", "wrappers": (), "env_args": {}}
    expect_trusted(config.model_copy(update={name: blank[name] for name in blank if name in over}), path)
    for name in ("encoder", "memory"):
        if (part := getattr(config, name)) is not None and name not in over and not is_trusted(path):
            raise RunError(
                f"{name}: {path} names {part!r}, which is not imported by itself. If you trust it: --{name} {part}, or "
                f"--trust; in Python, {name}=..., or call dualhead.trust({str(path)!r})"
            )
