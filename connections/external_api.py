"""Tasks for programs in any language: take one under a lease, say that you live, write output, ask, end.

What a program holds is named by the task, by what it calls itself and by the number of the attempt; with its key that makes the
:class:`~connections.tasks.Hold` of our own workers, under the same rules. A program that comes with an old attempt gets 409 ``lease_lost`` and has
changed nothing. What is sent to a task comes over a stream: ``task_streams.InputsConsumer``.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from drf_spectacular.utils import OpenApiParameter
from rest_framework.request import Request
from rest_framework.response import Response

from connections import access, inputs, models, openapi, outputs, payloads, task_inputs, tasks
from connections.access import operable
from connections.api import Operation
from connections.openapi import operation, shape
from connections.tasks import Hold

Json = dict[str, Any]

HOLDER = [
    OpenApiParameter("worker", str, required=True, description="What the program calls itself."),
    OpenApiParameter("attempt", int, required=True, description="The attempt that it was given."),
]


class WorkOperation(Operation):
    """What the operations of a held task have in common."""

    def hold(self, task_id: str, body: Json) -> Hold:
        """The caller's hold of a task.

        :raises LeaseLost: it is not the present one.
        """
        worker = access.worker_name(self.principal, body["worker"])
        return tasks.held(task_id=task_id, worker=worker, attempt=body["attempt"])

    def task(self, task_id: str) -> models.Task:
        row: models.Task = operable(self.principal, models.Task.objects, task_id)
        return row


class Claim(WorkOperation):
    """Takes a task."""

    @operation(
        "claimWork",
        "Take the task of these kinds that waits longest, of the owners that the caller may act for. 204 when there is none.",
        tag="work",
        answer=shape(openapi.ClaimedShape),
        nothing="There is no task to do.",
        takes=inputs.WorkClaim,
        post=True,
    )
    def post(self, request: Request) -> Response:
        return self.once(self._claim)

    def _claim(self) -> Response:
        body = self.parsed(inputs.WorkClaim)
        lease = body.get("lease_seconds", inputs.DEFAULT_LEASE)
        hold = tasks.claim(
            worker=access.worker_name(self.principal, body["worker"]),
            kinds=body["kinds"],
            owners=self.principal.operates,
            lease_seconds=lease,
            now=self.now,
        )
        if hold is None:
            return Response(status=204)
        row = models.Task.objects.get(pk=hold.task_id)
        return Response(
            {
                "task": payloads.task(row),
                "attempt": hold.attempt,
                "worker": body["worker"],
                "lease_expires_at": payloads.timestamp(self.now + dt.timedelta(seconds=lease)),
            }
        )


class Heartbeat(WorkOperation):
    """I am still at it."""

    @operation(
        "renewWork",
        "Hold on for another lease, and learn what has changed. `inputs_taken`: every input up to this number has arrived.",
        tag="work",
        acts=True,
        answer=shape(openapi.HeldShape),
        takes=inputs.WorkHeartbeat,
        errors=(403, 404, 409),
    )
    def post(self, request: Request, task_id: str) -> Response:
        self.task(task_id)
        body = self.parsed(inputs.WorkHeartbeat)
        hold = self.hold(task_id, body)
        if "inputs_taken" in body:
            task_inputs.inputs_taken(hold=hold, through=body["inputs_taken"], now=self.now)
        lease = body.get("lease_seconds", inputs.DEFAULT_LEASE)
        if not tasks.renew(hold=hold, now=self.now, lease_seconds=lease):
            raise tasks.LeaseLost(task_id)
        row = models.Task.objects.get(pk=task_id)
        return Response(
            {
                "lease_expires_at": payloads.timestamp(row.lease_expires_at or self.now),
                "status": row.status,
                "kill_requested": row.kill_requested_at is not None,
                "inputs_waiting": row.inputs_waiting,
            }
        )


class Output(WorkOperation):
    """Writes."""

    @operation(
        "writeWorkOutput",
        "Add the bytes of the body to the output. With `at` (kept and dropped bytes before these) sending again adds nothing twice.",
        tag="work",
        acts=True,
        answer=shape(openapi.WrittenShape),
        raw=True,
        query=[
            *HOLDER,
            OpenApiParameter(
                "at", int, description="Where the output should end now; 409 `gap` when it ends before."
            ),
        ],
        errors=(400, 403, 404, 409, 413),
    )
    def post(self, request: Request, task_id: str) -> Response:
        self.task(task_id)
        query = inputs.holder_of(request.query_params)
        try:
            size = outputs.append(
                task_id=task_id,
                worker=access.worker_name(self.principal, query.worker),
                attempt=query.attempt,
                data=self.raw_body(),
                at=query.at,
                now=self.now,
            )
        except outputs.NotHeld:
            raise tasks.LeaseLost(task_id) from None
        return Response({"end": size.end, "dropped": size.dropped, "next": size.end + size.dropped})


class Status(WorkOperation):
    """What the program is doing."""

    @operation(
        "setWorkStatus",
        "Say that the task goes on, waits for input, or has ended. Whatever ends after a kill was asked for is `killed`.",
        tag="work",
        answer=shape(payloads.TaskShape),
        takes=inputs.WorkStatus,
        errors=(403, 404, 409),
        post=True,
    )
    def post(self, request: Request, task_id: str) -> Response:
        self.task(task_id)
        return self.once(lambda: self._set(task_id))

    def _set(self, task_id: str) -> Response:
        body = self.parsed(inputs.WorkStatus)
        hold = self.hold(task_id, body)
        match body["status"]:
            case "running":
                tasks.go_on(hold=hold, now=self.now)
            case "waiting_for_input":
                # Somebody has sent something meanwhile: then the task does not wait, and the answer says so.
                tasks.await_input(hold=hold, prompt=_prompt(body["prompt"]), now=self.now)
            case "completed":
                tasks.settle(hold=hold, now=self.now, exit_code=body.get("exit_code"))
            case _:
                tasks.settle(
                    hold=hold,
                    now=self.now,
                    exit_code=body.get("exit_code"),
                    error_code=body.get("error_code") or "failed",
                    error=body.get("error", ""),
                )
        return Response(payloads.task(models.Task.objects.get(pk=task_id)))


def _prompt(given: Json) -> Json:
    secret = given.get("kind") == "password"
    return {
        "kind": given.get("kind", "text"),
        "text": given["text"],
        "replies": [] if secret else [dict(reply) for reply in given.get("replies", [])],
        "detected_by": "worker",
    }


class Release(WorkOperation):
    """Gives a task back."""

    @operation(
        "releaseWork",
        "Put the task back in the queue, for somebody else. One that is to be killed is killed instead.",
        tag="work",
        success=204,
        acts=True,
        takes=inputs.WorkRelease,
        errors=(403, 404, 409),
    )
    def post(self, request: Request, task_id: str) -> Response:
        self.task(task_id)
        hold = self.hold(task_id, self.parsed(inputs.WorkRelease))
        tasks.release(hold=hold, now=self.now)
        return Response(status=204)
