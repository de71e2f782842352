"""Training, its checkpoints, its processes.

On a few drawn scenes with made-up features, in seconds.
"""

import functools
import io
import itertools
import json
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import caption_files
import sample
import storyteller_utils as st
import training
from support import FORKS, begin_stage

SMALL = {"epochs": 3, "batch_size": 32, "precision": "float32"}
SIZES = st.RECIPES["original"]["sizes"]  # what workers in processes of their own train


@pytest.fixture(scope="module", autouse=True)
def small_lstm():
    """Most tests train a smaller LSTM than the recipe's, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(st.RECIPES["original"], "sizes", {"embedding": 64, "hidden": 128})
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder in which 01 and 02 are finished.

    60 drawn scenes, whose features are their words, blurred.
    """
    folder = tmp_path_factory.mktemp("project")
    before = Path.cwd()
    os.chdir(folder)
    sample.draw_dataset("drawn", photos=60, size=(64, 48))
    run = begin_stage("02_vocab", dataset_dir="drawn", min_count=2)
    captions = caption_files.read_captions(run.dataset)
    split_of = caption_files.split_photos(list(run.dataset.photos), 13)
    st.write_csv(
        run.out / "captions.csv",
        ["image", "split", "caption", "tokens"],
        [(n, split_of[n], c, " ".join(st.tokenize(c))) for n, c in captions.rows],
    )
    words = {
        name: [st.tokenize(c) for n, c in captions.rows if n == name] for name in run.dataset.photos
    }
    vocab = st.Vocab.build(
        [w for n, group in words.items() if split_of[n] == "train" for w in group], 2
    )
    vocab.save(run.out / "vocab.json")
    run.finish()
    run = begin_stage("01_extract_features", dataset_dir="drawn", backbone="efficientnet_lite0")
    generator = np.random.default_rng(0)
    bags = np.array(
        [
            np.bincount([vocab.ids.get(w, 3) for g in group for w in g], minlength=len(vocab))
            for group in words.values()
        ]
    )
    features = bags @ generator.normal(size=(len(vocab), 24)) + generator.normal(size=(60, 24))
    np.save(run.out / "features.npy", features[:, None].astype(np.float16))
    photos = [run.dataset.photos[name] for name in words]
    rows = [
        (i, n, p.stat().st_size, st.sha256(p))
        for (i, n), p in zip(enumerate(words), photos, strict=True)
    ]
    st.write_csv(run.out / "images.csv", ["row", "image", "bytes", "sha256"], rows)
    st.write_csv(run.out / "skipped.csv", ["image", "reason"], [])
    run.finish(backbone="efficientnet_lite0", backbone_sha256="", regions=1, width=24)
    os.chdir(before)
    return folder


def handlers():
    """Return how this process answers the signals that end a worker cleanly."""
    return {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}


@pytest.fixture(autouse=True)
def here(project, monkeypatch):
    monkeypatch.chdir(project)
    st.shutil.rmtree(st.OUTPUTS / "03_train_dual_t4", ignore_errors=True)
    before = handlers()
    yield
    assert handlers() == before, "a test must leave Ctrl-C as it was"


@pytest.fixture
def restored_handlers():
    """Handlers of signals, which a worker takes over, are pytest's again afterwards."""
    before = handlers()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def begin(**settings):
    run = begin_stage("03_train_dual_t4", dataset_dir="drawn", **SMALL | settings)
    for stage in st.STAGES[run.stage]:
        run.read(stage)
    return run


def trained(run):
    trainer = training.Trainer(run.job())
    trainer.run()
    return trainer


@functools.cache
def undisturbed(**settings):
    """Return the last.pt of a run that nothing disturbs; it is trained once, and not to change."""
    run = begin(**settings)
    trained(run)
    state = last(run)
    st.shutil.rmtree(run.out)
    return state


def taken_up(state, **settings):
    """Return a trainer that goes on from another run's last.pt."""
    torch.save(state, "other.pt")
    trainer = training.Trainer(begin(resume_from="other.pt", **settings).job())
    trainer.resume()
    return trainer


def be_worker(folder, status, sizes):
    os.chdir(folder)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.argv = [st.__file__, "train", status]
    st.RECIPES["original"]["sizes"] = sizes
    st.main()


def start_worker(run):
    """Start what `launch` starts, without waiting for its end."""
    st.set_status(run.out, job=run.job())
    arguments = Path.cwd(), str(run.out / "status.json"), st.RECIPES["original"]["sizes"]
    worker = FORKS.Process(target=be_worker, args=arguments)
    worker.start()
    return worker


def weights(run_or_trainer):
    return {k: v.clone() for k, v in run_or_trainer.captioner.state_dict().items()}


def last(run):
    return torch.load(run.out / "last.pt", weights_only=True)


def epochs_done(run):
    """Return how many epochs are in a run's checkpoint."""
    return len(last(run)["history"]) if (run.out / "last.pt").is_file() else 0


def without_clock(history):
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "captions_per_second")}
        for line in history
    ]


def assert_same(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_same_seed_trains_the_same_weights_and_another_does_not():
    one, run, third = undisturbed(), begin(), undisturbed(seed=14)
    trained(run)
    assert_same(one["model"], last(run)["model"])
    assert without_clock(one["history"]) == without_clock(last(run)["history"])
    assert without_clock(third["history"]) != without_clock(one["history"])


def test_it_learns():
    history = undisturbed(epochs=8, learning_rate=0.005)["history"]
    assert history[-1]["train_loss"] < history[0]["train_loss"] * 0.7
    assert history[-1]["val_loss"] < history[0]["val_loss"] * 0.7


class Stop(Exception):
    pass


@pytest.mark.fast
@pytest.mark.parametrize("step", [2, 11])
def test_a_run_stopped_in_the_middle_goes_on_to_the_very_same_weights(monkeypatch, step):
    expected = undisturbed()
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)  # a checkpoint after every step
    learn, seen = training.Trainer.train_step, []

    def stopping(self, batch, number):
        if len(seen) == step:
            raise Stop
        seen.append(number)
        learn(self, batch, number)

    monkeypatch.setattr(training.Trainer, "train_step", stopping)
    with pytest.raises(Stop):
        trained(begin())
    monkeypatch.setattr(training.Trainer, "train_step", learn)
    again = trained(begin())
    assert_same(last(begin())["model"], expected["model"])
    assert_same(last(begin())["best"]["weights"], expected["best"]["weights"])
    assert without_clock(again.progress.history) == without_clock(expected["history"])


def count_measuring(monkeypatch):
    """Let features be measured as they are; return a list that gets longer each time."""
    measured, moments = [], st.Features.moments

    def counting(self, rows):
        measured.append(len(rows))
        return moments(self, rows)

    monkeypatch.setattr(st.Features, "moments", counting)
    return measured


def stop_halfway(**settings):
    """Train an epoch and a step, as if asked to stop then."""
    trainer = training.Trainer(begin(**settings).job())
    pause = trainer._pause

    def pause_in_second():
        if trainer.progress.epoch == 1:
            trainer.stop = "asked to stop"
        return pause()

    trainer._pause = pause_in_second
    trainer.run()
    assert (trainer.progress.epoch, trainer.progress.step) == (1, 1)


@pytest.mark.fast
@pytest.mark.parametrize("settings", [{}, {"standardise": False}])
def test_a_resumed_run_knows_the_features_mean_and_deviation(monkeypatch, capsys, settings):
    expected = undisturbed(**settings)
    measured = count_measuring(monkeypatch)
    stop_halfway(**settings)
    assert len(measured) == 1
    assert "measuring the features" in capsys.readouterr().err
    trained(begin(**settings))
    said = capsys.readouterr().err
    assert len(measured) == 1 and "measuring" not in said and "resuming after 1 epochs" in said
    again = last(begin(**settings))
    for part in ("model", "optimizer"):
        assert str(again[part]) == str(expected[part])
    assert_same(again["model"], expected["model"])
    assert_same(again["best"]["weights"], expected["best"]["weights"])
    assert all(map(torch.equal, again["moments"], expected["moments"]))


def test_a_checkpoint_of_a_time_before_moments_were_kept_still_loads(monkeypatch):
    expected = undisturbed()["model"]
    stop_halfway()
    old = {name: value for name, value in last(begin()).items() if name != "moments"}
    torch.save(old, begin().out / "last.pt")
    measured = count_measuring(monkeypatch)
    assert trained(begin()).progress.epoch == 3
    assert len(measured) == 1
    assert_same(last(begin())["model"], expected)


def test_the_moments_of_another_runs_checkpoint_are_not_taken():
    mean, deviation = undisturbed()["moments"]
    trainer = taken_up(undisturbed() | {"moments": (mean + 5, deviation)}, epochs=4)
    trainer.save()
    assert trainer.progress.epoch == 3
    assert torch.equal(trainer.captioner.mean, mean)
    assert torch.equal(last(begin())["moments"][0], mean)


@pytest.mark.fast
def test_only_the_first_process_measures_and_all_end_with_its_error(monkeypatch):
    whole = training.Trainer(begin().job())
    sent = [torch.ones(24), torch.full((24,), 2.0)]
    measured = count_measuring(monkeypatch)
    monkeypatch.setattr(st, "join_processes", lambda _: (1, 2))
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model, **_: model)

    def receive(values):
        values[0] = tuple(sent)

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", receive)
    second = training.Trainer(begin().job())
    assert not measured and torch.equal(second.captioner.mean, sent[0])
    assert torch.equal(second.captioner.deviation, sent[1])
    for name, weight in weights(second).items():  # measuring draws no random numbers
        assert torch.equal(weight, weights(whole)[name])

    def fail(values):
        values[0] = st.ArtifactError("Some features are not finite.")

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", fail)
    with pytest.raises(st.ArtifactError, match="not finite"):
        training.Trainer(begin().job())


def test_another_runs_checkpoint_is_not_taken_up_unasked():
    torch.save(undisturbed(), begin().out / "last.pt")
    assert len(trained(begin(epochs=2)).progress.history) == 2
    asked = trained(begin(epochs=4, resume_from=str(st.OUTPUTS / "03_train_dual_t4")))
    assert [line["epoch"] for line in asked.progress.history] == [1, 2, 3, 4]


def test_a_checkpoint_loads_with_the_prefix_that_dataparallel_writes():
    expected = undisturbed()["model"]
    trainer = taken_up(undisturbed() | {"model": {f"module.{k}": v for k, v in expected.items()}})
    assert_same(weights(trainer), expected)


@pytest.mark.parametrize(
    "data", [b"", b"no checkpoint", b"\x80\x04\x95\x0e\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94."]
)
def test_a_broken_checkpoint_is_one_artifact_error(data):
    run = begin()
    (run.out / "last.pt").write_bytes(data)
    with pytest.raises(st.ArtifactError, match=r"last\.pt is not a checkpoint"):
        trained(run)


@pytest.mark.fast
def test_slices_of_a_batch_give_the_gradient_of_the_whole():
    whole, sliced = (
        training.Trainer(begin(dropout=0).job()),
        training.Trainer(begin(dropout=0, accumulate=4).job()),
    )
    for trainer in (whole, sliced):
        for step, batch in enumerate(trainer.batches["train"].epoch(13, 0)):
            trainer.train_step(batch, step)
    for one, other in zip(weights(whole).values(), weights(sliced).values(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def assert_close(state, expected):
    """Hold a run of several processes, which add up in another order, against that of one."""
    for name, tensor in state["model"].items():
        torch.testing.assert_close(tensor, expected["model"][name], atol=1e-4, rtol=1e-3)
    histories = without_clock(state["history"]), without_clock(expected["history"])
    for one, other in zip(*histories, strict=True):
        assert one == pytest.approx(other, abs=2e-3)


def test_an_epoch_has_every_caption_once_in_batches_of_alike_lengths():
    generator = np.random.default_rng(0)
    vocab = st.Vocab([*st.SPECIAL, *"abcdefghijklmnopqrstuvwxyz"])
    captions = [vocab.words[4 : 4 + n] for n in generator.integers(3, 25, 3000)]
    rows, references = np.arange(3000), [[words] for words in captions]
    data = st.CaptionData(vocab, {"train": rows}, {"train": []}, {"train": references})
    batches = data.batches("train", 64, 50)
    epochs = [batches.epoch(13, number) for number in (0, 0, 1)]
    for epoch in epochs:
        assert sorted(np.concatenate(epoch)) == list(range(3000)) and len(epoch) == len(batches)
    assert all(np.array_equal(a, b) for a, b in zip(*epochs[:2], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(epochs[0], epochs[2], strict=True))
    padded = sum(batches.words(batch).numel() for batch in epochs[0])
    assert padded < 1.05 * batches.lengths.sum()  # at random it is 1.7 times
    for caption in (0, 17):
        assert batches.words(np.array([caption])).tolist() == [vocab.encode(captions[caption])]


def test_captions_are_cut_to_the_longest_that_is_allowed():
    trainer = training.Trainer(begin(max_caption_length=5).job())
    assert trainer.batches["train"].lengths.max() == 5 + 2  # and <start> and <end>


@pytest.mark.fast
def test_the_learning_rate_warms_up_and_falls():
    trainer = training.Trainer(begin(epochs=50).job())
    rates = [
        trainer.objective.learning_rate(step) for step in range(50 * len(trainer.batches["train"]))
    ]
    peak = int(np.argmax(rates))
    assert rates[peak] == pytest.approx(0.001) and 0 < peak < len(rates) / 10
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(
        rates[peak:], reverse=True
    )
    assert rates[-1] < 2e-5


def dots(trainer):
    """List the dots that the curves of a run have on losses, and on CIDEr-D: (epoch, value)."""
    history = pd.DataFrame(trainer.progress.history)
    axes = training.loss_curves(history, trainer.out / "model").axes
    lines = [[line for line in a.lines if line.get_marker() == "o"] for a in axes]
    return [[(line.get_xdata()[0], line.get_ydata()[0]) for line in found] for found in lines]


@pytest.mark.parametrize("select_by, kept", [("cider", 2), ("loss", 3)])
def test_the_epoch_that_is_kept_is_the_best_by_what_was_chosen(monkeypatch, select_by, kept):
    losses, ciders = iter([3.0, 2.5, 2.0, 2.2]), iter([0.1, 0.4, 0.3, 0.2])
    run = begin(epochs=4, select_by=select_by)
    trainer, seen = training.Trainer(run.job()), {}
    captions = trainer.validate()[1]
    monkeypatch.setattr(trainer, "validate", lambda: (next(losses), captions))
    monkeypatch.setattr(trainer.cider, "score", lambda _: np.array([next(ciders)]))
    train = trainer.train_epoch

    def keep_weights():
        finished = train()
        seen[trainer.progress.epoch + 1] = weights(trainer)
        return finished

    monkeypatch.setattr(trainer, "train_epoch", keep_weights)
    trainer.run()
    config = json.loads((run.out / "model/config.json").read_text())
    assert config["training"]["best_epoch"] == kept
    saved = st.Storyteller.from_pretrained(run.out / "model").captioner.state_dict()
    for name, tensor in seen[kept].items():
        torch.testing.assert_close(saved[name], tensor.half().float())
    assert dots(trainer) == ([[], [(2, 0.4)]] if select_by == "cider" else [[(3, 2.0)], []])


@pytest.mark.usefixtures("restored_handlers")
def test_out_of_memory_ends_in_one_sentence_that_names_what_to_change(monkeypatch):
    def full(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(training.Trainer, "run", full)
    with pytest.raises(
        st.ArtifactError, match=r"batch_size=32.*accumulate=2.*batch_size=16.*max_caption_length=25"
    ):
        training.train_worker(begin().job())


def test_a_loss_that_is_no_number_stops_the_run_with_advice():
    trainer = training.Trainer(begin().job())
    with torch.no_grad():
        trainer.captioner.decoder.output.bias.fill_(float("nan"))
    with pytest.raises(st.ArtifactError, match="learning_rate"):
        trainer.run()


def test_the_worker_of_a_killed_machine_says_so_and_what_to_do(monkeypatch):
    run = begin()
    monkeypatch.setattr(st.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="resumes where it stopped"):
        training.train(run)


def test_features_of_other_photos_are_refused():
    run = begin()
    extracted = Path(run.job()["reads"]["01_extract_features"])
    kept = (extracted / "images.csv").read_text()
    try:
        (extracted / "images.csv").write_text("\n".join(kept.splitlines()[:-5]) + "\n")
        with pytest.raises(st.ArtifactError, match=r"5 of 60 captioned photos.*same max_photos"):
            st.CaptionData.load(extracted, st.OUTPUTS / "02_vocab")
    finally:
        (extracted / "images.csv").write_text(kept)


class Trace:
    """Unpickled, it leaves a folder behind."""

    def __reduce__(self):
        return os.mkdir, ("a-pickle-was-run",)


def absurd(shape, dtype="<f2"):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return header.getvalue() + bytes(100)


@pytest.mark.fast
@pytest.mark.parametrize(
    "name, data",
    [
        *(
            (name, pickle.dumps(Trace()))
            for name in ("images.csv", "skipped.csv", "captions.csv", "vocab.json", "features.npy")
        ),
        ("features.npy", absurd((2,), "|O") + pickle.dumps([Trace(), Trace()])),
        ("features.npy", absurd((10**9, 49, 2048))),
        ("features.npy", absurd((60, -1, 24))),
        ("features.npy", absurd((0, 1, 24))),
        ("features.npy", absurd((5, 1, 2), "<f8")),
        ("features.npy", b""),
        ("features.npy", np.lib.format.magic(1, 0) + b"\xff\xff{'descr'"),
        (
            "features.npy",
            absurd((60, 1, 24))[:-100] + np.full((60, 1, 24), np.nan, np.float16).tobytes(),
        ),
        ("images.csv", b"row,name\n0,x.jpg\n"),
        ("captions.csv", b"image,caption\nscene_0001.jpg,A dog .\n"),
        ("vocab.json", b"[" * 100_000),
        ("vocab.json", b'{"words": [1, 2, 3, 4]}'),
        ("vocab.json", b'{"words": ["a", "a"]}'),
    ],
)
def test_hostile_results_of_earlier_stages_are_one_artifact_error_and_run_nothing(
    tmp_path, monkeypatch, name, data
):
    job = begin().job()
    job["reads"] = {
        stage: shutil.copytree(folder, tmp_path / stage) for stage, folder in job["reads"].items()
    }
    (harmed,) = (path / name for path in job["reads"].values() if (path / name).exists())
    harmed.write_bytes(data)
    with pytest.raises(st.ArtifactError):
        training.Trainer(job)
    assert not Path("a-pickle-was-run").exists()


def count_steps(monkeypatch):
    """Let training go on as it does; return a list that gets longer with every step."""
    steps, learn = [], training.Trainer.train_step

    def counting(self, batch, number):
        steps.append(number)
        learn(self, batch, number)

    monkeypatch.setattr(training.Trainer, "train_step", counting)
    return steps


def test_a_finished_run_is_trained_anew_when_it_is_run_again(monkeypatch):
    run = begin(epochs=1)
    first = trained(run)
    run.finish()
    steps = count_steps(monkeypatch)
    again = trained(begin(epochs=1))
    assert len(steps) == len(again.batches["train"])
    assert without_clock(again.progress.history) == without_clock(first.progress.history)


class Killed(BaseException):
    """What a SIGKILL is to the code that it hits: nothing below here runs."""


def run_stage(settings):
    """Do what notebook 03 does."""
    run = begin(**settings)
    trainer = trained(run)
    st.save_figure(
        training.loss_curves(pd.DataFrame(trainer.progress.history), run.out / "model"),
        run.out / "curves.png",
    )
    run.finish()
    return run


def test_a_run_that_is_killed_after_any_file_goes_on_and_trains_no_step_twice(monkeypatch):
    settings = {"epochs": 1, "max_caption_length": 5}
    run = run_stage(settings)
    expected, replace = last(run)["model"], os.replace
    for moment in itertools.count(1):
        st.shutil.rmtree(run.out)
        written = []

        def dying(source, target, moment=moment, written=written):
            replace(source, target)
            written.append(Path(target).name)
            if len(written) == moment:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", dying)
            try:
                run_stage(settings)
                break  # fewer files are written than that
            except Killed:
                finished = (run.out / "manifest.json").is_file()
        assert finished == ("manifest.json" in written)
        with monkeypatch.context() as patch:
            steps = count_steps(patch)
            assert_same(last(run_stage(settings))["model"], expected)
            assert finished or bool(steps) == ("last.pt" not in written), written
    assert {"last.pt", "history.csv", "model.safetensors", "manifest.json"} <= set(written)


def wait_for(condition, what, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found


def stop_worker(run, name):
    """Start a worker, send it a signal after an epoch, and return its exit status."""
    before, worker = epochs_done(run), start_worker(run)
    wait_for(lambda: epochs_done(run) > before, "no epoch")
    os.kill(worker.pid, signal.Signals[name])
    worker.join()
    return worker.exitcode


def test_a_run_that_is_killed_and_asked_to_stop_goes_on_to_the_very_same_end(monkeypatch):
    expected, run = undisturbed(epochs=8), begin(epochs=8)
    assert stop_worker(run, "SIGKILL") == -signal.SIGKILL
    assert not (run.out / "model").exists()
    for asking in ("SIGTERM", "SIGINT"):
        run, before = begin(epochs=8), epochs_done(run)
        assert stop_worker(run, asking) == 0
        stopped, at = run.stopped(), last(run)
        assert (stopped["epoch"], stopped["step"]) == (at["epoch"], at["step"])
        assert asking in stopped["reason"] and before < stopped["epoch"] < 8
        assert (run.out / "model/config.json").is_file(), "the best captioner so far"
    run = begin(epochs=8)
    monkeypatch.setattr(st.Run, "launch", lambda run, _: trained(run))  # in this process
    assert list(training.train(run)["epoch"]) == list(range(1, 9))
    assert_same(last(run)["model"], expected["model"])
    assert without_clock(last(run)["history"]) == without_clock(expected["history"])
    assert not run.stopped()


def test_when_its_time_is_over_a_run_stops_and_no_later_stage_takes_it(
    monkeypatch, tmp_path, capsys
):
    expected = undisturbed(epochs=2)
    monkeypatch.setattr(st.Run, "launch", lambda run, _: trained(run))  # in this process
    assert training.train(begin(epochs=2, max_hours=1e-6)).empty
    said = r"stopped after 0 of 2 epochs and 1 steps: max_hours have passed.*resumes there"
    assert re.search(said, capsys.readouterr().out)
    with pytest.raises(st.ArtifactError, match="03_train_dual_t4 stopped before it was finished"):
        begin_stage("04_evaluate", dataset_dir="drawn").read("03_train_dual_t4")
    begin(epochs=2).finish()
    assert (
        "is not finished" in capsys.readouterr().out
        and not (st.OUTPUTS / "03_train_dual_t4/manifest.json").exists()
    )
    # On Kaggle, what was stopped is attached read-only, and the same notebook goes on from there.
    attached = tmp_path / "input/notebooks/someone/training/03_train_dual_t4"
    st.shutil.copytree(st.OUTPUTS / "03_train_dual_t4", attached)
    st.shutil.rmtree(st.OUTPUTS / "03_train_dual_t4")
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(tmp_path / "input"))
    trainer = trained(begin(epochs=2))
    assert "resuming after 0 epochs and 1 steps" in capsys.readouterr().err
    assert without_clock(trainer.progress.history) == without_clock(expected["history"])
    assert_same(last(begin(epochs=2))["model"], expected["model"])


def test_resume_from_takes_a_folder_and_says_when_it_is_not_clear(tmp_path):
    for place in (Path(), tmp_path / "one", tmp_path / "two"):
        (place / begin().out).mkdir(parents=True, exist_ok=True)
        (place / begin().out / "last.pt").touch()
    assert (
        training.Trainer(begin(resume_from=str(tmp_path / "one")).job()).checkpoints()[-1][0]
        == tmp_path / "one" / begin().out / "last.pt"
    )
    for place, count in ((tmp_path, 2), (tmp_path / "nowhere", 0)):
        with pytest.raises(st.ArtifactError, match=f"holds {count} checkpoints"):
            training.Trainer(begin(resume_from=str(place)).job()).checkpoints()


def test_a_run_that_began_elsewhere_goes_on_from_its_own_checkpoint(tmp_path, capsys):
    torch.save(undisturbed(epochs=1), tmp_path / "last.pt")
    settings = {"epochs": 3, "resume_from": str(tmp_path / "last.pt")}
    for steps in (1, 2):
        trained(begin(**settings, max_hours=1e-6))
        assert last(begin(**settings))["step"] == steps
    assert trained(begin(**settings)).progress.epoch == 3
    assert re.findall("resuming after .*", capsys.readouterr().err) == [
        f"resuming after 1 epochs and {steps} steps" for steps in (0, 1, 2)
    ]


def test_less_memory_a_step_or_another_gpu_does_not_make_it_another_run_but_other_settings_do(
    capsys,
):
    run = begin(epochs=2, max_hours=1e-6)
    trained(run)
    assert (run.stopped()["epoch"], run.stopped()["step"]) == (0, 1)
    for settings, used in (({"accumulate": 2}, True), ({"learning_rate": 0.5}, False)):
        trainer = training.Trainer(begin(epochs=2, **settings).job())
        trainer.resume()
        assert (trainer.progress.step == 1) == used
        assert ("is of a run with other settings" in capsys.readouterr().err) != used


def test_a_run_in_float32_goes_on_in_float16_where_the_hardware_says_so(monkeypatch):
    trained(begin(epochs=2, max_hours=1e-6))
    monkeypatch.setattr(st, "choose_precision", lambda *_: (torch.float16, "float16"))
    trainer = training.Trainer(begin(epochs=2).job())
    trainer.resume()
    assert trainer.progress.step == 1 and trainer.progress.scaler.get_scale() == 2**16


def test_float16_with_its_scaler_trains_what_float32_does_on_a_cpu_too():
    exact = undisturbed(epochs=1)["history"]
    half = trained(begin(epochs=1, precision="float16")).progress
    assert half.scaler.is_enabled()
    for line, other in zip(without_clock(exact), without_clock(half.history), strict=True):
        assert line["train_loss"] == pytest.approx(other["train_loss"], rel=3e-3)
        assert line["val_loss"] == pytest.approx(other["val_loss"], rel=3e-3)
        assert line["val_cider"] == pytest.approx(other["val_cider"], abs=0.05)


def test_a_step_that_the_scaler_skips_moves_neither_schedule_nor_averages(monkeypatch):
    monkeypatch.setitem(st.RECIPES["original"], "ema_decay", 0.9)
    trainer = training.Trainer(begin(precision="float16").job())
    at = trainer.progress
    at.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # more than float16 holds
    before = weights(trainer)
    batches = trainer.batches["train"].epoch(13, 0)
    trainer.train_step(batches[0], 0)
    assert at.updates == 0 and at.scaler.get_scale() == 2.0**39
    assert_same(weights(trainer), before)
    assert_same(at.ema.state_dict(), before)
    at.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    trainer.train_step(batches[1], 1)
    assert at.updates == 1
    assert at.optimizer.param_groups[0]["lr"] == trainer.objective.learning_rate(0)


def test_a_few_validation_photos_spread_over_all_choose_the_epoch(capsys):
    every = training.Trainer(begin(epochs=1).job()).data
    run = begin(epochs=1, val_photos=3)
    trainer = trained(run)
    names = every.names["val"]
    assert len(names) == 6 and trainer.data.names["val"] == names[::2]
    assert (trainer.data.rows["val"] == every.rows["val"][::2]).all()
    assert trainer.data.references["val"] == every.references["val"][::2]
    assert set(trainer.batches["val"].rows) == set(trainer.data.rows["val"])
    assert "3 of 6 validation photos" in capsys.readouterr().err
    (line,) = st.read_table(run.out / "history.csv").to_dict("records")
    assert line["val_photos"] == "3"


def test_where_cider_d_is_0_for_every_caption_the_loss_chooses_the_epoch(capsys, monkeypatch):
    losses = iter([3.0, 2.0, 2.5])
    trainer = training.Trainer(begin(val_photos=1, self_critical=2).job())
    assert "CIDEr-D is 0" in capsys.readouterr().err
    captions = trainer.validate()[1]
    monkeypatch.setattr(trainer, "validate", lambda: (next(losses), captions))
    trainer.run()
    assert trainer.progress.best["epoch"] == 2 and len(trainer.progress.history) == 3
    config = st.read_json(trainer.out / "model/config.json")
    assert config["training"]["select_by"] == "loss"
    assert dots(trainer) == [[(2, 2.0)], []]


def test_photos_that_all_have_the_same_features_are_refused(monkeypatch):
    monkeypatch.setattr(
        st.Features, "moments", lambda *_: (torch.ones(24), torch.full((24,), 1e-4))
    )
    with pytest.raises(st.ArtifactError, match="All training photos have the same features"):
        training.Trainer(begin().job())


def test_a_stop_after_the_last_step_is_none(monkeypatch):
    run = begin(epochs=1)
    trainer = training.Trainer(run.job())
    validate = trainer.validate
    monkeypatch.setattr(
        trainer, "validate", lambda: setattr(trainer, "stop", "asked to stop") or validate()
    )
    trainer.run()
    assert (run.out / "model").is_dir() and not run.stopped()


def test_two_unfinished_runs_on_kaggle_are_one_too_many(monkeypatch, tmp_path):
    for name in ("one", "two"):
        place = tmp_path / "input" / name / "03_train_dual_t4"
        place.mkdir(parents=True)
        (place / "status.json").write_text("{}")
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(tmp_path / "input"))
    with pytest.raises(
        st.ArtifactError, match=r"(?s)2 unfinished runs.*one/03_train.*two/03_train"
    ):
        training.Trainer(begin().job()).resume()


def test_processes_at_different_places_are_an_error(monkeypatch):
    trainer = training.Trainer(begin().job())
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def all_gather(values, own):
        values[:] = [own, (1, 1, "likelihood")]

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather)
    with pytest.raises(
        st.ArtifactError,
        match=r"(?s)different checkpoints.*\(0, 0, 'likelihood'\), \(1, 1, 'l.*Copy outputs/",
    ):
        trainer.resume()


def test_the_loss_does_not_choose_among_self_critical_epochs():
    with pytest.raises(ValueError, match=r"select_by is 'loss'.*self_critical=0"):
        begin(recipe="best", select_by="loss")


def test_a_killed_worker_ends_the_run_of_both_and_the_next_run_ends_like_one_process(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(st.RECIPES["original"], "sizes", SIZES)
    settings = {"dropout": 0, "epochs": 6, "batch_size": 25}
    expected, run, failures = undisturbed(**settings), begin(**settings), []

    def train():
        try:
            run.launch("train", processes=2)
        except RuntimeError as error:
            failures.append(str(error))

    def second():  # the worker of rank 1
        for process in Path("/proc").glob("[0-9]*"):
            try:
                known, place = (
                    (process / "environ").read_bytes().split(b"\0"),
                    (process / "cwd").readlink(),
                )
            except OSError:
                continue
            if b"LOCAL_RANK=1" in known and place == Path.cwd():
                return int(process.name)
        raise LookupError("no process of rank 1")

    thread = threading.Thread(target=train)
    thread.start()
    wait_for((run.out / "last.pt").is_file, "no first epoch")
    os.kill(second(), signal.SIGKILL)
    thread.join(60)
    assert not thread.is_alive() and len(failures) == 1
    assert "killed" in failures[0] and "resumes where it stopped" in failures[0]
    done = len(last(run)["history"])
    assert 1 <= done < 6 and not (run.out / "model").exists()
    again = begin(**settings)
    again.launch("train", processes=2)
    assert_close(last(again), expected)
    assert (again.out / "model").is_dir()


def test_two_machines_train_what_one_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setitem(st.RECIPES["original"], "sizes", SIZES)
    settings = {"dropout": 0, "epochs": 2, "batch_size": 25}
    expected = undisturbed(**settings)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"--nnodes=2 --node-rank=0 --master-addr=127.0.0.1 --master-port={port}"
    run = begin(torchrun=options, **settings)
    capsys.readouterr()
    thread = threading.Thread(target=run.launch, args=("train", 1))
    thread.start()
    wait_for(lambda: "job" in st.read_json(run.out / "status.json"), "no job")
    other = tmp_path / "other machine"  # the project as it was copied there
    st.shutil.copytree(".", other)
    printed = wait_for(
        lambda: re.search(r"\$ python (.*)", capsys.readouterr().out),
        "no command for it",
    )
    command = printed[1].replace("storyteller_utils.py", st.__file__).replace("rank=0", "rank=1")
    there = subprocess.run(
        [sys.executable, *command.split()], cwd=other, capture_output=True, text=True, timeout=120
    )
    thread.join(60)
    assert there.returncode == 0 and not thread.is_alive(), there.stderr
    assert_close(last(run), expected)
    assert (run.out / "model/config.json").is_file()
    assert {p.name for p in (other / run.out).iterdir()} == {"status.json"}, (
        "only the first machine writes"
    )


def test_self_critical_training_raises_the_reward(monkeypatch):
    monkeypatch.setattr(training, "SELF_CRITICAL_RATE", 0.003)
    settings = {"epochs": 8, "learning_rate": 0.005}
    trainer = taken_up(undisturbed(**settings), **settings)
    trainer.begin_self_critical()
    rewards = []
    for step in range(30):
        trainer.progress.begin_epoch()
        trainer.train_step(np.arange(8), step)
        sums = trainer.progress.sums
        rewards.append(sums["reward"] / sums["captions"])
    assert np.mean(rewards[-10:]) > 1.3 * np.mean(rewards[:10])


def test_self_critical_epochs_follow_the_others_and_go_on_where_they_stopped(monkeypatch):
    settings = {"epochs": 1, "self_critical": 2}
    expected = undisturbed(**settings)
    assert [line["reward"] is None for line in expected["history"]] == [True, False, False]
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    learn = training.Trainer.train_step

    def stopping(self, batch, number):
        if self.progress.epoch == 2 and self.progress.step == 1:
            raise Stop
        learn(self, batch, number)

    monkeypatch.setattr(training.Trainer, "train_step", stopping)
    with pytest.raises(Stop):
        trained(begin(**settings))
    monkeypatch.setattr(training.Trainer, "train_step", learn)
    again = trained(begin(**settings))
    assert without_clock(again.progress.history) == without_clock(expected["history"])
    assert_same(last(begin(**settings))["model"], expected["model"])


@pytest.mark.fast
def test_advantages_compare_the_captions_of_a_photo_with_each_other_only():
    trainer, photos = training.Trainer(begin(dropout=0).job()), np.array([3, 0, 7])
    drawn = trainer.objectives["self_critical"].draw(photos, photos, 1.0)
    words, advantages = drawn.words, drawn.weights
    assert len(drawn.features) == len(words) == len(advantages) == 3 * training.SAMPLES
    assert drawn.tokens == int((words[:, 1:] != st.PAD).sum())
    zeros = torch.zeros(3)
    torch.testing.assert_close(
        advantages.view(3, training.SAMPLES).sum(1), zeros, atol=1e-5, rtol=0
    )
    vocab, references = trainer.data.vocab, trainer.data.references["train"]
    captions = [vocab.decode(ids) + ["<end>"] * (st.END in ids) for ids in words.tolist()]
    photos = np.repeat(photos, training.SAMPLES)
    cider = st.CiderD([[[*w, "<end>"] for w in group] for group in references])
    rewards = cider.score(captions, photos)
    for i in range(len(photos)):
        others = [j for j in range(len(photos)) if photos[j] == photos[i] and j != i]
        assert float(advantages[i]) == pytest.approx(rewards[i] - rewards[others].mean(), abs=1e-5)


def test_averaged_weights_are_the_ones_that_generate_captions(monkeypatch):
    monkeypatch.setitem(st.RECIPES["original"], "ema_decay", 0.9)
    run = begin(epochs=2)
    trainer = training.Trainer(run.job())
    mean, steps = weights(trainer), []
    learn = trainer.train_step

    def follow(batch, step):
        learn(batch, step)
        kept = min(0.9, (1 + step) / (10 + step))
        for name, tensor in weights(trainer).items():
            mean[name] = kept * mean[name] + (1 - kept) * tensor
        steps.append(step)

    trainer.train_step = follow
    trainer.run()
    assert steps == list(range(len(steps)))
    state = last(run)
    for name, tensor in mean.items():
        torch.testing.assert_close(state["ema"][name], tensor, atol=1e-5, rtol=1e-4)
        assert "weight" not in name or not torch.equal(state["model"][name], state["ema"][name])


def test_training_ends_when_the_last_epochs_were_all_worse_than_the_best(monkeypatch):
    monkeypatch.setitem(st.RECIPES["original"], "patience", 2)
    ciders = iter([0.1, 0.4, 0.3, 0.2, 0.5])
    trainer = training.Trainer(begin(epochs=5).job())
    monkeypatch.setattr(trainer.cider, "score", lambda _: np.array([next(ciders)]))
    trainer.run()
    assert len(trainer.progress.history) == 4 and trainer.progress.best["epoch"] == 2


@pytest.mark.fast
def test_mirrored_photos_are_seen_half_the_time_but_not_by_captions_that_name_a_side(
    project, monkeypatch
):
    run = begin()
    extracted = Path(run.job()["reads"]["01_extract_features"])
    monkeypatch.setitem(st.RECIPES["original"], "flips", True)
    try:
        np.save(extracted / "features_flip.npy", np.load(extracted / "features.npy") + 100)
        trainer = training.Trainer(run.job())
        captions = np.arange(len(trainer.batches["train"].rows))
        trainer.sides = torch.tensor([trainer.data.vocab.ids["two"]])
        drawn = trainer.objective.draw(captions, captions, 1.0)
        features, words = drawn.features, drawn.words
        mirrored = features.mean((1, 2)) > 50
        named = (words == trainer.sides).any(1)
        assert named.any() and not mirrored[named].any()
        assert 0.3 < float(mirrored[~named].float().mean()) < 0.7
        val = trainer.features[trainer.data.rows["val"]]
        assert not (val.mean((1, 2)) > 50).any()
    finally:
        (extracted / "features_flip.npy").unlink()


def test_the_card_says_what_each_stage_was_set_to_and_the_terms_of_flickrs_data():
    run = begin(epochs=1, resume_from="")
    trained(run)
    config = st.read_json(run.out / "model/config.json")
    assert list(config["settings"]) == list(st.STAGES)[:3]
    assert config["settings"]["03_train_dual_t4"]["epochs"] == 1
    card = (run.out / "model/README.md").read_text()
    assert "| 02_vocab | caption_column='', language='en', min_count=2, " in card
    assert "dataset_dir" not in card and "research and education only" not in card
    config["dataset"]["name"] = "flickr8k"
    assert "research and education only" in st.Storyteller.model_card(config)
