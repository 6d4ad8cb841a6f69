"""What the tests share: one thread, a cache of their own, the embedded digits, and the real data sets where there are any."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import periplus

torch.set_num_threads(1)  # the same bits on every machine, and several test processes on few cores


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of this session: no test reads what an earlier one left on the machine, or leaves something there."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


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
