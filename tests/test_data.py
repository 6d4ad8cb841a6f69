"""The data room: real sets have their published counts and means, every form of path comes back as it went in, and every
kind of broken file gives its own sentence."""

import gzip
import io
import os
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from periplus import metrics
from periplus.data import ImageData, composites, formats, load_data
from periplus.errors import DataError, UsageError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder with the real sets, read in place: $PERIPLUS_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("PERIPLUS_DATA") or SHARED)
    if not (folder / "mnist" / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"no real data at {folder}: set PERIPLUS_DATA to a folder that has mnist/, fashion-mnist/, binarized-mnist/")
    return folder


@pytest.fixture
def images() -> np.ndarray:
    """Twelve grey images of 5 x 7, all different, with the extremes 0 and 255 in them."""
    values = np.random.default_rng(0).integers(0, 256, (12, 5, 7), dtype=np.uint8)
    values[0, 0, :2] = 0, 255
    return values


LABELS = np.array([0, 1, 2] * 4)


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.astype(np.uint8).tobytes()


def npz(path: Path, compressed: bool = False, **arrays: np.ndarray) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def write(path: Path, body: bytes) -> Path:
    path.write_bytes(body)
    return path


def refusal(path: Path, *words: str, **options: object) -> str:
    """The one-line sentence with which `path` is refused: it names the file first and has all the words."""
    with pytest.raises(DataError) as caught:
        load_data(path, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    for word in words:
        assert word in message
    return message


# --- truths of the published sets ------------------------------------------------------------------------------------------

MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


@pytest.mark.parametrize(
    ("name", "split", "counts", "mean", "std"),
    [
        ("mnist", "train", MNIST_TRAIN, 0.1307, 0.3081),
        ("mnist", "test", MNIST_TEST, 0.1325, 0.3105),
        ("fashion-mnist", "train", [6000] * 10, 0.2860, 0.3530),
        ("fashion-mnist", "test", [1000] * 10, 0.2868, 0.3524),
    ],
)
def test_published_sets_have_their_published_numbers(real_data: Path, name: str, split: str, counts: list[int], mean: float, std: float):
    data = load_data(name, split, root=real_data)
    assert len(data) == sum(counts) and data.shape == (1, 28, 28) and len(data.classes) == 10
    assert data.labels is not None and data.labels.bincount().tolist() == counts
    assert data.images.double().mean() / 255 == pytest.approx(mean, abs=5e-5)
    assert data.images.double().std() / 255 == pytest.approx(std, abs=5e-5)
    assert (data.name, data.split) == (name, split)


#: The set is made by a fixed seed from a frozen stream: these digests are the same on every machine, for ever.
STACKED = {
    "train": (60000, "57f8ff0fdbdf920f3c568c0ae44326a5b2df13f5d1c8de22b0f8f515a152b602"),
    "test": (26000, "f50cb162131e9df368d9c9fb2f63875aae6119afb7a7c3102306a054c857f832"),
}


@pytest.mark.parametrize("split", STACKED)
def test_stacked_mnist_is_made_of_digits_of_its_split(real_data: Path, split: str):
    data, digits = load_data("stacked-mnist", split, root=real_data), load_data("mnist", split, root=real_data)
    count, digest = STACKED[split]
    assert data.images.shape == (count, 3, 28, 28) and data.classes == tuple(f"{n:03d}" for n in range(1000))
    assert data.content_hash() == digest and (data.name, data.split, data.source) == ("stacked-mnist", split, "stacked-mnist")
    label_of = {image.numpy().tobytes(): int(label) for image, label in zip(digits.images, digits.labels, strict=True)}
    for row in range(0, count, 97):
        assert int(data.labels[row]) == int("".join(str(label_of[channel.numpy().tobytes()]) for channel in data.images[row]))
    shares = digits.labels.bincount(minlength=10).double()
    product = torch.einsum("a,b,c->abc", shares, shares, shares).flatten()  # the channels are independent
    assert metrics.class_distance(data.labels.bincount(minlength=1000), product).p_value > 0.001


def test_stacked_digits_spell_their_number_and_use_every_class():
    digits = formats.Loaded(np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1).repeat(2, 2), np.arange(40) // 10, tuple("abcd"))
    stacked = composites.stack_digits(digits, 5000, "toy", "train")
    assert stacked.images.shape == (5000, 3, 2, 1) and stacked.images.flags.c_contiguous
    assert np.array_equal((stacked.images[:, :, 0, 0] // 10) @ np.array([16, 4, 1]), stacked.labels)
    assert len(np.unique(stacked.labels)) == 64 == len(stacked.classes)
    assert np.array_equal(composites.stack_digits(digits, 5000, "toy", "train").images, stacked.images)
    assert not np.array_equal(composites.stack_digits(digits, 5000, "toy", "test").images, stacked.images)


@pytest.mark.parametrize(("split", "count", "mean"), [("train", 50000, 0.130562), ("valid", 10000, 0.131127), ("test", 10000, 0.132512)])
def test_binarized_mnist_has_its_published_means(real_data: Path, split: str, count: int, mean: float):
    data = load_data("binarized-mnist", split, root=real_data)
    assert data.images.shape == (count, 1, 28, 28) and data.labels is None
    assert data.images.unique().tolist() == [0, 255]
    assert data.images.double().mean() / 255 == pytest.approx(mean, abs=5e-7)


def test_binarized_test_set_is_mnist_sorted_by_label(real_data: Path):
    """The unpacking has the right pixel and bit order: binarised images look like the grey ones they were drawn from."""
    grey = load_data("mnist", "test", root=real_data)
    assert grey.labels is not None
    drawn = load_data("binarized-mnist", "test", root=real_data).images.double().flatten(1)
    source = grey.images[torch.sort(grey.labels, stable=True).indices].double().flatten(1)
    assert torch.corrcoef(torch.stack([drawn.flatten(), source.flatten()]))[0, 1] > 0.9


def test_an_idx_path_finds_its_sibling_labels(real_data: Path):
    by_name = load_data("mnist", "test", root=real_data)
    by_path = load_data(real_data / "mnist" / "t10k-images-idx3-ubyte.gz")
    assert by_path.content_hash() == by_name.content_hash() and by_path.classes == by_name.classes and by_path.split == "all"


def test_digits_are_embedded_and_split_as_promised():
    from sklearn.datasets import load_digits

    train, test, everything = (load_data("digits", split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (1500, 297, 1797) and train.shape == (1, 8, 8)
    assert torch.equal(torch.cat([train.images, test.images]), everything.images)
    original = load_digits()
    assert np.array_equal(everything.images[:, 0].numpy(), np.round(original.images * 255 / 16).astype(np.uint8))
    assert everything.labels is not None and np.array_equal(everything.labels.numpy(), original.target)


# --- the noun --------------------------------------------------------------------------------------------------------------


def some_data(count: int = 20) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 3, 4), dtype=torch.uint8, generator=generator)
    return ImageData(pixels, torch.arange(count) % 3, ("a", "b", "c"), "some", "train")


def test_subset_takes_rows_in_order_and_masks():
    data = some_data()
    part = data.subset([5, 0, -1])
    assert torch.equal(part.images, data.images[[5, 0, 19]]) and part.labels is not None and part.labels.tolist() == [2, 0, 1]
    assert data.labels is not None
    assert torch.equal(data.subset(data.labels == 1).images, data.images[data.labels == 1])
    for wrong in ([], [20], [-21], [0.5], [[1]]):
        with pytest.raises(DataError):
            data.subset(wrong)  # type: ignore[arg-type]


def test_split_off_partitions_by_seed_and_draws_the_order_of_what_is_held_out():
    data = ImageData(torch.arange(50, dtype=torch.uint8).reshape(50, 1, 1, 1), None, (), "count", "train")
    rest, held_out = data.split_off(15, seed=3)
    values, others = held_out.images.flatten().tolist(), rest.images.flatten().tolist()
    assert values != sorted(values) and others == sorted(others) and sorted(values + others) == list(range(50))
    assert (len(rest), len(held_out)) == (35, 15)
    again = data.split_off(15, seed=3)[1].images.flatten().tolist()
    assert again == values and data.split_off(15, seed=4)[1].images.flatten().tolist() != values
    for count in (0, 50, -1):
        with pytest.raises(DataError):
            data.split_off(count, seed=0)


def test_content_hash_depends_on_pixels_labels_and_shape_only():
    data = some_data()
    same = ImageData(data.images.clone(), data.labels, ("x", "y", "z"), "other", "test")
    assert data.content_hash() == same.content_hash() and len(data.content_hash()) == 64
    changed = data.images.clone()
    changed[3, 0, 1, 1] ^= 1
    others = [
        ImageData(changed, data.labels, data.classes, "", ""),
        ImageData(data.images, None, (), "", ""),
        ImageData(data.images, data.labels.flip(0), data.classes, "", ""),  # type: ignore[union-attr]
        ImageData(data.images.reshape(20, 1, 4, 3), data.labels, data.classes, "", ""),
    ]
    assert len({data.content_hash(), *(other.content_hash() for other in others)}) == 5
    strided = ImageData(data.images.repeat_interleave(2, 0)[::2], data.labels, data.classes, "", "")
    assert strided.content_hash() == data.content_hash()


@pytest.mark.parametrize(
    ("pixels", "labels", "classes"),
    [
        (torch.zeros(4, 1, 2, 2), None, ()),
        (torch.zeros(4, 2, 2, dtype=torch.uint8), None, ()),
        (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), None, ()),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), ("a",)),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int32), ("a",)),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 2, 0]), ("a", "b")),
        (torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, -1, 0, 0]), ("a", "b")),
        (np.zeros((4, 1, 2, 2), np.uint8), None, ()),
    ],
)
def test_parts_that_do_not_fit_are_refused(pixels: torch.Tensor, labels: torch.Tensor | None, classes: tuple[str, ...]):
    with pytest.raises(DataError):
        ImageData(pixels, labels, classes, "wrong", "train")


# --- paths come back as they went ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_idx_roundtrip(tmp_path: Path, images: np.ndarray, packed: bool):
    pack = gzip.compress if packed else bytes
    path = write(tmp_path / "my-images-idx3-ubyte", pack(idx(images)))
    assert load_data(path).labels is None
    write(tmp_path / "my-labels-idx1-ubyte", pack(idx(LABELS)))
    data = load_data(path)
    assert np.array_equal(data.images[:, 0].numpy(), images) and data.labels is not None
    assert np.array_equal(data.labels.numpy(), LABELS) and data.classes == ("0", "1", "2")
    assert (data.name, data.split) == ("my-images-idx3-ubyte", "all")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW", "NHWC-colour", "NCHW-colour", "fortran"])
def test_npz_roundtrip(tmp_path: Path, images: np.ndarray, compressed: bool, layout: str):
    colour = np.stack([images, 255 - images, images // 2], axis=1)
    stored, expected = {
        "NHW": (images, images[:, None]),
        "NHWC": (images[..., None], images[:, None]),
        "NCHW": (images[:, None], images[:, None]),
        "NHWC-colour": (np.moveaxis(colour, 1, -1), colour),
        "NCHW-colour": (colour, colour),
        "fortran": (np.asfortranarray(images), images[:, None]),
    }[layout]
    data = load_data(npz(tmp_path / "a.npz", compressed, images=stored, labels=LABELS))
    assert np.array_equal(data.images.numpy(), expected) and data.labels is not None and data.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", ">f4", "<f8"])
def test_npz_floats_are_rounded_to_the_nearest_byte(tmp_path: Path, images: np.ndarray, dtype: str):
    data = load_data(npz(tmp_path / "a.npz", whatever=(images / 255).astype(dtype)))
    assert np.array_equal(data.images[:, 0].numpy(), images)
    assert data.labels is None


def test_npz_takes_the_only_array_beside_labels_and_prefers_images(tmp_path: Path, images: np.ndarray):
    data = load_data(npz(tmp_path / "a.npz", x=images, labels=LABELS.astype(np.uint8)))
    assert data.labels is not None and np.array_equal(data.images[:, 0].numpy(), images)
    data = load_data(npz(tmp_path / "b.npz", x=images[:2], images=images, y=LABELS))
    assert data.labels is None and len(data) == 12


def test_ambiguous_channels_are_read_as_nchw_with_a_warning(tmp_path: Path):
    stored = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    with pytest.warns(UserWarning, match="ambiguous"):
        data = load_data(npz(tmp_path / "a.npz", images=stored))
    assert np.array_equal(data.images.numpy(), stored)


def save_folder(root: Path, images: np.ndarray, suffix: str, by_class: bool) -> Path:
    for number, image in enumerate(images):
        folder = root / f"class-{'cab'[number % 3]}" if by_class else root
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:03d}{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    return root


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".bmp", ".gif", ".pgm", ".webp"])
def test_folder_roundtrip(tmp_path: Path, images: np.ndarray, suffix: str):
    root = save_folder(tmp_path / "flat", images, suffix, by_class=False)
    write(root / ".hidden.png", b"not an image")
    write(root / "README.txt", b"words")
    data = load_data(root)
    assert np.array_equal(data.images[:, 0].numpy(), images) if suffix != ".webp" else (data.images[:, 0].numpy() == images).all()
    assert data.labels is None and data.name == "flat"
    data = load_data(save_folder(tmp_path / "classes", images, suffix, by_class=True))
    assert data.classes == ("class-a", "class-b", "class-c") and data.labels is not None
    assert data.labels.tolist() == [0, 1, 2] * 4  # classes take turns
    assert np.array_equal(data.images[:, 0].numpy(), np.stack([images[1::3], images[2::3], images[0::3]], 1).reshape(images.shape))


def test_classes_of_unequal_size_take_turns_until_they_are_used_up(tmp_path: Path, images: np.ndarray):
    for name, rows in {"a": [0, 1, 2], "b": [3], "c": [4, 5]}.items():
        save_folder(tmp_path / name, images[rows], ".png", by_class=False)
    data = load_data(tmp_path)
    assert data.labels is not None and data.labels.tolist() == [0, 1, 2, 0, 2, 0]
    assert np.array_equal(data.images[:, 0].numpy(), images[[0, 3, 4, 1, 5, 2]])


def test_the_first_images_held_out_of_a_sorted_set_are_of_all_classes():
    data = ImageData(torch.zeros(300, 1, 1, 1, dtype=torch.uint8), torch.arange(3).repeat_interleave(100), ("a", "b", "c"), "sorted", "all")
    held_out = data.split_off(60, seed=0)[1]
    assert held_out.labels is not None and set(held_out.labels[:12].tolist()) == {0, 1, 2}


def test_folder_of_jpegs_is_close(tmp_path: Path):
    ramp = np.tile(np.linspace(0, 255, 16, dtype=np.uint8), (3, 16, 1))
    data = load_data(save_folder(tmp_path / "j", ramp, ".jpg", by_class=False))
    assert data.shape == (1, 16, 16) and (data.images[:, 0].int() - torch.from_numpy(ramp).int()).abs().max() <= 6


def test_one_colour_image_makes_all_rgb(tmp_path: Path, images: np.ndarray):
    save_folder(tmp_path, images[:2], ".png", by_class=False)
    Image.fromarray(np.stack([images[2], images[3], images[4]], -1)).save(tmp_path / "zz.png")
    data = load_data(tmp_path)
    assert data.images.shape == (3, 3, 5, 7)
    assert np.array_equal(data.images[0].numpy(), np.stack([images[0]] * 3)) and np.array_equal(data.images[2].numpy(), images[2:5])


def test_palettes_are_judged_by_the_colours_they_show(tmp_path: Path, images: np.ndarray):
    Image.fromarray(images[0]).convert("P").save(tmp_path / "a.png")
    assert np.array_equal(load_data(tmp_path).images.numpy(), images[:1, None])
    paletted = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), mode="P")
    paletted.putpalette([255, 0, 0, 0, 0, 255])
    (tmp_path / "b").mkdir()
    paletted.save(tmp_path / "b" / "a.png")
    assert load_data(tmp_path / "b").images[0, :, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("suffix", [".png", ".pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str):
    wide = np.array([[0, 257, 128 * 257], [40000, 65535, 300]], np.uint16)
    Image.fromarray(wide).save(tmp_path / f"a{suffix}")
    assert load_data(tmp_path).images[0, 0].tolist() == np.round(wide / 257).astype(int).tolist()


def test_transparency_is_composited_on_black(tmp_path: Path):
    Image.fromarray(np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 51]]], np.uint8)).save(tmp_path / "a.png")
    assert load_data(tmp_path).images[0].tolist() == [[[200, 0, 40]], [[100, 0, 20]], [[50, 0, 10]]]
    (tmp_path / "b").mkdir()
    Image.fromarray(np.array([[[200, 255], [200, 0]]], np.uint8), mode="LA").save(tmp_path / "b" / "a.png")
    assert load_data(tmp_path / "b").images[0].tolist() == [[[200, 0]]]
    (tmp_path / "c").mkdir()
    Image.fromarray(np.array([[7, 9]], np.uint8)).save(tmp_path / "c" / "a.png", transparency=9)
    assert load_data(tmp_path / "c").images[0].tolist() == [[[7, 0]]]


def test_one_bit_and_cmyk_images(tmp_path: Path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert load_data(tmp_path).images[0].tolist() == [[[255, 0]]]
    (tmp_path / "b").mkdir()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "b" / "a.jpg")
    assert load_data(tmp_path / "b").images[0, :, 4, 4].tolist() == pytest.approx([254, 0, 0], abs=6)


def test_image_size_resizes_every_source_alike(tmp_path: Path, images: np.ndarray):
    write(tmp_path / "a-images-idx3", idx(images))
    npz(tmp_path / "a.npz", images=images)
    save_folder(tmp_path / "f", images, ".png", by_class=False)
    sets = [load_data(tmp_path / name, image_size=(4, 3)) for name in ("a-images-idx3", "a.npz", "f")]
    assert all(data.shape == (1, 4, 3) for data in sets) and len({data.content_hash() for data in sets}) == 1
    constant = load_data(npz(tmp_path / "c.npz", images=np.full((2, 8, 8, 3), 77, np.uint8)), image_size=5)
    assert constant.shape == (3, 5, 5) and (constant.images == 77).all()
    halved = load_data(npz(tmp_path / "d.npz", images=np.full((2, 8, 8), 255, np.uint8) * np.arange(2, dtype=np.uint8)[:, None, None]), image_size=4)
    assert halved.images[0].max() == 0 and halved.images[1].min() == 255
    assert load_data("digits", image_size=16).shape == (1, 16, 16)


@pytest.mark.parametrize("size", [0, -3, (4,), (4, 0), 10**6, "8", 2.5])
def test_nonsense_image_sizes_are_usage_errors(size: object):
    with pytest.raises(UsageError, match="image_size"):
        load_data("digits", image_size=size)  # type: ignore[arg-type]


def test_unequal_sizes_name_the_file_unless_resized(tmp_path: Path, images: np.ndarray):
    save_folder(tmp_path, images[:3], ".png", by_class=False)
    Image.fromarray(images[0, :4]).save(tmp_path / "001.png")
    message = refusal(tmp_path, "001.png", "4 x 7", "5 x 7", "image size")
    assert message.startswith(str(tmp_path / "001.png"))
    assert load_data(tmp_path, image_size=6).images.shape == (3, 1, 6, 6)


# --- names and places ------------------------------------------------------------------------------------------------------


def test_unknown_names_list_the_known_and_suggest_the_nearest():
    with pytest.raises(DataError, match=r"unknown data 'fashon-mnist'; did you mean 'fashion-mnist'\? known are digits, mnist"):
        load_data("fashon-mnist")
    with pytest.raises(DataError, match="unknown data 'cifar'; known are digits, mnist, fashion-mnist, binarized-mnist"):
        load_data("cifar")
    with pytest.raises(DataError, match="no such file or folder"):
        load_data("no/such/thing.npz")
    for nonsense in ("", "\0", "a\nb", "~nobody-of-that-name/x", "x" * 5000):
        with pytest.raises(DataError) as caught:
            load_data(nonsense)
        assert "\n" not in str(caught.value)


def test_unknown_splits_list_the_splits():
    with pytest.raises(DataError, match="digits: unknown split 'valid'; it has train, test, all"):
        load_data("digits", "valid")
    with pytest.raises(DataError, match="mnist: unknown split 'all'; it has train, test"):
        load_data("mnist", "all")


def test_a_path_is_one_split(tmp_path: Path, images: np.ndarray):
    path = npz(tmp_path / "a.npz", images=images)
    assert load_data(path, "test").split == load_data(str(path)).split == "all"


def test_a_damaged_named_file_is_refused_by_its_digest(tmp_path: Path, images: np.ndarray):
    (tmp_path / "mnist").mkdir()
    path = write(tmp_path / "mnist" / "train-images-idx3-ubyte.gz", gzip.compress(idx(images)))
    with pytest.raises(DataError, match="does not have the published SHA-256") as caught:
        load_data("mnist", root=tmp_path)
    assert str(path) in str(caught.value) and "delete it" in str(caught.value)


def test_more_images_than_the_limit_are_refused_before_they_are_read(tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formats, "IMAGE_BYTES_LIMIT", 419)
    refusal(write(tmp_path / "x-images-idx3", idx(images)), "declares 420 bytes of images, over the limit of 419")
    refusal(npz(tmp_path / "x.npz", images=images), "over the limit of 419")


def test_importing_the_room_imports_no_parsers():
    code = "import sys, periplus.data; print([m for m in ('sklearn', 'PIL', 'scipy', 'matplotlib') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# --- every kind of broken file has its own sentence --------------------------------------------------------------------------


def header(*sizes: int, kind: int = 8) -> bytes:
    return bytes([0, 0, kind, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes)


IDX_WRECKS = {
    "empty": (b"", "is empty"),
    "inside its header": (header(12, 5, 7)[:9], "stops inside its IDX header"),
    "three bytes": (b"\0\0\x08", "stops inside its IDX header"),
    "truncated": (header(12, 5, 7) + bytes(12 * 35 - 1), "is truncated"),
    "too long": (header(12, 5, 7) + bytes(12 * 35 + 1), "goes on after the 420 bytes"),
    "over-large": (header(2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(50), "more than a file of"),
    "implausible": (header(2**20, 28, 28) + bytes(50), "more than a file of 66 can hold"),
    "no images": (header(0, 5, 7), "has no images"),
    "no pixels": (header(3, 0, 7), "has no images"),
    "labels": (header(10) + bytes(10), "holds labels (one dimension), where images were expected"),
    "a matrix": (header(5, 2) + bytes(10), "they must be (N, H, W)"),
    "wrong magic": (b"\0\0\x77\x03" + bytes(60), "wrong magic number 00007703"),
    "too many dimensions": (b"\0\0\x08\x09" + bytes(60), "wrong magic number 00000809"),
    "floats": (header(2, 2, 2, kind=0x0D) + bytes(32), "holds float32 values"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wreck", IDX_WRECKS)
def test_idx_wrecks(tmp_path: Path, wreck: str, packed: bool):
    body, sentence = IDX_WRECKS[wreck]
    if packed and wreck == "implausible":
        return  # a gzip file may hold more than its length
    if packed and wreck == "empty":
        sentence = "stops inside its IDX header"
    refusal(write(tmp_path / "x-images-idx3-ubyte", gzip.compress(body) if packed else body), sentence)


def test_gzip_wrecks(tmp_path: Path, images: np.ndarray):
    whole = gzip.compress(idx(images))
    path = tmp_path / "x-images-idx3-ubyte.gz"
    refusal(write(path, whole[:-20]), "is truncated")
    refusal(write(path, whole[:100] + bytes([whole[100] ^ 255]) + whole[101:]), "damaged IDX file")
    refusal(write(path, whole[:-8] + b"\1\2\3\4" + whole[-4:]), "damaged IDX file")
    refusal(write(path, whole + b"garbage"), "damaged IDX file")
    refusal(write(path, gzip.compress(header(2**31, 2, 1) + bytes(1000))), "more than a file of")
    refusal(write(path, b"\x1f\x8b"), "is truncated")


def test_a_gzip_bomb_costs_no_memory(tmp_path: Path):
    """20 MB of zeros behind a header of 35 bytes: reading stops one byte after what was declared."""
    path = write(tmp_path / "x-images-idx3-ubyte.gz", gzip.compress(header(1, 5, 7) + bytes(20 * 2**20)))
    refusal(path, "goes on after the 35 bytes")
    with pytest.raises(DataError, match="over the limit of 1,000,000"):
        formats.read_idx(write(path, gzip.compress(header(1000, 50, 50) + bytes(2500000))), limit=10**6)


def test_mislabelled_idx_siblings(tmp_path: Path, images: np.ndarray):
    path = write(tmp_path / "x-images-idx3-ubyte", idx(images))
    sibling = write(tmp_path / "x-labels-idx1-ubyte", idx(images))
    for body, sentence in ((idx(images), "holds images (3 dimensions), where labels were expected"), (idx(LABELS[:-1]), "(11,) for 12 images")):
        sibling.write_bytes(body)
        with pytest.raises(DataError) as caught:
            load_data(path)
        assert str(caught.value).startswith(str(sibling)) and sentence in str(caught.value)


def npy(shape: str, descr: str = "'|u1'", body: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """A .npy member by hand, whose header may lie."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + version + struct.pack("<H" if version == b"\1\0" else "<I", len(text)) + text + body


def zipped(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, body in members.items():
            archive.writestr(f"{name}.npy", body)
    return path


NPZ_WRECKS = {
    "objects": (dict(images=np.array([{}, []], dtype=object)), "holds pickled objects"),
    "object labels": (dict(images=np.zeros((2, 3, 3), np.uint8), labels=np.array([{}, 1], dtype=object)), "holds pickled objects in labels.npy"),
    "NaN": (dict(images=np.full((2, 3, 3), np.nan)), "NaN or infinite"),
    "infinite": (dict(images=np.full((2, 3, 3), -np.inf, np.float16)), "NaN or infinite"),
    "outside [0, 1]": (dict(images=np.full((2, 3, 3), 255.0)), "outside [0, 1] (from 255 to 255)"),
    "negative": (dict(images=np.full((2, 3, 3), -0.5)), "outside [0, 1]"),
    "int64": (dict(images=np.zeros((2, 3, 3), np.int64)), "of type int64; they must be uint8"),
    "bool": (dict(images=np.zeros((2, 3, 3), bool)), "of type bool"),
    "text": (dict(images=np.array([["a"]])), "of type <U1"),
    "complex": (dict(images=np.zeros((2, 3, 3), complex)), "of type complex128"),
    "one image": (dict(images=np.zeros((3, 3), np.uint8)), "they must be (N, H, W)"),
    "five axes": (dict(images=np.zeros((1, 1, 1, 3, 3), np.uint8)), "they must be (N, H, W)"),
    "no images": (dict(images=np.zeros((0, 3, 3), np.uint8)), "has no images"),
    "four channels": (dict(images=np.zeros((2, 4, 5, 4), np.uint8)), "no axis of 1 or 3 channels"),
    "only labels": (dict(labels=np.zeros(3, np.int64)), "holds labels but no images"),
    "nothing": ({}, "holds no arrays"),
    "several": (dict(x_train=np.zeros((2, 3, 3), np.uint8), x_test=np.zeros((2, 3, 3), np.uint8)), "several others (x_train, x_test)"),
    "short labels": (dict(images=np.zeros((2, 3, 3), np.uint8), labels=np.zeros(1, np.int64)), "labels of shape (1,) for 2 images"),
    "float labels": (dict(images=np.zeros((2, 3, 3), np.uint8), labels=np.zeros(2)), "they must be integers"),
    "negative labels": (dict(images=np.zeros((2, 3, 3), np.uint8), labels=np.array([0, -1])), "has the label -1"),
    "huge labels": (dict(images=np.zeros((2, 3, 3), np.uint8), labels=np.array([0, 2**17])), "has the label 131072"),
}


@pytest.mark.parametrize("wreck", NPZ_WRECKS)
def test_npz_wrecks(tmp_path: Path, wreck: str):
    arrays, sentence = NPZ_WRECKS[wreck]
    refusal(npz(tmp_path / "x.npz", **arrays), sentence)


MEMBER_WRECKS = {
    "over-large": (npy("(100000, 1000, 1000)", body=bytes(90)), "declares shape (100000, 1000, 1000) of uint8, but has"),
    "astronomic": (npy("(99999999999999999999999, 9, 9)", body=bytes(90)), "is truncated or false"),
    "truncated": (npy("(2, 3, 3)", body=bytes(17)), "is truncated or false"),
    "too long": (npy("(2, 3, 3)", body=bytes(19)), "is truncated or false"),
    "negative": (npy("(-2, -3, 3)", body=bytes(18)), "is truncated or false"),
    "no header": (b"hello", "damaged array header"),
    "no literal": (npy("(__import__('os').abort(),)"), "damaged array header"),
    "deeply nested": (npy("(" * 4000 + ")" * 4000), "damaged array header"),
    "long header": (npy("(2, 3, 3)" + " " * 20000, body=bytes(18)), "damaged array header"),
    "endless header": (npy("(2, 3, 3)", version=b"\2\0")[:8] + b"\xff\xff\xff\x7f", "damaged array header"),
    "unknown version": (npy("(2, 3, 3)", version=b"\7\0", body=bytes(18)), "damaged array header"),
}


@pytest.mark.parametrize("wreck", MEMBER_WRECKS)
def test_npz_members_that_lie(tmp_path: Path, wreck: str):
    body, sentence = MEMBER_WRECKS[wreck]
    refusal(zipped(tmp_path / "x.npz", images=body), sentence)


def test_npz_containers_that_lie(tmp_path: Path, images: np.ndarray):
    whole = npz(tmp_path / "good.npz", images=images).read_bytes()
    path = tmp_path / "x.npz"
    refusal(write(path, b""), "is empty")
    refusal(write(path, whole[:-30]), "damaged NPZ file")
    refusal(write(path, whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]), "damaged NPZ file")
    refusal(write(path, idx(images)), "named .npz but does not begin like one")
    encrypted = bytearray(whole)
    encrypted[encrypted.rindex(b"PK\1\2") + 8] |= 1
    refusal(write(path, bytes(encrypted)), "encrypted or compressed in an unusual way")
    refusal(zipped(path, zipfile.ZIP_LZMA, images=npy("(2, 3, 3)", body=bytes(18))), "compressed in an unusual way")
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", npy("(2, 3, 3)", body=bytes(18)))
        archive.writestr("images.npy", npy("(2, 3, 3)", body=bytes(18)))
    refusal(path, "two arrays named images.npy")


def test_zip_bombs_are_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    declared = npz(tmp_path / "x.npz", images=np.zeros((2, 3, 3), np.uint8))
    body = bytearray(declared.read_bytes())
    at = body.rindex(b"PK\1\2") + 24
    body[at : at + 4] = struct.pack("<I", 2**31)  # the uncompressed size, in the directory
    refusal(write(declared, bytes(body)), "zip bomb")
    monkeypatch.setattr(formats, "IMAGE_BYTES_LIMIT", 10**6)
    bomb = zipped(tmp_path / "b.npz", zipfile.ZIP_DEFLATED, images=npy("(200, 100, 100)", body=bytes(2 * 10**6)))
    assert bomb.stat().st_size < 10**4
    refusal(bomb, "over the limit of 1,000,000")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"\x80\x04\x95", "is a pickle"),
        (b"\x89PNG\r\n\x1a\n", "one image: give the folder"),
        (b"\x93NUMPY\1\0", "single .npy array"),
        (b"<!DOCTYPE html>", "failed download"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"words, just words", "of no known format"),
    ],
)
def test_other_files_are_told_by_what_they_are(tmp_path: Path, body: bytes, sentence: str):
    refusal(write(tmp_path / "thing", body), sentence)


def test_folder_wrecks(tmp_path: Path, images: np.ndarray):
    refusal(tmp_path, "is a folder without images")
    write(tmp_path / "t-images-idx3", idx(images))
    refusal(tmp_path, "give the file itself: t-images-idx3")
    save_folder(tmp_path / "a", images, ".png", by_class=True)
    (tmp_path / "a" / "class-d").mkdir()
    refusal(tmp_path / "a" / "", "class-d", "is a class without images")
    (tmp_path / "a" / "class-d" / "deep").mkdir()
    refusal(tmp_path / "a", "class-d", "has folders inside it (deep)")
    save_folder(tmp_path / "a", images[:1], ".png", by_class=False)
    refusal(tmp_path / "a", "both in it and in its sub-folder class-a")
    Image.fromarray(images[0]).save(tmp_path / "a" / "x.tiff")
    refusal(tmp_path / "a", "x.tiff", "of a kind that is not read")


def test_broken_image_files_are_named(tmp_path: Path, images: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    folder = save_folder(tmp_path / "f", images[:3], ".png", by_class=False)
    bad = folder / "001.png"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:50])
    refusal(folder, "001.png", "not a readable image")
    bad.write_bytes(b"")
    refusal(folder, "001.png", "is empty")
    bad.write_bytes(b"not a picture at all")
    refusal(folder, "001.png", "it is none of PNG, JPEG")
    bad.write_bytes(b"Pf\n2 2\n-1.0\n" + bytes(16))
    refusal(folder, "001.png", "floating-point pixels")
    stream = io.BytesIO()
    Image.fromarray(images[0]).save(stream, "TIFF")
    bad.write_bytes(stream.getvalue())  # a decoder that is not allowed, under a name that is
    refusal(folder, "001.png", "not a readable image")
    bad.write_bytes(b"P5 60000 60000 255\n" + bytes(100))
    refusal(folder, "001.png")
    bad.write_bytes(b"P5 7000 7000 255\n" + bytes(100))
    refusal(folder, "001.png", "declares 7000 x 7000 pixels")
    bad.write_bytes(whole)
    monkeypatch.setattr(formats, "IMAGE_BYTES_LIMIT", 100)
    refusal(folder, "more than the limit of 100 bytes")


# --- fuzzing ---------------------------------------------------------------------------------------------------------------


def test_two_hundred_mutants_load_or_are_refused(tmp_path: Path):
    """The same mutants as benchmarks/fuzz_data.py makes by the ten thousand, seeds 0 to 199."""
    import importlib.util

    where = Path(__file__).resolve().parents[1] / "benchmarks" / "fuzz_data.py"
    spec = importlib.util.spec_from_file_location("fuzz_data", where)
    assert spec is not None and spec.loader is not None
    fuzz = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_data"] = fuzz
    spec.loader.exec_module(fuzz)
    outcomes = [fuzz.try_mutant(seed, tmp_path) for seed in range(200)]
    assert [outcome for outcome in outcomes if outcome.result not in ("loaded", "refused")] == []
    assert {outcome.result for outcome in outcomes} == {"loaded", "refused"}
    assert {outcome.format for outcome in outcomes} == set(fuzz.FORMATS)
