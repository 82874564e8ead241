"""Certificates: what the authority signs, what is read from them, and what of a request is trusted."""

from __future__ import annotations

import ssl
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from cluster.core.errors import ClockWrong, ClusterDamaged, InvalidOption, InvalidRequest, NoCluster, Unauthenticated
from cluster.security.authority import Authority, cluster_id_of, read_authority
from cluster.security.cluster_folder import ClusterFolder
from cluster.security.keyring import Keyring, make_request
from cluster.security.roles import Party, Role, name_of, read_party

NOW = 1_800_000_000.0
DAY = 86_400.0
ID = "0123456789abcdef"


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    return ClusterFolder(tmp_path / "home", "lab")


@pytest.fixture
def authority(folder: ClusterFolder) -> Authority:
    return Authority.make(folder, NOW)


def admitted(folder: ClusterFolder, authority: Authority, role: Role, name: str = "mac-2") -> Keyring:
    key, csr = make_request()
    folder.keep(role, name, key=key, certificate=authority.sign(csr, role, ID, name, NOW))
    found = folder.keyring(role, name)
    assert found is not None
    return found


@pytest.mark.parametrize("role", Role)
def test_a_certificate_says_who_its_holder_is(folder: ClusterFolder, authority: Authority, role: Role) -> None:
    ring = admitted(folder, authority, role)
    serial = x509.load_pem_x509_certificate(ring.certificate).serial_number
    assert ring.party == Party(role, ID, authority.cluster_id, "mac-2", serial)
    assert read_party(ring.certificate) == ring.party
    assert (ring.not_before, ring.not_after) == (NOW - DAY, NOW + 90 * DAY)
    assert b"PRIVATE" not in repr(ring).encode()


def test_what_a_certificate_may_be_used_for(folder: ClusterFolder, authority: Authority) -> None:
    leaf = x509.load_pem_x509_certificate(admitted(folder, authority, Role.WORKER).certificate)
    assert isinstance(leaf.public_key(), ec.EllipticCurvePublicKey)
    usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical
    assert (usage.value.digital_signature, usage.value.key_cert_sign) == (True, False)
    limits = leaf.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (limits.critical, limits.value.ca) == (True, False)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [
        x509.DNSName(f"worker.{ID}.{authority.cluster_id}"),
        x509.DNSName(f"worker.{authority.cluster_id}"),
    ]
    own = x509.load_pem_x509_certificate(authority.certificate)
    assert own.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    own_usage = own.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (own_usage.key_cert_sign, own_usage.digital_signature, own_usage.crl_sign) == (True, False, False)
    assert (own.not_valid_after_utc.timestamp() - NOW) / DAY == 3650


def test_of_a_request_the_public_key_alone_is_believed(folder: ClusterFolder, authority: Authority) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    forged = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "admin")]))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(f"admin.{ID}.{authority.cluster_id}")]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, SHA256())
    )
    signed = authority.sign(forged.public_bytes(Encoding.PEM), Role.WORKER, ID, "mac-2", NOW)
    assert read_party(signed).role is Role.WORKER
    leaf = x509.load_pem_x509_certificate(signed)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert "admin" not in leaf.subject.rfc4514_string()


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)])
def test_a_request_for_another_kind_of_key_is_refused(authority: Authority, key: ec.EllipticCurvePrivateKey) -> None:
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, SHA256())
    with pytest.raises(InvalidRequest, match="EC P-256"):
        authority.sign(csr.public_bytes(Encoding.PEM), Role.WORKER, ID, "mac-2", NOW)


def test_a_request_whose_signature_is_wrong_is_refused(authority: Authority) -> None:
    _, one = make_request()
    der = bytearray(x509.load_pem_x509_csr(one).public_bytes(Encoding.DER))
    der[-1] ^= 1
    broken = x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)
    for bad in (broken, b"", b"nonsense", b"x" * 100_000):
        with pytest.raises(InvalidRequest):
            authority.sign(bad, Role.WORKER, ID, "mac-2", NOW)


def test_ids_and_names_that_are_none_are_refused(authority: Authority) -> None:
    _, csr = make_request()
    with pytest.raises(InvalidRequest, match="16 hex digits"):
        authority.sign(csr, Role.WORKER, "x.worker", "mac-2", NOW)
    with pytest.raises(InvalidOption, match="cannot be a member's name"):
        authority.sign(csr, Role.WORKER, ID, "../mac", NOW)


def test_an_authority_is_loaded_as_it_was_made(folder: ClusterFolder, authority: Authority) -> None:
    again = Authority.load(folder)
    assert again.certificate == authority.certificate
    assert again.fingerprint == authority.fingerprint
    shown = read_authority(authority.certificate)
    assert (shown.certificate, shown.fingerprint) == (authority.certificate, authority.fingerprint)
    assert (shown.cluster, shown.cluster_id) == ("lab", authority.cluster_id)
    assert authority.cluster_id == cluster_id_of(authority.fingerprint) == authority.fingerprint.hex()[:16]
    with pytest.raises(InvalidOption, match="already in a cluster named lab"):
        Authority.make(folder, NOW)
    folder.authority_key.write_bytes(make_request()[0])
    with pytest.raises(ClusterDamaged, match="belongs to another authority"):
        Authority.load(folder)


def test_without_the_authoritys_key_nobody_is_admitted(folder: ClusterFolder) -> None:
    with pytest.raises(NoCluster, match="macpipe init"):
        Authority.load(folder)


def test_what_came_along_with_an_authority_is_not_kept(authority: Authority, tmp_path: Path) -> None:
    foreign = Authority.make(ClusterFolder(tmp_path / "other", "lab"), NOW)
    kept = read_authority(authority.certificate + foreign.certificate)
    assert (kept.certificate, kept.fingerprint) == (authority.certificate, authority.fingerprint)


def test_a_leaf_is_no_authority(folder: ClusterFolder, authority: Authority) -> None:
    with pytest.raises(ValueError, match="not that of a macpipe authority"):
        read_authority(admitted(folder, authority, Role.WORKER).certificate)
    with pytest.raises(ValueError, match="too long"):
        read_authority(b"x" * 100_000)


def test_an_http_certificate_is_no_partys(authority: Authority) -> None:
    key, csr = make_request()
    signed = authority.sign_http(csr, ["mac-1.local", "192.168.1.11", "fd00::5"], NOW)
    with pytest.raises(Unauthenticated, match="not issued by a macpipe cluster"):
        read_party(signed)
    with pytest.raises(ValueError, match="belongs to another cluster"):
        Keyring.of(authority.certificate, signed, key)
    usages = x509.load_pem_x509_certificate(signed).extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usages) == [ExtendedKeyUsageOID.SERVER_AUTH]
    for bad in ([], [name_of(Role.ADMIN, authority.cluster_id, ID)], [name_of(Role.ADMIN, authority.cluster_id)]):
        with pytest.raises(InvalidRequest, match="host names of this Mac"):
            authority.sign_http(csr, bad, NOW)


def test_bytes_that_are_no_certificate_are_nobodys(authority: Authority) -> None:
    for bad in (b"", b"x" * 100_000, authority.certificate):
        with pytest.raises(Unauthenticated):
            read_party(bad)


def test_a_keyring_whose_files_do_not_belong_together_is_refused(
    folder: ClusterFolder, authority: Authority, tmp_path: Path
) -> None:
    ring = admitted(folder, authority, Role.CLIENT)
    foreign = Authority.make(ClusterFolder(tmp_path / "other", "lab"), NOW)
    with pytest.raises(ValueError, match="belongs to another certificate"):
        Keyring.of(ring.authority, ring.certificate, make_request()[0])
    with pytest.raises(ValueError, match="belongs to another cluster"):
        Keyring.of(foreign.certificate, ring.certificate, ring.key)


def test_a_reader_waits_for_the_second_file_of_a_renewal(folder: ClusterFolder, authority: Authority) -> None:
    admitted(folder, authority, Role.CLIENT)
    key, csr = make_request()
    folder.write(folder.party(Role.CLIENT) / "key.pem", key)
    fresh = authority.sign(csr, Role.CLIENT, ID, "mac-2", NOW + DAY)
    later = threading.Timer(0.2, folder.write, [folder.party(Role.CLIENT) / "certificate.pem", fresh])
    later.start()
    found = folder.keyring(Role.CLIENT)
    later.join()
    assert found is not None
    assert found.certificate == fresh


def test_a_clock_outside_a_certificates_time_is_named(folder: ClusterFolder, authority: Authority) -> None:
    ring = admitted(folder, authority, Role.WORKER)
    ring.check_clock(NOW - 600)
    ring.check_clock(NOW + 89 * DAY)
    with pytest.raises(ClockWrong, match=r"this Mac's clock says 2027-01-13 08:00 UTC.* starts 2027-01-14 08:00 UTC"):
        ring.check_clock(NOW - 2 * DAY)
    with pytest.raises(ClockWrong, match=r"expired 2027-04-15 .* join again with a new token"):
        ring.check_clock(NOW + 91 * DAY)


def test_python_verifies_what_the_authority_signs(folder: ClusterFolder) -> None:
    """Both sides over a memory wire, verified by OpenSSL in its strict mode: chain, usage and the name dialled."""
    import time

    authority = Authority.make(folder, time.time())
    key, csr = make_request()
    folder.keep(Role.WORKER, "mac-2", key=key, certificate=authority.sign(csr, Role.WORKER, ID, "mac-2", time.time()))
    here = folder.party(Role.WORKER, "mac-2")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(here / "certificate.pem", here / "key.pem")
    server.load_verify_locations(folder.authority)
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=str(folder.authority))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    client.load_cert_chain(here / "certificate.pem", here / "key.pem")
    assert shaken(server, client, name_of(Role.WORKER, authority.cluster_id, ID)) is None
    assert shaken(server, client, name_of(Role.WORKER, authority.cluster_id)) is None
    failed = shaken(server, client, name_of(Role.COORDINATOR, authority.cluster_id))
    assert isinstance(failed, ssl.SSLCertVerificationError)


def shaken(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> ssl.SSLError | None:
    """Return the client's view of a handshake over memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    there = server.wrap_bio(to_server, to_client, server_side=True)
    here = client.wrap_bio(to_client, to_server, server_hostname=name)
    for _ in range(4):
        for side in (here, there):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as e:
                return e
    return None
