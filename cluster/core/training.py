"""The options of a fine-tuning run, by mlx-lm's names. One decoder checks them on every surface.

They travel as JSON, since several of them (the LoRA parameters, the schedule) are nested as in mlx-lm's config file. It
knows names, types and ranges, nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cluster.core.errors import InvalidOption
from cluster.core.limits import MAX_ROWS
from cluster.core.training_limits import MAX_MODULE_NAMES, MAX_SEQUENCE

__all__ = ["DATA_SETS", "LearningSchedule", "LoraParameters", "TrainingOptions"]

DATA_SETS: Final = ("train", "valid", "test")
"""The data sets of a run; each is a file of JSON lines, NAME.jsonl."""

_Count = Annotated[int, Field(ge=1, le=2**31)]
_Batches = Annotated[int, Field(ge=-1, le=2**31)]
_Name = Annotated[str, Field(max_length=256)]
_STRICT: Final = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LoraParameters(BaseModel):
    """The adapter of each layer. ``keys`` are the modules that get one, by their path in a layer; None means all."""

    model_config = _STRICT

    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    scale: float = 20.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    keys: Annotated[tuple[_Name, ...], Field(max_length=MAX_MODULE_NAMES)] | None = None


class LearningSchedule(BaseModel):
    """A schedule of mlx's optimizers by name, the arguments of its function, and the steps of a linear warm-up."""

    model_config = _STRICT

    name: Literal["cosine_decay", "exponential_decay", "linear_schedule", "step_decay"]
    arguments: Annotated[tuple[int | float, ...], Field(min_length=2, max_length=3)]
    warmup: Annotated[int, Field(ge=0)] = 0
    warmup_init: float = 0.0


class TrainingOptions(BaseModel):
    """What to train, and how. Names and defaults are mlx-lm's.

    ``num_layers`` counts from the last layer; -1 means all. ``val_batches`` and ``test_batches`` of -1 use all data. A
    step is one batch; an update of the weights follows ``grad_accumulation_steps`` of them. ``micro_batches`` is not
    mlx-lm's: it cuts a batch into so many parts, at most one a row, which follow each other through the stages.
    """

    model_config = _STRICT

    fine_tune_type: Literal["lora", "dora"] = "lora"
    lora_parameters: LoraParameters = LoraParameters()
    num_layers: Annotated[int, Field(ge=-1, le=4096)] = 16
    optimizer: Literal["adam", "adamw", "muon", "sgd", "adafactor"] = "adam"
    optimizer_config: dict[_Name, dict[_Name, Any]] = Field(default_factory=dict)
    learning_rate: Annotated[float, Field(ge=0)] = 1e-5
    lr_schedule: LearningSchedule | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    grad_checkpoint: bool = False
    grad_accumulation_steps: _Count = 1
    micro_batches: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 1

    train: bool = False
    test: bool = False
    iters: _Count = 1000
    batch_size: Annotated[int, Field(ge=1, le=MAX_ROWS)] = 4
    max_seq_length: Annotated[int, Field(ge=2, le=MAX_SEQUENCE)] = 2048
    mask_prompt: bool = False
    prompt_feature: _Name = "prompt"
    completion_feature: _Name = "completion"
    chat_feature: _Name = "messages"
    text_feature: _Name = "text"
    val_batches: _Batches = 25
    test_batches: _Batches = 500
    steps_per_report: _Count = 10
    steps_per_eval: _Count = 200
    save_every: _Count = 100

    @model_validator(mode="after")
    def _check_purpose(self) -> Self:
        if not (self.train or self.test):
            raise ValueError("give --train, --test or both")
        return self

    @staticmethod
    def of(values: Mapping[str, Any]) -> TrainingOptions:
        """Return the options with ``values`` by name. Raises ``InvalidOption``, which names the first wrong one."""
        try:
            return TrainingOptions.model_validate(dict(values))
        except ValidationError as error:
            raise _invalid_options_error(error) from None

    @staticmethod
    def from_json(text: str) -> TrainingOptions:
        """Return the options in a JSON object. Raises ``InvalidOption``."""
        try:
            return TrainingOptions.model_validate_json(text)
        except ValidationError as error:
            raise _invalid_options_error(error) from None

    def require_layers(self, layers: int) -> None:
        """Raises ``InvalidOption`` if a model with so many layers has fewer than are to be trained."""
        if self.num_layers > layers:
            raise InvalidOption(
                f"--num-layers is {self.num_layers}, but the model has only {layers} layers", field="num_layers"
            )

    def to_json(self) -> str:
        """Return the options as a JSON object."""
        return self.model_dump_json()

    def plain(self) -> dict[str, Any]:
        """Return the options as dicts, lists, numbers and strings."""
        plain: dict[str, Any] = json.loads(self.to_json())
        return plain


def _invalid_options_error(error: ValidationError) -> InvalidOption:
    first = error.errors(include_url=False, include_context=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    said = str(first["msg"]).removeprefix("Value error, ")
    return InvalidOption(f"invalid training option {field}: {said}" if field else said, field=field)
