"""Keys and certificates: who may read them, what they are good for, what stays."""

import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509.oid import ExtensionOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from deepfusion import cli
from deepfusion.flower.keys import make_keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    make_keys(folder, ("fusion.example.org", "10.77.0.1"), 2)
    return folder


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_each_machine_gets_a_folder_and_secrets_are_secret(folder: Path) -> None:
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "ca.crt",
        "ca.key",
        "server/ca.crt",
        "server/server.pem",
        "server/server.key",
        "server/nodes/device-00.pub",
        "server/nodes/device-01.pub",
        "device-00/ca.crt",
        "device-00/device.key",
        "device-01/ca.crt",
        "device-01/device.key",
    }
    for path in folder.rglob("*.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_the_certificate_names_the_server_and_its_own_loopback(folder: Path) -> None:
    found = certificate(folder / "server" / "server.pem").extensions
    names = found.get_extension_for_oid(ExtensionOID.SUBJECT_ALTERNATIVE_NAME).value
    assert isinstance(names, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "fusion.example.org"]
    addresses = [str(one) for one in names.get_values_for_type(x509.IPAddress)]
    assert addresses == ["127.0.0.1", "10.77.0.1"]


def test_it_is_verified_by_its_own_authority_and_by_no_other(folder: Path, tmp_path: Path) -> None:
    make_keys(tmp_path, (), 0)
    leaf = certificate(folder / "server" / "server.pem")

    def check(authority: Path) -> None:
        verifier = (
            PolicyBuilder()
            .store(Store([certificate(authority)]))
            .build_server_verifier(x509.DNSName("fusion.example.org"))
        )
        verifier.verify(leaf, [])

    check(folder / "device-00" / "ca.crt")
    with pytest.raises(VerificationError):
        check(tmp_path / "ca.crt")


def test_a_devices_key_is_the_one_that_the_server_knows(folder: Path) -> None:
    private = load_ssh_private_key((folder / "device-01" / "device.key").read_bytes(), None)
    public = load_ssh_public_key((folder / "server" / "nodes" / "device-01.pub").read_bytes())
    assert private.public_key() == public  # type: ignore[union-attr]


def test_more_devices_and_names_later_leave_the_rest_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert cli.main(["keys", str(folder), "--devices", "3"]) == 0
    assert "2 new files" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())
    assert cli.main(["keys", str(folder), "other.example.org", "--devices", "3"]) == 0
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"server.pem", "server.key"}
