import pytest
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A hub of one's own, logged in to; large files go over plain LFS, which needs no storage service beside the hub."""
    with FakeHub() as made:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.mktemp("home") / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path_factory.mktemp("home") / "harnesses.json"))
        yield made
