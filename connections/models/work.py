"""The queue: tasks, what is sent to them, what they write, and the reports of their ends."""

from __future__ import annotations

from django.db import models
from django.db.models import Q

from connections.models.auth import LoginFlow, ManagedAuthConnection
from connections.models.base import Owned, delivery_id, task_id
from connections.states import TASK_END, TASK_HELD, HookState, InputKind, TaskKind, TaskStatus


class Capacity(models.Model):
    """A row to lock while something is counted, so that two creations at once cannot pass a limit together."""

    name = models.CharField(primary_key=True, max_length=40)

    class Meta:
        verbose_name_plural = "capacities"

    def __str__(self) -> str:
        return self.name


class Task(Owned):
    """Something that a worker does and that may have to wait for a person: one row of the one queue.

    ``spec`` says what is to be done. For a command: ``argv`` (list of strings), ``cwd``, ``template`` (its name, or empty), ``rows``, ``cols``.
    For a kind of somebody else's: ``payload`` (any JSON). ``prompt`` is what the task asks while it waits: see ``terminal/prompts.py``.
    ``hook_sealed`` is ``[address, secret]`` of its hook: the path or the query of an address may be a secret as well.
    """

    id = models.CharField(primary_key=True, max_length=40, default=task_id, editable=False)
    kind = models.CharField(max_length=40)
    status = models.CharField(
        max_length=20, choices=TaskStatus.choices, default=TaskStatus.QUEUED, editable=False
    )
    title = models.CharField(max_length=200)
    connection = models.ForeignKey(
        ManagedAuthConnection, null=True, blank=True, on_delete=models.SET_NULL, related_name="tasks"
    )
    flow = models.OneToOneField(
        LoginFlow, null=True, blank=True, on_delete=models.SET_NULL, related_name="task"
    )
    parent = models.ForeignKey(
        "self", null=True, blank=True, on_delete=models.SET_NULL, related_name="children"
    )
    labels = models.JSONField(default=list, blank=True, help_text="a list of short ASCII words")
    spec = models.JSONField(default=dict, blank=True, editable=False)
    timeout_seconds = models.PositiveIntegerField(null=True, blank=True)
    created_by = models.CharField(max_length=200, blank=True, help_text="who, in words")
    run_after = models.DateTimeField()
    attempts = models.PositiveSmallIntegerField(default=0, help_text="how often a worker took it")
    leased_by = models.CharField(max_length=80, blank=True)
    lease_expires_at = models.DateTimeField(null=True, blank=True)
    started_at = models.DateTimeField(null=True, blank=True)
    finished_at = models.DateTimeField(null=True, blank=True)
    exit_code = models.IntegerField(null=True, blank=True)
    signal = models.CharField(max_length=16, blank=True, help_text="what ended the program: SIGSEGV, SIGTERM")
    error_code = models.CharField(max_length=40, blank=True)
    error = models.CharField(max_length=500, blank=True)
    prompt = models.JSONField(null=True, blank=True, editable=False)
    kill_requested_at = models.DateTimeField(null=True, blank=True)
    kill_requested_by = models.CharField(max_length=200, blank=True)
    kill_reason = models.CharField(max_length=500, blank=True)
    last_activity_at = models.DateTimeField(null=True, blank=True)
    output_bytes = models.PositiveBigIntegerField(
        default=0, db_default=0, editable=False, help_text="of output that are kept"
    )
    output_dropped = models.PositiveBigIntegerField(
        default=0, db_default=0, editable=False, help_text="bytes of output beyond the limit, not kept"
    )
    hook_site = models.CharField(
        max_length=300,
        blank=True,
        help_text="scheme and host of the hook that is told when the task has ended",
    )
    hook_sealed = models.BinaryField(null=True, editable=False)
    inputs_waiting = models.PositiveIntegerField(
        default=0, db_default=0, editable=False, help_text="lines nobody has taken yet"
    )
    prompt_delivered = models.BooleanField(
        null=True,
        editable=False,
        help_text="whether the command has got its initial input; null: it has none",
    )
    version = models.PositiveBigIntegerField(default=1, editable=False)

    class Meta:
        ordering = ["-created_at", "-id"]
        permissions = [("run_commands", "Can run commands on the machines of the workers")]
        constraints = [
            models.CheckConstraint(
                condition=Q(status__in=sorted(TASK_HELD), lease_expires_at__isnull=False)
                | (~Q(status__in=sorted(TASK_HELD)) & Q(lease_expires_at__isnull=True, leased_by="")),
                name="task_leased_while_held",
            ),
            models.CheckConstraint(
                condition=Q(status__in=sorted(TASK_END), finished_at__isnull=False)
                | (~Q(status__in=sorted(TASK_END)) & Q(finished_at__isnull=True)),
                name="task_finished_when_it_says_so",
            ),
        ]
        indexes = [
            models.Index(
                fields=["run_after", "created_at"],
                condition=Q(status=TaskStatus.QUEUED),
                name="task_claim_next",
            ),
            # SQLite takes a partial index for conditions like these; for a list of statuses it would read the whole table.
            models.Index(
                fields=["lease_expires_at"], condition=Q(lease_expires_at__isnull=False), name="task_rescue"
            ),
            models.Index(fields=["owner", "-created_at", "-id"], name="task_list"),
            models.Index(
                fields=["finished_at"], condition=Q(finished_at__isnull=False), name="task_ended_when"
            ),
            models.Index(fields=["kind"], condition=Q(finished_at__isnull=True), name="task_open_of_kind"),
            models.Index(fields=["owner"], condition=Q(finished_at__isnull=True), name="task_open_of_owner"),
        ]

    def __str__(self) -> str:
        return f"{self.title} ({self.status})"

    @property
    def is_over(self) -> bool:
        return self.status in TASK_END

    @property
    def kind_label(self) -> str:
        """The kind in words; a kind of somebody else's is its own word."""
        return str(TaskKind(self.kind).label) if self.kind in TaskKind.values else self.kind


class TaskOutput(models.Model):
    """A piece of what a task wrote: the bytes from ``start`` on. Appended by the task's holder alone, never changed."""

    task = models.ForeignKey(Task, on_delete=models.CASCADE, related_name="output")
    start = models.PositiveBigIntegerField()
    data = models.BinaryField()
    at = models.DateTimeField()

    class Meta:
        ordering = ["start"]
        constraints = [
            models.UniqueConstraint(fields=["task", "start"], name="task_output_each_byte_once"),
        ]

    def __str__(self) -> str:
        return f"output of {self.task_id} from {self.start}"


class HookDelivery(models.Model):
    """The report of a task's end to its hook: written in the transaction of the end, sent by a worker under a lease."""

    id = models.CharField(primary_key=True, max_length=40, default=delivery_id, editable=False)
    task = models.OneToOneField(Task, on_delete=models.CASCADE, related_name="hook_delivery")
    state = models.CharField(
        max_length=12, choices=HookState.choices, default=HookState.PENDING, editable=False
    )
    attempts = models.PositiveSmallIntegerField(default=0, help_text="in this round")
    next_attempt_at = models.DateTimeField(null=True, blank=True)
    leased_by = models.CharField(max_length=80, blank=True)
    lease_expires_at = models.DateTimeField(null=True, blank=True)
    last_status = models.PositiveSmallIntegerField(null=True, blank=True, help_text="of HTTP")
    last_error = models.CharField(max_length=300, blank=True)
    delivered_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField()
    updated_at = models.DateTimeField()

    class Meta:
        ordering = ["-created_at", "-id"]
        verbose_name_plural = "hook deliveries"
        constraints = [
            models.CheckConstraint(
                condition=Q(state=HookState.PENDING, next_attempt_at__isnull=False)
                | (~Q(state=HookState.PENDING) & Q(next_attempt_at__isnull=True, leased_by="")),
                name="hook_due_while_pending",
            ),
        ]
        indexes = [
            models.Index(
                fields=["next_attempt_at"], condition=Q(state=HookState.PENDING), name="hook_due_next"
            ),
        ]

    def __str__(self) -> str:
        return f"report of {self.task_id} ({self.state})"


class TaskInput(models.Model):
    """What somebody sent to a task. Encrypted until the task takes it, then erased: it may be a password.

    Sealed is, by ``kind``: the text (``submit``: with Enter behind it), a list of names of keys, or ``[rows, columns]``.
    """

    task = models.ForeignKey(Task, on_delete=models.CASCADE, related_name="inputs")
    kind = models.CharField(
        max_length=8, choices=InputKind.choices, default=InputKind.TEXT, db_default="text"
    )
    submit = models.BooleanField(default=True, db_default=True, help_text="with Enter behind the text")
    initial = models.BooleanField(
        default=False, db_default=False, editable=False, help_text="typed once the command is ready for it"
    )
    number = models.PositiveIntegerField(help_text="the order of acceptance, from 1")
    message_id = models.CharField(max_length=255, help_text="the sender's name for this line")
    sender = models.BigIntegerField(
        default=0,
        db_default=0,
        editable=False,
        help_text="key of the user whose message id it is; 0: nobody's",
    )
    fingerprint = models.CharField(
        max_length=64, editable=False, help_text="keyed hash, to know a repetition by"
    )
    sealed = models.BinaryField(null=True, editable=False)
    byte_count = models.PositiveIntegerField()
    submitted_by = models.CharField(max_length=200)
    created_at = models.DateTimeField()
    taken_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        ordering = ["-created_at", "-pk"]
        constraints = [
            models.UniqueConstraint(fields=["task", "number"], name="task_input_number_once_per_task"),
            models.UniqueConstraint(
                fields=["task", "sender", "message_id"], name="task_input_once_per_message"
            ),
            models.CheckConstraint(
                condition=Q(taken_at__isnull=True) | Q(sealed__isnull=True), name="task_input_taken_is_erased"
            ),
        ]

    def __str__(self) -> str:
        return f"line {self.number} of {self.task_id}"

    @property
    def state(self) -> str:
        """``waiting``, ``delivered``, or ``dropped``: the task was over before it took the line."""
        if self.taken_at is not None:
            return "delivered"
        return "dropped" if self.task.is_over else "waiting"
