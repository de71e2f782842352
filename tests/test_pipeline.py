"""The five notebooks by papermill, in an empty folder, on the drawn sample."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import storyteller_utils as st
from support import copy_project, run_notebook

ROOT = Path(__file__).resolve().parents[1]
MISSED = "in every reference, not said"
TOKEN = "hf_thisTokenMustShowUpNowhere"


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A folder in which the five notebooks have run, each replaced by its executed copy."""
    folder = tmp_path_factory.mktemp("pipeline")
    copy_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "KAGGLE_KEY", "KAGGLE_API_TOKEN"):
            patch.setenv(name, TOKEN)
        (folder / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
        for stage in st.STAGES:
            run_notebook(folder, stage)
    return folder


@pytest.fixture
def inside(executed, monkeypatch):
    monkeypatch.chdir(executed)
    return executed


def test_every_stage_finishes_and_is_built_on_what_was_there(inside):
    manifests = {stage: st.Artifact.find(stage).manifest for stage in st.STAGES}
    for stage, manifest in manifests.items():
        assert manifest["reads"] == {name: manifests[name]["edition"] for name in st.STAGES[stage]}
        assert manifest["dataset"]["sample"] and manifest["seconds"] > 0
    assert set(manifests["03_train_dual_t4"]["files"]) >= {
        "last.pt",
        "history.csv",
        "curves.png",
        "model/config.json",
        "model/vocab.json",
        "model/model.safetensors",
    }
    assert set(manifests["05_deploy"]["files"]) >= {
        "space.zip",
        "space/app.py",
        "space/storyteller_utils.py",
    }


def test_tokens_that_lie_around_show_up_in_nothing_that_the_notebooks_leave(inside):
    (inside / ".env").unlink()
    files = [path for path in inside.rglob("*") if path.is_file()]
    assert len(files) > 800 and not [path for path in files if TOKEN.encode() in path.read_bytes()]
    with zipfile.ZipFile("outputs/05_deploy/space.zip") as archive:
        assert not [
            name
            for name in archive.namelist()
            if ".env" in name or TOKEN.encode() in archive.read(name)
        ]


def test_unseen_scenes_are_captioned_well(inside):
    rows = json.loads(Path("outputs/04_evaluate/scores.json").read_text())["rows"]
    beam, constant = (
        rows["beam search, width 5"]["BLEU-4"]["value"],
        rows["constant caption"]["BLEU-4"]["value"],
    )
    assert beam >= 0.5 and beam >= 2 * constant
    assert rows["beam search, width 5"]["distinct captions"] > 0.5


def test_captions_collapse_when_the_features_are_shuffled_among_the_photos(inside):
    data = st.CaptionData.load(
        st.Artifact.find("01_extract_features"), st.Artifact.find("02_vocab")
    )
    rows, references = data.of("test")
    teller = st.Storyteller.from_pretrained("outputs/03_train_dual_t4/model")
    features = st.Features("outputs/01_extract_features/features.npy", True, teller.device)
    bleu = {}
    for name, asked in (("own", rows), ("shuffled", np.roll(rows, len(rows) // 2))):
        told = [
            teller.vocab.decode(h[0].ids) for h in st.generate(teller.captioner, features, asked)
        ]
        bleu[name] = st.score_captions(told, references)["BLEU-4"]["value"]
    assert bleu["shuffled"] < bleu["own"] / 2


def test_the_score_table_names_the_sample_and_every_row(inside):
    table = Path("outputs/04_evaluate/scores.md").read_text()
    for part in (
        "the drawn sample (no real photos), test",
        "greedy search",
        "beam search, width 5",
        "constant caption",
        "most similar photo",
        "people (four references)",
        *st.METRICS[:4],
        "ROUGE-L",
        "CIDEr-D",
        "recall",
    ):
        assert part in table
    assert "drawings, not photos" in Path("outputs/05_deploy/space/model/README.md").read_text()


def readme_table() -> tuple[str, dict]:
    """The README's sentence about the sample's scores, and {(row, metric): [value, low, high]}."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sentence, table = re.search(
        r"^(The sample's test .*?)\n\n(\|.*?)\n\n", text, re.M | re.S
    ).groups()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return sentence, {
        (row, metric): [float(number) for number in re.findall(r"[\d.]+", cell)]
        for metric, *cells in lines[2:]
        for row, cell in zip(lines[0][1:], cells, strict=True)
    }


def test_the_readmes_table_is_what_a_run_gives_within_the_intervals(inside):
    """Other versions of torch draw other dropout: digits differ, and intervals overlap."""
    rows = json.loads(Path("outputs/04_evaluate/scores.json").read_text())["rows"]
    sentence, cells = readme_table()
    assert re.search(r"torch \d+\.\d+", sentence), "it says which version of torch made it"
    assert {row for row, _ in cells} == set(rows)
    for (row, metric), (value, *interval) in cells.items():
        ours = rows[row][metric.split(" (")[0]]
        low, high = interval or (value, value)
        assert low <= ours["high"] and high >= ours["low"], (row, metric, value, ours)


def test_other_metrics_find_captions_and_references_in_their_form(inside):
    out = Path("outputs/04_evaluate")
    predictions, references = (
        [json.loads(line) for line in (out / f"{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("predictions", "references")
    )
    assert [item["id"] for item in predictions] == [item["id"] for item in references]
    assert all(set(item) == {"id", "caption", "image"} for item in predictions)
    assert all(len(item["references"]) == 5 for item in references)
    photos = {path.name for path in Path("outputs/sample_dataset/Images").glob("*.jpg")}
    assert {item["image"] for item in predictions} <= photos


def test_the_error_sheet_counts_colours_as_a_plain_count_does(inside):
    out, colours = Path("outputs/04_evaluate"), ("red", "blue", "yellow", "white", "brown")
    said = pd.read_csv(out / "captions.csv").set_index("image")["beam"]
    counted = {}
    for line in (out / "references.jsonl").read_text("utf-8").splitlines():
        photo = json.loads(line)
        words = set(re.findall(r"\w+", said[photo["id"]].lower()))
        written = [set(re.findall(r"\w+", text.lower())) for text in photo["references"]]
        for colour in colours:
            there = [colour in other for other in written]
            wrong, missed = colour in words and not any(there), colour not in words and all(there)
            for error, happened in (("said, in no reference", wrong), (MISSED, missed)):
                counted[error, colour] = counted.get((error, colour), 0) + happened
    sheet = pd.read_csv(out / "errors.csv")
    sheet = sheet[(sheet["kind"] == "colour") & sheet["word"].isin(colours)]
    found = {(row.error, row.word): row.photos for row in sheet.itertuples()}
    assert found == {what: count for what, count in counted.items() if count}


def test_the_card_that_ships_has_the_test_scores(inside):
    config = json.loads(Path("outputs/05_deploy/space/model/config.json").read_text())
    rows = json.loads(Path("outputs/04_evaluate/scores.json").read_text())["rows"]
    assert config["scores"] == {
        metric: rows["beam search, width 5"][metric] for metric in st.METRICS
    }
    assert (
        f"| CIDEr-D | {config['scores']['CIDEr-D']['value']:.3f} |"
        in Path("outputs/05_deploy/space/model/README.md").read_text()
    )


def test_the_readmes_usage_example_runs_as_shown(inside):
    (example,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
    )
    told = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True)
    assert re.fullmatch(r"([A-Z][^\n]+\. -\d+\.\d+\n){2}", told.stdout), told.stderr


def test_the_terminal_tells_what_the_module_tells(inside):
    photo = next(Path("outputs/sample_dataset/Images").glob("*.jpg"))
    caption = (
        st.Storyteller.from_pretrained("outputs/03_train_dual_t4/model")
        .caption(photo, beam_width=5)[0]
        .text
    )
    told = subprocess.run(
        [
            sys.executable,
            "storyteller_utils.py",
            "caption",
            photo,
            "--model",
            "outputs/03_train_dual_t4/model",
        ],
        capture_output=True,
        text=True,
    )
    assert json.loads(told.stdout)["text"] == caption  # on a terminal, the caption alone


def test_a_notebook_runs_from_its_own_folder_and_gives_the_same_files_and_outputs_again(inside):
    """nbval runs in notebooks/, as Jupyter and VS Code do; it compares what papermill stored."""
    before = st.Artifact.find("02_vocab").manifest
    nbval = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env")
    done = subprocess.run(
        [sys.executable, *nbval, "notebooks/02_vocab.ipynb"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert not Path("notebooks/outputs").exists()
    after = st.Artifact.find("02_vocab").manifest
    assert after["finished"] > before["finished"]  # it has run anew
    assert after["edition"] == before["edition"] and after["files"] == before["files"]


def test_the_stored_notebooks_show_what_they_still_print(executed):
    """The checked cells of the committed notebooks, against those that just ran."""
    import nbformat

    for stage in st.STAGES:
        stored, ran = (
            nbformat.read(root / "notebooks" / f"{stage}.ipynb", 4) for root in (ROOT, executed)
        )
        ran.cells = [
            cell for cell in ran.cells if "injected-parameters" not in cell.metadata.get("tags", [])
        ]
        for one, other in zip(stored.cells, ran.cells, strict=True):
            if "# NBVAL_CHECK_OUTPUT" in one.source:
                assert [o.get("text", o.get("data")) for o in one.outputs] == [
                    o.get("text", o.get("data")) for o in other.outputs
                ]
