"""The API of tasks: see them, send them lines. For programs with a key, and for the dashboard's own pages with their session."""

from __future__ import annotations

import uuid
from typing import Any

from drf_spectacular.utils import OpenApiParameter
from rest_framework.request import Request
from rest_framework.response import Response

from connections import errors, idempotency, inputs, models, openapi, payloads, task_inputs
from connections.access import operable, visible
from connections.api import Operation, paged, window
from connections.openapi import operation, shape
from connections.states import TaskStatus

#: How many lines of a task are shown with it, the newest.
LINES_SHOWN = 100


class Tasks(Operation):
    """All tasks of the caller."""

    browser = True

    @operation(
        "listTasks",
        "The tasks that the caller may see, newest first.",
        tag="tasks",
        answer=shape(payloads.TaskShape, many=True),
        query=[OpenApiParameter("status", str, enum=TaskStatus.values, description="Only these.")],
        paged=True,
    )
    def get(self, request: Request) -> Response:
        page = inputs.page_of(request.query_params)
        rows = models.Task.objects.visible_to(self.principal)
        wanted = inputs.text_of(request.query_params, "status")
        if wanted and wanted not in TaskStatus.values:
            known = ", ".join(TaskStatus.values)
            raise errors.invalid_request(
                [{"code": "invalid_choice", "message": f"status: Use one of {known}."}]
            )
        if wanted:
            rows = rows.filter(status=wanted)
        return paged(window(rows.order_by("-created_at", "-pk"), page), page, payloads.task)


class Task(Operation):
    """One task."""

    browser = True

    @operation(
        "getTask",
        f"A task and its newest {LINES_SHOWN} lines in the order of acceptance, without their texts.",
        tag="tasks",
        answer=shape(payloads.TaskDetailShape),
        errors=(404,),
    )
    def get(self, request: Request, task_id: str) -> Response:
        row = visible(self.principal, models.Task.objects, task_id)
        lines = list(row.inputs.defer("sealed").order_by("-number")[:LINES_SHOWN])
        return Response(payloads.task_detail(row, lines[::-1]))


class TaskInput(Operation):
    """Lines for a task."""

    browser = True

    @operation(
        "sendTaskInput",
        "Send a line. It is kept, and delivered in the order of acceptance; what the task is doing does not matter.",
        tag="tasks",
        success=202,
        answer=shape(openapi.ReceiptShape),
        takes=inputs.TaskInput,
        errors=(403, 404, 429),
        post=True,
        browser=True,
    )
    def post(self, request: Request, task_id: str) -> Response:
        operable(self.principal, models.Task.objects, task_id)
        return self.once(lambda: self._accept(task_id))

    def _accept(self, task_id: str) -> Response:
        text = self.parsed(inputs.TaskInput)["text"]
        # Without a name of the client's own nothing can be known as a repetition.
        message_id = self.message_id() or str(uuid.uuid4())
        task_inputs.add_input(
            task_id=task_id, content=text, message_id=message_id, actor=self.principal.name, now=self.now
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
