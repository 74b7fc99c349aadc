"""Django's settings. What can be turned from outside is read and checked in ``project/env.py``."""

from __future__ import annotations

from typing import Any

from project import env

KNOBS = env.read()
BASE_DIR = env.BASE_DIR
DATA_DIR = KNOBS.data_dir

DEBUG = KNOBS.debug
SECRET_KEY = KNOBS.secret_key
ALLOWED_HOSTS = KNOBS.allowed_hosts
BASE_URL = KNOBS.base_url
USE_HTTPS = BASE_URL.startswith("https://")
CSRF_TRUSTED_ORIGINS = [BASE_URL]

INSTALLED_APPS = [
    "daphne",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "whitenoise.runserver_nostatic",
    "django.contrib.staticfiles",
    "channels",
    "corsheaders",
    "django_htmx",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "events",
    "connections",
]

MIDDLEWARE = [
    "project.middleware.trusted_proxy",
    "project.middleware.security_headers",
    "django.middleware.security.SecurityMiddleware",
    "whitenoise.middleware.WhiteNoiseMiddleware",
    "corsheaders.middleware.CorsMiddleware",
    "project.middleware.body_limit",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "django_htmx.middleware.HtmxMiddleware",
]

ROOT_URLCONF = "project.urls"
ASGI_APPLICATION = "project.asgi.application"
APPEND_SLASH = False

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "templates"],
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]

DATABASES: dict[str, Any] = {"default": KNOBS.database}
# One short unit of work per connection: a stream must never keep one (see design notes in events/consumers.py).
DATABASES["default"]["CONN_MAX_AGE"] = 0
IS_SQLITE = "sqlite" in str(DATABASES["default"]["ENGINE"])
if IS_SQLITE:
    DATABASES["default"]["OPTIONS"] = {
        # A write lock taken at BEGIN: two verbs wait for each other instead of failing half way with "locked".
        "transaction_mode": "IMMEDIATE",
        "timeout": 20,
        "init_command": (
            "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-8000; PRAGMA secure_delete=ON;"
        ),
    }
else:
    DATABASES["default"].setdefault("OPTIONS", {})["pool"] = {"min_size": 0, "max_size": 20, "timeout": 10}

CHANNEL_LAYERS: dict[str, Any] = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
CACHES: dict[str, Any] = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
if KNOBS.redis_url:
    CHANNEL_LAYERS["default"] = {
        "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
        "CONFIG": {"hosts": [KNOBS.redis_url]},
    }
    CACHES["default"] = {
        "BACKEND": "django.core.cache.backends.redis.RedisCache",
        "LOCATION": KNOBS.redis_url,
    }

AUTH_PASSWORD_VALIDATORS = [
    {"NAME": "django.contrib.auth.password_validation.MinimumLengthValidator"},
    {"NAME": "django.contrib.auth.password_validation.CommonPasswordValidator"},
]
LOGIN_URL = "/signin"
LOGIN_REDIRECT_URL = "/"
LOGOUT_REDIRECT_URL = "/signin"

LANGUAGE_CODE = "en"
TIME_ZONE = "UTC"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

STATIC_URL = "/static/"
STATICFILES_DIRS = [BASE_DIR / "project" / "static"]
STATIC_ROOT = DATA_DIR / "static"
# WhiteNoise warns about a folder that is not there; collectstatic is optional here.
STATIC_ROOT.mkdir(exist_ok=True)
STORAGES = {
    "default": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
    "staticfiles": {"BACKEND": "whitenoise.storage.CompressedStaticFilesStorage"},
}
# Serve from the source folders when nothing was collected: `make run` needs no collectstatic.
WHITENOISE_USE_FINDERS = True

SESSION_COOKIE_HTTPONLY = True
SESSION_COOKIE_SAMESITE = "Lax"
SESSION_COOKIE_SECURE = USE_HTTPS
CSRF_COOKIE_SECURE = USE_HTTPS
CSRF_FAILURE_VIEW = "connections.errors.csrf_failure"
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
SECURE_HSTS_SECONDS = 31_536_000 if USE_HTTPS else 0
X_FRAME_OPTIONS = "DENY"
DATA_UPLOAD_MAX_MEMORY_SIZE = KNOBS.max_body_bytes

CORS_ALLOWED_ORIGINS = KNOBS.cors_origins
CORS_ALLOW_METHODS = ("GET", "POST", "OPTIONS")
CORS_ALLOW_HEADERS = ("authorization", "content-type", "accept", "last-event-id", "idempotency-key")
CORS_EXPOSE_HEADERS = ("X-Has-More", "X-Next-Offset", "Retry-After", "x-should-retry")
CORS_URLS_REGEX = r"^/(auth|credentials|profiles)(/|$)"

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["connections.authentication.BearerAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
    "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
    "DEFAULT_PARSER_CLASSES": ["connections.inputs.StrictJSONParser"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "connections.errors.exception_handler",
    "UNAUTHENTICATED_USER": None,
    "DEFAULT_CONTENT_NEGOTIATION_CLASS": "connections.inputs.AlwaysJSON",
}
SPECTACULAR_SETTINGS = {
    "TITLE": "Switchboard",
    "DESCRIPTION": (
        "Managed-auth connections, tasks and live streams. The paths under /auth, /credentials and /profiles "
        "speak the wire protocol of Kernel's managed auth, so Kernel's SDKs work with nothing changed but the base URL."
    ),
    "VERSION": "0.1.0",
    "SERVE_INCLUDE_SCHEMA": False,
    "SERVE_PUBLIC": True,
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "COMPONENT_SPLIT_REQUEST": True,
}

# The domain's own limits; each is a knob of project/env.py.
FLOW_SECONDS = KNOBS.flow_seconds
INPUT_SECONDS = KNOBS.input_seconds
LEASE_SECONDS = KNOBS.lease_seconds
TASK_ATTEMPTS = KNOBS.task_attempts
STREAM_MAX_SECONDS = KNOBS.stream_max_seconds
STREAM_LIMIT = KNOBS.stream_limit
STREAM_PROCESS_LIMIT = KNOBS.stream_process_limit
HEARTBEAT_SECONDS = KNOBS.heartbeat_seconds
POLL_SECONDS = KNOBS.poll_seconds
EVENT_RETENTION_DAYS = KNOBS.event_retention_days
CONNECTION_QUOTA = KNOBS.connection_quota
MAX_BODY_BYTES = KNOBS.max_body_bytes
ALLOW_PRIVATE_TARGETS = KNOBS.allow_private_targets
ENCRYPTION_KEYS = KNOBS.encryption_keys
RETURN_URLS = KNOBS.return_urls
FRAME_ANCESTORS = KNOBS.frame_ancestors
TRUSTED_PROXIES = KNOBS.trusted_proxies

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(name)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
    "root": {"handlers": ["stderr"], "level": KNOBS.log_level},
    "loggers": {
        # The request line of the target site may carry what a GET form was filled with.
        "httpx": {"level": "WARNING"},
        "httpcore": {"level": "WARNING"},
        # Its access line prints the full URL, and a hosted page's URL carries a one-time code.
        "django.channels.server": {"level": "WARNING"},
        "daphne": {"level": "WARNING"},
        "asyncio": {"level": "WARNING"},
    },
}
