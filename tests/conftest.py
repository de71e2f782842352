"""What tests share: no network, no GPU needed, a small drawn dataset, ../shared if it exists."""

import hashlib
import importlib.util
import os
import socket
import sys
import time
from pathlib import Path

# Before torch: spinning threads, or more of them than cores, starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # on a CPU, wherever they run
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks"), str(ROOT / "space")]

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import sample  # noqa: E402
import storyteller_utils as st  # noqa: E402

OURS = (
    "storyteller_utils|training|extraction|caption_files|sample|app|space_app|attention|caption"
    "|caption_xmp|export|offline|publish|support|test_[a-z_]+"
)
# Ours are errors; those of others that we can do nothing about are named one by one.
WARNINGS = (
    f"error:::({OURS})\\Z",
    r"ignore:.*future.no_silent_downcasting:Warning:gradio\.queueing",
    r"ignore:The copy keyword is deprecated:Warning:gradio\.queueing",
    r"ignore:Use 'content=<...>':DeprecationWarning:httpx2\._models",
    r"ignore:Detected pickle protocol:UserWarning:torch\._weights_only_unpickler",
)


def pytest_configure(config):
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", line)
    config.addinivalue_line(
        "markers", "fast: those that mutants.py runs, about a minute on a quiet core"
    )


# The files that take minutes, longest first: two workers would end far apart otherwise.
LONG = ["training", "pipeline", "static", "datasets", "gpu", "kaggle", "faults", "bench"]


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONG)))


hypothesis.settings.register_profile("suite", database=None, derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")


def _local(address) -> bool:
    return not isinstance(address, tuple) or str(address[0]) in (
        "",
        "localhost",
        "127.0.0.1",
        "::1",
        "0.0.0.0",
    )


def _guarded(real):
    def connect(self, address):
        if not _local(address):
            raise OSError(f"a test tried to reach {address}")
        return real(self, address)

    return connect


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    """Refuse every connection that leaves this machine; be off Kaggle unless a test says so."""
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))

    def resolve(host, *args, real=socket.getaddrinfo, **more):
        if host is not None and not _local((host.decode() if isinstance(host, bytes) else host,)):
            raise socket.gaierror(f"a test tried to look up {host}")
        return real(host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setenv(
        "STORYTELLER_KAGGLE_INPUT", str(tmp_path_factory.getbasetemp() / "not-kaggle")
    )


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory, in which outputs/ appears."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photos and weights beside the project.

    Tests that need it are skipped without it.
    """
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder}, which holds real photos and weights, is not on this machine")
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """A small drawn dataset: 24 photos with five captions each. Copy it before changing it."""
    return sample.draw_dataset(tmp_path_factory.mktemp("drawn") / "sample", photos=24, seed=5)


# The page (test_space.py, test_browser.py)
# ----------------------------------------------------------------------------


def look_around(words):
    """Attention weights that wander over the 7x7 grid, for decoders that have none of their own."""
    y, x = np.mgrid[0:7, 0:7]
    maps = [
        np.exp(-((x - 6 * (i % 2)) ** 2 + (y - 6 * (i // 2 % 2)) ** 2) / 4.0)
        for i in range(len(words))
    ]
    return np.stack([m / m.sum() for m in maps])


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A captioner of 23 words with random weights, which never ends a sentence.

    Quick, and different for each photo.
    """
    torch.manual_seed(0)
    text = "a brown dog runs on the grass two men sit in snow red bird flies over blue water"
    vocab = st.Vocab([*st.SPECIAL, *sorted(set(text.split()))])
    backbone, sizes = st.load_backbone("efficientnet_lite0"), {"embedding": 16, "hidden": 32}
    width = backbone.width
    captioner = st.Captioner(
        "lstm", width, len(vocab), (torch.zeros(width), torch.ones(width)), **sizes
    )
    for parameter in captioner.parameters():
        parameter.data.mul_(3)
    captioner.decoder.output.bias.data[st.END] = -9
    config = {
        "decoder": "lstm",
        "sizes": sizes,
        "width": width,
        "regions": 1,
        "backbone": backbone.name,
        "backbone_sha256": backbone.sha256,
        "preprocessing": "squash",
        "precision": "auto",
        "dataset": {"name": "tiny", "photos": 10, "fingerprint": "0", "sample": False},
        "recipe": "original",
        "training": {
            "epochs": 1,
            "seed": 0,
            "photos": 8,
            "best_epoch": 1,
            "val_loss": 1.0,
            "val_cider": 0.1,
        },
        "feature_mean": [0.0] * width,
        "feature_deviation": [1.0] * width,
    }
    folder = tmp_path_factory.mktemp("tiny") / "model"
    st.Storyteller(config, vocab, captioner).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def load_app(tiny_model, tmp_path_factory):
    """Import space/app.py as a Space runs it, showing the tiny captioner."""

    def load():
        spec = importlib.util.spec_from_file_location("space_app", ROOT / "space/app.py")
        module = importlib.util.module_from_spec(spec)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MODEL", str(tiny_model))
            spec.loader.exec_module(module)
        return module

    os.environ["GRADIO_TEMP_DIR"] = str(tmp_path_factory.mktemp("gradio"))
    return load


@pytest.fixture(scope="session")
def app(load_app):
    return load_app()


@pytest.fixture(scope="session")
def address(app):
    """Where the page is served, to clients and to browsers."""
    _, address, _ = app.demo.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
    yield address
    app.demo.close()


@pytest.fixture(scope="session")
def client(address):
    from gradio_client import Client

    return Client(address, verbose=False)


# The Hub (test_space.py, test_static.py)


def listing(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


@pytest.fixture(autouse=True)
def onednn():
    """oneDNN, which training in float16 switches off on a CPU, is on again for the next test."""
    yield
    torch.backends.mkldnn.set_flags(True)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The real huggingface_hub client against a Hub on this machine; no pause between attempts."""
    from huggingface_hub import constants, file_download
    from local_hub import LocalHub

    hub = LocalHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    pages = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, file_download):  # 0.33 keeps it in both
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", pages, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # not in 0.33
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    yield hub
    hub.close()


def digests(files):
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def on_disk(folder):
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in listing(folder)
    }
