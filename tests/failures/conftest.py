"""The base that the rows' adapters are on, made once."""

from pathlib import Path

import pytest
from tiny import make_llama, make_qwen3_moe


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def untied(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("bases") / "untied", tie=False)


@pytest.fixture(scope="session")
def experts(tmp_path_factory) -> Path:
    return make_qwen3_moe(tmp_path_factory.mktemp("bases") / "experts")
