"""A coordinator serves the models of a file, and takes up what changes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.cli.launch import fetch_served, find_small_model
from cluster.client import Client
from cluster.core.errors import ModelNotFound
from integration.daemons import Cluster, free_port, until, wait_serving

FILE = """
[[model]]
name = "big"
source = "faq"

[[model]]
name = "small"
source = "faq-draft"
aliases = ["claude-haiku-*"]
pin = true
"""


@pytest.mark.long
def test_models_of_a_file_are_served_and_changed_while_they_answer(tmp_path: Path) -> None:
    file, cluster = tmp_path / "models.toml", Cluster(tmp_path)
    file.write_text(FILE)
    port, http = free_port(), f"127.0.0.1:{free_port()}"
    try:
        cluster.worker("ada")
        daemon = cluster.serve(
            f"--models={file}", "--port", str(port), "--http", http, "--wait", "20", "--workers", "1"
        )
        wait_serving(address := f"127.0.0.1:{port}", daemon)
        with Client(address, timeout_s=30) as client:
            until(lambda: [one.id for one in client.models() if one.loaded] == ["big", "small"])
            layers = {one.name: one.stages[0].layers.end for one in client.cluster().deployments}
            assert layers == {"big": 8, "small": 2}
            assert [one.sentence for one in client.cluster().events] == ["loaded big", "loaded small"]
            for name, answers in (("", "big"), ("big", "big"), ("small", "small"), ("claude-haiku-4-5", "small")):
                answer = client.generate("Hi", max_tokens=2, model=name)
                assert answer.tokens
                assert answer.model == answers
            context = client.cluster().deployments[0].max_context
            assert client.unload("big") == ("big",)
            resting = fetch_served(http)
            assert (resting.model, resting.context) == ("big", context), "a request would load it"
            assert find_small_model(resting) == "small"
            file.write_text(FILE.replace("claude-haiku-*", "title"))
            until(lambda: client.cluster().deployments[1].aliases == ("title",))
            with pytest.raises(ModelNotFound, match="use big, small, title"):
                client.generate("Hi", max_tokens=2, model="claude-haiku-4-5")
            file.write_text(FILE.replace("pin = true", "pin = 1"))
            until(lambda: client.cluster().warnings)
            assert "pin must be true or false" in client.cluster().warnings[0]
            assert client.generate("Hi", max_tokens=2, model="title").tokens
            file.write_text(FILE.partition('[[model]]\nname = "small"')[0])
            until(lambda: not client.cluster().warnings)
            assert client.generate("Hi", max_tokens=2, model="small").tokens, "what is loaded stays"
            assert client.unload("small") == ("small",)
            assert not client.cluster().deployments
    finally:
        cluster.close()
