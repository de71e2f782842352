"""Build, check and push a captioner's web page, a Hugging Face Space, and the captioner itself.

    python space/publish.py NAME/storyteller [--static] [--private] [--model FOLDER]
        [--model-repo NAME/captioner]

A Gradio Space captions on the Hub's machine; a static one, which every account may have for free,
in the visitor's browser.

Needs a Hugging Face token with write access, in HF_TOKEN or saved by `hf auth login`.
"""

import argparse
import contextlib
import functools
import getpass
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # the module: one level up, in the repository and on Kaggle
import storyteller_utils as st  # noqa: E402

BUILDS = HERE.parent / "outputs"  # where the command builds
MODEL_FILES = ("config.json", "vocab.json", "model.safetensors", "README.md")
BACKBONE_FILE = "backbone.safetensors"  # unless the backbone's weights come with a package
APP_FILES = ("app.py", "attention.py", "style.css", "README.md", "requirements.txt")
PHOTOS = (".jpg", ".png")
BROWSER_FILES = (
    *("index.html", "style.css", "page.js", "captioner.js", "worker.js", "service-worker.js"),
    *("README.md", "runtime/LICENSE", "runtime/README.md", "runtime/ort.wasm.min.mjs"),
    *("runtime/ort-wasm-simd-threaded.mjs", "runtime/ort-wasm-simd-threaded.wasm.gz"),
)
BROWSER_MODEL_FILES = ("encoder.onnx", "step.onnx", "captioner.json", "README.md")
EXPORT_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Files by which a Space on the Hub is recognised as one of this project, of either kind.
OURS = {"storyteller_utils.py", "captioner.js"}
# Deleted on the Hub unless pushed again: files of an earlier captioner, or of the other kind.
REPLACED = [
    *("model/*", "examples/*", "runtime/*", "storyteller_utils.py"),
    *(name for name in (*APP_FILES, *BROWSER_FILES) if "/" not in name),
]
PYTHON_LEFTOVERS = {"__pycache__", ".gradio"}  # written by an app that ran in its folder
NOT_PUSHED_YET = {".gitattributes", "README.md"}  # all that a fresh Space holds
START_SECONDS = 1200  # installing torch takes the Hub some minutes
TOKENS = "https://huggingface.co/settings/tokens"
STORAGE = "https://huggingface.co/settings/storage"
ADVICE = {
    401: f'The token is wrong or has expired: make a new one with the role "write" at {TOKENS}',
    403: 'The token may not write there: use one with the role "write", and a name of your own.',
    404: "That name is somebody else's, or the token cannot see it: choose another name.",
    409: "That name is taken, or it was changed at the same moment: try again, or choose another.",
    429: "Too many requests: try again in an hour.",
    507: f"Your storage there is full: delete what you no longer need ({STORAGE}).",
}
STATIC_IS_FREE = (
    "Every account may have a static Space for free, which captions in the visitor's browser: "
    'space_kind="static" in 05, or python space/publish.py NAME/storyteller --static'
)
HTTP_LIBRARIES = {"httpx", "httpx2", "requests", "urllib3"}  # the client changed over the years

# Building -----------------------------------------------------------------------------------------


def space_files(space_dir: Path, model_dir: Path, module: Path) -> dict[str, Path]:
    """List the files that belong to a Space: name there -> path here.

    Other files (.env, caches) do not. Raises ArtifactError if any is missing.
    """
    photos = [p for p in sorted(space_dir.glob("examples/[!.]*")) if p.suffix in PHOTOS]
    own = [*APP_FILES, "examples/README.md", *(f"examples/{photo.name}" for photo in photos)]
    model = list(MODEL_FILES)
    if st.read_json(model_dir / "config.json")["backbone"] not in st.BACKBONES_FROM_PIP:
        model.append(BACKBONE_FILE)
    files = {name: space_dir / name for name in own}
    files["storyteller_utils.py"] = module
    files |= {f"model/{name}": model_dir / name for name in model}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise st.ArtifactError(
            f"The Space lacks {', '.join(missing)}. Restore space/ with git, or run 03 again; only "
            "a folder that build_space made can be pushed."
        )
    return files


def build_space(
    model_dir: Path | str,
    out_dir: Path | str,
    scores: dict | None = None,
    scored_on: str = "the test photos",
    space_dir: Path | str = HERE,
) -> Path:
    """Compose a Space, ready to push, and `space.zip` beside it.

    The package that its backbone needs is added to its requirements.

    model_dir  the captioner it shows, as `save_pretrained` writes it
    scores     {metric: {"value", "low", "high"}} of 04, for the model card that ships; None: those
               in its config
    scored_on  the photos that were scored
    space_dir  the repository's space/

    Returns `out_dir`, without an earlier build's files. ArtifactError if anything is missing or
    wrong, or if `out_dir` holds something else.
    """
    out, model_dir = Path(out_dir), Path(model_dir)
    files = space_files(Path(space_dir), model_dir, Path(st.__file__))
    contents = {name: path.read_bytes() for name, path in files.items()}
    config = st.read_json(model_dir / "config.json")
    package = st.BACKBONE_PACKAGES.get(config["backbone"].partition("/")[0])
    if package:
        contents["requirements.txt"] += f"{package}\n".encode()
    if scores is not None:
        config |= {"scores": scores, "scored_on": scored_on}
        contents["model/config.json"] = (json.dumps(config, ensure_ascii=False) + "\n").encode()
        contents["model/README.md"] = st.Storyteller.model_card(config).encode()
    _write_build(out, contents, entry="app.py")
    zip_space(out)
    return out


def static_files(browser_dir: Path, model_dir: Path, photos_dir: Path) -> dict[str, Path]:
    """List the files that belong to a static Space, as `space_files` does."""
    photos = [p for p in sorted(photos_dir.glob("[!.]*")) if p.suffix in PHOTOS]
    files = {name: browser_dir / name for name in BROWSER_FILES}
    files |= {f"model/{name}": model_dir / name for name in BROWSER_MODEL_FILES}
    files |= {f"examples/{p.name}": p for p in (*photos, photos_dir / "README.md")}
    if missing := [str(path) for path in files.values() if not path.is_file()]:
        raise st.ArtifactError(
            f"The static Space lacks {', '.join(missing)}. Restore space/ with git; only a folder "
            "that build_static_space made can be pushed."
        )
    return files


def build_static_space(model_dir: Path | str, out_dir: Path | str, int8: bool = False) -> Path:
    """Compose a static Space, ready to push, and a zip beside it: it captions in the browser.

    model_dir  the captioner it shows, as `save_pretrained` writes it
    int8       half the size, for phones; some captions differ

    Returns `out_dir`. ArtifactError if anything is missing, if the captioner cannot be exported or
    its captions change by that, or if `out_dir` holds something else.
    """
    return _write_static_space(Path(out_dir), _static_contents(model_dir, int8))


def build_static_if_possible(model_dir: Path | str, out_dir: Path | str) -> Path | None:
    """Compose a static Space as `build_static_space` does, or say what for one is missing."""
    try:
        contents = _static_contents(model_dir)
    except st.ArtifactError as error:
        print(f"No static Space: {error}")
        return None
    return _write_static_space(Path(out_dir), contents)  # a full disk is an error


def _static_contents(model_dir: Path | str, int8: bool = False) -> dict[str, bytes]:
    """Export a captioner and return the files of its static Space."""
    _check_packages()
    browser = find_browser()
    sys.path.append(str(browser))
    import export

    with tempfile.TemporaryDirectory() as exported:
        export.export(model_dir, exported, int8, HERE / "examples")
        files = static_files(browser, Path(exported), HERE / "examples")
        return {name: path.read_bytes() for name, path in files.items()}


def _write_static_space(out: Path, contents: dict[str, bytes]) -> Path:
    _write_build(out, contents, entry="index.html")
    zip_space(out)
    return out


def find_browser() -> Path:
    """Return the folder space/browser: beside this file, or in a dataset that Kaggle attached."""
    runtime = "runtime/ort.wasm.min.mjs"
    folders = [HERE / "browser"]
    if inputs := st.kaggle_input():
        folders += [path.parents[1] for path in sorted(inputs.rglob(runtime))]
    for folder in folders:
        if (folder / runtime).is_file() and (folder / "export.py").is_file():
            return folder
    raise st.ArtifactError(
        f"{HERE / 'browser'} is missing: it holds the page and onnxruntime-web. On Kaggle, add "
        "the repository's folder space/browser as a dataset."
    )


def _check_packages() -> None:
    lacking = [name for name in EXPORT_PACKAGES if importlib.util.find_spec(name) is None]
    if not lacking:
        return
    install = f"pip install {' '.join(EXPORT_PACKAGES)}"
    if not st.kaggle_input():
        raise st.ArtifactError(f"{', '.join(lacking)} must be installed first: {install}")
    try:
        find_browser()
        dataset = ""
    except st.ArtifactError:
        dataset = ", and add the repository's folder space/browser as a dataset"
    raise st.ArtifactError(
        f"{', '.join(lacking)} must be installed first: switch the internet on (Settings) and run "
        f"%{install} in a cell above this one (without internet, add a dataset with the wheels "
        f"that pip download {' '.join(EXPORT_PACKAGES)} fetches elsewhere, and run it with "
        f"--no-index --find-links=/kaggle/input/DATASET){dataset}."
    )


def _write_build(out: Path, contents: dict[str, bytes], entry: str) -> None:
    """Write a build's files, each whole or not at all: `entry` first, by which it is recognised."""
    ours = {name.split("/")[0] for name in contents} | PYTHON_LEFTOVERS
    there = {p.name for p in out.iterdir()} if out.is_dir() else set()
    strange = there - ours if entry in there else there
    if strange:
        raise st.ArtifactError(
            f"{out} holds files that no Space has ({', '.join(sorted(strange)[:5])}) and is left "
            "as it is. Move them away, or name another folder."
        )
    for name in (entry, *contents):
        with st.replacing(out / name) as temporary:
            temporary.write_bytes(contents[name])
    for path in [p for p in out.rglob("*") if p.is_file()]:
        if path.relative_to(out).as_posix() not in contents:
            path.unlink()  # an example or a backbone that the Space no longer has
    for leftover in PYTHON_LEFTOVERS:
        shutil.rmtree(out / leftover, ignore_errors=True)


def zip_space(folder: Path) -> Path:
    """Pack a Space into a zip beside it, the same bytes for the same files. Returns its path."""
    folder = folder.resolve()
    packed = folder.with_name(f"{folder.name}.zip")
    with st.replacing(packed) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
            entry = zipfile.ZipInfo(name)  # dated 1980, whatever the file is
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    return packed


# Checking -----------------------------------------------------------------------------------------


def check_space(folder: Path | str, timeout: float = 180) -> list[str]:
    """Start a Space in a new process without network, and caption two examples by its API.

    timeout  seconds it may take to start: the first import of torch is slow

    Returns the captions; ArtifactError, ending in the app's own log, if it has none. The process
    has ended either way.
    """
    folder = Path(folder).resolve()
    with tempfile.TemporaryDirectory() as scratch, _log_file(scratch) as log:
        port = _free_port()
        app = subprocess.Popen(
            [sys.executable, str(HERE / "offline.py"), str(os.getpid())],
            cwd=folder,
            env=_app_environment(port, scratch),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            client = _connect(app, f"http://127.0.0.1:{port}/", time.monotonic() + timeout)
            return _caption_examples(folder, client)
        except Exception as error:  # whatever it is, the app's log says why
            log.seek(0)
            tail = "\n".join(log.read().splitlines()[-30:])
            raise st.ArtifactError(
                f"The Space in {folder} does not work: {error}\nIts log ends:\n{tail}"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(app.pid, signal.SIGKILL)
            app.wait()


def _log_file(folder: str):
    return open(Path(folder) / "log", "w+", encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _app_environment(port: int, scratch: str) -> dict[str, str]:
    """Return the app's environment, without this session's proxies and tokens."""
    return {
        name: value
        for name, value in os.environ.items()
        if name != "MODEL" and not name.lower().endswith(("_proxy", "token"))
    } | {
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": scratch,
        "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _connect(app: subprocess.Popen, address: str, deadline: float):
    """Return a client of the app once it answers; ArtifactError if it ends or takes too long."""
    from gradio_client import Client

    direct = {"trust_env": False}  # no proxy
    while True:
        try:
            return Client(address, verbose=False, httpx_kwargs=direct, download_files=False)
        except Exception as error:  # many kinds, most of them meaning "not yet" while the app lives
            if app.poll() is not None:
                raise st.ArtifactError(f"it ended with status {app.returncode}") from None
            if time.monotonic() > deadline:
                reason = f"{type(error).__name__}: {error}"
                raise st.ArtifactError(f"it took too long to start ({reason})") from None
            time.sleep(0.2)


def _caption_examples(folder: Path, client) -> list[str]:
    from gradio_client import handle_file

    examples = sorted(p for p in folder.glob("examples/*") if p.suffix in PHOTOS)[:2]
    captions = [client.predict(handle_file(str(p)), api_name="/caption")[0] for p in examples]
    if not captions or not all(captions):
        raise st.ArtifactError(f"its captions for {len(examples)} examples are {captions}")
    return captions


# Publishing ---------------------------------------------------------------------------------------


def find_token() -> str:
    """Return a Hugging Face token: Kaggle's secret HF_TOKEN, else the login's, else a typed one.

    Raises ArtifactError, saying how to get one, if there is none and no terminal to ask at.
    """
    from huggingface_hub import get_token

    # Not on Kaggle, no such secret, no internet: the next source may work.
    with contextlib.suppress(Exception):
        from kaggle_secrets import UserSecretsClient

        return UserSecretsClient().get_secret("HF_TOKEN").strip()
    token = get_token()
    if not token and ("ipykernel" in sys.modules or (sys.stdin and sys.stdin.isatty())):
        # NotImplementedError: a notebook that nobody watches
        with contextlib.suppress(EOFError, NotImplementedError):
            token = getpass.getpass("Hugging Face token (stays hidden): ").strip()
    if not token:
        raise st.ArtifactError(
            f'There is no Hugging Face token. Make one with the role "write" at {TOKENS} and, on '
            "Kaggle, add it as the secret HF_TOKEN (Add-ons, Secrets), elsewhere run: hf auth login"
        )
    return token


def push_space(
    folder: Path | str,
    repo_id: str,
    token: str | None = None,
    private: bool = True,
    wait: bool = False,
) -> dict:
    """Create or update a Space on the Hub, in a single commit.

    folder   made by build_space or build_static_space
    repo_id  owner/name
    token    None: from `find_token`; it is neither shown nor kept
    wait     return only when the Space runs (a static one does at once)

    Returns {"address", "commit", "hardware"}, also left as `pushed.json` beside the folder;
    {"address": None, "zip"} if the account may not have such a Space. ArtifactError says what to do
    about anything else that the Hub refuses.
    """
    from huggingface_hub import HfApi

    folder = Path(folder).resolve()
    token = token or find_token()
    static = (folder / "index.html").is_file()
    if static:
        files = static_files(folder, folder / "model", folder / "examples")
    else:
        files = space_files(folder, folder / "model", folder / "storyteller_utils.py")
    api = HfApi(token=token)
    hardware = _ask_hub(lambda: _create_space(api, repo_id, private, static), repo_id, token)
    if hardware is None:
        packed = zip_space(folder)
        print(f"Nothing was published. {packed} holds the whole Space, to run or upload elsewhere.")
        print(STATIC_IS_FREE)
        return {"address": None, "zip": str(packed)}
    commit = _ask_hub(lambda: _upload(api, folder, repo_id, list(files)), repo_id, token)
    address = f"{api.endpoint}/spaces/{repo_id}"
    pushed = {"address": address, "commit": commit.oid, "hardware": hardware}
    st.write_json(folder.with_name("pushed.json"), pushed)
    print(f"{address} ({hardware})")
    if wait and not static:
        _wait_until_running(
            lambda: _ask_hub(lambda: api.get_space_runtime(repo_id), repo_id, token), address
        )
    return pushed


def _upload(api, folder: Path, repo_id: str, files: list[str]):
    return api.upload_folder(
        repo_id=repo_id,
        repo_type="space",
        folder_path=folder,
        allow_patterns=files,
        delete_patterns=REPLACED,
        commit_message="Show this captioner",
    )


def _wait_until_running(runtime: Callable, address: str) -> None:
    """Wait until a Space runs; ArtifactError when it fails or takes more than START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        stage = runtime().stage
        stage = getattr(stage, "value", stage)  # a string in some clients, an enum in others
        if stage == "RUNNING":
            return
        if stage.endswith("ERROR") or stage == "NO_APP_FILE" or time.monotonic() > deadline:
            raise st.ArtifactError(
                f"The Space is online but does not run ({stage}): {address}?logs=container"
            )
        time.sleep(5)


def push_kind(
    kind: str,
    space: Path | str,
    static: Path | str | None,
    repo_id: str,
    token: str | None = None,
    private: bool = True,
) -> dict:
    """Push a Space of a kind, as `push_space` does.

    kind    "gradio"; "static"; "both": the Gradio Space or, if the Hub asks for a paid plan, the
            static one under the same name
    static  made by build_static_space; None: there is none
    """
    if kind == "static" and static is None:
        raise st.ArtifactError("There is no static Space to push: see above why.")
    if kind == "static":
        return push_space(static, repo_id, token, private)
    pushed = push_space(space, repo_id, token, private)
    if pushed["address"] is None and kind == "both" and static is not None:
        return push_space(static, repo_id, token, private)
    return pushed


def _create_space(api, repo_id: str, private: bool, static: bool) -> str | None:
    """Create the Space unless it exists; ArtifactError if it is another project's.

    Returns its hardware, None if the account may have none.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    with contextlib.suppress(RepositoryNotFoundError):
        space = api.space_info(repo_id)
        files = {sibling.rfilename for sibling in space.siblings or []}
        if not files & OURS and files - NOT_PUSHED_YET:
            raise st.ArtifactError(
                f"The name {repo_id} is taken by another Space. Choose another, or delete that one."
            )
        return f"hardware as before, still {'private' if space.private else 'public'}"
    if static:
        api.create_repo(
            repo_id, repo_type="space", space_sdk="static", private=private, exist_ok=True
        )
        return "the visitor's browser"
    if _create_on(api, repo_id, private, None):
        return "cpu-basic"
    print(
        "The Hub asks for a paid plan for cpu-basic hardware (402). Trying ZeroGPU, which is free."
    )
    if _create_on(api, repo_id, private, "zero-a10g"):
        return "zero-a10g"
    print("The Hub asks for a paid plan for ZeroGPU too (402). Packing the folder instead.")
    return None


def _create_on(api, repo_id: str, private: bool, hardware: str | None) -> bool:
    """Create a Space on some hardware (None: cpu-basic). Returns whether that is free."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api.create_repo(
            repo_id,
            repo_type="space",
            space_sdk="gradio",
            private=private,
            exist_ok=True,
            space_hardware=hardware,
        )
    except HfHubHTTPError as error:
        if error.response.status_code != 402:
            raise
        return False
    return True


def push_model(
    folder: Path | str, repo_id: str, token: str | None = None, private: bool = True
) -> dict:
    """Create or update a model on the Hub: a captioner's folder, its scores in the metadata.

    Returns {"address", "commit"}; `Storyteller.from_pretrained(repo_id)` loads it. Arguments,
    errors: as `push_space`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder)
    token = token or find_token()
    api = HfApi(token=token)
    names = [name for name in (*MODEL_FILES, BACKBONE_FILE) if (folder / name).is_file()]
    files = {name: str(folder / name) for name in names}
    files["README.md"] = _scored_card(folder).encode()
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    _ask_hub(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id, token)
    commit = _ask_hub(
        lambda: api.create_commit(repo_id, operations, commit_message="This captioner"),
        repo_id,
        token,
    )
    return {"address": f"{api.endpoint}/{repo_id}", "commit": commit.oid}


def _scored_card(folder: Path) -> str:
    """Return a captioner's model card with its scores in the metadata, where the Hub reads them."""
    from huggingface_hub import EvalResult, ModelCard

    config = st.read_json(folder / "config.json")
    card = ModelCard.load(folder / "README.md")
    dataset = config["dataset"]["name"]
    card.data.pipeline_tag = "image-to-text"
    card.data.model_name = "Neural Storyteller"
    results = [
        EvalResult(
            task_type="image-to-text",
            dataset_type=re.sub(r"\W+", "-", dataset.lower()),
            dataset_name=dataset,
            dataset_split=config.get("scored_on"),
            metric_type=name.lower(),
            metric_name=name,
            metric_value=round(score["value"], 4),
        )
        for name, score in config.get("scores", {}).items()
    ]
    card.data.eval_results = results or None
    return str(card)


def _ask_hub(call: Callable, repo_id: str, token: str, attempts: int = 4):
    """Call the Hub, again after dropped connections; ArtifactError for what it refuses."""
    from huggingface_hub.errors import HfHubHTTPError

    for attempt in range(1, attempts + 1):
        try:
            return call()
        except HfHubHTTPError as error:
            reason = _refusal(error, repo_id, token)
        except Exception as error:
            if not _is_dropped_connection(error):
                raise
            reason = f"the connection broke ({type(error).__name__})."
        if attempt < attempts:
            print(f"Trying again: {reason}")
            time.sleep(2**attempt / 2)
    raise st.ArtifactError(
        f"{repo_id} was not changed; {attempts} times in a row {reason} Try again later."
    )


def _refusal(error, repo_id: str, token: str) -> str:
    """Return the Hub's reason, without the token; ArtifactError if retrying cannot help."""
    status = error.response.status_code
    said = (error.server_message or str(error)).replace(token, "***")
    reason = f"the Hub answered {status}: {said[:300].rstrip('.')}."
    if status < 500 or status == 507:
        storage = re.search("storage|quota", said, re.I)
        advice = ADVICE[507] if storage else ADVICE.get(status, "")
        raise st.ArtifactError(f"{repo_id} was not changed; {reason} {advice}") from None
    return reason


def _is_dropped_connection(error: Exception) -> bool:
    """Return whether this is a network error of any HTTP library that the client may use."""
    libraries = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(libraries & HTTP_LIBRARIES)


def make_server(
    folder: Path, port: int = 0, headers: dict[str, str] | None = None
) -> ThreadingHTTPServer:
    """Return a server of a static Space on this machine, at any free port unless one is named."""

    class Handler(SimpleHTTPRequestHandler):
        # Without this type, which some systems do not know, a browser runs no module.
        extensions_map = SimpleHTTPRequestHandler.extensions_map | {".mjs": "text/javascript"}

        def end_headers(self):
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(folder))
    return ThreadingHTTPServer(("127.0.0.1", port), handler)


def serve(folder: Path, port: int = 8000) -> None:
    """Serve a static Space on this machine until Ctrl-C."""
    with make_server(folder, port) as server:
        print(f"http://127.0.0.1:{server.server_port} (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def main(argv: list[str] | None = None) -> None:
    """Build, check and push a Space, and with --model-repo its captioner as a model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("repo_id", nargs="?", metavar="NAME/storyteller", help="the Space")
    parser.add_argument("--demo", action="store_true", help="serve the static Space here instead")
    parser.add_argument("--static", action="store_true", help="captions in the visitor's browser")
    parser.add_argument("--private", action="store_true", help="show it to nobody else")
    parser.add_argument(
        "--model",
        default=st.Storyteller.default_folder(),
        metavar="FOLDER",
        help="default: %(default)s",
    )
    parser.add_argument("--model-repo", metavar="NAME/captioner", help="push the captioner too")
    arguments = parser.parse_args(argv)
    if not arguments.repo_id and not arguments.demo:
        parser.error("NAME/storyteller is needed: the name of the Space")
    try:
        if arguments.demo:
            return serve(build_static_space(arguments.model, BUILDS / "static"))
        if arguments.static:
            space = build_static_space(arguments.model, BUILDS / "static")
        else:
            space = build_space(arguments.model, BUILDS / "space")
            print(*check_space(space), sep="\n")
        push_space(space, arguments.repo_id, private=arguments.private)
        if arguments.model_repo:
            model = push_model(arguments.model, arguments.model_repo, private=arguments.private)
            print(model["address"])
    except (st.ArtifactError, ValueError) as error:
        sys.exit(f"publish.py: {error}")


if __name__ == "__main__":
    main()
