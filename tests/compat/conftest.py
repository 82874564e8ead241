"""Two workers and a coordinator with an HTTP port, shared by all compatibility tests, and two models in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from checkpoints import add_pooling, make
from cluster.client import Client
from cluster.security.keys import KeyScope, KeyStore
from integration.daemons import Cluster, free_port, serve_model

ALIAS = "gpt-4o-mini"
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
TEMPLATE = """
{%- if tools %}<|user|>tools: {{ tools | tojson }}<|end|>{% endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}<|assistant|>{{ m.reasoning_content or '' }}{{ m.content }}
{%- for tool_call in m.tool_calls or [] %}{% set tool_call = tool_call.function -%}
<tool_call>{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}</tool_call>
{%- endfor %}<|end|>
{%- else %}<|user|>{{ m.role }}: {{ m.content }}<|end|>
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|assistant|>{% if reasoning_effort == 'high' %}<think>{% endif %}{% endif %}"""
"""Tools as Hermes and Qwen write them, small."""


@dataclass(frozen=True)
class Served:
    """The coordinator's addresses."""

    grpc: str
    http: str
    tooled: Path
    key: str = "none"
    """What HTTP asks for; with ``--mtls`` one of the cluster's."""

    @property
    def bearer(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    @property
    def openai(self) -> str:
        return f"{self.http}/v1"

    def serve(self, model: str) -> None:
        """Load a model over both workers, unless it is there."""
        with Client(self.grpc, timeout_s=60) as client:
            if client.cluster().model != model:
                serve_model(client, model, 2)

    def live(self) -> int:
        """Sequences that stages hold and requests that wait."""
        with Client(self.grpc, timeout_s=10) as client:
            return len(client.cluster().requests)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests for the model with tools after the others, since each change of the model takes seconds."""
    places = [i for i, item in enumerate(items) if item.path.is_relative_to(Path(__file__).parent)]
    for place, item in zip(places, sorted((items[i] for i in places), key=_needs_tools), strict=True):
        items[place] = item


def _needs_tools(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and "tooled" in item.fixturenames


@pytest.fixture(scope="package")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    cluster = Cluster(tmp_path_factory.mktemp("compat"))
    try:
        for name in ("eve", "fay"):
            cluster.worker(name)
        http = f"127.0.0.1:{free_port()}"
        _, grpc = cluster.serving("faq", 2, "--http", http, "--served-model-name", ALIAS)
        tooled = make_tooled(tmp_path_factory.mktemp("tooled"))
        key = KeyStore(cluster.lead.folder).create("tests", KeyScope.ADMIN)[1] if cluster.mtls else "none"
        yield Served(grpc, f"http://{http}", tooled, key)
    finally:
        cluster.close()


def make_tooled(folder: Path) -> Path:
    """Create a random model whose template knows tools and reasoning, with a token for each of their marks."""
    make("llama", folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    add_pooling(folder)
    return folder


@pytest.fixture
def faq(served: Served) -> Served:
    """While the model that comes along is served."""
    served.serve("faq")
    return served


@pytest.fixture
def tooled(served: Served) -> Served:
    """While the model with tools is served."""
    served.serve(str(served.tooled))
    return served
