"""What needs a GPU: the same features and captions as on the CPU, in every precision it has."""

import re
import sys

import gpu
import pytest
import torch

import storyteller_utils as st
from support import ROOT, run_cells

# conftest.py hides GPUs from all other tests; `make gpu` shows them: CUDA_VISIBLE_DEVICES=0.
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU is visible here")


@needs_gpu
def test_the_gpu_captions_photos_as_the_cpu_does():
    photos = sorted((ROOT / "space/examples").glob("*.jpg"))
    captions = {}
    for device in ("cpu", "cuda"):
        storyteller = st.Storyteller.from_pretrained(ROOT / "space/model", device)
        storyteller.config["precision"] = "float32"
        captions[device] = storyteller.caption(photos)
    for cpu, cuda in zip(captions["cpu"], captions["cuda"], strict=True):
        assert cuda.text == cpu.text and cuda.score == pytest.approx(cpu.score, abs=1e-3)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_features_on_the_gpu_are_those_of_the_cpu(dtype):
    photos = torch.randint(0, 256, (4, 3, 224, 224), dtype=torch.uint8)
    cpu = st.load_backbone("efficientnet_lite0").prepare(torch.device("cpu"), torch.float32)
    gpu = st.load_backbone("efficientnet_lite0").prepare(torch.device("cuda"), dtype)
    similarity = torch.cosine_similarity(cpu(photos, 1), gpu(photos, 1).cpu(), dim=-1)
    assert similarity.min() > 0.99


def test_the_gpu_script_goes_through_its_steps_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--cpu"])
    for recipe in ("original", "best"):  # smaller: without hardware for it, float16 is slow
        sizes = dict.fromkeys(st.RECIPES[recipe]["sizes"], 64)
        monkeypatch.setitem(st.RECIPES[recipe], "sizes", sizes)
    through_papermill = gpu.run_stage

    def run_stage(folder, stage, given, cpu):
        if "torchrun" in given:
            return through_papermill(folder, stage, given, cpu)
        monkeypatch.chdir(folder)
        return run_cells(stage, dataset_dir="dataset", **given)

    monkeypatch.setattr(gpu, "run_stage", run_stage)
    gpu.main()
    report = (tmp_path / "outputs/gpu/report.md").read_text()
    (resumed,) = re.findall(r"\| best, float16, resumed \| \d+ \| (.*) \|", report)
    epoch, *losses, cider, speed = map(float, resumed.split(" | "))
    assert epoch == 2 and all(0 < loss < 10 for loss in losses) and cider >= 0 and speed > 0
    assert "| original, float16" in report and "| original, two processes" in report
    assert "| evaluation | " in report and "left out" not in report
