"""Secrets at rest: sealed, rotated, compared, never guessed."""

from __future__ import annotations

from typing import Any

import pytest
from cryptography.fernet import Fernet

from connections import vault
from connections.vault import VaultError

OLD, NEW = (Fernet.generate_key().decode() for _ in range(2))


def test_what_was_sealed_is_read_back_and_is_not_to_be_seen() -> None:
    value = {"password": "UNMISTAKABLE", "n": [1, None, "ü"]}
    token = vault.seal(value)
    assert b"UNMISTAKABLE" not in token
    assert vault.unseal(token) == value
    assert vault.unseal(memoryview(token)) == value
    assert vault.seal(value) != token, "the same twice does not look the same"


@pytest.mark.parametrize("token", [None, b"", b"nonsense"])
def test_what_cannot_be_read_says_so_and_nothing_else(token: bytes | None) -> None:
    with pytest.raises(VaultError):
        vault.unseal(token)


def test_a_changed_token_is_refused() -> None:
    token = bytearray(vault.seal("x"))
    token[-5] ^= 1
    with pytest.raises(VaultError):
        vault.unseal(bytes(token))


def test_an_old_key_still_reads_and_a_resealed_secret_needs_it_no_more(settings: Any) -> None:
    settings.ENCRYPTION_KEYS = [OLD]
    token = vault.seal("secret")
    settings.ENCRYPTION_KEYS = [NEW, OLD]
    assert vault.unseal(token) == "secret"
    fresh = vault.reseal(token)
    settings.ENCRYPTION_KEYS = [NEW]
    assert vault.unseal(fresh) == "secret"
    with pytest.raises(VaultError):
        vault.unseal(token)
    with pytest.raises(VaultError):
        vault.reseal(token)


def test_fingerprints_tell_same_from_other_and_depend_on_the_installation(settings: Any) -> None:
    one = vault.fingerprint({"a": 1, "b": "x"})
    assert one == vault.fingerprint({"b": "x", "a": 1})
    assert one != vault.fingerprint({"a": 1, "b": "y"})
    settings.SECRET_KEY = "another-secret-key-of-another-installation"
    assert one != vault.fingerprint({"a": 1, "b": "x"})


def test_keys_and_codes_are_random_and_kept_as_hashes() -> None:
    assert vault.new_api_key().startswith("sk_")
    assert len({vault.new_code() for _ in range(50)}) == 50
    assert len(vault.new_code()) >= 43, "256 bits"
    assert vault.hash_token("a") != vault.hash_token("b")
    assert len(vault.hash_token("a")) == 64


def test_comparison_takes_any_text() -> None:
    assert vault.same("ü", "ü")
    assert not vault.same("a", "ab")
