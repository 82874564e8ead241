"""The bundle for a bug report: what was read from this Mac, what was found, and the cluster's state, without secrets.

Only named facts go in: no log, no model file, no state file, no prompt. What commands wrote goes in after
``redact``, which removes keys, tokens, hardware addresses, serial numbers, and the user's name.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping
from typing import Final

MEMBERS: Final = ("README.txt", "findings.json", "readings.json", "cluster.json")
"""The files of a bundle."""
README: Final = """\
This bundle was made by `macpipe report` for a bug report. Look through it before you send it.

findings.json  what `macpipe doctor --json` found
readings.json  versions, free disk, network interfaces, and what macOS commands wrote about this Mac
cluster.json   the cluster's state as `macpipe status --json` shows it; {} if no coordinator answered

Prompts, answers, join tokens, API keys, certificates' keys, hardware addresses, serial numbers, and the user's name
are left out or replaced by [removed]. Names and addresses of the cluster's Macs, and the model's name, are in it.
"""
REMOVED: Final = "[removed]"

_SECRETS: Final = re.compile(
    r"-----BEGIN [A-Z ]{1,40}-----.{0,20000}?-----END [A-Z ]{1,40}-----"  # PEM
    r"|\bmpj1\.[1-9A-HJ-NP-Za-km-z]+"  # a join token
    r"|\bmpk_[0-9a-f]{4,}[A-Za-z0-9_-]*"  # an API key
    r"|\b(?:hf|sk|ghp|gho)[_-][A-Za-z0-9_-]{16,}"  # keys of other services
    r"|\bBearer\s+[^\s\"]+"
    r"|\b(?:[0-9a-fA-F]{1,2}:){5}[0-9a-fA-F]{1,2}\b"  # a hardware address
    r"|\bfe80::[0-9a-fA-F:]+"  # it contains a hardware address
    r"|\b(?:[0-9a-fA-F]{4}:){3}[0-9a-fA-F]{4}\b"  # a GUID of an RDMA device
    r"|\b[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}\b"  # a UUID of the hardware or of a network service
    r"|\b0x[0-9a-fA-F]{12,16}\b"  # a unique id of a Thunderbolt device
    r"|(?<=\s)[0-9a-fA-F]{16}\b"  # the same without colons
    r"|(?<=serial[_-]number)[^:,\n]{0,10}:[^,\n]*",
    re.DOTALL,
)


def redact(text: str, user: str, home: str) -> str:
    """Replace secrets, ids of hardware, the home folder and the user's name in ``text``."""
    cleaned = _SECRETS.sub(REMOVED, text)
    if len(home) > 1:
        cleaned = cleaned.replace(home, "~")
    return re.sub(rf"(?<![A-Za-z0-9]){re.escape(user)}(?![A-Za-z0-9])", REMOVED, cleaned) if user else cleaned


def pack_report(facts: Mapping[str, object], user: str, home: str) -> bytes:
    """Return a zip file of ``facts``: what belongs in each of ``MEMBERS`` but the README, as lists and dicts."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as bundle:
        bundle.writestr("README.txt", README)
        for name in MEMBERS[1:]:
            bundle.writestr(name, json.dumps(_redact_all(facts[name], user, home), ensure_ascii=False, indent=1))
    return packed.getvalue()


def _redact_all(value: object, user: str, home: str) -> object:
    """Redact each string within a value; what JSON does not know, such as an address, becomes a string.

    The encoded text would hide where a line begins.
    """
    match value:
        case None | bool() | int() | float():
            return value
        case dict():
            return {key: _redact_all(one, user, home) for key, one in value.items()}
        case list():
            return [_redact_all(one, user, home) for one in value]
    return redact(str(value), user, home)
