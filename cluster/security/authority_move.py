"""Move the authority to another coordinator's Mac: encrypt it for that one, store it there, and give it up here.

A copy on two Macs does no harm: only the coordinator that the roster names as holder uses it. So each step may be
repeated after a crash. The module knows nothing of the RPCs between the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import Any, Final

import msgpack
from cryptography import x509
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from cluster.core.errors import Forbidden, InvalidOption, InvalidRequest, MemberNotFound
from cluster.security.authority import Authority
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import public_bytes
from cluster.security.limits import OFFER_S
from cluster.security.members import Member, Members
from cluster.security.roles import Party, Role, coordinators_named
from cluster.security.tokens import TokenStore

_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)


def seal_authority(folder: ClusterFolder, target: Member, public_key: bytes) -> bytes:
    """Return the authority's key and its open join tokens, encrypted for the key that ``target`` offered.

    Raises as ``Authority.load`` does, and ``InvalidRequest`` if the offered key is invalid.
    """
    authority = Authority.load(folder)
    try:
        recipient = X25519PublicKey.from_public_bytes(public_key)
    except ValueError as e:
        raise InvalidRequest(f"the key that {target.name} offers cannot be used: {e}") from e
    content = {"key": folder.authority_key.read_bytes(), "tokens": TokenStore(folder).export_open()}
    return _SUITE.encrypt(msgpack.packb(content), recipient, _purpose(authority.cluster_id, target.id))


def give_up_authority(folder: ClusterFolder, target: Member) -> None:
    """Name ``target`` in this machine's roster as the authority's holder, and delete the key here.

    ``target`` must have confirmed that it stored the key. Raises ``InvalidOption`` if it is this machine's coordinator.
    """
    _require_elsewhere(folder, target)  # the only key would be lost
    with folder.lock():
        Members(folder).name_authority_holder(target.id, locked=True)
        folder.authority_key.unlink(missing_ok=True)


class AuthorityReceiver:
    """Receives the authority on the coordinator's machine of ``folder``. Each offered key decrypts one message."""

    def __init__(self, folder: ClusterFolder, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._clock = folder, clock
        self._guard = Lock()
        self._offer: tuple[X25519PrivateKey, float] | None = None

    def offer(self) -> bytes:
        """Return a new public key, good for ``OFFER_S``. It replaces the one before."""
        with self._guard:
            key = X25519PrivateKey.generate()
            self._offer = key, self._clock() + OFFER_S
            return key.public_key().public_bytes_raw()

    def receive(self, sender: Party, encrypted: bytes) -> None:
        """Store the authority that ``sender`` encrypted, and name this machine's coordinator as its holder.

        Raises ``Forbidden`` if the roster does not name the sender as holder, or if the sender is this coordinator: one
        that is told that the key is stored deletes its own. Raises ``InvalidRequest`` if the message is not the
        authority of this cluster, encrypted for the last offer, ``MemberNotFound`` if this coordinator is unknown.
        """
        with self._folder.lock():
            members = Members(self._folder)
            require_holder(members, sender)
            own = _own(self._folder)
            if own.id == sender.id:
                raise Forbidden(f"{own.name} holds the authority already, and cannot move it to itself")
            key, tokens = self._decrypt(encrypted, own)
            self._check_key(key)
            TokenStore(self._folder).import_tokens(tokens, locked=True)
            self._folder.write(self._folder.authority_key, key)
            members.name_authority_holder(own.id, locked=True)

    def _decrypt(self, encrypted: bytes, own: Party) -> tuple[bytes, list[Any]]:
        """Return the authority's key (PEM) and the rows of its tokens."""
        with self._guard:
            offer, self._offer = self._offer, None
        if offer is None or self._clock() > offer[1]:
            raise InvalidRequest("the offer for the authority's key has expired; try again")
        try:
            content = msgpack.unpackb(_SUITE.decrypt(encrypted, offer[0], _purpose(own.cluster_id, own.id)))
            return bytes(content["key"]), list(content["tokens"])
        except (InvalidTag, ValueError, TypeError, KeyError) as e:
            raise InvalidRequest("this is not the authority, encrypted for this coordinator") from e

    def _check_key(self, pem: bytes) -> None:
        """Raise ``InvalidRequest`` unless ``pem`` is the private key of this cluster's authority."""
        certificate = x509.load_pem_x509_certificate(self._folder.authority.read_bytes())
        try:
            if public_bytes(load_pem_private_key(pem, None).public_key()) == public_bytes(certificate.public_key()):
                return
        except (ValueError, TypeError):
            pass
        raise InvalidRequest("the key that was sent is not that of this cluster's authority")


def require_holder(members: Members, sender: Party) -> None:
    """Raise ``Forbidden`` unless the roster names ``sender`` as the coordinator that holds the authority."""
    holder = members.authority_holder()
    if holder is None or (holder.role, holder.id) != (sender.role, sender.id):
        name = holder.name if holder else "no coordinator"
        raise Forbidden(f"{name} holds the authority of this cluster, so {sender.name} cannot move it")


def find_target(folder: ClusterFolder, name: str) -> Member:
    """Return the coordinator ``name``, or that of the Mac ``name``.

    Raises ``MemberNotFound``, and ``InvalidOption`` if it is this machine's own.
    """
    coordinators = (member for member in Members(folder).current() if member.role is Role.COORDINATOR)
    for target in coordinators_named(name, coordinators):
        _require_elsewhere(folder, target)
        return target
    raise MemberNotFound(
        f"no coordinator of this cluster is named {name}: `macpipe members` shows them, and `macpipe token create"
        " --role coordinator` admits another"
    )


def _require_elsewhere(folder: ClusterFolder, target: Member) -> None:
    """Raise ``InvalidOption`` if ``target`` is the coordinator of this machine."""
    own = folder.keyring(Role.COORDINATOR)
    if own is not None and own.party.id == target.id:
        raise InvalidOption(
            f"{target.name} is this Mac's own coordinator, which has the authority already; name another Mac:"
            " `macpipe members` shows them",
            field="name",
        )


def _own(folder: ClusterFolder) -> Party:
    ring = folder.keyring(Role.COORDINATOR)
    if ring is None:
        raise MemberNotFound(f"this Mac has no coordinator in cluster {folder.cluster}")
    return ring.party


def _purpose(cluster_id: str, target: str) -> bytes:
    """Return what both ends bind the encryption to: a message for another cluster or Mac does not decrypt."""
    return f"macpipe authority {cluster_id} {target}".encode()
