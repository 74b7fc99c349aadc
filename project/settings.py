"""Django's settings. What can be turned from outside is read and checked in ``project/env.py``."""

from __future__ import annotations

from typing import Any

from project import env, logs

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
    # First: its runserver comes before Daphne's.
    "project",
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
    "project.middleware.noted",
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
# One short unit of work per connection: a stream must never keep one (see design notes in events/consumers.py). With a pool Django
# insists on it, too: what CONN_MAX_AGE would save, the pool does.
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
    _given: dict[str, Any] = DATABASES["default"].get("OPTIONS", {})
    # A connection is looked at before it is handed out (one round trip): after a restart of PostgreSQL nobody gets a dead one.
    DATABASES["default"]["CONN_HEALTH_CHECKS"] = True
    # Whatever DATABASE_URL says after its "?" wins.
    DATABASES["default"]["OPTIONS"] = {
        "application_name": "switchboard",
        "connect_timeout": 5,
        # A network that swallows everything is noticed within 15 s while something is sent, and 45 s while nothing is.
        "tcp_user_timeout": 15_000,
        "keepalives": 1,
        "keepalives_idle": 30,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        **_given,
        # Writers of events wait for each other (events/log.py). A process that was stopped or cut off in mid-transaction loses its turn after 15 s, and
        # who waits has a little more patience than that, so it costs the others time and no failure. No verb talks to the network in its transaction.
        "options": f"-c idle_in_transaction_session_timeout=15s -c lock_timeout=20s {_given.get('options', '')}".strip(),
        "pool": {
            "min_size": 0,
            "max_size": KNOBS.database_pool_size,
            "timeout": 5,
            # For as long as somebody waits it tries again, with pauses of 1 and 2 s. By default it goes on for 300 s and doubles its
            # pause each time: after a minute without PostgreSQL it would come back up to a minute late.
            "reconnect_timeout": 5,
        },
    }

CHANNEL_LAYERS: dict[str, Any] = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
CACHES: dict[str, Any] = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
if KNOBS.redis_url:
    # Chosen by measurement (python -m tests.bench.layers; 2 cores, Redis 7.0, two receivers; RedisChannelLayer | RedisPubSubChannelLayer):
    # wake-up p50 1.5 | 0.9 ms, p99 2.8 | 2.4 ms, CPU per wake-up 770 | 330 µs where it is heard and 920 | 780 µs where it is sent, lost of
    # 1,000 quick ones 16 | 0 %, an idle receiver 0.01 | 0.27 % of a core. After a cut connection and after a restart of Redis both hear again
    # within 1.1 s, the first by raising errors and being joined anew, the second by itself. What either loses meanwhile the hub finds by looking.
    # Reads of the second are bounded one by one (0.1 s) and do not know socket_timeout, so it limits only what is sent: a Redis that is
    # there but silent held a sender for exactly so long.
    CHANNEL_LAYERS["default"] = {
        "BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer",
        "CONFIG": {"hosts": [{"address": KNOBS.redis_url, "socket_connect_timeout": 2, "socket_timeout": 2}]},
    }
    CACHES["default"] = {"BACKEND": "project.cache.SharedCounters", "LOCATION": KNOBS.redis_url}

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

SESSION_ENGINE = "project.sessions"
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
    "ENUM_NAME_OVERRIDES": {
        "TaskStatusEnum": "connections.states.TaskStatus.values",
        "WorkStatusEnum": "connections.inputs.WORK_STATUSES",
    },
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
CLIENT_GRACE_SECONDS = KNOBS.client_grace_seconds
CLIENT_SUSPENDED_SECONDS = KNOBS.client_suspended_seconds
CLIENT_LEASE_SECONDS = KNOBS.client_lease_seconds
POLL_SECONDS = KNOBS.poll_seconds
EVENT_RETENTION_DAYS = KNOBS.event_retention_days
#: 0: for ever.
TASK_RETENTION_DAYS = KNOBS.task_retention_days
CONNECTION_QUOTA = KNOBS.connection_quota
MAX_BODY_BYTES = KNOBS.max_body_bytes
COMMANDS = KNOBS.commands
COMMAND_TEMPLATES = KNOBS.command_templates
COMMAND_DIRECTORIES = KNOBS.command_directories
COMMAND_ENV = KNOBS.command_env
COMMAND_LIMIT = KNOBS.command_limit
COMMAND_CONCURRENCY = KNOBS.command_concurrency
COMMAND_SECONDS = KNOBS.command_seconds
COMMAND_OUTPUT_BYTES = KNOBS.command_output_bytes
COMMAND_QUIET_SECONDS = KNOBS.command_quiet_seconds
COMMAND_KILL_SECONDS = KNOBS.command_kill_seconds
COMMAND_ON_STOP = KNOBS.command_on_stop
COMMAND_STOP_SECONDS = KNOBS.command_stop_seconds
HOOK_ATTEMPTS = KNOBS.hook_attempts
ALLOW_PRIVATE_TARGETS = KNOBS.allow_private_targets
ENCRYPTION_KEYS = KNOBS.encryption_keys
RETURN_URLS = KNOBS.return_urls
FRAME_ANCESTORS = KNOBS.frame_ancestors
TRUSTED_PROXIES = KNOBS.trusted_proxies
METRICS_TOKEN = KNOBS.metrics_token

LOGGING = logs.config(KNOBS.log_format, KNOBS.log_level)
