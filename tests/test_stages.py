"""Stages, manifests, settings, the worker's launch, precision, and what importing the module costs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import storyteller_utils as st
from support import begin_stage, parameters

pytestmark = pytest.mark.fast

FEATURES, VOCAB, TRAIN, EVALUATE, DEPLOY = st.STAGES


@pytest.fixture
def data(here, drawn) -> str:
    return str(shutil.copytree(drawn, here / "data"))


def finished(stage: str, data: str, text: str = "one\n", read: tuple = (), **settings) -> dict:
    """Run a stage that leaves two files, and return its manifest."""
    run = begin_stage(stage, dataset_dir=data, **settings)
    for earlier in read:
        run.read(earlier)
    (run.out / "model").mkdir(exist_ok=True)
    (run.out / "model/words.json").write_text("{}")
    (run.out / "table.csv").write_text(text)
    run.finish(rows=1)
    return json.loads((run.out / "manifest.json").read_text())


# What finish writes


def test_a_stage_is_finished_by_its_manifest_alone(here, data):
    run = begin_stage(VOCAB, dataset_dir=data)
    (run.out / "table.csv").write_text("one\n")
    with pytest.raises(st.ArtifactError, match=rf"{VOCAB} stopped before.*Run {VOCAB}\.ipynb"):
        st.find_artifact(VOCAB)
    run.finish(rows=3)
    artifact = st.find_artifact(VOCAB)
    assert (
        artifact.manifest["facts"] == {"rows": 3}
        and (artifact / "table.csv").read_text() == "one\n"
    )


def test_the_manifest_is_written_last_and_whole(here, data, monkeypatch):
    run = begin_stage(VOCAB, dataset_dir=data)
    (run.out / "table.csv").write_text("one\n")

    def refuse(*paths):
        raise OSError("disk full")

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", refuse)
        broken.setattr(os, "rename", refuse)
        with pytest.raises(OSError, match="disk full"):
            run.finish()
    assert sorted(path.name for path in run.out.iterdir()) == ["status.json", "table.csv"]


def test_the_manifest_lists_every_file_with_its_size_and_sha256(here, data):
    manifest = finished(VOCAB, data)
    listed = subprocess.run(
        ["sha256sum", "table.csv", "model/words.json"],
        cwd=here / "outputs" / VOCAB,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == dict(
        zip(listed[1::2], listed[::2])
    )
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        "table.csv": 4,
        "model/words.json": 2,
    }


def test_hidden_leftovers_are_no_part_of_an_artifact(here, data):
    run = begin_stage(VOCAB, dataset_dir=data)
    for name in (".DS_Store", "table.csv"):
        (run.out / name).write_text("x")
    run.finish()
    (run.out / ".DS_Store").unlink()
    assert set(st.find_artifact(VOCAB).manifest["files"]) == {"table.csv"}


def test_finishing_twice_leaves_a_valid_artifact(here, data):
    run = begin_stage(VOCAB, dataset_dir=data)
    (run.out / "table.csv").write_text("one\n")
    run.finish()
    (run.out / "table.csv").write_text("two\n")
    run.finish()  # someone ran the notebook's last cells again
    assert set(st.find_artifact(VOCAB).manifest["files"]) == {"table.csv"}


def test_the_same_bytes_are_the_same_edition_wherever_the_dataset_lies(here, data):
    first = finished(VOCAB, data)
    shutil.copytree(data, here / "moved" / "photos")
    moved = finished(VOCAB, str(here / "moved" / "photos"))
    assert moved["edition"] == first["edition"] and moved["settings"] != first["settings"]


@pytest.mark.parametrize("change", [{"text": "two\n"}, {"seed": 14}, {"min_count": 2}])
def test_other_bytes_or_settings_are_another_edition(here, data, change):
    assert finished(VOCAB, data)["edition"] != finished(VOCAB, data, **change)["edition"]


def test_another_dataset_is_another_edition(here, data):
    first = finished(VOCAB, data)["edition"]
    Path(data, "Images/scene_0001.jpg").unlink()
    assert finished(VOCAB, data)["edition"] != first


def test_restarting_a_stage_makes_it_unfinished(here, data):
    finished(VOCAB, data)
    st.find_artifact(VOCAB)
    begin_stage(VOCAB, dataset_dir=data)
    with pytest.raises(st.ArtifactError, match=f"{VOCAB} stopped before it was finished"):
        st.find_artifact(VOCAB)


def test_settings_that_are_refused_leave_the_finished_stage_alone(here, data):
    finished(VOCAB, data)
    with pytest.raises(ValueError):
        begin_stage(VOCAB, dataset_dir=data, min_count=0)
    st.find_artifact(VOCAB)


def test_what_finish_prints_names_the_files_and_the_next_notebook(here, data, capsys):
    finished(VOCAB, data)
    assert capsys.readouterr().out.endswith(
        "02_vocab now holds model, table.csv.\nNext: 03_train_dual_t4.ipynb.\n"
    )


# What a later stage refuses


def test_an_artifact_of_another_dataset_is_refused(here, data, drawn):
    finished(VOCAB, data)
    Path(data, "Images/scene_0001.jpg").unlink()
    run = begin_stage(TRAIN, dataset_dir=data)
    with pytest.raises(
        st.ArtifactError,
        match=rf"(?s){VOCAB} was made from .*24 photos.*23 photos.*Run {VOCAB}\.ipynb again",
    ):
        run.read(VOCAB)


def test_an_artifact_built_on_another_edition_is_refused(here, data):
    finished(FEATURES, data)
    finished(VOCAB, data)
    finished(TRAIN, data, read=(FEATURES, VOCAB))
    run = begin_stage(EVALUATE, dataset_dir=data)
    for stage in (FEATURES, VOCAB, TRAIN):
        run.read(stage)
    finished(VOCAB, data, text="two\n")
    run = begin_stage(EVALUATE, dataset_dir=data)
    run.read(FEATURES)
    run.read(VOCAB)
    with pytest.raises(
        st.ArtifactError,
        match=rf"{TRAIN} was built on another edition of {VOCAB} .*Run {TRAIN}\.ipynb again",
    ):
        run.read(TRAIN)


def test_the_order_of_reading_does_not_matter_to_the_refusal(here, data):
    finished(FEATURES, data)
    finished(TRAIN, data, read=(FEATURES,))
    finished(FEATURES, data, text="two\n")
    run = begin_stage(EVALUATE, dataset_dir=data)
    run.read(TRAIN)
    with pytest.raises(
        st.ArtifactError, match=rf"{TRAIN} was built on another edition of {FEATURES}"
    ):
        run.read(FEATURES)


def test_05_refuses_a_score_of_another_model(here, data):
    finished(TRAIN, data)
    finished(EVALUATE, data, read=(TRAIN,))
    finished(TRAIN, data, text="two\n")
    run = begin_stage(DEPLOY)
    run.read(TRAIN)
    with pytest.raises(st.ArtifactError, match=rf"Run {EVALUATE}\.ipynb again"):
        run.read(EVALUATE)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path):
    data = bytearray(path.read_bytes())
    data[1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage", [_truncate, _flip, Path.unlink], ids=["truncated", "flipped", "removed"]
)
@pytest.mark.parametrize("name", ["table.csv", "model/words.json"])
def test_a_damaged_file_is_refused_by_name_with_the_stage_to_run(here, data, damage, name):
    finished(VOCAB, data)
    run = begin_stage(TRAIN, dataset_dir=data)
    damage(here / "outputs" / VOCAB / name)
    artifact = run.read(VOCAB)
    with pytest.raises(st.ArtifactError, match=rf"{VOCAB}/{name} .*Run {VOCAB}\.ipynb again"):
        artifact / name
    with pytest.raises(st.ArtifactError, match=name):
        artifact / name.split("/")[0]
    assert (artifact / next(iter({"table.csv", "model/words.json"} - {name}))).is_file()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"stage": "01_extract_features"}'])
def test_a_broken_manifest_is_refused_by_name(here, data, text):
    finished(VOCAB, data)
    (here / "outputs" / VOCAB / "manifest.json").write_text(text)
    with pytest.raises(st.ArtifactError, match=f"{VOCAB}/manifest.json"):
        st.find_artifact(VOCAB)


# Kaggle's inputs


def mount(here, data, where: str) -> Path:
    """Leave what 02 makes in a folder below Kaggle's inputs, as another notebook's output."""
    finished(VOCAB, data)
    return Path(shutil.move(here / "outputs", here / "input" / where / "outputs")) / VOCAB


@pytest.mark.parametrize("where", ["vocab", "notebooks/me/vocab", "a/b/c/d/e"])
def test_an_earlier_output_is_found_at_any_depth_below_kaggles_inputs(
    here, data, monkeypatch, where
):
    folder = mount(here, data, where)
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(here / "input"))
    run = begin_stage(TRAIN, dataset_dir=data)
    assert run.read(VOCAB).folder.resolve() == folder.resolve()


def test_several_outputs_of_a_stage_are_listed_and_none_is_chosen(here, data, monkeypatch):
    folders = [mount(here, data, "one"), mount(here, data, "notebooks/me/two")]
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(here / "input"))
    with pytest.raises(st.ArtifactError, match=f"2 outputs of {VOCAB}") as error:
        st.find_artifact(VOCAB)
    assert all(str(folder) in str(error.value) for folder in folders)


def test_no_output_of_a_stage_says_where_it_was_looked_for_and_what_to_run(here, data, monkeypatch):
    (here / "input/some-dataset").mkdir(parents=True)
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(here / "input"))
    with pytest.raises(
        st.ArtifactError,
        match=f"(?s)No finished {VOCAB} in outputs or under {here}/input.*Run {VOCAB}.ipynb",
    ):
        st.find_artifact(VOCAB)


def test_this_sessions_own_output_goes_before_an_attached_one(here, data, monkeypatch):
    mount(here, data, "old")
    manifest = finished(VOCAB, data, text="new\n")
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(here / "input"))
    assert st.find_artifact(VOCAB).manifest["edition"] == manifest["edition"]


# start


@pytest.mark.parametrize("beside", ["work/notebooks", "", "elsewhere"])
def test_outputs_are_the_projects_wherever_the_notebook_was_started(
    tmp_path, data, monkeypatch, beside
):
    project = tmp_path / "work"
    monkeypatch.setattr(st, "__file__", str(project / "storyteller_utils.py"))
    (tmp_path / beside).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / beside)
    code = {"__vsc_ipynb_file__": "02_vocab.ipynb"} if beside == "elsewhere" else {}
    st.start(VOCAB, parameters(VOCAB, dataset_dir="data") | code)
    assert Path.cwd() == project and (project / "outputs" / VOCAB).is_dir()


def test_a_folder_called_notebooks_of_another_project_is_left_alone(here, data, monkeypatch):
    (here / "notebooks").mkdir()
    monkeypatch.chdir(here / "notebooks")
    begin_stage(VOCAB, dataset_dir=data)
    assert Path.cwd() == here / "notebooks" and (here / "notebooks/outputs" / VOCAB).is_dir()


def test_the_backbone_follows_from_the_dataset(here, data):
    assert begin_stage(FEATURES, dataset_dir=data).settings.backbone == "resnet50"
    assert (
        begin_stage(FEATURES, dataset_dir=data, backbone="efficientnet_lite0").settings.backbone
        == "efficientnet_lite0"
    )
    shutil.copytree(data, "outputs/sample_dataset")
    assert begin_stage(FEATURES).settings.backbone == "efficientnet_lite0"


# Settings


@pytest.mark.parametrize(
    "stage, setting, value",
    [
        (FEATURES, "regions", 7),
        (FEATURES, "regions", "1"),
        (FEATURES, "backbone", "resnet18"),
        (FEATURES, "batch_size", 0),
        (FEATURES, "preprocessing", "stretch"),
        (FEATURES, "max_photos", -1),
        (FEATURES, "precision", "int8"),
        (FEATURES, "batch_size", 2.5),
        (FEATURES, "batch_size", True),
        (FEATURES, "dataset_dir", None),
        (FEATURES, "dataset_dir", Path("data")),
        (VOCAB, "min_count", 0),
        (VOCAB, "seed", "13"),
        (TRAIN, "recipe", "bset"),
        (TRAIN, "learning_rate", 2),
        (TRAIN, "learning_rate", float("nan")),
        (TRAIN, "epochs", -1),
        (TRAIN, "dropout", 1.0),
        (TRAIN, "accumulate", 0),
        (TRAIN, "select_by", "bleu"),
        (EVALUATE, "split", "dev"),
        (EVALUATE, "beam_width", 0),
        (EVALUATE, "length_preference", -1.0),
        (DEPLOY, "space_id", "just-a-name"),
        (DEPLOY, "private", "yes"),
        (DEPLOY, "private", 1),
        (FEATURES, "flips", "no"),
        (TRAIN, "dropout", -1),
        (TRAIN, "seed", None),
    ],
)
def test_a_setting_that_is_not_allowed_is_named_with_its_value(here, stage, setting, value):
    with pytest.raises(ValueError) as error:
        begin_stage(stage, **{setting: value})
    assert setting in str(error.value) and repr(value) in str(error.value)
    assert not (here / "outputs").exists()


@pytest.mark.parametrize("stage", st.STAGES)
def test_an_unknown_setting_is_refused_by_its_name(here, stage):
    with pytest.raises((ValueError, TypeError), match="bacth_size"):
        begin_stage(stage, bacth_size=3)


@pytest.mark.parametrize("stage", st.STAGES)
def test_every_stage_has_settings_whose_defaults_are_allowed(stage):
    settings = st.SETTINGS[stage](**parameters(stage))
    with pytest.raises(AttributeError):
        settings.seed = 1


# Writing


def test_a_file_is_replaced_whole_or_not_at_all(here):
    st.write_text("note.txt", "old")
    with pytest.raises(KeyboardInterrupt), st.replacing("note.txt") as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert Path("note.txt").read_text() == "old" and os.listdir() == ["note.txt"]
    st.write_text("note.txt", "new")
    assert Path("note.txt").read_text() == "new" and os.listdir() == ["note.txt"]


def test_a_folder_is_replaced_whole_or_not_at_all(here):
    def write(text, fail=False):
        with st.replacing("model") as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
            if fail:
                raise RuntimeError("stopped")

    write("old")
    with pytest.raises(RuntimeError, match="stopped"):
        write("half", fail=True)
    assert os.listdir() == ["model"] and os.listdir("model") == ["old"]
    write("new")
    assert os.listdir() == ["model"] and os.listdir("model") == ["new"]


# Workers


def test_a_workers_own_message_is_raised_as_the_same_error(here, data, capsys):
    run = begin_stage(
        FEATURES,
        dataset_dir=data,
        backbone="resnet50",
        backbone_weights=str(here / "gone.safetensors"),
    )
    with pytest.raises(st.ArtifactError, match="gone.safetensors holds no weights") as error:
        st.launch("extract", run)
    assert "Traceback" not in str(error.value)
    assert [path.name for path in run.out.iterdir()] == ["status.json"]


def test_a_wrong_value_found_by_a_worker_is_raised_as_a_value_error(here, data):
    run = begin_stage(
        FEATURES, dataset_dir=data, backbone="resnet50", backbone_weights="IMAGENET1K_V9"
    )
    with pytest.raises(ValueError, match="IMAGENET1K_V9.*IMAGENET1K_V2"):
        st.launch("extract", run)


# Precision


@pytest.mark.parametrize(
    "device, capability, flags, override, expected",
    [
        ("cuda", (7, 5), "", "auto", torch.float16),  # T4
        ("cuda", (7, 0), "", "auto", torch.float16),  # V100
        ("cuda", (6, 0), "", "auto", torch.float32),  # P100
        ("cuda", (8, 0), "", "auto", torch.bfloat16),  # A100
        ("cuda", (8, 9), "", "auto", torch.bfloat16),  # L4
        ("cuda", (10, 0), "", "auto", torch.bfloat16),  # B200
        (
            "cuda",
            (7, 5),
            "flags : avx512_bf16 amx_bf16",
            "auto",
            torch.float16,
        ),  # the processor's flags are not the GPU's
        ("cuda", (6, 0), "flags : avx512_bf16 amx_bf16", "auto", torch.float32),
        ("cpu", (0, 0), "flags : fpu avx2", "auto", torch.float32),
        ("cpu", (0, 0), "flags : fpu avx512_bf16", "auto", torch.bfloat16),
        ("cpu", (0, 0), "flags : amx_bf16 fpu", "auto", torch.bfloat16),
        ("cpu", (0, 0), "Features : fp asimd bf16", "auto", torch.bfloat16),  # ARM
        ("cpu", (0, 0), "flags : no_avx512_bf16x", "auto", torch.float32),
        ("cpu", (9, 0), "", "auto", torch.float32),
        ("cuda", (9, 0), "", "float32", torch.float32),
        ("cuda", (7, 5), "", "bfloat16", torch.bfloat16),
        ("cpu", (0, 0), "avx512_bf16", "float32", torch.float32),
    ],
)
def test_precision_follows_from_the_hardware_unless_it_is_given(
    device, capability, flags, override, expected
):
    dtype, reason = st.choose_precision(device, capability, flags, override)
    assert dtype == expected and str(expected).removeprefix("torch.") in reason


# Importing


def test_importing_the_module_is_silent_touches_no_disk_and_loads_torch_and_numpy_only(here):
    program = (
        "import sys, storyteller_utils\n"
        "heavy = 'pandas matplotlib torchvision sklearn nltk gradio PIL huggingface_hub rouge_score safetensors'\n"
        "sys.exit(' '.join(name for name in heavy.split() if name in sys.modules) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        cwd=here,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(st.__file__).parent),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(here.iterdir())
