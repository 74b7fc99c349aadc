"""Owner, colleague, stranger, superuser, page: who sees and who may act."""

from __future__ import annotations

import pytest
from django.contrib.auth.models import AnonymousUser, Group, Permission, User
from django.utils import timezone

from connections import access, registry
from connections.access import Forbidden, NotFound, operable, visible
from connections.models import ManagedAuthConnection
from tests.connections.flow_support import Story

ROWS = ManagedAuthConnection.objects


def test_the_owner_sees_and_acts(owner: User) -> None:
    story = Story.of(owner)
    assert operable(access.of_user(owner), ROWS, story.id).pk == story.id
    assert list(ROWS.visible_to(access.of_user(owner))) == [story.connection]


def test_a_colleague_with_the_permission_sees_and_acts(owner: User, colleague: User) -> None:
    story = Story.of(owner)
    assert operable(access.of_user(colleague), ROWS, story.id).pk == story.id


def test_a_colleague_without_the_permission_looks_and_no_more(owner: User, stranger: User) -> None:
    team = Group.objects.create(name="lookers")
    owner.groups.add(team)
    stranger.groups.add(team)
    story = Story.of(owner)
    principal = access.of_user(stranger)
    assert visible(principal, ROWS, story.id).pk == story.id
    with pytest.raises(Forbidden):
        operable(principal, ROWS, story.id)


def test_for_a_stranger_a_foreign_id_and_an_unknown_one_look_alike(owner: User, stranger: User) -> None:
    story = Story.of(owner)
    principal = access.of_user(stranger)
    for pk in (story.id, "ma_unknown"):
        for look in (visible, operable):
            with pytest.raises(NotFound):
                look(principal, ROWS, pk)
    assert not ROWS.visible_to(principal).exists()


def test_a_superuser_sees_and_does_everything(owner: User) -> None:
    story = Story.of(owner)
    root = User.objects.create_superuser("root", password="x")
    assert operable(access.of_user(root), ROWS, story.id).pk == story.id
    assert ROWS.visible_to(access.of_user(root)).count() == 1


def test_a_key_may_what_its_owner_may_and_has_a_name_of_its_own(owner: User, stranger: User) -> None:
    story = Story.of(owner)
    key, _ = registry.create_api_key(owner_id=owner.pk, name="laptop", now=timezone.now())
    principal = access.of_user(owner, api_key=key)
    assert (principal.key, principal.name) == (f"key:{key.pk}", 'API key "laptop"')
    assert operable(principal, ROWS, story.id).pk == story.id


def test_A02_the_token_of_a_page_sees_its_own_connection_and_nothing_else(owner: User) -> None:
    story, other = Story.of(owner), Story.of(owner, domain="other.example")
    flow = story.start()
    page = access.of_page(owner_id=owner.pk, connection_id=story.id, flow_id=flow.id)
    assert page.is_page
    assert visible(page, ROWS, story.id).pk == story.id
    with pytest.raises(NotFound):
        visible(page, ROWS, other.id)


def test_nobody_signed_in_is_nobody(owner: User) -> None:
    assert access.of_request_user(AnonymousUser()) is None
    principal = access.of_request_user(owner)
    assert principal is not None
    assert principal.user_id == owner.pk


def test_the_system_sees_everything_under_its_own_name(owner: User) -> None:
    story = Story.of(owner)
    system = access.of_system("reconciler")
    assert system.name == "reconciler"
    assert operable(system, ROWS, story.id).pk == story.id


def test_the_permission_of_one_team_does_not_reach_into_another(owner: User, colleague: User) -> None:
    # The colleague may act in the team; in another group, which does not allow it, they only look.
    onlookers = Group.objects.create(name="onlookers")
    neighbour = User.objects.create_user("neighbour")
    neighbour.groups.add(onlookers)
    colleague.groups.add(onlookers)
    found = access.of_user(User.objects.get(pk=colleague.pk))
    assert found.audiences == {owner.pk, colleague.pk, neighbour.pk}
    assert found.operates == {owner.pk, colleague.pk}
    assert not found.may_operate(neighbour.pk)


def test_a_permission_given_to_the_user_holds_in_every_team(owner: User, stranger: User) -> None:
    group = Group.objects.create(name="any")
    for user in (owner, stranger):
        user.groups.add(group)
    assert access.of_user(User.objects.get(pk=stranger.pk)).operates == {stranger.pk}
    stranger.user_permissions.add(Permission.objects.get(codename="operate_managedauthconnection"))
    assert access.of_user(User.objects.get(pk=stranger.pk)).operates == {owner.pk, stranger.pk}
