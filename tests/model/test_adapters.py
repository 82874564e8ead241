"""Adapters on slices: tokens are mlx-lm's with the adapter, rows of several adapters share the stages, not a step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

import checkpoints
from adapters import make_adapter
from cluster.core.adapter import AdapterRef, stage_bytes
from cluster.core.errors import BadFrame, MacpipeError, ModelDiffers, ModelUnsupported, PrefixMissing
from cluster.core.frames import Compute, Drop, Join, Leave, Restore, Save, Step
from cluster.core.plan import LayerRange
from cluster.core.request import SamplingParams
from cluster.model.adapter_files import open_adapter
from cluster.model.adapters import read_adapter
from cluster.model.model_shape import read_shape
from model.disks import Disks
from model.ring import CHUNKS, PROMPT, Ring, tokens

GREEDY = SamplingParams()
COUNT = 6


def with_adapter(model: Path, adapter: Path | None, count: int = COUNT, prompt: Sequence[int] = PROMPT) -> list[int]:
    """mlx-lm's own greedy tokens, as of ``mlx_lm.generate --adapter-path``, the prompt in the same chunks."""
    loaded, _ = load_model(model)
    if adapter:
        load_adapters(loaded, str(adapter))
        loaded.eval()
    caches = make_prompt_cache(loaded)
    at = 0
    for size in CHUNKS:
        if part := prompt[at : min(at + size, len(prompt) - 1)]:
            loaded(mx.array([part]), cache=caches)
            mx.eval([cache.state for cache in caches])
        at += size
    rest = mx.array(prompt[min(at, len(prompt) - 1) :])
    return [int(token) for token, _ in generate_step(rest, loaded, max_tokens=count, prompt_cache=caches)]


class Adapted:
    """A ring of stages, with adapters."""

    def __init__(self, model: Path, stages: int, **folders: Path) -> None:
        self.shape = read_shape(model, "tiny", None)
        self.ring = Ring(self.shape, model, stages)
        self.refs = {name: AdapterRef(name, str(f), open_adapter(f).fingerprint) for name, f in folders.items()}
        self.set(*folders)

    def set(self, *names: str) -> None:
        wanted = {self.refs[name].key: self.refs[name] for name in names}
        for stage in self.ring.stages:
            stage.set_adapters(wanted)

    def key(self, name: str) -> str:
        return self.refs[name].key if name else ""

    def join(self, sequence: int, adapter: str = "") -> None:
        self.ring.send(Join(sequence, len(PROMPT), GREEDY, adapter=self.key(adapter)))

    def answer(self, adapter: str, sequence: int = 1) -> list[int]:
        self.join(sequence, adapter)
        self.ring.prefill(sequence, PROMPT[:-1])
        found = tokens(self.ring.go_on(sequence, PROMPT[-1], COUNT))
        self.ring.send(Leave(sequence))
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make("llama", tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("adapters")
    return {
        "one": make_adapter(model, base / "one", 1),
        "two": make_adapter(model, base / "two", 2, num_layers=2, keys=["self_attn.q_proj", "mlp.down_proj"]),
    }


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("llama", "lora"), ("llama_4bit", "lora"), ("llama_4bit", "dora"), ("qwen3_moe", "lora"), ("qwen3_moe", "dora"),
        ("deepseek_v3", "lora"), ("qwen3_next", "lora"), ("mamba2", "lora"), ("gemma3_text", "dora"),
    ],
)  # fmt: skip
def test_tokens_are_those_of_mlx_lm_with_the_adapter(arch: str, kind: str, tmp_path: Path) -> None:
    model = checkpoints.make(arch, tmp_path / "model")
    keys = {"keys": ["self_attn.q_proj", "self_attn.o_proj"]} if kind == "dora" else {}
    folder = make_adapter(model, tmp_path / "adapter", 3, num_layers=3, kind=kind, **keys)
    expected = with_adapter(model, folder)
    assert expected != with_adapter(model, None)
    for stages in (1, 2):
        assert Adapted(model, stages, one=folder).answer("one") == expected


def test_an_adapter_of_the_embedding_and_the_head_is_on_each_stage_that_reads_them(tmp_path: Path) -> None:
    model = checkpoints.make("llama", tmp_path / "model", tie_word_embeddings=True)
    folder = make_adapter(model, tmp_path / "adapter", 3, keys=["model.embed_tokens", "self_attn.v_proj"])
    assert Adapted(model, 3, one=folder).answer("one") == with_adapter(model, folder)


def test_requests_of_several_adapters_and_of_none_take_turns(model: Path, folders: dict[str, Path]) -> None:
    adapted = Adapted(model, 2, **folders)
    names = ["one", "", "two", "one"]
    for sequence, name in enumerate(names, 1):
        adapted.join(sequence, name)
        adapted.ring.prefill(sequence, PROMPT[:-1])
    found: dict[int, list[int]] = {sequence: [] for sequence in range(1, 5)}
    for _ in range(COUNT):
        for rows in ((1, 4), (2,), (3,)):
            row_tokens = tuple((found[s][-1] if found[s] else PROMPT[-1],) for s in rows)
            reply = adapted.ring.send(step=Step(Compute.DECODE, rows, row_tokens), lane=rows[0])
            for sample in reply.samples:
                found[sample.sequence].append(sample.token)
    expected = {name: with_adapter(model, folders.get(name)) for name in ("", "one", "two")}
    assert len({tuple(answer) for answer in expected.values()}) == 3
    assert [found[i] for i in range(1, 5)] == [expected[name] for name in names]


def test_a_step_of_several_adapters_is_refused(model: Path, folders: dict[str, Path]) -> None:
    adapted = Adapted(model, 1, **folders)
    adapted.join(1, "one")
    adapted.join(2)
    with pytest.raises(BadFrame, match="several adapters"):
        adapted.ring.send(step=Step(Compute.DECODE, (1, 2), ((1,), (2,))))


def test_a_prefix_of_another_adapter_is_not_restored(model: Path, folders: dict[str, Path]) -> None:
    adapted = Adapted(model, 1, **folders)
    adapted.join(1, "one")
    adapted.ring.prefill(1, PROMPT[:-1])
    adapted.ring.send(Save(1, 7))
    with pytest.raises(BadFrame, match="another adapter"):
        adapted.ring.send(Join(2, len(PROMPT), GREEDY, adapter=adapted.key("two")), Restore(2, 7, 20))
    adapted.ring.send(Join(3, len(PROMPT), GREEDY, adapter=adapted.key("one")), Restore(3, 7, len(PROMPT) - 1))
    assert tokens(adapted.ring.go_on(3, PROMPT[-1], COUNT)) == with_adapter(model, folders["one"])


def test_a_prefix_on_disk_is_read_for_its_own_adapter_alone(
    model: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    adapted = Adapted(model, 2, **folders)
    disks = Disks(adapted.ring, tmp_path)
    adapted.join(1, "one")
    adapted.ring.prefill(1, PROMPT[:32])
    adapted.ring.send(Save(1, 7), Leave(1))
    disks.persist(7, adapter=adapted.key("one"))
    adapted.ring.send(Drop(7))
    for other in ("", adapted.key("two")):
        assert all(isinstance(error, PrefixMissing) for error in disks.read(8, PROMPT[:32], adapter=other))
    assert disks.read(9, PROMPT[:32], adapter=adapted.key("one")) == [None, None]
    with pytest.raises(BadFrame, match="another adapter"):
        adapted.ring.send(Join(2, len(PROMPT), GREEDY), Restore(2, 9, 32))
    adapted.ring.send(Join(3, len(PROMPT), GREEDY, adapter=adapted.key("one")), Restore(3, 9, 32))
    adapted.ring.send(step=Step(Compute.PREFILL, (3,), (PROMPT[32:-1],)))
    assert tokens(adapted.ring.go_on(3, PROMPT[-1], COUNT)) == with_adapter(model, folders["one"])
    disks.close()


def test_a_sequence_keeps_an_adapter_that_is_dropped_and_a_new_one_breaks_alone(
    model: Path, folders: dict[str, Path]
) -> None:
    adapted = Adapted(model, 1, **folders)
    adapted.join(1, "one")
    adapted.ring.prefill(1, PROMPT[:-1])
    adapted.set("two")
    assert adapted.ring.stages[0].adapters == {adapted.key("two")}
    assert tokens(adapted.ring.go_on(1, PROMPT[-1], COUNT)) == with_adapter(model, folders["one"])
    adapted.join(2, "one")  # travels on a frame that may have another sequence's step
    with pytest.raises(BadFrame, match="not loaded"):
        adapted.ring.decode(2, 1)
    assert adapted.answer("", 3) == with_adapter(model, None)


def test_a_stage_holds_the_tensors_of_its_layers_alone(model: Path, folders: dict[str, Path]) -> None:
    adapted = Adapted(model, 2, **folders)
    known = [read_adapter(name, folder, model, adapted.shape) for name, folder in folders.items()]
    for stage in adapted.ring.stages:
        held = sum(adapter.nbytes for adapter in stage._adapters.values())
        assert held == stage_bytes(known, stage.spec.layers) > 0
    assert stage_bytes(known, LayerRange(0, 4)) == sum(adapter.nbytes for adapter in known)


def refusal(model: Path, folder: Path) -> MacpipeError:
    with pytest.raises(MacpipeError) as caught:
        read_adapter("one", folder, model, read_shape(model, "tiny", None))
    return caught.value


def test_an_adapter_of_another_model_is_refused_in_a_sentence(model: Path, tmp_path: Path) -> None:
    wider = checkpoints.make("llama", tmp_path / "wider", intermediate_size=96)
    refused = refusal(model, make_adapter(wider, tmp_path / "a", 1))
    assert isinstance(refused, ModelDiffers)
    assert "is not for the model tiny" in refused.sentence
    deeper = checkpoints.make("llama", tmp_path / "deeper", layers=6)
    assert "no place for its tensor" in refusal(model, make_adapter(deeper, tmp_path / "b", 1)).sentence
    moe = checkpoints.make("qwen3_moe", tmp_path / "moe")
    assert isinstance(refusal(moe, make_adapter(model, tmp_path / "c", 1, num_layers=2)), ModelDiffers)


@pytest.mark.parametrize(
    ("change", "kind", "part"),
    [
        ({"fine_tune_type": "full"}, ModelUnsupported, "full fine-tune"),
        ({"fine_tune_type": "ia3"}, ModelUnsupported, "lora and dora are supported"),
        ({"lora_parameters": None}, MacpipeError, "lora_parameters"),
        ({"lora_parameters": {"rank": 0, "scale": 1.0}}, MacpipeError, "rank"),
        ({"lora_parameters": {"rank": 4, "alpha": 1.0}}, MacpipeError, "scale"),
        ({"lora_parameters": {"rank": 4, "scale": 1.0, "dropout": 1}}, MacpipeError, "dropout"),
        ({"num_layers": "all"}, MacpipeError, "num_layers"),
        ({"num_layers": 1}, ModelDiffers, "no place"),
    ],
)
def test_a_damaged_config_is_refused_in_a_sentence(
    model: Path, tmp_path: Path, change: dict[str, object], kind: type[MacpipeError], part: str
) -> None:
    import json

    folder = make_adapter(model, tmp_path / "a", 1)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refused = refusal(model, folder)
    assert isinstance(refused, kind)
    assert part in refused.sentence


def test_a_folder_without_an_adapter_is_refused_in_a_sentence(model: Path, tmp_path: Path) -> None:
    assert "no adapter folder" in refusal(model, tmp_path / "none").sentence
    assert "not an adapter" in refusal(model, tmp_path).sentence
    assert "not an adapter" in refusal(model, model).sentence
    folder = make_adapter(model, tmp_path / "a", 1)
    (folder / "adapters.safetensors").write_bytes(b"\x08")
    assert "cut short" in refusal(model, folder).sentence
    (folder / "adapters.safetensors").unlink()
    assert "adapters.safetensors" in refusal(model, folder).sentence


def test_the_fingerprint_depends_on_every_byte(model: Path, tmp_path: Path) -> None:
    first, second = make_adapter(model, tmp_path / "a", 1), make_adapter(model, tmp_path / "b", 1)
    assert open_adapter(first).fingerprint == open_adapter(second).fingerprint
    content = bytearray((second / "adapters.safetensors").read_bytes())
    content[-1] ^= 1
    (second / "adapters.safetensors").write_bytes(content)
    assert open_adapter(first).fingerprint != open_adapter(second).fingerprint
