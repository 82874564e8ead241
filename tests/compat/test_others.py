"""langchain, the llm command and curl against real daemons, with the requests that they are known to send."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compat.conftest import Served

pytestmark = [pytest.mark.xdist_group("compat"), pytest.mark.timeout(120)]

HOP = "A hop is the journey of an activation from one stage to the next."


@pytest.mark.filterwarnings("ignore")
def test_langchain(faq: Served) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(base_url=faq.openai, api_key=faq.key, model="faq", temperature=0, max_tokens=19)  # type: ignore[call-arg,arg-type]
    assert model.invoke("What is a hop?").content == HOP
    assert "".join(str(chunk.content) for chunk in model.stream("What is a hop?")) == HOP
    assert [m.content for m in model.batch(["What is a hop?"] * 3)] == [HOP] * 3


@pytest.mark.filterwarnings("ignore")
def test_langchain_tools_and_structured_output(tooled: Served) -> None:
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI
    from pydantic import BaseModel

    @tool
    def switch(on: bool) -> str:
        """Switch the light."""
        return "done"

    class Switch(BaseModel):
        """A light."""

        on: bool

    model = ChatOpenAI(base_url=tooled.openai, api_key=tooled.key, model="default", temperature=0)  # type: ignore[call-arg,arg-type]
    calling = model.bind_tools([switch], tool_choice="switch", parallel_tool_calls=False).invoke("Light, please")
    assert calling.tool_calls[0]["name"] == "switch"
    assert isinstance(calling.tool_calls[0]["args"]["on"], bool)
    assert isinstance(model.with_structured_output(Switch).invoke("Light, please"), Switch)


def test_the_llm_command(faq: Served, tmp_path: Path) -> None:
    known = [{"model_id": "macpipe", "model_name": "faq", "api_base": faq.openai, "api_key_name": "openai"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(known))
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": faq.key}
    for streaming in ([], ["--no-stream"]):
        options = ["-o", "temperature", "0", "-o", "max_tokens", "19", *streaming]
        command = [sys.executable, "-m", "llm", "prompt", "-m", "macpipe", *options, "What is a hop?"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == HOP


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(faq: Served) -> None:
    def curl(*arguments: str) -> str:
        command = ["curl", "-sS", "-H", f"Authorization: {faq.bearer['authorization']}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout

    body = '{"messages": [{"role": "user", "content": "What is a hop?"}], "temperature": 0, "max_tokens": 19'
    whole = curl(f"{faq.openai}/chat/completions", "-d", body + "}")
    assert json.loads(whole)["choices"][0]["message"]["content"] == HOP
    assert whole.endswith("}\n")
    streamed = curl("-N", f"{faq.openai}/chat/completions", "-d", body + ', "stream": true}').split("\n\n")
    assert streamed[-2:] == ["data: [DONE]", ""]
    lines = curl(
        "-N", f"{faq.http}/api/generate", "-d", '{"model": "faq", "prompt": "A", "options": {"num_predict": 2}}'
    )
    assert [json.loads(line)["done"] for line in lines.splitlines()][-2:] == [False, True]
    assert json.loads(curl(f"{faq.http}/api/tags"))["models"][0]["name"] == "faq"
    assert json.loads(curl(f"{faq.http}/health"))["status"] == "serving"
    assert curl("-o", "/dev/null", "-w", "%{http_code}", "-X", "OPTIONS", f"{faq.openai}/responses") == "204"
    assert curl("-o", "/dev/null", "-w", "%{http_code}", "-I", f"{faq.openai}/models") == "200"
    assert curl("-w", "%{http_code}", "-H", "Origin: https://example.org", f"{faq.http}/health").endswith("\n403")
    assert curl("-w", "%{http_code}", "-H", "Host: example.org", f"{faq.http}/health").endswith("\n403")
    assert "macpipe_kv_reserved_bytes" in curl(f"{faq.http}/metrics")
