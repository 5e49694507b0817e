"""Every way an upload can be refused or fail is one paragraph with a code, and no secret in it."""

from __future__ import annotations

import json
import logging

import pytest
from fake_hub import TOKEN
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import _http, validate_repo_id
from pushable import finished_run, make_model, ours

from luthier import cli
from luthier.config.hub_id import wrong_id
from luthier.errors import LuthierError
from luthier.export.push.failures import redacted
from luthier.export.push.push import push


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path / "run")


@pytest.fixture
def impatient(monkeypatch):
    """The client waits 23 seconds in all before it gives up on a server's error."""
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)


def failed(run, id="me/model", **options) -> LuthierError:
    with pytest.raises(LuthierError) as error:
        push(run, id, **options)
    said = str(error.value)
    assert TOKEN not in said and "secretkey" not in said and "\n" not in said and error.value.remedy
    return error.value


def test_without_a_login_no_request_is_made(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    error = failed(run)
    assert (error.code, error.exit_code) == ("not-logged-in", 2) and "hf auth login" in error.remedy and not hub.asked


def test_a_token_that_the_hub_does_not_know(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expiredexpiredexpired")
    error = failed(run)
    assert (error.code, error.exit_code) == ("hub-token", 2) and "expired" not in error.message


def test_no_right_to_make_the_repository(hub, run):
    hub.refuse("POST /api/repos/create", 403, "You don't have the rights to create a model under the namespace")
    error = failed(run)
    assert (error.code, error.exit_code) == ("hub-permission", 2) and "the rights to create" in error.message


def test_no_right_to_write_to_a_repository_that_can_be_read(hub, run):
    hub.make("me/model")
    hub.refuse("POST /api/repos/create", 403, "no")
    hub.refuse("preupload", 403, "Forbidden: pass create_pr=1")
    assert failed(run).code == "hub-permission"


@pytest.fixture
def logged():
    """What the client logs while it tries again."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("huggingface_hub.utils._http")
    log.addHandler(handler)
    yield lines
    log.removeHandler(handler)


@pytest.mark.parametrize("where", ["/api/repos/create", "preupload", "objects/batch", "PUT /storage", "/commit/", "/tree/"])  # fmt: skip
def test_an_error_of_the_server_at_any_step_says_to_run_it_again(hub, run, impatient, logged, where):
    hub.refuse(where, 503, "Service is overloaded")
    error = failed(run)
    assert (error.code, error.exit_code) == ("hub-failed", 1)
    assert not any("secretkey" in line for line in logged)
    assert any("/storage/" in line for line in logged) == (where == "PUT /storage")
    assert "503" in error.message and "overloaded" in error.message and "same command" in error.remedy
    hub.refusals.clear()
    assert push(run, "me/model").checked == 5


def test_a_full_account(hub, run):
    hub.refuse("objects/batch", 403, "Private repository storage limit reached, please upgrade your plan")
    error = failed(run)
    assert (error.code, error.exit_code) == ("hub-full", 1) and "storage limit" in error.message


def test_a_file_that_is_too_large_for_the_hub(hub, run):
    hub.refuse("PUT /storage", 413, "")
    error = failed(run)
    assert (error.code, error.exit_code) == ("hub-too-large", 2) and "--shard-size" in error.remedy


def test_a_request_that_the_hub_refuses_is_told_in_its_words(hub, run):
    hub.refuse("/commit/", 400, "the branch is protected")
    error = failed(run)
    assert error.code == "hub-refused" and "the branch is protected" in error.message


def test_a_card_whose_head_the_hub_refuses_stops_before_the_upload(hub, run):
    (run / "final/README.md").write_text("---\nlicense: not-a-licence\n---\n")
    error = failed(run)
    assert error.code == "hub-card" and "license" in error.message and not hub.puts


def test_no_network(hub, run, impatient):
    error = failed(run, endpoint="http://127.0.0.1:9")
    assert (error.code, error.exit_code) == ("push-unreachable", 1) and "127.0.0.1:9" in error.message


def test_a_connection_that_breaks_while_bytes_are_sent(hub, run, impatient):
    hub.breaks = "PUT /storage"
    error = failed(run)
    assert error.code == "push-unreachable" and "uploading" in error.message


def test_offline_by_the_environment(hub, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert failed(run).code == "hub-offline"


@pytest.mark.parametrize(
    "endpoint", ["hub.example.org", "ftp://hub", "https://me:secretkey@hub", "https://hub?x=secretkey"]
)
def test_an_address_that_is_none(hub, run, endpoint):
    assert failed(run, endpoint=endpoint).code == "hub-endpoint"


IDS = ["me/model", "Me_1/my-model.v2", "a/b", "model", "me/my/model", "me/", "/model", "me/mo del", "me/-model", "me/model.", "me/a--b", "me/a..b", "me/model.git", "我/模型", "me/" + "x" * 97, "", "me\n/x"]  # fmt: skip


@pytest.mark.parametrize("id", IDS)
def test_the_rule_for_names_is_the_client_s_with_an_owner(id):
    try:
        validate_repo_id(id)
        valid = "/" in id
    except HFValidationError:
        valid = False
    assert (wrong_id(id) == "") == valid


def test_a_wrong_name_is_refused_before_anything_is_read(hub, tmp_path):
    error = failed(tmp_path / "nothing", "model")
    assert error.code == "hub-id" and "OWNER/NAME" in error.message and not hub.asked


def test_secrets_do_not_outlive_their_text():
    told = redacted("PUT https://s3.example.org/x?X-Amz-Signature=abc with Bearer hf_abcdefgh failed, hf_abcdefgh")
    assert told == "PUT https://s3.example.org/x with <secret> failed, <secret>"


def test_the_command_line_prints_what_the_hub_holds(hub, run, capsys):
    assert cli.main(["push", str(run), "me/model", "--json"]) == 0
    out = capsys.readouterr()
    made = json.loads(out.out)
    assert made["id"] == "me/model" and made["private"] and made["checked"] == made["files"] == 5
    assert set(made) == {"id", "url", "commit", "revision", "private", "new", "files", "bytes", "checked", "proof", "base", "left_out"}  # fmt: skip
    assert cli.main(["push", str(run), "me/model"]) == 0
    out = capsys.readouterr()
    assert "already held 5 files" in out.out and "checksums" in out.out and TOKEN not in out.out + out.err


def test_the_command_line_gives_each_kind_of_failure_its_exit_code(hub, run, tmp_path, capsys):
    assert cli.main(["push", str(run), "model"]) == 2
    folder = ours(make_model(tmp_path / "model"), "model")
    (folder / "model.safetensors").write_bytes(b"")
    assert cli.main(["push", str(folder), "me/model"]) == 3
    hub.refuse("/api/repos/create", 500, "")
    assert cli.main(["push", str(run), "me/model"]) == 1
    assert capsys.readouterr().err.count("luthier: ") == 3
