"""Stages, manifests, settings, workers, precision, and what importing the module costs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
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


def test_a_stage_whose_worker_stopped_gets_no_manifest_until_it_has_gone_on(here, data, capsys):
    run = begin_stage(VOCAB, dataset_dir=data)
    st.set_status(run.out, stopped={"epoch": 1})
    run.finish()
    run = begin_stage(VOCAB, dataset_dir=data)
    run.finish()
    assert capsys.readouterr().out.count("is not finished, so no later notebook accepts it") == 2
    st.set_status(run.out, stopped={})
    run.finish()
    assert os.listdir(run.out) == ["manifest.json"]


def test_what_is_older_than_a_run_is_of_a_finished_one_and_an_unfinished_run_goes_on(here, data):
    assert begin_stage(VOCAB, dataset_dir=data).job()["began"] == 0
    finished(VOCAB, data)
    ended = (here / "outputs" / VOCAB / "manifest.json").stat().st_mtime
    for _attempt in range(2):
        assert begin_stage(VOCAB, dataset_dir=data).job()["began"] == ended
    (here / "outputs" / VOCAB / "status.json").write_text("{")  # as damaged as may be
    assert begin_stage(VOCAB, dataset_dir=data).job()["began"] == 0


def test_a_stage_is_finished_by_its_manifest_alone(here, data):
    run = begin_stage(VOCAB, dataset_dir=data)
    (run.out / "table.csv").write_text("one\n")
    with pytest.raises(st.ArtifactError, match=rf"{VOCAB} stopped before.*Run {VOCAB}\.ipynb"):
        st.Artifact.find(VOCAB)
    run.finish(rows=3)
    artifact = st.Artifact.find(VOCAB)
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
        zip(listed[1::2], listed[::2], strict=True)
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
    assert set(st.Artifact.find(VOCAB).manifest["files"]) == {"table.csv"}


def test_finishing_twice_leaves_a_valid_artifact(here, data):
    run = begin_stage(VOCAB, dataset_dir=data)
    (run.out / "table.csv").write_text("one\n")
    run.finish()
    (run.out / "table.csv").write_text("two\n")
    run.finish()  # someone ran the notebook's last cells again
    assert set(st.Artifact.find(VOCAB).manifest["files"]) == {"table.csv"}


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
    st.Artifact.find(VOCAB)
    begin_stage(VOCAB, dataset_dir=data)
    with pytest.raises(st.ArtifactError, match=f"{VOCAB} stopped before it was finished"):
        st.Artifact.find(VOCAB)


def test_settings_that_are_refused_leave_the_finished_stage_alone(here, data):
    finished(VOCAB, data)
    with pytest.raises(ValueError):
        begin_stage(VOCAB, dataset_dir=data, min_count=0)
    st.Artifact.find(VOCAB)


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


@pytest.mark.parametrize("same_size", [True, False])
def test_photos_replaced_in_place_after_01_are_refused_and_copied_ones_are_not(
    here, data, same_size
):
    photos = sorted(Path(data, "Images").iterdir())
    run = begin_stage(FEATURES, dataset_dir=data)
    rows = [(i, p.name, p.stat().st_size, st.sha256(p)) for i, p in enumerate(photos)]
    st.write_csv(run.out / "images.csv", ["row", "image", "bytes", "sha256"], rows)
    run.finish()
    for path in photos:  # copied to another disk: newer, and the same
        path.write_bytes(path.read_bytes())
        os.utime(path, (2**31, 2**31))
    run = begin_stage(TRAIN, dataset_dir=data)
    run.read(FEATURES)
    other = photos[1].read_bytes()
    photos[0].write_bytes(other[: rows[0][2]].ljust(rows[0][2], b".") if same_size else other)
    os.utime(photos[0], (2**31, 2**31))
    with pytest.raises(st.ArtifactError, match=rf"1 photos have changed.*{photos[0].name}"):
        run.read(FEATURES)


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
        st.Artifact.find(VOCAB)


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
        st.Artifact.find(VOCAB)
    assert all(str(folder) in str(error.value) for folder in folders)


def test_no_output_of_a_stage_says_where_it_was_looked_for_and_what_to_run(here, data, monkeypatch):
    (here / "input/some-dataset").mkdir(parents=True)
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(here / "input"))
    with pytest.raises(
        st.ArtifactError,
        match=f"(?s)No finished {VOCAB} in outputs or under {here}/input.*Run {VOCAB}.ipynb",
    ):
        st.Artifact.find(VOCAB)


def test_this_sessions_own_output_goes_before_an_attached_one(here, data, monkeypatch):
    mount(here, data, "old")
    manifest = finished(VOCAB, data, text="new\n")
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(here / "input"))
    assert st.Artifact.find(VOCAB).manifest["edition"] == manifest["edition"]


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


@pytest.mark.parametrize("given, expected", [(2024, "2024"), (1.5, "1.5"), ("~", "/home/me")])
def test_a_number_for_a_name_is_its_text_and_a_tilde_the_home(here, monkeypatch, given, expected):
    monkeypatch.setenv("HOME", "/home/me")
    values = parameters(VOCAB, dataset_dir=given)
    assert st.VocabSettings(**values).dataset_dir == expected


def test_a_parameter_that_the_notebook_lacks_is_named(here):
    values = parameters(VOCAB)
    del values["min_count"]
    with pytest.raises(ValueError, match="02_vocab lacks the parameter min_count"):
        st.start(VOCAB, values)


def test_an_injected_parameter_that_no_setting_takes_is_named(here, monkeypatch):
    cells = ["", "# Parameters\nmin_cuont = 3\nseed = 1\n"]
    monkeypatch.setattr(sys.modules["__main__"], "In", cells, raising=False)
    with pytest.raises(ValueError, match="02_vocab has no parameter min_cuont; it has dataset_dir"):
        begin_stage(VOCAB)


def test_none_is_the_recipes_value_and_zero_is_none_of_it():
    settings = st.TrainSettings(**parameters(TRAIN, dropout=0, epochs=3))
    recipe = st.RECIPES["original"]
    assert settings.resolved() == recipe | {"dropout": 0, "epochs": 3}


def test_a_parameter_changed_after_the_start_stops_the_finish(here, data):
    variables = parameters(VOCAB, dataset_dir=data)
    run = st.start(VOCAB, variables)
    variables["min_count"] = 2
    with pytest.raises(ValueError, match=r"min_count is 2 now, but was 5 when 02_vocab started"):
        run.finish()
    assert not (run.out / "manifest.json").exists()
    variables["min_count"] = 5
    run.finish()


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


class Killed(BaseException):
    """Stands for the end of the process, after which nothing cleans up."""


def killed_at(monkeypatch, moment: int, write) -> bool:
    """Run `write` until its `moment`-th change of the disk. Returns whether it came to that."""
    changes = 0

    def dying(real):
        def change(*arguments, **options):
            nonlocal changes
            changes += 1
            if changes >= moment:  # nor does anything after it
                raise Killed
            return real(*arguments, **options)

        return change

    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink", "rmdir", "mkdir", "fsync"):
            patch.setattr(os, name, dying(getattr(os, name)))
        patch.setattr(Path, "write_text", dying(Path.write_text))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        try:
            write()
        except Killed:
            return True
    return False


def write_folder(text: str, *names: str) -> None:
    with st.FileSet("model", "config.json").replace() as new:
        st.write_json(new / "config.json", {"text": text})
        for name in names:
            st.write_text(new / name, f"{text} {name}")


def read_folder() -> tuple[str, dict]:
    says, files = st.FileSet("model", "config.json").read()
    return says["text"], {name: path.read_text() for name, path in files.items()}


def test_a_folders_files_are_all_old_or_all_new_wherever_their_writer_is_killed(here, monkeypatch):
    texts, seen = ["old", "new"], set()
    for moment in range(1, 100):
        shutil.rmtree("model", ignore_errors=True)
        write_folder("old", "a.bin", "b.bin", "gone.bin")
        Path("model/mine.txt").write_text("mine")
        ended = not killed_at(
            monkeypatch, moment, lambda: write_folder("new", "a.bin", "parts/c.bin", "README.md")
        )
        text, files = read_folder()
        names = (
            ["a.bin", "b.bin", "gone.bin"]
            if text == "old"
            else ["README.md", "a.bin", "parts/c.bin"]
        )
        assert {n: files[n] for n in names if n != "README.md"} == {
            n: f"{text} {n}" for n in names if n != "README.md"
        }
        assert Path("model/mine.txt").read_text() == "mine"
        seen.add(text)
        write_folder("third", "a.bin")  # the next writer takes over
        assert read_folder() == ("third", {"a.bin": "third a.bin"})
        assert not Path("model/.new").exists()
        if ended:
            break
    assert ended and seen == set(texts) and moment > 10


def test_a_file_of_another_writing_is_refused_and_a_card_may_be_edited(here):
    write_folder("one", "a.bin", "README.md")
    Path("model/README.md").write_text("edited")
    assert read_folder()[1]["README.md"] == "edited"
    Path("model/a.bin").write_text("two a.bin")
    with pytest.raises(st.ArtifactError, match=r"model/a\.bin is missing or is not the one"):
        st.FileSet("model", "config.json").read()


def test_what_an_earlier_writing_left_goes_unless_it_was_changed(here):
    write_folder("old", "a.bin", "b.bin")
    Path("model/b.bin").write_text("mine now")
    write_folder("new")
    assert sorted(os.listdir("model")) == ["b.bin", "config.json"]


def test_an_index_that_lists_no_files_takes_those_that_are_there(here):
    st.write_json("model/config.json", {"text": "before files were listed"})
    Path("model/a.bin").write_text("a")
    assert st.FileSet("model", "config.json").read()[1]["a.bin"] == Path("model/a.bin")


def test_a_stage_that_is_killed_anywhere_in_finish_is_unfinished_or_whole(here, data, monkeypatch):
    outcomes = set()
    for moment in range(1, 20):
        run = begin_stage(VOCAB, dataset_dir=data)
        (run.out / "table.csv").write_text("one\n")
        killed = killed_at(monkeypatch, moment, run.finish)
        if (run.out / "manifest.json").is_file():
            assert (st.Artifact.find(VOCAB) / "table.csv").read_text() == "one\n"
            outcomes.add("whole")
        else:
            with pytest.raises(st.ArtifactError, match="stopped before it was finished"):
                st.Artifact.find(VOCAB)
            outcomes.add("unfinished")
        if not killed:
            break
    assert outcomes == {"whole", "unfinished"} and not killed


def test_a_large_file_is_hashed_once_until_it_changes(here, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    path = here / "large.bin"
    path.write_bytes(bytes(2**24))
    first = st.sha256(path)
    assert not (here / "cache").exists()  # so young a file could change within its clock's tick
    long_ago = os.stat(path).st_mtime_ns - 10**10
    monkeypatch.setattr(st.time, "time", lambda real=st.time.time: real() + 10)
    assert st.sha256(path) == first
    (note,) = (here / "cache/storyteller").iterdir()
    note.write_text("it was asked")
    assert st.sha256(path) == "it was asked"
    with open(path, "rb+") as file:
        file.write(b"x")
    os.utime(path, ns=(long_ago, long_ago))
    assert st.sha256(path) not in (first, "it was asked")


# Memory and bars


@pytest.mark.parametrize("platform, unit", [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_on_every_system(here, data, monkeypatch, platform, unit):
    import resource

    monkeypatch.setattr(sys, "platform", platform)
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert kib * unit <= finished(VOCAB, data)["memory"] < kib * unit * 100


@pytest.mark.parametrize("leave", [True, False])
def test_away_from_a_terminal_a_bar_is_a_few_whole_lines(capsys, leave):
    for _ in st.progress(range(1000), desc="reading", total=1100, initial=100, leave=leave):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3 and all("reading" in line for line in lines)
    assert "1100/1100" in lines[-1] and "\r" not in "".join(lines)


# Workers


@pytest.fixture
def stand_in(here, data, monkeypatch):
    """Put a program in the place of the module that `launch` starts, and begin a stage."""

    def put(program: str) -> st.Run:
        (here / "worker.py").write_text(program)
        monkeypatch.setattr(st, "__file__", str(here / "worker.py"))
        return begin_stage(FEATURES, dataset_dir=data)

    return put


def test_no_character_is_split_where_output_comes_in_blocks(stand_in, capsys):
    text = "€" * 5000
    run = stand_in(f"print({text!r})")
    run.launch("extract")
    assert capsys.readouterr().err == f"{text}\n"


def test_the_first_error_is_raised_and_a_killed_worker_is_said(stand_in):
    run = stand_in(
        "import sys\n"
        "print('storyteller: ArtifactError: first\\n  its second line', 'x' * 9000, sep='\\n')\n"
        "sys.exit('\\nstoryteller: ValueError: lost a peer')"
    )
    with pytest.raises(st.ArtifactError, match=r"^first\nits second line$"):
        run.launch("extract")
    run = stand_in("import os\nos.kill(os.getpid(), 9)")
    with pytest.raises(RuntimeError, match=r"status -9 \(one was killed, often for lack of memory"):
        run.launch("extract")


def test_a_worker_started_by_hand_prints_its_error(here):
    done = subprocess.run(
        [sys.executable, st.__file__, "train", "nowhere/status.json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "storyteller: ArtifactError: nowhere/status.json is missing" in done.stderr


def test_a_worker_ends_with_its_notebook(stand_in, here):
    run = stand_in(
        f"import sys, time\nsys.path.insert(0, {str(Path(st.__file__).parent)!r})\n"
        "import storyteller_utils as st\n"
        "def wait(job):\n    open('working', 'w').close()\n    time.sleep(60)\n"
        "st._work(wait, sys.argv[2])"
    )
    st.set_status(run.out, job=run.job())
    command = [sys.executable, str(here / "worker.py"), "extract", str(run.out / "status.json")]
    environment = {**os.environ, "STORYTELLER_NOTEBOOK": "1"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as worker:
        while not (here / "working").exists():
            assert worker.poll() is None
            time.sleep(0.05)
        worker.stdin.close()
        assert worker.wait(20) == -signal.SIGTERM


def test_a_stage_runs_once_at_a_time(here, data):
    run = begin_stage(VOCAB, dataset_dir=data)
    program = f"from support import begin_stage\nbegin_stage({VOCAB!r}, dataset_dir={data!r})"
    places = os.pathsep.join([str(Path(__file__).parent), str(Path(st.__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": places}

    def other():
        command = [sys.executable, "-c", program]
        return subprocess.run(command, capture_output=True, text=True, env=environment).stderr

    assert f"Another run is using outputs/{VOCAB}" in other()
    begin_stage(VOCAB, dataset_dir=data)  # the same notebook's first cell again
    (run.out / "table.csv").write_text("one\n")
    run.finish()
    assert other() == ""


def test_a_workers_own_message_is_raised_as_the_same_error(here, data, capsys):
    run = begin_stage(
        FEATURES,
        dataset_dir=data,
        backbone="resnet50",
        backbone_weights=str(here / "gone.safetensors"),
    )
    with pytest.raises(st.ArtifactError, match=r"gone\.safetensors holds no weights") as error:
        run.launch("extract")
    assert "Traceback" not in str(error.value)
    assert [path.name for path in run.out.iterdir()] == ["status.json"]


def test_a_wrong_value_found_by_a_worker_is_raised_as_a_value_error(here, data):
    run = begin_stage(
        FEATURES, dataset_dir=data, backbone="resnet50", backbone_weights="IMAGENET1K_V9"
    )
    with pytest.raises(ValueError, match=r"IMAGENET1K_V9.*IMAGENET1K_V2"):
        run.launch("extract")


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
        # The processor's flags are not the GPU's.
        ("cuda", (7, 5), "flags : avx512_bf16 amx_bf16", "auto", torch.float16),
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
    dtype, reason = st.choose_precision(torch.device(device), override, capability, flags)
    assert dtype == expected and str(expected).removeprefix("torch.") in reason


# Importing


def test_importing_the_module_is_silent_touches_no_disk_and_loads_torch_and_numpy_only(here):
    program = (
        "import sys, storyteller_utils\n"
        "heavy = 'pandas matplotlib torchvision sklearn nltk gradio PIL huggingface_hub '\n"
        "heavy += 'rouge_score safetensors filelock'\n"
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
