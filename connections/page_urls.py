"""The paths of the pages."""

from __future__ import annotations

from django.urls import path

from connections import client_pages, views

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
    path("tasks", views.task_list, name="tasks"),
    path("tasks/<str:task_id>", views.task_detail, name="task"),
    path("tasks/<str:task_id>/input", views.task_input, name="task-input"),
    path("clients", client_pages.client_list, name="clients"),
    path("clients/<int:pk>/disconnect", client_pages.client_disconnect, name="client-disconnect"),
    path("events", views.event_feed, name="events"),
    path("signin", views.SignIn.as_view(), name="signin"),
    path("signout", views.SignOut.as_view(), name="signout"),
]
