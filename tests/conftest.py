"""What the tests share: one thread, the embedded digits, and the real data sets where there are any."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import periplus

torch.set_num_threads(1)  # the same bits on every machine, and several test processes on few cores


@pytest.fixture(scope="session")
def digits() -> periplus.ImageData:
    """The 1500 training digits of scikit-learn, 8 x 8."""
    return periplus.load_data("digits")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """A folder with the real sets, read in place: $PERIPLUS_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("PERIPLUS_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not (folder / "mnist" / "train-images-idx3-ubyte.gz").is_file():
        pytest.skip(f"no real data at {folder}: set PERIPLUS_DATA to a folder that has mnist/, fashion-mnist/, binarized-mnist/")
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the tests' own: nothing of the user's is read, nothing is left there."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder
