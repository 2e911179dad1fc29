"""``--chat``: turns of a conversation, its commands, and Ctrl-C while the model speaks."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_devices import with_devices
from fixtures.sft.tiny import write_model
from test_generator import adapter

from rmlora_jax import hub, stopping
from rmlora_jax.errors import UserError
from rmlora_jax.inference import written
from rmlora_jax.inference.chat import chat

ROOT = Path(__file__).parents[2]
OPTIONS = {"max_new_tokens": 6, "temperature": 1.5, "seed": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture(scope="module")
def model(folder):
    return hub.load(folder)


def said(model, *lines, **options):
    out = io.StringIO()
    source = io.StringIO("".join(f"{line}\n" for line in lines))
    chat("folder", find=lambda folder: model, source=source, out=out, **OPTIONS | options)
    first, *rest = out.getvalue().splitlines()
    assert first == "/reset begins anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
    return rest


def test_turns(model):
    one = model.generate(["q1 q2"], **OPTIONS)[0].text
    messages = [{"role": "user", "content": "q1 q2"}, {"role": "assistant", "content": one},
                {"role": "user", "content": "q3"}]  # fmt: skip
    two = model.generate([messages], **OPTIONS)[0].text
    alone = model.generate(["q3"], **OPTIONS)[0].text
    assert len({one, two, alone}) == 3
    assert said(model, "q1 q2", "", "  q3 ") == [f"> {one}", f"> > {two}", "> "]
    assert said(model, "q1 q2", "/reset", "q3", "/exit", "q4") == [
        f"> {one}", f"> > {alone}", "> "]  # fmt: skip
    assert said(model, "/help") == ["> there is no command /help; /reset, /exit", "> "]


def test_one_of_several_adapters_answers(model, folder, tmp_path):
    base = hub.load_pretrained(folder)
    for number, name in enumerate(("one", "two")):
        adapter(tmp_path / name, base, number, 2, target="layers/attention/.*")
    several = hub.load(tmp_path)
    messages: list = [{"role": "user", "content": "q1 q2"}]

    def expected(name):
        return several.generate([messages], adapters=name, **OPTIONS)[0].text

    one, two = expected("one"), expected("two")
    assert one != two
    first = "{} answers; /adapter NAME chooses among one, two"
    assert said(several, "q1 q2") == [first.format("one"), f"> {one}", "> "]
    assert said(several, "q1 q2", adapter="two") == [first.format("two"), f"> {two}", "> "]
    found = said(several, "q1 q2", "/adapter twa", "/adapter  two", "/adapter", "q3")
    messages += [{"role": "assistant", "content": one}, {"role": "user", "content": "q3"}]
    assert found == [
        first.format("one"), f"> {one}",
        "> error: /adapter names the adapter 'twa'; this model has one, two; did you mean two?",
        "> two answers",
        "> error: /adapter names the adapter ''; this model has one, two",
        f"> {expected('two')}", "> ",
    ]  # fmt: skip
    with pytest.raises(UserError, match="--adapter names the adapter 'on'; this model has one, tw"):
        said(several, "q1", adapter="on")
    with pytest.raises(UserError, match=r"--adapter names the adapter 'one'; this model has one$"):
        said(model, "q1", adapter="one")
    assert said(model, "/adapter") == ["> there is no command /adapter; /reset, /exit", "> "]
    content, shown, _ = written.answered(several, ["q1 q2"], pytest.fail, OPTIONS | {
        "adapter": "two"})  # fmt: skip
    assert shown == two and json.loads(content)["adapter"] == "two"


def test_a_conversation_that_is_too_long(model):
    long = "q1 " * 130
    found = said(model, "q1 q2", long, "q3", max_new_tokens=3)
    assert found[1].startswith("> error: prompt 0 has ") and found[1].endswith("; /reset begins "
                                                                               "anew")
    short = said(model, "q1 q2", "q3", max_new_tokens=3)
    assert [found[0], *found[2:]] == short  # what was refused is forgotten


def test_ctrl_c_stops_an_answer(model, monkeypatch):
    pieces = model.stream

    def interrupted(messages, **options):
        for number, piece in enumerate(pieces(messages, **options)):
            if len(messages) == 1 and number == 0:
                stopping.ask(signal.SIGINT)
            yield piece

    monkeypatch.setattr(model, "stream", interrupted)
    options = OPTIONS | {"max_new_tokens": 40, "seed": 0}
    first = next(pieces("q1 q2", **options))
    found = said(model, "q1 q2", "q3", **options)
    assert found[0] == f"> {first}"
    messages = [{"role": "user", "content": "q1 q2"}, {"role": "assistant", "content": first},
                {"role": "user", "content": "q3"}]  # fmt: skip
    assert found[1] == f"> {model.generate([messages], **options)[0].text}"
    ended = []
    monkeypatch.setattr(stopping, "end", ended.append)
    monkeypatch.setattr(model, "stream", lambda messages, **options: _terminated(pieces, messages))
    said(model, "q1 q2")
    assert ended == [signal.SIGTERM]


def _terminated(pieces, messages):
    for piece in pieces(messages, max_new_tokens=40):
        os.kill(os.getpid(), signal.SIGTERM)
        yield piece


def test_who_does_not_talk(model, folder, tiny_vit, monkeypatch):
    with pytest.raises(UserError, match="chat with which model"):
        chat(None)
    with pytest.raises(UserError, match=r"does not write text; type\npython run\.py --workdir"):
        chat(str(tiny_vit))
    monkeypatch.setattr(model, "template", model.template._replace(text=None))
    with pytest.raises(UserError, match=r"has no chat template.*; type\npython run.py"):
        said(model, "a")
    with pytest.raises(UserError, match="top_p is 2"):
        chat(str(folder), top_p=2.0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_command(folder):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), f"--workdir={folder}", "--chat",
         "--max_new_tokens=4"],
        env=with_devices(1), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline().startswith("/reset begins anew")
    process.stdin.write("q1 q2\n")
    process.stdin.flush()
    answer = hub.load(folder).generate(["q1 q2"], max_new_tokens=4)[0].text
    assert process.stdout.readline() == f"> {answer}\n"
    assert process.stdout.read(2) == "> "  # it reads again
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)  # not `communicate`, which ends its input
    _, told = process.communicate()
    assert process.returncode == 130 and told.startswith("\nstopped: ") and "Trace" not in told


def test_a_flag_of_classifiers_is_refused():
    with pytest.raises(UserError, match="--top does not go with a chat; it takes --max_new_tokens"):
        chat("anywhere", top=3)
