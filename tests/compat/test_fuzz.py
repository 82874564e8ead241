"""Requests generated from our own description, valid and broken: each gets a timely answer, and never a 500."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cluster.api.http.errors import OLLAMA_ROUTES
from compat.conftest import Served
from compat.schemas import ANYTHING, WORDS, allowed

pytestmark = [pytest.mark.xdist_group("compat"), pytest.mark.timeout(2400)]

PATHS = (
    "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
    "/tokenize", "/api/chat", "/api/generate", "/api/show",
)  # fmt: skip
ANSWER_S = 60
LONGEST = {"max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 2, "n": 2}
"""What a request asks for is kept small: this is about the surface, not about speed."""
LENGTH = {"/v1/chat/completions": "max_tokens", "/v1/responses": "max_output_tokens", "/v1/messages": "max_tokens"}
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": WORDS})
PLAIN: Mapping[str, st.SearchStrategy[Any]] = {
    "messages": st.lists(TURN, min_size=1, max_size=3),
    "prompt": WORDS.filter(bool) | st.lists(st.integers(0, 500), min_size=1, max_size=4),
    "input": WORDS,
    "max_tokens": st.integers(1, 2),
}


def bodies(document: Mapping[str, Any], path: str) -> st.SearchStrategy[Any]:
    """Generate valid bodies, bodies with one or two more fields of the schema, broken ones, and anything else."""
    schemas = document["components"]["schemas"]
    reference = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    form = schemas[reference.rpartition("/")[2]]
    fields = {name: allowed(one, schemas) for name, one in form["properties"].items()}
    needed = {name: PLAIN[name] for name in PLAIN if name in fields} | {"model": st.sampled_from(["faq", "default"])}
    needed.pop({"/tokenize": "messages", "/v1/responses": "prompt"}.get(path, ""), None)
    plain = st.fixed_dictionaries(needed)
    changes = st.dictionaries(st.sampled_from(sorted(fields)), st.none(), min_size=1, max_size=2).flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
    )
    spoiling = st.dictionaries(st.sampled_from(sorted(fields)) | WORDS, ANYTHING, min_size=1, max_size=2)
    merged = st.builds(lambda body, more: {**body, **more}, plain, changes | changes | spoiling)
    return plain | merged | merged | merged | allowed(form, schemas) | ANYTHING


def small(body: Any, path: str) -> Any:
    """A body that cannot ask for much."""
    if not isinstance(body, dict):
        return body
    if path.startswith("/api/"):
        options = body.get("options") or {}
        return {**body, "options": {**options, "num_predict": 2}} if isinstance(options, dict) else body
    less = {k: min(v, LONGEST[k]) if k in LONGEST and type(v) is int else v for k, v in body.items()}
    length = LENGTH.get(path)
    return less if length is None or "max_completion_tokens" in less else {length: 2, **less}


@pytest.mark.parametrize("count", [50, pytest.param(850, marks=pytest.mark.long)])
@pytest.mark.parametrize("path", PATHS)
def test_nothing_that_is_sent_breaks_it(faq: Served, path: str, count: int) -> None:
    statuses: Counter[int] = Counter()
    with httpx.Client(base_url=faq.http, headers=faq.bearer, timeout=ANSWER_S) as client:
        document = client.get("/openapi.json").json()

        @settings(
            max_examples=count, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(bodies(document, path))
        def ask(body: Any) -> None:
            reply = client.post(path, content=json.dumps(small(body, path)).encode("utf-8", "surrogatepass"))
            statuses[reply.status_code] += 1
            assert reply.status_code in (200, 400, 404), reply.text
            if reply.status_code != 200:
                error = reply.json()["error"]
                assert error if path in OLLAMA_ROUTES else error["message"]
            elif reply.headers["content-type"].startswith("text/event-stream"):
                assert "server_error" not in reply.text
                assert "api_error" not in reply.text

        ask()
    print(f"{path}: {dict(statuses)}")
    assert statuses[200] > count // 20
    assert statuses[400] + statuses[404] > count // 20
    assert faq.live() == 0
