"""What the tests share: no network, no GPU needed, a small drawn dataset, and ../shared where there is one."""
import os
import socket
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads starve each other on two cores
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # on a CPU, wherever they run
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hypothesis  # noqa: E402
import pytest  # noqa: E402

import storyteller_utils as st  # noqa: E402

hypothesis.settings.register_profile("suite", database=None, derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")

def _local(address) -> bool:
    return not isinstance(address, tuple) or str(address[0]) in ("", "localhost", "127.0.0.1", "::1", "0.0.0.0")

@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    """Refuse every connection that leaves this machine, and be off Kaggle until a test says otherwise."""
    for name in ("connect", "connect_ex"):
        def guarded(self, address, real=getattr(socket.socket, name)):
            if not _local(address):
                raise OSError(f"a test tried to reach {address}")
            return real(self, address)
        monkeypatch.setattr(socket.socket, name, guarded)

    def resolve(host, *args, real=socket.getaddrinfo, **more):
        if host is not None and not _local((host.decode() if isinstance(host, bytes) else host,)):
            raise socket.gaierror(f"a test tried to look up {host}")
        return real(host, *args, **more)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(tmp_path_factory.getbasetemp() / "not-kaggle"))

@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, in which outputs/ appears."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder

@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos and weights beside the project; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder}, which holds real photos and weights, is not on this machine")
    return folder

@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """A small drawn dataset: 24 photos with five captions each. Copy it before changing it."""
    return st.draw_sample_dataset(tmp_path_factory.mktemp("drawn") / "sample", images=24, seed=5)
