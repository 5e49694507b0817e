"""Callbacks and loggers hear of everything, and none of them can stop a run."""

import importlib
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from luthier.config.schema import RunConfig
from luthier.errors import RequestError
from luthier.training.events import Event, Events, resolve
from luthier.training.loggers import LoggerThread, open_logger


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory, whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != ""])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def module(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(text))
    importlib.invalidate_caches()


def make_events(run: Path, callbacks=(), loggers=()) -> tuple[Events, list[str]]:
    said: list[str] = []
    config = RunConfig(model="m", data={"train": "t"}, output=str(run), callbacks=list(callbacks), log=list(loggers))
    return Events(config.callbacks, config.log, run, config, said.append), said


def event(kind="step", step=1, run=Path("run"), /, **metrics) -> Event:
    return Event(kind, step, 300, run, metrics)


def test_callbacks_get_every_event_in_order(here):
    module(
        here,
        "hooks_order",
        "seen = []\ndef tell(event):\n    seen.append((event.kind, event.step, event.metrics.get('loss')))\n",
    )
    events, said = make_events(here, ["hooks_order:tell"])
    for kind in ("start", "step", "evaluation", "checkpoint", "end"):
        events.emit(event(kind, 7, loss=0.5))
    assert [kind for kind, _, _ in sys.modules["hooks_order"].seen] == [
        "start",
        "step",
        "evaluation",
        "checkpoint",
        "end",
    ]
    assert sys.modules["hooks_order"].seen[1] == ("step", 7, 0.5) and not said


@pytest.mark.parametrize("failure", ["raise ValueError('no such luck')", "import sys; sys.exit(3)"])
def test_failing_callback_is_named_and_passed_over(here, failure):
    module(
        here,
        "hooks_fail",
        f"seen = []\ndef bad(event):\n    {failure}\ndef good(event):\n    seen.append(event.step)\n",
    )
    events, said = make_events(here, ["hooks_fail:bad", "hooks_fail:good"])
    for step in range(250):
        events.emit(event("step", step))
    assert sys.modules["hooks_fail"].seen == list(range(250))
    assert len(said) == 3  # the first, the 101st and the 201st
    assert (
        "hooks_fail:bad failed at step (step 0)" in said[0]
        and "the run goes on" in said[0]
        and "hooks_fail.py:3" in said[0]
    )
    assert "101 times so far" in said[1]


def test_callback_cannot_spoil_what_the_next_one_sees(here):
    module(
        here,
        "hooks_spoil",
        "seen = []\ndef bad(event):\n    event.metrics.clear()\ndef good(event):\n    seen.append(event.metrics)\n",
    )
    events, _ = make_events(here, ["hooks_spoil:bad", "hooks_spoil:good"])
    record = {"loss": 1.0}
    events.emit(Event("step", 1, 2, here, record))
    assert sys.modules["hooks_spoil"].seen == [{"loss": 1.0}] and record == {"loss": 1.0}


def test_keyboard_interrupt_in_a_callback_passes_through(here):
    module(here, "hooks_interrupt", "def stop(event):\n    raise KeyboardInterrupt\n")
    events, _ = make_events(here, ["hooks_interrupt:stop"])
    with pytest.raises(KeyboardInterrupt):
        events.emit(event())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hooks_wrong", "does not name a function.*module:function"),
        ("no_such_module:tell", "'no_such_module' cannot be imported.*Put no_such_module.py into"),
        ("hooks_wrong:no_such", "has no function 'no_such'"),
        ("hooks_wrong:constant", "has no function 'constant'"),
        ("hooks_wrong:none", "cannot be called with one argument"),
        ("hooks_wrong:two", "cannot be called with one argument"),
        ("hooks_broken:tell", r"ZeroDivisionError.*hooks_broken.py:1.*Mend the module"),
        ("hooks_needs:tell", "No module named 'not_installed_at_all'.*Mend the module"),
    ],
)
def test_wrong_callback_is_refused_before_training(here, name, text):
    module(here, "hooks_wrong", "constant = 1\ndef none(): pass\ndef two(a, b): pass\n")
    module(here, "hooks_broken", "1 / 0\n")
    module(here, "hooks_needs", "import not_installed_at_all\n")
    with pytest.raises(RequestError, match=f"(?s)callbacks.*{text}"):
        make_events(here, [name])


def test_working_directory_hides_no_installed_library(here):
    (here / "yaml").mkdir()
    (here / "yaml" / "__init__.py").write_text("raise RuntimeError('the wrong yaml')")
    module(here, "hooks_yaml", "import yaml\ndef tell(event):\n    yaml.safe_load('1')\n")
    assert resolve("hooks_yaml:tell", key="callbacks")


FAKES = {
    "wandb": """
        from types import SimpleNamespace
        calls = []
        def login(prompt=True, verify=True):
            assert not prompt
            return False
        def init(**settings):
            calls.append(("init", settings))
            return SimpleNamespace(id="abc", log=lambda m, step: calls.append((step, m)), finish=lambda: calls.append("finish"))
        """,
    "mlflow": """
        from types import SimpleNamespace
        calls = []
        def set_experiment(name): pass
        def start_run(run_id, run_name):
            calls.append(("init", {"id": run_id, "name": run_name}))
            return SimpleNamespace(info=SimpleNamespace(run_id="abc"))
        def log_params(params):
            assert len(params) <= 100 and params["model.path"] == "m" if "model.path" in params else True
        def log_metrics(m, step): calls.append((step, m))
        def end_run(): calls.append("finish")
        """,
    "trackio": """
        from types import SimpleNamespace
        calls = []
        def init(**settings):
            calls.append(("init", settings))
            return SimpleNamespace(log=lambda m, step: calls.append((step, m)), finish=lambda: calls.append("finish"))
        """,
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Installs a stand-in for a service's package: the real ones need their servers."""

    def install(name: str, text: str | None = None):
        folder = tmp_path / "site"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(textwrap.dedent(text or FAKES[name]))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()

    yield install
    for name in FAKES:
        if str(tmp_path) in str(getattr(sys.modules.get(name), "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("name", FAKES)
def test_logger_gets_numbers_under_their_sections_and_continues_its_run(tmp_path, fake, name, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake(name)
    run = tmp_path / "run"
    run.mkdir()
    for start in (0, 2):
        events, said = make_events(run, loggers=[name])
        events.emit(event("start", start))
        events.emit(event("step", start + 1, kind="train", step=start + 1, loss=0.5, skipped=False, reason=None))
        events.emit(event("evaluation", start + 1, eval_loss=0.4, samples=[], **{"metric/exact": 1}))
        events.emit(event("end", start + 1))
        assert not said
    calls = sys.modules[name].calls
    assert calls[1] == (1, {"train/loss": 0.5, "train/skipped": 0.0})
    assert calls[2] == (1, {"eval/loss": 0.4, "eval/metric/exact": 1.0})
    assert calls[3] == "finish"
    first, second = calls[0][1], calls[4][1]
    key = "name" if name == "trackio" else "id"
    assert second[key] == (first["name"] if name == "trackio" else "abc")
    if name == "wandb":
        assert first["mode"] == "offline", "without a key, wandb would ask on the terminal and wait"


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio", "tensorboard"])
def test_missing_package_is_refused_before_training(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()  # such a folder, left by the service itself, is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    with pytest.raises(RequestError, match=f"`log` asks for {name}.*pip install {name}") as caught:
        open_logger(name, tmp_path)
    assert caught.value.where == "log"


def test_broken_package_is_refused_before_training(tmp_path, fake):
    fake("wandb", "raise ImportError('libfoo.so is missing')")
    with pytest.raises(RequestError, match=r"fails to import.*libfoo.so.*pip install --upgrade wandb"):
        open_logger("wandb", tmp_path)


class Broken:
    name = "broken"

    def __init__(self, *, at: str, hang: threading.Event | None = None) -> None:
        self.at = at
        self.hang = hang
        self.calls = 0

    def _reach(self, place: str) -> None:
        self.calls += 1
        if place == self.at:
            if self.hang:
                self.hang.wait(30)
            raise ConnectionError("no route to host\nmore")

    def start(self, config, step):
        self._reach("start")

    def log(self, step, metrics):
        self._reach("log")

    def finish(self):
        self._reach("finish")


@pytest.mark.parametrize("at", ["start", "log", "finish"])
def test_failing_logger_is_switched_off_with_one_message(at):
    said: list[str] = []
    logger = Broken(at=at)
    thread = LoggerThread(logger, said.append)
    thread.start({}, 0)
    for step in range(50):
        thread.log(step, {"loss": 1.0})
        time.sleep(0.001)
    thread.finish()
    thread.finish()
    assert said == [
        "log: broken failed (ConnectionError: no route to host) and is off for the rest of this run; metrics.jsonl has every record."
    ]
    assert logger.calls == {"start": 1, "log": 2, "finish": 52}[at]


def test_hanging_logger_delays_neither_steps_nor_the_end():
    said: list[str] = []
    release = threading.Event()
    thread = LoggerThread(Broken(at="start", hang=release), said.append, size=10, finish_seconds=0.2)
    began = time.monotonic()
    thread.start({}, 0)
    for step in range(1000):
        thread.log(step, {"loss": 1.0})
    thread.finish()
    assert time.monotonic() - began < 5
    release.set()
    assert len(said) == 2 and "cannot keep up" in said[0] and "did not finish within 0.2 s" in said[1]


def test_messages_of_a_logger_come_from_the_training_thread():
    threads: list[str] = []
    thread = LoggerThread(Broken(at="log"), lambda text: threads.append(threading.current_thread().name))
    thread.start({}, 0)
    thread.log(1, {})
    thread.finish()
    assert threads == [threading.current_thread().name]


def test_end_without_start_is_harmless(tmp_path, fake):
    fake("trackio")
    events, said = make_events(tmp_path, loggers=["trackio"])
    events.close()
    assert not said


def test_tensorboard_files_hold_the_curves_and_a_resumed_run_replaces_what_it_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, loss in ((0, 1.0), (2, 3.0)):
        events, said = make_events(tmp_path, loggers=["tensorboard"])
        events.emit(event("start", start))
        for step in range(start + 1, start + 5):
            events.emit(event("step", step, loss=loss))
        events.close()
        assert not said
        time.sleep(1.1)  # event files are ordered by the second in their names
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in curves.Scalars("train/loss")] == [
        (1, 1.0), (2, 1.0), (3, 3.0), (4, 3.0), (5, 3.0), (6, 3.0),
    ]  # fmt: skip
