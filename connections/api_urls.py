"""Addresses of the API. The streams are routed before Django, in ``project/asgi.py``."""

from __future__ import annotations

from django.urls import path, re_path

from connections import api, client_api, external_api, task_api

_CONNECTION = "auth/connections/<str:connection_id>"
_CLIENT = "api/clients/<str:cid>"
_TASK = "api/tasks/<str:task_id>"
_WORK = "api/work/<str:task_id>"

urlpatterns = [
    path("auth/connections", api.Connections.as_view()),
    path(_CONNECTION, api.Connection.as_view()),
    path(f"{_CONNECTION}/login", api.Login.as_view()),
    path(f"{_CONNECTION}/submit", api.Submit.as_view()),
    path(f"{_CONNECTION}/exchange", api.Exchange.as_view()),
    path(f"{_CONNECTION}/timeline", api.Timeline.as_view()),
    path(f"{_CONNECTION}/cancel", api.Cancel.as_view()),
    path(f"{_CONNECTION}/check", api.Check.as_view()),
    path(f"{_CONNECTION}/handoff", api.Handoff.as_view()),
    path("credentials", api.Credentials.as_view()),
    # Names may contain slashes, so the longer addresses come first.
    path("credentials/<path:id_or_name>/totp-code", api.TotpCode.as_view()),
    path("credentials/<path:id_or_name>", api.Credential.as_view()),
    path("profiles", api.Profiles.as_view()),
    path("profiles/<path:id_or_name>/download", api.ProfileDownload.as_view()),
    path("profiles/<path:id_or_name>", api.Profile.as_view()),
    path("api/tasks", task_api.Tasks.as_view()),
    path(_TASK, task_api.Task.as_view()),
    path(f"{_TASK}/input", task_api.TaskInput.as_view()),
    path(f"{_TASK}/kill", task_api.TaskKill.as_view()),
    path(f"{_TASK}/output", task_api.TaskOutput.as_view()),
    path(f"{_TASK}/redeliver-hook", task_api.TaskHook.as_view()),
    path("api/work/claim", external_api.Claim.as_view()),
    path(f"{_WORK}/heartbeat", external_api.Heartbeat.as_view()),
    path(f"{_WORK}/output", external_api.Output.as_view()),
    path(f"{_WORK}/status", external_api.Status.as_view()),
    path(f"{_WORK}/release", external_api.Release.as_view()),
    path("api/clients", client_api.Clients.as_view()),
    path(_CLIENT, client_api.Client.as_view()),
    path(f"{_CLIENT}/probe", client_api.Probe.as_view()),
    path(f"{_CLIENT}/answer", client_api.Answer.as_view()),
    path(f"{_CLIENT}/suspend", client_api.Suspend.as_view()),
    path(f"{_CLIENT}/disconnect", client_api.Disconnect.as_view()),
    path(f"{_CLIENT}/claims", client_api.Claims.as_view()),
    path(f"{_CLIENT}/claims/<str:subject>", client_api.Claim.as_view()),
    path(f"{_CLIENT}/presence", client_api.Presence.as_view()),
    path("api/schema", api.Schema.as_view(), name="api-schema"),
    path("api/docs", api.Docs.as_view(), name="api-docs"),
    # Last: with DEBUG on, Django would answer an unknown address with a page.
    re_path(r"^(?:auth|credentials|profiles|api)(?:/.*)?$", api.Nothing.as_view()),
]
