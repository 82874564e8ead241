"""Forms against generated bodies: each becomes a request, or a refusal with a sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from cluster.api.http.body import parse
from cluster.api.http.openapi import BODIES, description
from cluster.core.errors import InvalidRequest
from compat.test_fuzz import bodies
from effort import effort

DOCUMENT = description()


@pytest.mark.parametrize("path", [path for path, _, _ in BODIES])
def test_no_body_breaks_a_form(path: str) -> None:
    form = next(form for each, form, _ in BODIES if each == path)
    taken = []

    @settings(max_examples=effort(150, 150, 25), deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(bodies(DOCUMENT, path))
    def take_in(body: Any) -> None:
        try:
            parsed: Any = parse(json.dumps(body).encode("utf-8", "surrogatepass"), form)
            if path == "/tokenize":
                parsed.params()
            elif path == "/api/show":
                parsed.asked()
            elif path == "/v1/messages/count_tokens":
                parsed.conversation()
            else:
                parsed.params("id")
            taken.append(body)
        except InvalidRequest as e:
            assert e.sentence

    take_in()
    assert taken
