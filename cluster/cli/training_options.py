"""Reads the options of ``macpipe lora`` from the command line and a YAML file, and finds and stores its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster.core.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from cluster.core.errors import InvalidOption, MacpipeError
from cluster.core.training import DATA_SETS, TrainingOptions
from cluster.core.training_events import AdapterFile
from cluster.platform.private_files import not_written, replace_file

__all__ = ["ChosenTraining", "TrainingFiles", "read_options"]

_PLACES: Final = ("model", "data", "adapter_path", "resume_adapter_file")
"""Options that name what is read and written here."""


@dataclass(frozen=True, slots=True)
class ChosenTraining:
    """A model, the options of its training, and the places of its files. ``adapter_path`` None: the base is tested."""

    model: str
    options: TrainingOptions
    data: Path
    adapter_path: Path | None
    resume: Path | None


def read_options(given: Mapping[str, Any], config: Path | None) -> ChosenTraining:
    """Return the options of a command line over those of a YAML file. Raises ``InvalidOption``."""
    values = {**(_read_yaml(config) if config else {}), **given}
    values = {name: value for name, value in values.items() if value is not None}
    places = {name: values.pop(name, None) for name in _PLACES}
    if not places["model"]:
        raise InvalidOption("give the model to train with --model", field="model")
    if not places["data"]:
        raise InvalidOption("give the training data with --data", field="data")
    path = "adapters" if places["adapter_path"] is None else str(places["adapter_path"])
    adapter_path = Path(path) if path else None
    if values.get("test") and not values.get("train"):
        values |= _read_adapter_options(adapter_path) if adapter_path else {"num_layers": -1}
    resume = places["resume_adapter_file"]
    return ChosenTraining(
        str(places["model"]),
        TrainingOptions.of(values),
        Path(places["data"]),
        adapter_path,
        Path(resume) if resume else None,
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    from yaml import YAMLError, safe_load  # type: ignore[import-untyped]

    try:
        values = safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidOption(f"cannot read {file}: {error.strerror}", field="config") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise InvalidOption(f"{file} is not YAML: {error}", field="config") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise InvalidOption(f"{file} has no options: it must map names to values", field="config")
    return values


def _read_adapter_options(folder: Path) -> dict[str, Any]:
    """Return the options that made the adapters in ``folder``."""
    from cluster.model.adapter_files import read_adapter_config
    from cluster.model.checkpoint import read_json_object

    try:
        config = read_adapter_config(read_json_object(folder / ADAPTER_CONFIG))
    except OSError as error:
        raise InvalidOption(
            f"cannot read {folder / ADAPTER_CONFIG}: {error.strerror}; name the adapters to test with --adapter-path, "
            "or --adapter-path '' to test the model without any",
            field="adapter_path",
        ) from error
    except MacpipeError as error:
        why = f"the adapter in {folder} cannot be tested: {error.sentence}"
        raise InvalidOption(why, field="adapter_path") from error
    return {
        "fine_tune_type": "dora" if config.dora else "lora",
        "num_layers": config.num_layers or -1,
        "lora_parameters": dict(config.parameters),
    }


@dataclass(slots=True)
class TrainingFiles:
    """The files of one run: those ``sent`` to the coordinator by name, and the folder of its adapters."""

    chosen: ChosenTraining
    sent: dict[str, Path]
    _configured: bool = False

    @staticmethod
    def of(chosen: ChosenTraining) -> TrainingFiles:
        """Find the files. Raises ``InvalidOption`` if one is missing."""
        sent = _find_data(chosen)
        adapters = chosen.resume
        if adapters is None and chosen.options.test and not chosen.options.train and chosen.adapter_path:
            adapters = chosen.adapter_path / ADAPTER_WEIGHTS
        if adapters:
            if not adapters.is_file():
                raise InvalidOption(f"there is no adapter file {adapters}", field="resume_adapter_file")
            sent["adapters"] = adapters
        return TrainingFiles(chosen, sent)

    def store(self, event: AdapterFile) -> Path:
        """Store adapters as mlx-lm does, whole or not at all. Return the file. Raises ``DiskFull``."""
        folder = self.chosen.adapter_path or Path("adapters")
        numbered = folder / f"{event.iteration:07d}_{ADAPTER_WEIGHTS}"
        target = folder / ADAPTER_WEIGHTS if event.final else numbered
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self._configured:
                replace_file(folder / ADAPTER_CONFIG, self._config())
                self._configured = True
            replace_file(folder / ADAPTER_WEIGHTS, event.content)
            if event.iteration % self.chosen.options.save_every == 0:
                replace_file(numbered, event.content)
        except OSError as error:
            raise not_written(error, target, "adapters") from error
        return target

    def _config(self) -> bytes:
        """Return adapter_config.json: all options, by mlx-lm's names."""
        chosen = self.chosen
        config = chosen.options.plain()
        if config["lora_parameters"].get("keys") is None:
            del config["lora_parameters"]["keys"]
        config |= {
            "model": chosen.model,
            "data": str(chosen.data),
            "adapter_path": str(chosen.adapter_path or ""),
            "resume_adapter_file": str(chosen.resume) if chosen.resume else None,
        }
        return json.dumps(config, indent=4, sort_keys=True).encode()


def _find_data(chosen: ChosenTraining) -> dict[str, Path]:
    data, options = chosen.data, chosen.options
    if data.is_file():
        return dict.fromkeys([name for name, use in (("train", options.train), ("test", options.test)) if use], data)
    found = {name: data / f"{name}.jsonl" for name in DATA_SETS}
    present = {name: file for name, file in found.items() if file.is_file()}
    for name, needed in (("train", options.train), ("test", options.test)):
        if needed and name not in present:
            raise InvalidOption(f"there is no {found[name]}; --{name} needs it", field="data")
    return {name: file for name, file in present.items() if name == "test" or options.train}
