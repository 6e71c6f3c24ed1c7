"""Fixtures of the kernels' tests."""

import pytest

from qat.kernels import build


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QAT_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.fixture(scope="session")
def library():
    try:
        build.compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    return build.load()
