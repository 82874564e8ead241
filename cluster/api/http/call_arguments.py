"""Encodes the arguments of an answer's tool call as one object, for APIs that do not send them as text."""

from __future__ import annotations

from typing import Final

from pydantic_core import from_json

from cluster.api.http.json_response import Encoded, compact
from cluster.api.json_elements import count_elements
from cluster.core.errors import InvalidRequest, TooLarge

STREAM: Final = "stream the answer instead"


def encode_arguments(text: str, instead: str = STREAM) -> Encoded:
    """Return a call's arguments as JSON; the complete fields of a truncated answer, ``{}`` if there are none.

    It holds the interpreter for at most 50 ms, as parsing a request's body does. Raises ``InvalidRequest``, which says
    what to do ``instead``, if the arguments have more elements than a body may have.
    """
    try:
        count_elements(text)
        value = from_json(text, allow_partial=True, allow_inf_nan=False)
    except TooLarge as e:
        raise InvalidRequest(
            f"cannot send the arguments of a tool call as one object, because {e.sentence}; {instead}", field="stream"
        ) from None
    except ValueError:
        value = {}
    return Encoded(compact(value if isinstance(value, dict) else {}))
