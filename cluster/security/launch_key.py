"""The API key that ``macpipe launch`` uses on the Mac that leads the cluster.

Its text is in a private file beside the cluster's own keys: who can read that folder can create keys anyway.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from typing import Final

from cluster.platform.private_files import not_written, open_regular_file, replace_file
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keys import KeyStore

_MAX_BYTES: Final = 256


def ensure_launch_key(folder: ClusterFolder) -> str:
    """Return the text of the key, which is created if there is none or it was revoked. ``folder`` leads its cluster.

    Raises ``Busy`` if the cluster has too many keys, and the error of a failed write.
    """
    keys = KeyStore(folder)
    with suppress(OSError), open_regular_file(folder.launch_key) as file:
        text = file.read(_MAX_BYTES).decode("ascii", "replace").strip()
        if keys.find(text):
            return text
    key, text = keys.create(f"launch-{secrets.token_hex(3)}")
    try:
        replace_file(folder.launch_key, f"{text}\n".encode())
    except OSError as e:
        keys.revoke(key.id)
        raise not_written(e, folder.launch_key, "the key") from None
    return text
