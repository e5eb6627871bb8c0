"""``serve.py`` with real exports and OpenAI's client: completions, streams, concurrency, bad requests, signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

import serve
from mvlm_core.errors import UserError
from mvlm_core.evaluation.bits_per_byte import load_export
from mvlm_core.export.archive import write_archive
from mvlm_core.pipeline import local_server
from tests.helpers import MODELS, REPOSITORY

PROMPT = "In the beginning"
INCOMPLETE = "\ufffd"  # replaces an incomplete character at the end of a completion; a stream omits it
BAD = (  # problem, request fields, words of the error
    ("no model", {"model": None}, "model: Field required"),
    ("another type of model", {"model": 7}, "model: "),
    ("tokens", {"prompt": [1, 2]}, "prompt: "),
    ("lone surrogate", {"prompt": "\ud800"}, "prompt: "),
    ("longer than the context", {"prompt": "and it came to pass " * 40}, "the model's context is 32"),
    ("megabytes", {"prompt": "a" * (2 << 20)}, "prompt: "),
    ("no tokens", {"max_tokens": 0}, "max_tokens: "),
    ("words for a number", {"max_tokens": "ten"}, "max_tokens: "),
    ("too hot", {"temperature": 2.5}, "temperature: "),
    ("no number", {"temperature": float("nan")}, "temperature: "),
    ("nothing to draw from", {"top_p": 0}, "top_p: "),
    ("seed too large", {"seed": 2**63}, "seed: "),
    ("empty stop", {"stop": ""}, "stop: "),
    ("several samples", {"n": 3}, "n: "),
    ("log-likelihoods", {"logprobs": 5}, "logprobs: "),
    ("settings of transformers", {"generation_config": "{}"}, "generation_config: "),
    ("two at once", {"top_p": 7, "seed": -1}, "top_p: Input should be less than or equal to 1; seed: "),
)


@contextmanager
def server(*arguments, script="serve.py"):
    """A running server's process and address; killed if the test does not end it."""
    command = [sys.executable, REPOSITORY / script, *arguments, "--port", "0", "--device", "cpu"]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line, process.wait(10)
            yield process, line.split(" at ")[1].split(";")[0]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def running(trained, tmp_path_factory):
    """The address of a server of both models, one of them from its archive."""
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    archive = tmp_path_factory.mktemp("archive") / "mvlm_gpt2_model.tar.gz"
    write_archive(trained / "mvlm_gpt2", archive)
    with server(archive, trained / "simone_enhanced") as (process, url):
        yield url
        assert process.poll() is None, "nothing that a client sent may end it"


@pytest.fixture
def client(running):
    import openai

    return openai.OpenAI(base_url=running, api_key="none", max_retries=0, timeout=60)


def ask(client, model=MODELS[1], **changes):
    return client.completions.create(**{"model": model, "prompt": PROMPT, "max_tokens": 12, "seed": 3} | changes)


def joined(stream):
    return "".join(part.choices[0].text for part in stream)


# --- quick --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def handler(trained):
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    from mvlm_core.pipeline.completions import CheckedCompletions, LoadedModels, OneThread

    return CheckedCompletions(LoadedModels({name: load_export(trained / name) for name in MODELS}), OneThread())


@pytest.mark.parametrize(("fields", "words"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_a_bad_request_is_refused_with_the_reason(handler, fields, words):
    from fastapi import HTTPException

    body = {"model": MODELS[0], "prompt": PROMPT} | fields
    with pytest.raises(HTTPException) as caught:
        handler.checked({name: value for name, value in body.items() if value is not None})
    assert caught.value.status_code == 400 and words in caught.value.detail


def test_max_tokens_is_capped_to_the_context_and_a_seed_added(handler):
    body = {"model": MODELS[0], "prompt": PROMPT, "max_tokens": 500, "user": "me", "n": 1, "temperature": 0}
    first, second = handler.checked(body), handler.checked(body)
    _, tokenizer = handler.models[MODELS[0]]
    assert first["max_tokens"] == 32 - len(tokenizer(PROMPT).input_ids), "the start token counts"
    assert first["seed"] != second["seed"] and not {"user", "n"} & set(first)


def test_responses_have_no_cors_headers(handler):
    from fastapi.testclient import TestClient

    from mvlm_core.pipeline.completions import completions_app

    answer = TestClient(completions_app(handler.models)).get("/v1/models", headers={"Origin": "http://a.b"})
    assert answer.status_code == 200 and "access-control-allow-origin" not in answer.headers


def test_a_prompt_begins_with_the_start_token(handler):
    for model, tokenizer in handler.models.values():
        ids = tokenizer(PROMPT).input_ids
        assert ids[0] == model.config.bos_token_id and tokenizer.decode(ids[1:]) == PROMPT
        assert tokenizer("").input_ids == ids[:1], "an empty prompt starts a document"


def test_all_bad_arguments_are_reported_in_one_error(tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    with pytest.raises(UserError, match="not a finished export"):
        serve.main([str(tmp_path)])
    with pytest.raises(UserError) as caught:
        serve.main([str(tmp_path), str(tmp_path / "none")])
    assert len(caught.value.problems) == 2
    with pytest.raises(UserError, match="--port 70000.*--device tpu: unknown.*not a finished export"):
        serve.main(["--port", "70000", "--device", "tpu", str(tmp_path)])


def test_missing_packages_and_models_are_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(local_server, "REPOSITORY_ROOT", tmp_path)
    packages, models = local_server.check(local_server.parser_of("", 1).parse_args([]), ("no_such_package", "torch"))
    assert "no_such_package; " in packages and "requirements-extras.txt" in packages and "no model in" in models


def test_default_models_are_exports_or_else_archives(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(local_server, "REPOSITORY_ROOT", tmp_path)
    (archive := tmp_path / "models_for_download" / "mvlm_gpt2_model.tar.gz").parent.mkdir()
    archive.touch()
    assert local_server.check(options := local_server.parser_of("", 1).parse_args([]), ()) == []
    assert options.models == [archive]
    for folder, files in {
        "simone_enhanced": ("manifest.json", "training_config.json"),
        "simone_enhanced_formats": ("manifest.json",),
    }.items():
        (tmp_path / "models" / folder).mkdir(parents=True)
        for file in files:
            (tmp_path / "models" / folder / file).touch()
    local_server.check(options := local_server.parser_of("", 1).parse_args([]), ())
    assert options.models == [tmp_path / "models" / "simone_enhanced"]


def test_models_with_the_same_name_get_numbered_suffixes(trained):
    assert list(local_server.by_name([trained / MODELS[0]] * 3)) == ["mvlm_gpt2", "mvlm_gpt2-2", "mvlm_gpt2-3"]


def test_port_in_use_and_unknown_host_are_refused():
    with local_server.listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert local_server.address(first) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"--port {port}: Address already in use"):
            local_server.listen("127.0.0.1", port)
    with pytest.raises(UserError, match="--host no.such.host.invalid"):
        local_server.listen("no.such.host.invalid", 0)


# --- a running server ---------------------------------------------------------------------------------------


@pytest.mark.integration
def test_models_are_listed_by_folder_name(client):
    assert [model.id for model in client.models.list()] == list(MODELS)


@pytest.mark.integration
@pytest.mark.parametrize("model", MODELS)
def test_streamed_text_matches_the_full_completion(client, model):
    whole = ask(client, model)
    parts = list(ask(client, model, stream=True))
    assert whole.choices[0].text and whole.model == model
    assert joined(parts) == whole.choices[0].text.rstrip(INCOMPLETE)
    assert len(parts) > 5 and parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.usage.completion_tokens == parts[-1].usage.completion_tokens <= 12


@pytest.mark.integration
def test_completions_are_reproducible_by_seed_and_at_temperature_zero(client):
    texts = [ask(client, seed=seed).choices[0].text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len({ask(client, temperature=0, seed=seed).choices[0].text for seed in range(3)}) == 1


@pytest.mark.integration
def test_completion_ends_at_the_context_or_a_stop_string(client):
    long = ask(client, max_tokens=500, temperature=0)
    assert long.usage.total_tokens <= 32 and long.choices[0].finish_reason
    text = long.choices[0].text
    stop = text[len(text) // 2 :][:2]
    stopped = ask(client, max_tokens=500, temperature=0, stop=stop).choices[0].text
    assert text.startswith(stopped) and stop in stopped and stop not in stopped[: -len(stop) - 8]


@pytest.mark.integration
def test_concurrent_clients_get_the_same_completions_as_alone(client):
    cases = [(MODELS[n % 2], n, n % 4 < 2) for n in range(8)]
    alone = [ask(client, model, seed=seed).choices[0].text.rstrip(INCOMPLETE) for model, seed, _ in cases]

    def answer(case):
        model, seed, stream = case
        if stream:
            return joined(ask(client, model, seed=seed, stream=True))
        return ask(client, model, seed=seed).choices[0].text.rstrip(INCOMPLETE)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, cases)) == alone


@pytest.mark.integration
def test_openai_client_raises_the_matching_errors(client):
    import openai

    with pytest.raises(openai.BadRequestError, match="temperature: .*less than or equal to 2"):
        ask(client, temperature=9)
    with pytest.raises(openai.NotFoundError, match="no model '../../etc'; available: mvlm_gpt2, simone_enhanced"):
        ask(client, "../../etc")
    with pytest.raises(openai.NotFoundError, match="/v1/completions"):
        client.chat.completions.create(model=MODELS[0], messages=[{"role": "user", "content": "Hi"}])


@pytest.mark.integration
def test_malformed_bodies_get_400_and_unknown_paths_404(running):
    def status(path, body=None, kind="application/json"):
        try:
            return urlopen(Request(running[:-3] + path, body, {"Content-Type": kind}), timeout=30).status
        except HTTPError as error:
            assert json.load(error)["error"]["message"]
            return error.code

    for body in (b"{", b"[]", b"", b"\xff\xfe", b"[" * 10_000, b'{"prompt": "\\ud800"}'):
        assert status("/v1/completions", body) == 400
    assert status("/v1/completions", b"{}", "text/plain") == 400
    for path in ("/", "/docs", "/openapi.json", "/v1/responses", "/v1/models/x"):
        assert status(path) == 404, path
    for path in ("/load_model", "/reset", "/v1/chat/completions"):
        assert status(path, b"{}") == 404, path
    assert status("/v1/completions") == 405 and status("/health") == 200


@pytest.mark.integration
def test_disconnecting_client_does_not_block_others(client):
    ask(client, stream=True, max_tokens=500).close()
    assert ask(client).choices[0].text


@pytest.mark.integration
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_during_requests_stops_the_server_promptly(trained, tmp_path, number, code):
    import openai

    archive, scratch = tmp_path / "mvlm_gpt2_model.tar.gz", tmp_path / "scratch"
    write_archive(trained / "mvlm_gpt2", archive)
    scratch.mkdir()
    os.environ["TMPDIR"] = str(scratch)
    try:
        with server(archive) as (process, url):
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
            with ThreadPoolExecutor(8) as pool:
                for _ in range(8):
                    pool.submit(lambda: [ask(client, MODELS[0], max_tokens=30, seed=n) for n in range(1000)])
                time.sleep(1)
                assert list(scratch.glob("mvlm-open-*"))
                process.send_signal(number)
                assert process.wait(30) == code, "the requests asked for would take minutes"
                assert not list(scratch.glob("mvlm-open-*")), "an unpacked archive is removed"
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])))
    finally:
        del os.environ["TMPDIR"]
