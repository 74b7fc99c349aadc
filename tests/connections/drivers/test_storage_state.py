"""Cookies as browsers keep them, and their way into and out of a Playwright storage_state."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from connections.drivers.storage_state import MAX_COOKIE_BYTES, CookieJar, parse_set_cookie

NOW = 1_800_000_000.0
SHOP = httpx.URL("https://www.shop.test/account/login")


def jar_with(*headers: str, url: httpx.URL = SHOP) -> CookieJar:
    jar = CookieJar(now=lambda: NOW)
    jar.store(url, headers)
    return jar


def test_a_state_has_exactly_the_keys_that_playwright_wants() -> None:
    jar = jar_with(
        "sid=abc; Path=/; HttpOnly; Secure; SameSite=Strict; Max-Age=60", "plain=1; Domain=shop.test"
    )
    assert jar.to_state() == {
        "cookies": [
            {
                "name": "sid", "value": "abc", "domain": "www.shop.test", "path": "/", "expires": NOW + 60,
                "httpOnly": True, "secure": True, "sameSite": "Strict",
            },
            {
                "name": "plain", "value": "1", "domain": ".shop.test", "path": "/account", "expires": -1,
                "httpOnly": False, "secure": False, "sameSite": "Lax",
            },
        ],
        "origins": [],
    }  # fmt: skip


def test_what_a_browser_wrote_comes_back_unchanged() -> None:
    state = {
        "cookies": [
            {
                "name": "a", "value": "1=2; ", "domain": ".shop.test", "path": "/", "expires": NOW + 9.5,
                "httpOnly": True, "secure": True, "sameSite": "None",
            },
            {
                "name": "b", "value": "", "domain": "www.shop.test", "path": "/x", "expires": -1,
                "httpOnly": False, "secure": False, "sameSite": "Lax",
            },
        ],
        "origins": [{"origin": "https://www.shop.test", "localStorage": [{"name": "k", "value": "v"}]}],
    }  # fmt: skip
    assert CookieJar.from_state(state, now=lambda: NOW).to_state() == state


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "name": st.text(min_size=1, max_size=8),
                "value": st.text(max_size=8),
                "domain": st.sampled_from(["shop.test", ".shop.test", "127.0.0.1"]),
                "path": st.sampled_from(["/", "/a", "/a/b/"]),
                "expires": st.sampled_from([-1, NOW + 5, NOW + 1e6]),
                "httpOnly": st.booleans(),
                "secure": st.just(True),
                "sameSite": st.sampled_from(["Strict", "Lax", "None"]),
            }
        ),
        unique_by=lambda entry: (entry["name"], entry["domain"], entry["path"]),
        max_size=6,
    )
)
def test_every_state_survives_the_round_trip(cookies: list[dict[str, object]]) -> None:
    state = {"cookies": cookies, "origins": []}
    assert CookieJar.from_state(state, now=lambda: NOW).to_state() == state


@pytest.mark.parametrize(
    "state", [None, {}, {"cookies": None}, {"cookies": ["x", {"name": "a"}, {"domain": "d"}]}]
)
def test_a_state_without_cookies_is_an_empty_jar(state: dict[str, object] | None) -> None:
    assert len(CookieJar.from_state(state)) == 0


def test_samesite_none_without_secure_becomes_lax_because_chromium_refuses_it() -> None:
    assert jar_with("a=1; SameSite=None").to_state()["cookies"][0]["sameSite"] == "Lax"


@pytest.mark.parametrize(
    ("header", "url", "sent"),
    [
        ("a=1", "https://www.shop.test/account/x", True),
        ("a=1", "https://www.shop.test/accounting", False),
        ("a=1; Path=/", "https://www.shop.test/", True),
        ("a=1; Path=/", "https://shop.test/", False),
        ("a=1; Path=/; Domain=shop.test", "https://api.shop.test/", True),
        ("a=1; Path=/; Domain=.shop.test", "https://shop.test/", True),
        ("a=1; Path=/; Domain=shop.test", "https://notshop.test/", False),
        ("a=1; Path=/; Secure", "http://www.shop.test/", False),
        ("a=1; Path=/; Max-Age=0", "https://www.shop.test/", False),
        ("a=1; Path=/; Expires=Thu, 01 Jan 1970 00:00:00 GMT", "https://www.shop.test/", False),
        ("a=1; Path=/; Expires=Fri, 01-Jan-2038 00:00:00 GMT", "https://www.shop.test/", True),
        ("a=1; Path=/; Expires=nonsense", "https://www.shop.test/", True),
    ],
)
def test_a_cookie_goes_where_a_browser_would_send_it(header: str, url: str, sent: bool) -> None:
    assert jar_with(header).header(httpx.URL(url)) == ("a=1" if sent else None)


@pytest.mark.parametrize(
    "header",
    [
        "nothing",
        "=value",
        "a=1; Domain=other.test",
        "a=1; Domain=test",
        "a=1; Domain=deeper.www.shop.test",
        "__Secure-a=1",
        "__Host-a=1; Secure; Path=/x",
        "__Host-a=1; Secure; Path=/; Domain=shop.test",
        f"a={'x' * MAX_COOKIE_BYTES}",
        "a=\x01",
    ],
)
def test_a_cookie_that_a_browser_ignores_is_ignored(header: str) -> None:
    assert parse_set_cookie(header, SHOP, now=NOW) is None


def test_a_host_cannot_set_a_secure_cookie_without_tls_unless_it_is_this_machine() -> None:
    assert parse_set_cookie("a=1; Secure", httpx.URL("http://www.shop.test/"), now=NOW) is None
    assert parse_set_cookie("a=1; Secure", httpx.URL("http://127.0.0.1:8000/"), now=NOW) is not None


def test_a_new_value_replaces_the_old_one_and_max_age_zero_deletes_it() -> None:
    jar = jar_with("a=1; Path=/", "a=2; Path=/")
    assert jar.header(SHOP) == "a=2"
    jar.store(SHOP, ["a=; Path=/; Max-Age=0"])
    assert jar.header(SHOP) is None


def test_the_longer_path_is_sent_first() -> None:
    assert jar_with("a=1; Path=/", "b=2; Path=/account").header(SHOP) == "b=2; a=1"


def test_a_jar_cannot_grow_without_end() -> None:
    assert len(jar_with(*(f"n{i}=1" for i in range(1500)))) == 1000


def test_cookies_do_not_print_their_values() -> None:
    assert "topsecret" not in repr(parse_set_cookie("a=topsecret", SHOP, now=NOW))
