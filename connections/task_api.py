"""The API of tasks: make them, see them, type into them, end them, read what they wrote. For programs with a key, and for the dashboard's own
pages with their session. What an output is as a stream is in ``task_streams.py``; programs that do the work use ``external_api.py``."""

from __future__ import annotations

import json
import uuid
from typing import Any

from django.db import transaction
from django.db.models import Q, QuerySet, TextField
from django.db.models.functions import Cast
from django.http import HttpResponse
from drf_spectacular.utils import OpenApiParameter
from rest_framework.request import Request
from rest_framework.response import Response

from connections import (
    commands,
    errors,
    hooks,
    idempotency,
    inputs,
    models,
    openapi,
    outputs,
    payloads,
    task_inputs,
    tasks,
    transitions,
)
from connections.access import NotFound, Principal, operable, visible
from connections.api import Operation, owner_of, paged, window
from connections.openapi import operation, shape
from connections.outputs import Size
from connections.states import InputKind, TaskKind, TaskStatus
from connections.terminal.ansi import plain

Json = dict[str, Any]

#: How many lines of a task are shown with it, the newest.
LINES_SHOWN = 100


def rows() -> QuerySet[models.Task]:
    """All tasks, with what is shown of them fetched along."""
    return models.Task.objects.select_related("hook_delivery")


def found(tasks_: Any, query: inputs.TaskQuery) -> Any:
    """The tasks that are asked for."""
    if query.statuses:
        tasks_ = tasks_.filter(status__in=query.statuses)
    for name in ("kind", "parent_id", "connection_id"):
        if wanted := getattr(query, name):
            tasks_ = tasks_.filter(**{name: wanted})
    if query.label:
        # Labels are ASCII words without quotes, so this is the same on every database.
        tasks_ = tasks_.annotate(labels_text=Cast("labels", TextField())).filter(
            labels_text__contains=json.dumps(query.label)
        )
    if query.text:
        # As it stands in JSON: both ways, for databases differ in whether they keep other letters as escapes.
        arguments = Q(spec__argv__icontains=json.dumps(query.text, ensure_ascii=False)[1:-1])
        arguments |= Q(spec__argv__icontains=json.dumps(query.text)[1:-1])
        tasks_ = tasks_.filter(Q(title__icontains=query.text) | Q(pk__icontains=query.text) | arguments)
    return tasks_


class Tasks(Operation):
    """All tasks of the caller."""

    browser = True

    @operation(
        "createTask",
        "Run a command, or put a task of your own kind in the queue. 429 `no_capacity` says how many commands are open.",
        tag="tasks",
        success=201,
        answer=shape(payloads.TaskCreatedShape),
        takes=inputs.TaskCreate,
        errors=(403, 429),
        post=True,
        browser=True,
    )
    def post(self, request: Request) -> Response:
        return self.once(self._create)

    def _create(self) -> Response:
        body = self.parsed(inputs.TaskCreate)
        row, made = create_task(self.principal, body, owner_id=owner_of(self.principal), now=self.now)
        return Response({**payloads.task(row), **({"hook_secret": made} if made else {})}, status=201)

    @operation(
        "listTasks",
        "The tasks that the caller may see, newest first.",
        tag="tasks",
        answer=shape(payloads.TaskShape, many=True),
        query=[
            OpenApiParameter("status", str, description="Only these: one status, or several with commas."),
            OpenApiParameter("kind", str, description="Only of this kind."),
            OpenApiParameter("q", str, description="Part of the title, the id or the arguments."),
            OpenApiParameter("label", str, description="Only with this label."),
            OpenApiParameter("parent_id", str, description="Only the children of this task."),
            OpenApiParameter("connection_id", str, description="Only of this connection."),
        ],
        paged=True,
    )
    def get(self, request: Request) -> Response:
        page = inputs.page_of(request.query_params)
        query = inputs.task_query(request.query_params)
        wanted = found(rows().visible_to(self.principal), query)  # type: ignore[attr-defined]
        return paged(window(wanted.order_by("-created_at", "-pk"), page), page, payloads.task)


def create_task(principal: Principal, body: Json, *, owner_id: int, now: Any) -> tuple[models.Task, str]:
    """The task that a checked body asks for, and the hook's secret if one was made up.

    :raises NotAllowed, InvalidCommand, NoCapacity, ApiError: it cannot be.
    """
    title, timeout = body.get("title"), body.get("timeout_seconds")
    if body["kind"] == TaskKind.COMMAND:
        names = ("argv", "template", "cwd", "title", "timeout_seconds", "rows", "cols")
        command = commands.prepare(principal=principal, **{name: body.get(name) for name in names})
        spec, title, timeout = command.spec, command.title, command.timeout_seconds
    else:
        spec = {"payload": body.get("payload")}
    if "parent_id" in body:
        try:
            operable(principal, models.Task.objects, body["parent_id"])
        except NotFound:
            raise errors.invalid_request(
                [{"code": "not_found", "message": "parent_id: There is no such task."}]
            ) from None
    hook_url = body.get("hook_url", "")
    made = hooks.new_secret() if hook_url and "hook_secret" not in body else ""
    with transaction.atomic():
        row = tasks.create(
            owner_id=owner_id,
            kind=body["kind"],
            title=title or body["kind"],
            spec=spec,
            labels=body.get("labels", ()),
            parent_id=body.get("parent_id"),
            timeout_seconds=timeout,
            hook_url=hook_url,
            hook_secret=body.get("hook_secret") or made,
            actor=principal.name,
            now=now,
        )
        if "input" in body:
            task_inputs.first_input(row, text=body["input"], actor=principal.name, now=now)
    return row, made


class Task(Operation):
    """One task."""

    browser = True

    @operation(
        "getTask",
        f"A task and its newest {LINES_SHOWN} inputs in the order of acceptance, without their texts.",
        tag="tasks",
        answer=shape(payloads.TaskDetailShape),
        errors=(404,),
    )
    def get(self, request: Request, task_id: str) -> Response:
        row = visible(self.principal, rows(), task_id)
        lines = list(row.inputs.defer("sealed").order_by("-number")[:LINES_SHOWN])
        for line in lines:
            line.task = row
        return Response(payloads.task_detail(row, lines[::-1]))

    @operation(
        "updateTask",
        "Change the title or the labels; only the keys sent change. Also after the end.",
        tag="tasks",
        acts=True,
        browser=True,
        answer=shape(payloads.TaskShape),
        takes=inputs.TaskUpdate,
        errors=(403, 404),
    )
    def patch(self, request: Request, task_id: str) -> Response:
        operable(self.principal, models.Task.objects, task_id)
        body = self.parsed(inputs.TaskUpdate)
        row = tasks.update(
            task_id=task_id,
            title=body.get("title"),
            labels=body.get("labels"),
            actor=self.principal.name,
            now=self.now,
        )
        return Response(payloads.task(row))

    @operation(
        "deleteTask",
        "Delete a task that has ended, with its output. 409 `task_running` before that.",
        tag="tasks",
        acts=True,
        browser=True,
        success=204,
        errors=(403, 404, 409),
    )
    def delete(self, request: Request, task_id: str) -> Response:
        operable(self.principal, models.Task.objects, task_id)
        tasks.delete(task_id=task_id, actor=self.principal.name, now=self.now)
        return Response(status=204)


def typeable(principal: Principal, task_id: str) -> models.Task:
    """The task, if the caller may type into it: into a command only who may run commands.

    :raises NotFound, Forbidden, NotAllowed: otherwise.
    """
    row: models.Task = operable(principal, models.Task.objects, task_id)
    if row.kind == TaskKind.COMMAND:
        commands.check_right(principal)
    return row


class TaskInput(Operation):
    """What is sent to a task."""

    browser = True

    @operation(
        "sendTaskInput",
        "Send a text, keys, or a new size. It is kept, and delivered in the order of acceptance; what the task is doing does not matter.",
        tag="tasks",
        success=202,
        answer=shape(openapi.ReceiptShape),
        takes=inputs.TaskInput,
        errors=(403, 404, 429),
        post=True,
        browser=True,
    )
    def post(self, request: Request, task_id: str) -> Response:
        typeable(self.principal, task_id)
        return self.once(lambda: self._accept(task_id))

    def _accept(self, task_id: str) -> Response:
        body = self.parsed(inputs.TaskInput)
        kind, content = content_of(body)
        # Without a name of the client's own nothing can be known as a repetition.
        message_id = self.message_id() or str(uuid.uuid4())
        task_inputs.add_input(
            task_id=task_id,
            kind=kind,
            content=content,
            submit=body.get("submit", True),
            message_id=message_id,
            sender=self.principal.user_id,
            actor=self.principal.name,
            now=self.now,
        )
        receipt = {"accepted": True, "client_message_id": message_id, "task_id": task_id}
        return Response(receipt, status=202)

    def message_id(self) -> str | None:
        """The header, or the member of the body: a client that sends both has to mean one message."""
        header = super().message_id()
        body = super().comparable_body()
        member = body.get("client_message_id") if isinstance(body, dict) else None
        # Of another type it is no name: the schema says so.
        if not isinstance(member, str):
            return header
        if header is not None and member != header:
            message = "client_message_id: It differs from the header Idempotency-Key."
            raise errors.invalid_request([{"code": "invalid", "message": message}])
        return idempotency.key_of(member)

    def comparable_body(self) -> Any:
        """Where the message id stands makes no other message of it."""
        body = super().comparable_body()
        if not isinstance(body, dict):
            return body
        return {key: value for key, value in body.items() if key != "client_message_id"}


def content_of(body: Json) -> tuple[InputKind, Any]:
    """A checked input in the words of the verb."""
    if "keys" in body:
        return InputKind.KEYS, list(body["keys"])
    if "rows" in body:
        return InputKind.RESIZE, [body["rows"], body["cols"]]
    return InputKind.TEXT, body["text"]


class TaskKill(Operation):
    """Ends a task before its time."""

    browser = True

    @operation(
        "killTask",
        "End a task: the whole process group gets SIGTERM, then SIGKILL. 200 when it was killed already, 409 `task_over` when it has ended otherwise.",
        tag="tasks",
        success=202,
        answer=shape(payloads.TaskShape),
        takes=inputs.Kill,
        errors=(403, 404, 409),
        post=True,
        browser=True,
    )
    def post(self, request: Request, task_id: str) -> Response:
        row = operable(self.principal, models.Task.objects, task_id)
        return self.once(lambda: self._kill(task_id, row.status == TaskStatus.KILLED))

    def _kill(self, task_id: str, killed: bool) -> Response:
        reason = self.parsed(inputs.Kill).get("reason", "").strip()
        row = transitions.kill_task(task_id=task_id, actor=self.principal, reason=reason, now=self.now)
        return Response(payloads.task(row), status=200 if killed else 202)


class TaskHook(Operation):
    """Sends the report of an end again."""

    browser = True

    @operation(
        "redeliverTaskHook",
        "Send the report of the end to the hook again, now, under the same `webhook-id`. 409 `no_hook`: there is none, or the task has not ended.",
        tag="tasks",
        success=202,
        answer=shape(payloads.TaskShape),
        takes=inputs.Empty,
        errors=(403, 404, 409),
        post=True,
        browser=True,
    )
    def post(self, request: Request, task_id: str) -> Response:
        operable(self.principal, models.Task.objects, task_id)
        return self.once(lambda: self._redeliver(task_id))

    def _redeliver(self, task_id: str) -> Response:
        self.parsed(inputs.Empty)
        hooks.redeliver(task_id=task_id, actor=self.principal.name, now=self.now)
        return Response(payloads.task(rows().get(pk=task_id)), status=202)


class TaskOutput(Operation):
    """What a task wrote, in one piece. As a stream: ``task_streams.OutputConsumer``, under the same address."""

    browser = True
    #: In the document the stream stands together with this, by hand.
    schema = None

    def get(self, request: Request, task_id: str) -> HttpResponse:
        place = inputs.output_place(request.query_params)
        limit = inputs.output_limit(request.query_params)
        row = visible(self.principal, models.Task.objects, task_id)
        start = place.begin(row.output_bytes)
        data = outputs.read(row.pk, start, min(limit, row.output_bytes - start))
        end = start + len(data)
        if place.strip:
            text, used = plain(data, final=row.is_over and end == row.output_bytes)
            answer = HttpResponse(text, content_type="text/plain; charset=utf-8")
            end = start + used
        else:
            answer = HttpResponse(data, content_type="application/octet-stream")
            answer["Content-Disposition"] = f'attachment; filename="{row.pk}.output"'
        for name, value in output_headers(row, start, end).items():
            answer[name] = value
        return answer


def output_headers(row: models.Task, start: int, end: int) -> dict[str, str]:
    """What a reader needs to go on: ``X-Output-End`` is where the next piece begins."""
    size = Size(end=row.output_bytes, dropped=row.output_dropped, status=row.status)
    return {
        "X-Output-Start": str(start),
        "X-Output-End": str(end),
        "X-Output-Size": str(size.end),
        "X-Output-Dropped": str(size.dropped),
        "X-Task-Status": size.status,
    }
