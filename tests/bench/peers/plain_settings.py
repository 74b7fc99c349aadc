"""Channels with its in-memory layer and nothing else."""

from __future__ import annotations

SECRET_KEY = "a bench on a loopback address has no secrets"
ALLOWED_HOSTS = ["127.0.0.1"]
INSTALLED_APPS = ["daphne", "channels"]
MIDDLEWARE: list[str] = []
ROOT_URLCONF = "tests.bench.peers.plain_urls"
ASGI_APPLICATION = "tests.bench.peers.plain_asgi.application"
USE_TZ = True
CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
