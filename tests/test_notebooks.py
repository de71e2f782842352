"""The notebooks' form, and that they, the README and the module agree."""

import ast
import dataclasses
import hashlib
import io
import re
import shutil
import tokenize
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import papermill
import pytest

import storyteller_utils as st

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {stage: ROOT / "notebooks" / f"{stage}.ipynb" for stage in st.STAGES}
PARAMETER = re.compile(r"(\w+): (str|int|float|bool) = (.+?)  # (\S.*)")


@pytest.fixture(params=st.STAGES)
def stage(request):
    return request.param


@pytest.fixture
def cells(stage):
    return nbformat.read(NOTEBOOKS[stage], 4).cells


def code(cells):
    return [cell for cell in cells if cell.cell_type == "code"]


def test_there_is_a_notebook_for_each_stage_and_none_besides():
    assert sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")) == list(st.STAGES)
    assert [
        set(reads) <= set(list(st.STAGES)[:i]) for i, reads in enumerate(st.STAGES.values())
    ] == [True] * 5


def test_the_readme_lists_the_stages_in_order():
    rows = re.findall(
        r"^\| \[?`?(\d\d_\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert rows == list(st.STAGES)


def test_the_parameters_are_the_settings_with_their_defaults_and_their_help(stage, cells):
    assert code(cells)[0].metadata.tags == ["parameters"] and cells[1] is code(cells)[0]
    lines = code(cells)[0].source.splitlines()
    parsed = [PARAMETER.fullmatch(line) for line in lines]
    assert all(parsed), [line for line, match in zip(lines, parsed, strict=True) if not match]
    # papermill's reader of such cells does not know "int | None": the cell says int = None.
    fields = [(f.name, f.type.split(" | ")[0]) for f in dataclasses.fields(st.SETTINGS[stage])]
    assert [(m[1], m[2]) for m in parsed] == fields
    st.SETTINGS[stage](**{m[1]: ast.literal_eval(m[3]) for m in parsed})
    shown = papermill.inspect_notebook(str(NOTEBOOKS[stage]))
    assert [(p["name"], p["help"]) for p in shown.values()] == [(m[1], m[4]) for m in parsed]


def test_no_cell_gives_a_parameters_name_to_something_else(stage, cells):
    # `finish` takes what a parameter's name stands for as what the stage was run with.
    given = {field.name for field in dataclasses.fields(st.SETTINGS[stage])}
    for cell in code(cells)[1:]:
        tree = ast.parse(cell.source)
        inner = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
        hidden = {id(n) for c in ast.walk(tree) if isinstance(c, inner) for n in ast.walk(c)}
        names = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in hidden]
        assert not given & {n.id for n in names if isinstance(n.ctx, ast.Store)}, cell.source


def test_a_notebook_starts_its_own_stage_with_its_own_parameters(stage, cells):
    assert f'st.start("{stage}", globals())' in code(cells)[1].source


def test_a_notebook_reads_the_stages_it_depends_on(stage, cells):
    source = "\n".join(cell.source for cell in code(cells))
    named = set(re.findall(r'run\.read\("(\w+)"\)', source)) | (
        set(st.STAGES[stage]) if f'in st.STAGES["{stage}"]' in source else set()
    )
    assert named == set(st.STAGES[stage])


def test_it_begins_with_what_it_reads_writes_and_takes_and_ends_with_finish(stage, cells):
    assert (
        cells[0].source.startswith("# ")
        and "| reads | writes | runs on | takes |" in cells[0].source
    )
    assert "@@" not in cells[0].source and f"outputs/{stage}/" in cells[0].source
    assert "run.finish(" in code(cells)[-1].source and cells[-1] is code(cells)[-1]


def test_it_says_how_long_it_takes_as_the_readme_does_and_what_is_an_estimate(stage, cells):
    takes = cells[0].source.splitlines()[-1].split(" | ")[-1].strip(" |")
    (row,) = [
        x for x in (ROOT / "README.md").read_text().splitlines() if x.startswith(f"| [{stage}]")
    ]
    on_sample = row.split(" | ")[-1].strip(" |")
    assert re.match(rf"on 2 CPU cores {on_sample}(,| for the sample)", takes)
    if stage == "05_deploy":  # the captioner's size is that of every dataset
        return
    assert re.search(r"Flickr8k.*Flickr30k", takes)
    assert "estimate" in takes[: takes.index("Flickr30k") + 40]


def test_cells_are_short_and_define_nothing(cells):
    for cell in code(cells):
        assert len(cell.source.splitlines()) <= 20
        assert not re.search(r"^\s*(def|class)\s", cell.source, re.M)


def test_stored_outputs_are_there_and_hold_no_error_no_path_and_no_timing(cells):
    assert any(cell.outputs for cell in code(cells))
    for output in (output for cell in code(cells) for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr"
        text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        assert not re.search(
            r"(?<![\w.])/(home|root|tmp|usr|kaggle|Users)/|it/s\]|photo/s", text
        ), text


def test_an_unknown_parameter_is_refused(tmp_path):
    for name in ("storyteller_utils.py", "notebooks/caption_files.py"):
        shutil.copy(ROOT / name, tmp_path)
    with pytest.raises(papermill.PapermillExecutionError, match="has no parameter min_cuont"):
        papermill.execute_notebook(
            NOTEBOOKS["02_vocab"],
            tmp_path / "out.ipynb",
            {"min_cuont": 3},
            progress_bar=False,
            cwd=str(tmp_path),
        )


CASES = {  # photos changed, 01's precision, captions that differ -> what 04's last check says
    "photos": (True, "torch.float32", 9, "1 of these photos changed since 01"),
    "precision": (False, "torch.bfloat16", 9, "01 computed in torch.bfloat16"),
    "near ties": (False, "torch.float32", 1, ""),
    "no cause": (False, "torch.float32", 9, "Run 01_extract_features.ipynb again"),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", CASES)
def test_the_last_check_of_04_is_an_error_only_where_nothing_explains_it(case, tmp_path, capsys):
    changed, precision, count, expected = CASES[case]
    notebook = nbformat.read(NOTEBOOKS["04_evaluate"], 4)
    (check,) = [c.source for c in code(notebook.cells) if "precisions = " in c.source]
    names, paths = [f"{i}.jpg" for i in range(10)], [tmp_path / f"{i}.jpg" for i in range(10)]
    for path in paths:
        path.write_bytes(path.name.encode())
    rows = [(name, hashlib.sha256(name.encode()).hexdigest()) for name in names]
    st.write_csv(tmp_path / "images.csv", ["image", "sha256"], rows)
    if changed:
        paths[3].write_bytes(b"another photo")

    class Extracted(type(tmp_path)):
        manifest = {"facts": {"precision": precision}}  # noqa: RUF012

    storyteller = SimpleNamespace(backbone=SimpleNamespace(dtype="torch.float32"))
    known = {"st": st, "hashlib": hashlib, "names": names, "paths": paths, "some": range(10)}
    known |= {"extracted": Extracted(tmp_path), "storyteller": storyteller}
    known["differing"] = dict.fromkeys(names[:count])
    if case == "no cause":
        with pytest.raises(st.ArtifactError, match=expected):
            exec(check, known)
    else:
        exec(check, known)
        assert expected in capsys.readouterr().out


def test_04_is_as_sure_as_the_captioner_whatever_length_is_preferred(tmp_path):
    notebook = nbformat.read(NOTEBOOKS["04_evaluate"], 4)
    (search,) = [c.source for c in code(notebook.cells) if "sure[name] = " in c.source]
    shipped = st.Storyteller.from_pretrained(ROOT / "space/model")
    features = shipped.extract([ROOT / "space/examples/bicycle.jpg"])
    np.save(tmp_path / "features.npy", features.half().numpy())
    settings = SimpleNamespace(decoding=lambda: {"length_preference": 2.0})
    known = {"st": st, "trained": ROOT / "space", "extracted": tmp_path, "photos": np.array([0])}
    known |= {"run": SimpleNamespace(settings=settings)}
    exec(search, known)
    (caption,) = shipped.caption_features(features, length_preference=2.0)
    told = shipped.confidence(known["sure"][known["best"]], features.mean(1))
    assert told == pytest.approx([caption.confidence], abs=1e-3) and 0 < told[0] < 1


@pytest.mark.fast
def test_the_score_table_shows_values_intervals_and_what_a_row_knows_besides():
    notebook = nbformat.read(NOTEBOOKS["04_evaluate"], 4)
    (lay_out,) = [c.source for c in code(notebook.cells) if c.source.endswith("\ntable")]
    dog, cat = ["a", "dog", "runs"], ["a", "cat"]
    rows = st.score_rows({"beam": [dog, cat]}, [[dog, cat], [cat, dog]], "beam")
    rows["beam"] |= {"seconds a photo": 0.00125, "copied from training": 0.5}
    dataset = SimpleNamespace(title=lambda: "a title")
    known = {"st": st, "run": SimpleNamespace(dataset=dataset), "split": "test"}
    known |= {"rows": rows, "best": "beam"}
    exec(lay_out, known)
    table = known["table"]
    assert table.index.name == "a title, test" and list(table.columns) == list(rows)
    cider = rows["beam"]["CIDEr-D"]
    shown = f"{cider['value']:.3f} [{cider['low']:.3f}, {cider['high']:.3f}]"
    assert table["beam"]["CIDEr-D"] == shown
    assert rows["beam"]["METEOR label"] in table.index and "METEOR" not in table.index
    people = table["people (one reference)"]
    assert table["beam"]["copied from training"] == "50.0%" and people["seconds a photo"] == ""


# The budget of the helper module (CONTRIBUTING.md, style)


@pytest.fixture(scope="module")
def module() -> str:
    return (ROOT / "storyteller_utils.py").read_text(encoding="utf-8")


@pytest.mark.fast
def test_the_module_has_at_most_26000_tokens(module):
    counted = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}
    tokens = tokenize.generate_tokens(io.StringIO(module).readline)
    assert sum(token.type in counted for token in tokens) <= 26_000


@pytest.mark.fast
def test_no_function_of_the_module_has_more_than_60_lines(module):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = [node for node in ast.walk(ast.parse(module)) if isinstance(node, kinds)]
    long = [f.name for f in functions if f.end_lineno - f.lineno + 1 > 60]
    assert not long and len(functions) > 100


@pytest.mark.fast
def test_the_module_has_at_most_55_public_functions_and_classes(module):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [node.name for node in ast.parse(module).body if isinstance(node, kinds)]
    public = [name for name in names if not name.startswith("_")]
    assert 30 < len(public) <= 55, public
