"""Run the five notebooks on the drawn sample and store them with their outputs; what `make
notebooks` does.

Progress bars are left out (they hold timings), and so is what differs from machine to machine in a
stored notebook.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import storyteller_utils as st  # noqa: E402


def cleaned(notebook):
    """Return the executed notebook without progress bars and what papermill adds."""
    notebook.cells = [
        cell
        for cell in notebook.cells
        if "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    for cell in notebook.cells:
        cell.metadata = (
            {"tags": ["parameters"]} if "parameters" in cell.metadata.get("tags", []) else {}
        )
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("notebooks", "space"):
            shutil.copytree(ROOT / name, Path(folder, name))
        shutil.copy(ROOT / "storyteller_utils.py", folder)
        for stage in st.STAGES:
            path = Path(folder, "notebooks", f"{stage}.ipynb")
            subprocess.run(
                [Path(sys.executable).with_name("papermill"), path, path, "--no-progress-bar"],
                cwd=folder,
                check=True,
            )
            nbformat.write(cleaned(nbformat.read(path, 4)), ROOT / "notebooks" / path.name)
        # The README's picture.
        sheet = Image.open(Path(folder, "outputs/04_evaluate/sheet.png")).convert("RGB")
        sheet.save(ROOT / "notebooks/sheet.jpg", quality=80)


if __name__ == "__main__":
    main()
