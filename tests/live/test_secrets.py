"""A48: whatever was typed, stored or set by the site is to be found nowhere: not at rest, not on the way, not in a log."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import quote, quote_plus

import httpx
import pytest

from tests.conftest import Running, run_switchboard, until
from tests.live.switchboard import Program, program
from tests.sites import PASSWORD, SMS_CODE, TOTP_SECRET, USERNAME, Site

pytestmark = pytest.mark.live
WRONG = "Wr0ng & unmistakable-pässword"


class Capture:
    """Keeps every byte that a stream sends."""

    def __init__(self, url: str, *, headers: dict[str, str], cookies: httpx.Cookies | None = None) -> None:
        self.content = b""
        self.open = threading.Event()
        self._enough = threading.Event()
        self._client = httpx.Client(headers=headers, cookies=cookies, timeout=30)
        self._url = url
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self.open.wait(20), f"{url} did not open"

    def _read(self) -> None:
        with self._client, self._client.stream("GET", self._url) as answer:
            assert answer.status_code == 200, answer.status_code
            self.open.set()
            for part in answer.iter_raw():
                self.content += part
                # With a heartbeat every second, this is looked at often enough.
                if self._enough.is_set():
                    return

    def end(self) -> None:
        self._enough.set()
        self._thread.join(10)


def spellings(secret: str) -> Iterator[bytes]:
    """As it would look in a URL, in JSON, in a form or in base64 at any of the three offsets."""
    plain = secret.encode()
    yield plain
    yield quote(secret, safe="").encode()
    yield quote_plus(secret).encode()
    yield secret.encode("unicode_escape")
    yield plain.hex().encode()
    for offset in range(3):
        coded = base64.b64encode(b"\0" * offset + plain)
        # The first and the last characters depend on their neighbours.
        yield coded[4:-4]
        yield base64.urlsafe_b64encode(b"\0" * offset + plain)[4:-4]


def found(secret: str, text: bytes) -> bool:
    if len(secret) <= 8:
        # Six digits also turn up inside ids and fractions of seconds: only a code that stands by itself counts.
        return re.search(rb"(?<![0-9A-Za-z.])" + secret.encode() + rb"(?![0-9A-Za-z])", text) is not None
    return any(spelling in text for spelling in spellings(secret))


@contextmanager
def signed_in(running: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, follow_redirects=True, timeout=20) as browser:
        sign_in(running, browser)
        yield browser


def sign_in(running: Running, browser: httpx.Client) -> None:
    form = browser.get("/signin")
    token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', form.text)
    assert token is not None
    answer = browser.post(
        "/signin",
        data={"username": running.username, "password": running.password, "csrfmiddlewaretoken": token[1]},
        headers={"Referer": f"{running.url}/signin"},
    )
    assert answer.status_code == 200, answer.text
    assert browser.cookies.get("sessionid")


def files(running: Running) -> dict[str, bytes]:
    """Everything that the installation has written, but for the keys it encrypts with."""
    return {
        path.name: path.read_bytes()
        for path in running.data_dir.rglob("*")
        if path.is_file() and path.suffix != ".key" and "static" not in path.parts
    }


def everywhere(running: Running, client: Program, browser: httpx.Client, ids: list[str]) -> dict[str, bytes]:
    """Every answer to a GET, by its path."""
    paths = ["/auth/connections", "/credentials", "/credentials/kept", "/profiles"]
    for pk in ids:
        paths += [f"/auth/connections/{pk}", f"/auth/connections/{pk}/timeline"]
    seen = {}
    for path in paths:
        answer = client.http.get(path)
        assert answer.status_code == 200, (path, answer.text)
        seen[path] = answer.content
    for path in ["/", "/connections", "/tasks", "/events", *[f"/connections/{pk}" for pk in ids]]:
        answer = browser.get(path)
        assert answer.status_code == 200, path
        seen[f"page {path}"] = answer.content
    for pk in ids:
        seen[f"hosted {pk}"] = browser.get(f"/login/{pk}").content
    return seen


def test_A48_no_secret_is_in_the_database_a_log_an_event_a_stream_or_an_answer(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    data_dir = tmp_path_factory.mktemp("secrets")
    with (
        run_switchboard(data_dir, LOG_LEVEL="DEBUG", STREAM_LIMIT="100", HEARTBEAT_SECONDS="1") as running,
        Site() as site,
        program(running) as client,
        signed_in(running) as browser,
    ):
        client.post(
            "/credentials",
            {
                "name": "kept",
                "domain": site.domain,
                "values": {"pin": "unmistakable-pin"},
                "totp_secret": TOTP_SECRET,
            },
            201,
        )
        with_secret = client.connect(
            site.domain, "secrets totp", login_url=site.url("/totp/login"), credential={"name": "kept"}
        )
        with_code = client.connect(site.domain, "secrets sms", login_url=site.url("/sms/login"))
        ids = [with_secret, with_code]
        logins = [client.login(pk) for pk in ids]
        bearer = {"Authorization": f"Bearer {running.api_key}"}
        streams = {
            "/api/events": Capture(f"{running.url}/api/events", headers=bearer),
            "/live": Capture(f"{running.url}/live", headers={}, cookies=browser.cookies),
        }
        for pk in ids:
            streams[pk] = Capture(f"{running.url}/auth/connections/{pk}/events", headers=bearer)
        exchanged = [
            client.post(f"/auth/connections/{pk}/exchange", {"code": login["handoff_code"]})["jwt"]
            for pk, login in zip(ids, logins, strict=True)
        ]

        during: dict[str, bytes] = {}
        for pk in ids:
            first = client.wait(pk, step="AWAITING_INPUT")["interaction_id"]
            client.submit(pk, {"username": USERNAME, "password": WRONG})
            again = client.wait(pk, step="AWAITING_INPUT", other_than=first)
            # The site prints the wrong password in its message; here it must be gone.
            assert again["website_error"]
            during |= {
                f"{name}, asked again": text
                for name, text in everywhere(running, client, browser, ids).items()
            }
            client.submit(pk, {"username": USERNAME, "password": PASSWORD})
            if pk == with_code:
                client.wait(pk, step="AWAITING_INPUT", other_than=again["interaction_id"])
                (field,) = client.state(pk)["fields"]
                client.submit(pk, {field["ref"]: SMS_CODE})
            client.wait(pk, status="SUCCESS")

        cookies = {
            match
            for request in list(site.requests)
            for match in re.findall(r"sid\d+=([0-9a-f]{32})", request.headers.get("Cookie", ""))
        }
        codes = {
            value
            for request in list(site.requests)
            if request.method == "POST" and request.path.startswith("/totp/")
            for value in request.form.values()
            if re.fullmatch(r"\d{6}", value)
        }
        secrets = {PASSWORD, WRONG, SMS_CODE, TOTP_SECRET, "unmistakable-pin", *cookies, *codes}
        assert codes, "the driver has made a code of the stored secret, or this test looks for nothing"
        assert cookies, "the site has set cookies, or this test looks for nothing"
        assert client.rows("SELECT count(*) FROM connections_profile WHERE state IS NOT NULL") == [(2,)]

        until(lambda: b"SUCCESS" in streams[with_code].content, 10)
        until(lambda: streams["/api/events"].content.count(b"completed") >= 2, 10)
        for stream in streams.values():
            stream.end()
        places = (
            files(running)
            | {f"stream {name}": stream.content for name, stream in streams.items()}
            | everywhere(running, client, browser, ids)
            | during
            | {"event log": repr(client.rows("SELECT * FROM events_event")).encode()}
        )
        assert {"switchboard.sqlite3", "server.log", "worker.log"} <= set(places)
        assert all(stream.content for stream in streams.values())
        leaks = sorted(
            (secret, name) for secret in secrets for name, text in places.items() if found(secret, text)
        )
        assert leaks == []

        tokens = [running.api_key, *exchanged, *[login["handoff_code"] for login in logins]]
        told = {
            name: text
            for name, text in places.items()
            if name.endswith(".log") or "event" in name or name == "stream /live"
        }
        assert (
            sorted((token, name) for token in tokens for name, text in told.items() if found(token, text))
            == []
        )
        at_rest = {name: text for name, text in files(running).items() if ".sqlite3" in name}
        assert [name for token in tokens for name, text in at_rest.items() if found(token, text)] == []
