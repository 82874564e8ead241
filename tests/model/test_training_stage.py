"""Training over several stages in one process, beside mlx-lm's own training of the whole model: equal bit for bit."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.llama import TransformerBlock

from checkpoints import make
from cluster.codec.adapter_file import read_adapters, write_adapters
from cluster.conversion.converter import convert_checkpoint
from cluster.coordinator.training_reports import TrainingReports
from cluster.core.errors import BadFrame, InvalidOption
from cluster.core.frames import Tensor
from cluster.core.plan import LayerRange, ModelRef, StageSpec
from cluster.core.quantization import Quantization
from cluster.core.training import TrainingOptions
from cluster.core.training_frames import DataBatch, Purpose, Task, TrainingCommand
from cluster.model.checkpoint import open_checkpoint
from cluster.model.tensor_codec import to_array
from cluster.model.tokenizer import load_tokenizer
from cluster.model.training_batches import read_training_data
from cluster.model.training_commands import TrainingCommands
from cluster.model.training_stage import load_training_stage
from cluster.model.weight_conversion import Conversion
from cluster.scheduler.training_schedule import BatchResult, TrainingSchedule
from lora_reference import fine_tune, write_texts

pytestmark = pytest.mark.xdist_group("training")
BASE = {
    "iters": 4, "batch_size": 2, "num_layers": -1, "learning_rate": 1e-3, "max_seq_length": 48,
    "steps_per_report": 1, "steps_per_eval": 3, "val_batches": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama_untied", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data"), train=12, valid=6)


class Stages:
    """All stages of a model in this process, driven as the coordinator drives them."""

    def __init__(self, model: Path, cuts: Sequence[int], options: TrainingOptions, weight_bits: int = 0) -> None:
        self.layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        ref = ModelRef("model", str(model), open_checkpoint(model).fingerprint)
        self.options = options
        self.stages: list[TrainingCommands] = []
        self.names: list[tuple[str, ...]] = []
        for i, (start, end) in enumerate(zip([0, *cuts], [*cuts, self.layers], strict=True)):
            spec = StageSpec(1, i, len(cuts) + 1, ref, LayerRange(start, end), 512, weight_bits=weight_bits)
            prepare = TrainingCommand(1, 0, Task.PREPARE, options=options.to_json())
            stage, reply = TrainingCommands.prepare(spec, model, prepare)
            self.stages.append(stage)
            self.names.append(reply.names)
        self.lowest = next(i for i, names in enumerate(self.names) if names)

    def run(self, batches: Iterator[DataBatch]) -> Iterator[BatchResult]:
        """Run batches, with as many in flight as the schedule allows; the latest stage replies first."""
        schedule = TrainingSchedule(len(self.stages), self.lowest)
        waiting: list[list[TrainingCommand]] = [[] for _ in self.stages]
        more = True
        while more or not schedule.idle:
            while more and schedule.wants:
                batch = next(batches, None)
                more = batch is not None
                if batch:
                    schedule.add(batch, update=is_update(batch, self.options))
            for order in schedule.next_orders():
                waiting[order.stage].append(command_of(order))
            stage = max(i for i, commands in enumerate(waiting) if commands)
            yield from schedule.on_reply(stage, self.stages[stage].run(waiting[stage].pop(0)))

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for stage in self.stages:
            reply = stage.run(TrainingCommand(1, 0, Task.READ_STATE))
            found |= dict(zip(reply.names, reply.tensors, strict=True))
            for part in range(1, reply.parts):
                reply = stage.run(TrainingCommand(1, 0, Task.READ_STATE, part=part))
                found |= dict(zip(reply.names, reply.tensors, strict=True))
        return {name: Tensor(t.dtype, t.shape, bytes(t.data)) for name, t in found.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        write = TrainingCommand(1, 0, Task.WRITE_STATE, update=True, names=tuple(state), tensors=tuple(state.values()))
        for stage in self.stages:
            stage.run(write)

    def adapters(self) -> dict[str, mx.array]:
        return {n.removeprefix("adapter/"): to_array(t) for n, t in self.state().items() if n.startswith("adapter/")}


def is_update(batch: DataBatch, options: TrainingOptions) -> bool:
    last = batch.purpose is Purpose.TRAIN and batch.ends_batch
    return last and batch.iteration % options.grad_accumulation_steps == 0


def command_of(order: Any) -> TrainingCommand:
    batch, tensors = order.batch, order.tensors
    if order.task is Task.FORWARD:
        own = (Tensor("int32", batch.shape, batch.tokens), Tensor("int32", (batch.shape[0], 2), batch.lengths))
        tensors = (*own, *tensors)
    train = batch.purpose is Purpose.TRAIN
    flags = (train, order.gradient, order.update)
    return TrainingCommand(1, 0, order.task, batch.number, *flags, tensors=tensors, weight=batch.weight)


def batches_of(model: Path, data: Path, options: TrainingOptions) -> Iterator[DataBatch]:
    return read_training_data(data, load_tokenizer(model), options).batches(options)


def reports(results: Iterable[BatchResult], options: TrainingOptions) -> list[dict[str, Any]]:
    """What mlx-lm would report of these results."""
    counted = TrainingReports(options)
    made = [report for result in results if (report := counted.add(result, {}))]
    return [
        {"iteration": r.iteration, "val_loss": r.val_loss}
        if r.val_loss is not None
        else {"iteration": r.iteration, "train_loss": r.train_loss, "learning_rate": r.learning_rate}
        for r in made
    ]


def compare(model: Path, data: Path, folder: Path, cuts: Sequence[int], **more: Any) -> None:
    """Train over stages and in one process: the same losses, learning rates and adapters."""
    given = {**BASE, **more}
    options = TrainingOptions.of({"train": True, **given})
    stages = Stages(model, cuts, options)
    own = reports(stages.run(batches_of(model, data, options)), options)
    expected, adapters = fine_tune(model, data, folder, **given)
    assert own == expected
    made = stages.adapters()
    assert made.keys() == adapters.keys()
    assert all(mx.array_equal(made[name], adapters[name]) for name in adapters)


@pytest.mark.parametrize(
    ("cuts", "more"),
    [
        ((2,), {"grad_accumulation_steps": 2}),
        ((1, 3), {"num_layers": 2, "optimizer": "adamw", "optimizer_config": {"adamw": {"weight_decay": 0.1}}}),
        ((3,), {"num_layers": 1}),
        ((2,), {"grad_checkpoint": True}),
        ((2,), {"fine_tune_type": "dora"}),
        ((1, 3), {"lora_parameters": {"rank": 4, "scale": 10.0, "dropout": 0.1}, "grad_accumulation_steps": 2}),
        ((2,), {"lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 10, 1e-4], "warmup": 2}}),
    ],
    ids=["sums", "three-stages", "last-layer", "checkpoint", "dora", "dropout", "schedule"],
)
def test_stages_train_as_one_process(
    llama: Path, data: Path, tmp_path: Path, cuts: tuple[int, ...], more: dict[str, Any]
) -> None:
    compare(llama, data, tmp_path, cuts, **more)


@pytest.mark.parametrize("arch", ["qwen3_moe", "llama_4bit"])
def test_experts_and_quantized_weights_train_as_in_one_process(data: Path, tmp_path: Path, arch: str) -> None:
    compare(make(arch, tmp_path / "model"), data, tmp_path / "adapters", (1, 3), iters=3)


def test_weights_that_are_quantized_while_loading_train_as_the_converted_ones(data: Path, tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 128}
    source, converted = make("llama", tmp_path / "source", **wide), tmp_path / "converted"
    convert_checkpoint(source, converted, Conversion(Quantization(4, 64)), lambda _: None)
    options = TrainingOptions.of({**BASE, "train": True, "iters": 2, "val_batches": 0})
    batches = list(batches_of(source, data, options))
    own, expected = Stages(source, (2,), options, weight_bits=4), Stages(converted, (2,), options)
    assert list(own.run(iter(batches))) == list(expected.run(iter(batches)))
    made, adapters = own.adapters(), expected.adapters()
    assert made.keys() == adapters.keys()
    assert all(mx.array_equal(made[name], adapters[name]) for name in adapters)


@pytest.mark.parametrize(
    ("arch", "parts", "more"),
    [
        ("llama_untied", 3, {}),
        ("llama_untied", 9, {"fine_tune_type": "dora", "grad_checkpoint": True}),
        ("llama_4bit", 2, {}),
    ],
    ids=["uneven", "a-row-each", "quantized"],
)
def test_micro_batches_have_the_gradients_and_losses_of_their_batch(
    data: Path, tmp_path: Path, arch: str, parts: int, more: dict[str, Any]
) -> None:
    """Sums of a few hundred float32 products in another order: off by some units of 2**-23 of the largest number.

    The gradients are those of the third step, from equal adapters. At the start, half of them are 0.
    """
    model = make(arch, tmp_path / "model")
    given = {**BASE, "train": True, "batch_size": 4, "iters": 3, "grad_accumulation_steps": 2, "val_batches": 1, **more}
    losses, states = [], []
    for count in (1, parts):
        options = TrainingOptions.of({**given, "micro_batches": count})
        stages, batches = Stages(model, (2,), options), list(batches_of(model, data, options))
        updated = [batch for batch in batches if batch.iteration < 3]
        losses.append(reports(stages.run(iter(updated)), options))
        states.append(stages.state())
        stages.restore(states[0])
        list(stages.run(iter(batches[len(updated) :])))
        states.append(stages.state())
    for report, own in zip(*losses, strict=True):
        assert own == {k: pytest.approx(v, rel=1e-5) for k, v in report.items()}
    _, whole, _, cut = states
    compared = [name for name in whole if name.startswith("gradients/")]
    assert len(compared) == sum(map(len, stages.names))
    for name in compared:
        expected = to_array(whole[name])
        assert mx.abs(to_array(cut[name]) - expected).max() <= 64 * 2**-23 * mx.abs(expected).max(), name


def test_a_checkpointed_stage_keeps_the_inputs_of_its_layers_and_runs_each_layer_twice(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    call: Any = TransformerBlock.__call__

    def counted(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        return call(*arguments, **more)

    monkeypatch.setattr(TransformerBlock, "__call__", counted)
    kept = dict[bool, int]()
    ref = ModelRef("model", str(llama), open_checkpoint(llama).fingerprint)
    for checkpoint in (True, False):
        options = TrainingOptions.of({"train": True, "num_layers": -1, "grad_checkpoint": checkpoint})
        stage = load_training_stage(StageSpec(1, 0, 2, ref, LayerRange(0, 3), 512), llama, options)
        gc.collect()  # stages of earlier tests, which would be freed meanwhile
        calls, before = 0, mx.get_active_memory()
        (leaving,) = stage.forward(1, mx.zeros((4, 65), mx.int32), [], train=True, gradient=False)
        kept[checkpoint] = mx.get_active_memory() - before
        stage.backward(1, [mx.ones_like(leaving)], update=False)
        assert calls == (6 if checkpoint else 3)
        stage.close()
    assert kept[True] <= 1.5 * (3 + 2) * leaving.nbytes, "the inputs, what leaves, and room for its gradient"
    assert kept[False] > 8 * kept[True]


def test_training_continues_from_a_state_on_other_cuts(llama: Path, data: Path) -> None:
    more = {"val_batches": 0, "iters": 5, "grad_accumulation_steps": 2, "lora_parameters": {"dropout": 0.1}}
    more["micro_batches"] = 2
    options = TrainingOptions.of({**BASE, "train": True, **more})
    whole = [r.loss for r in Stages(llama, (2,), options).run(batches_of(llama, data, options))]
    batches = list(batches_of(llama, data, options))
    before = Stages(llama, (1, 3), options)
    first = [r.loss for r in before.run(iter(batches[:3]))]  # in the middle of a sum of gradients
    after = Stages(llama, (2,), options)
    after.restore(before.state())
    assert first + [r.loss for r in after.run(iter(batches[3:]))] == whole


def test_training_begins_with_the_adapters_of_an_earlier_run(llama: Path, data: Path, tmp_path: Path) -> None:
    _, earlier = fine_tune(llama, data, tmp_path / "earlier", **BASE)
    options = TrainingOptions.of({**BASE, "train": True})
    stages = Stages(llama, (1, 3), options)
    content = (tmp_path / "earlier" / "adapters.safetensors").read_bytes()
    given = read_adapters(content)
    assert {name: t.shape for name, t in given.items()} == {n: a.shape for n, a in earlier.items()}
    stages.restore({f"adapter/{name}": tensor for name, tensor in given.items()})
    own = reports(stages.run(batches_of(llama, data, options)), options)
    resumed = {**BASE, "resume_adapter_file": str(tmp_path / "earlier" / "adapters.safetensors")}
    assert own == fine_tune(llama, data, tmp_path / "later", **resumed)[0]
    made = tmp_path / "made.safetensors"
    made.write_bytes(write_adapters(given))
    assert all(mx.array_equal(array, earlier[name]) for name, array in dict(mx.load(str(made))).items())


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, b"\x02" + bytes(7) + b"[]", b"\x10" + bytes(7) + b'{"a": {"x": 1}} ']
)
def test_a_damaged_adapter_file_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidOption, match="the adapter file is damaged"):
        read_adapters(content)


def adapting(**parameters: Any) -> TrainingOptions:
    return TrainingOptions.of({"train": True, "num_layers": 4, "lora_parameters": parameters})


def test_options_that_do_not_fit_the_model_are_refused(llama: Path) -> None:
    with pytest.raises(InvalidOption, match="the model has only 4 layers"):
        Stages(llama, (2,), TrainingOptions.of({"train": True, "num_layers": 5}))
    with pytest.raises(InvalidOption, match="names none of them"):
        Stages(llama, (2,), adapting(keys=["x"]))
    with pytest.raises(InvalidOption, match="lm_head, which is outside the layers"):
        Stages(llama, (2,), adapting(keys=["lm_head", "self_attn.q_proj"]))
    with pytest.raises(InvalidOption, match=r"invalid training option lora_parameters\.rank"):
        adapting(rank=0)


def test_a_state_of_another_base_and_a_gradient_of_no_batch_are_refused(llama: Path) -> None:
    stages, other = Stages(llama, (2,), adapting(rank=2)), Stages(llama, (2,), adapting(rank=3))
    with pytest.raises(InvalidOption, match="trained on another base"):
        stages.restore(other.state())
    gradient = Tensor("float32", (1, 4, 32), bytes(4 * 4 * 32))
    with pytest.raises(BadFrame, match="comes back to a stage"):
        stages.stages[0].run(TrainingCommand(1, 0, Task.BACKWARD, batch=9, tensors=(gradient,)))
