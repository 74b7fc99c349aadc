"""The paths of the pages."""

from __future__ import annotations

from django.urls import path

from connections import client_pages, task_pages, views

urlpatterns = [
    path("", views.home, name="home"),
    path("attention", views.attention, name="attention"),
    path("recent", views.recent, name="recent"),
    path("connections", views.connection_list, name="connections"),
    path("connections/new", views.connection_new, name="connection-new"),
    path("connections/<str:connection_id>", views.connection_detail, name="connection"),
    path("connections/<str:connection_id>/edit", views.connection_edit, name="connection-edit"),
    path("connections/<str:connection_id>/delete", views.connection_delete, name="connection-delete"),
    path("connections/<str:connection_id>/login", views.start, name="connection-login"),
    path("connections/<str:connection_id>/answer", views.answer, name="connection-answer"),
    path("connections/<str:connection_id>/cancel", views.cancel, name="connection-cancel"),
    path("connections/<str:connection_id>/seen", views.seen, name="connection-seen"),
    path("connections/<str:connection_id>/check", views.check, name="connection-check"),
    path("connections/<str:connection_id>/link", views.link, name="connection-link"),
    path("tasks", task_pages.task_list, name="tasks"),
    path("tasks/new", task_pages.task_new, name="task-new"),
    path("tasks/argv", task_pages.task_argv, name="task-argv"),
    path("tasks/<str:task_id>", task_pages.task_detail, name="task"),
    path("tasks/<str:task_id>/output", task_pages.task_download, name="task-output"),
    path("tasks/<str:task_id>/input", task_pages.task_input, name="task-input"),
    path("tasks/<str:task_id>/kill", task_pages.task_kill, name="task-kill"),
    path("tasks/<str:task_id>/redeliver", task_pages.task_redeliver, name="task-redeliver"),
    path("tasks/<str:task_id>/edit", task_pages.task_edit, name="task-edit"),
    path("tasks/<str:task_id>/delete", task_pages.task_delete, name="task-delete"),
    path("clients", client_pages.client_list, name="clients"),
    path("clients/<int:pk>/disconnect", client_pages.client_disconnect, name="client-disconnect"),
    path("events", views.event_feed, name="events"),
    path("signin", views.SignIn.as_view(), name="signin"),
    path("signout", views.SignOut.as_view(), name="signout"),
]
