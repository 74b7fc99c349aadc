"""What a page is for, what it wants typed, and which other ways on it offers."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from urllib.parse import urlsplit

from connections.drivers.base import Choice, ChoiceType, Field, FieldType, InputMode, MfaType
from connections.drivers.forms.page import Control, Form, Kind, Link, Page, Reading, Want, Way
from connections.drivers.forms.words import (
    ACCOUNT_HEADING,
    ADDRESS,
    BOT,
    CHOOSE,
    CODE,
    CONFIRM,
    ELSEWHERE,
    EMAIL,
    ENDING,
    EXTERNAL,
    IDENTIFIER,
    IGNORECASE,
    LOGIN,
    LOGIN_PATH,
    LOGOUT,
    LOGOUT_PATH,
    METHODS,
    NEEDS_SCRIPT,
    NEVER_A_WAY,
    NOT_CODE,
    PASSWORD,
    PHONE,
    RESET,
    SEARCH,
    SENT_TO,
    SIGN_UP,
    SUBMIT,
    sso_of,
)


def read(page: Page) -> Reading:
    """Say what ``page`` is for. The order below is the order of certainty."""
    signed_in = _offers_logout(page)
    login, code = _login_form(page, signed_in), _code_form(page)
    form = login if login is not None and (code is None or _has_password(login)) else code
    if _is_relay(page):
        relay = next(candidate for candidate in page.forms if not candidate.typed)
        return Reading(kind="relay", form=relay)
    if form is not None:
        if form.captcha:
            return Reading(kind="captcha", form=form)
        wants = _wants(page, form)
        kind: Kind = "login" if form is login else "code"
        return Reading(kind=kind, form=form, wants=wants, ways=_ways_beside(page, form), signed_in=signed_in)
    external = bool(EXTERNAL.search(f"{page.heading} . {page.text}")) and not _has_fields(page)
    if external and not (signed_in and not EXTERNAL.search(page.heading)):
        return Reading(kind="external", ways=_ways_beside(page, None), signed_in=signed_in)
    picker = _picker(page, signed_in)
    if picker:
        return Reading(kind="picker", ways=picker, signed_in=signed_in)
    if signed_in:
        return Reading(kind="signed_in", signed_in=True)
    providers = tuple(_sso_ways(page))
    if providers:
        return Reading(kind="login", ways=_unique((*providers, *_alternatives(page, None))))
    return Reading(kind=_dead_end(page))


def _dead_end(page: Page) -> Kind:
    """Why nothing can be done on a page that offers nothing."""
    if BOT.search(f"{page.title} . {page.text}"):
        return "bot"
    if page.captcha:
        return "captcha"
    fields = any(control.typable for form in page.forms for control in form.controls)
    empty = page.scripted and not fields and len(page.text) < 200 and not page.links
    if page.orphan_password or empty or (page.scripted and NEEDS_SCRIPT.search(page.text) and not fields):
        return "scripted"
    return "other"


def login_link(page: Page) -> str | None:
    """Where "Log in" leads to; None when the page has no such link."""
    by_words = [
        link for link in page.links if LOGIN.search(link.label) and not sso_of(link.label, link.hints)
    ]
    by_path = [
        link for link in page.links
        if re.search(r"/(log-?in|sign-?in|sign_in)\b", urlsplit(link.url).path, IGNORECASE)
        and not sso_of(link.label, link.hints)
        and not SIGN_UP.search(link.label)
        and not RESET.search(link.label)
    ]  # fmt: skip
    for link in (*by_words, *by_path):
        return link.url
    for form in page.forms:
        button = form.primary
        if form.method == "get" and not form.typed and button is not None and LOGIN.search(button.label):
            return form.action or None
    return None


def is_login_path(url: str) -> bool:
    """Whether the path of ``url`` is called as login pages are."""
    return bool(LOGIN_PATH.search(urlsplit(url).path))


def signature(reading: Reading) -> tuple[str, ...]:
    """The same for a form that comes again, whatever its token and address: then a value was rejected."""
    names = sorted(control.name for want in reading.wants for control in want.controls)
    return (reading.kind, *names)


def mfa_type_of(text: str) -> MfaType | None:
    """Which second factor ``text`` speaks of."""
    return next((kind for kind, pattern in METHODS if pattern.search(text)), None)


def destination_of(text: str) -> str | None:
    """The masked number or address that ``text`` says a code was sent to, as written there."""
    ending = ENDING.search(text)
    if ending:
        return f"••{ending[1]}"
    match = SENT_TO.search(text)
    return match[1].strip(" .") if match else None


def _offers_logout(page: Page) -> bool:
    if any(LOGOUT.search(link.label) or LOGOUT_PATH.search(urlsplit(link.url).path) for link in page.links):
        return True
    return any(
        LOGOUT_PATH.search(urlsplit(form.action).path)
        or any(LOGOUT.search(button.label) for button in form.buttons)
        for form in page.forms
    )


def _has_password(form: Form) -> bool:
    return any(control.kind == "password" and not _is_code(control) for control in form.typed)


def _has_fields(page: Page) -> bool:
    """Whether anything but search and newsletter wants typing."""
    return any(form.typed and not _is_beside_the_point(form) for form in page.forms)


def _is_beside_the_point(form: Form) -> bool:
    """Search, newsletter, registration, reset: forms with an e-mail address that log nobody in."""
    typed = form.typed
    words = " ".join(button.label for button in form.buttons)
    if any(control.kind == "search" or control.name in ("q", "s", "query", "search") for control in typed):
        return True
    if "search" in form.hints.lower().split() or SEARCH.search(form.hints.replace("/", " ")):
        return True
    new = [
        c
        for c in typed
        if "new-password" in c.autocomplete or (c.kind == "password" and "new" in c.says.lower().split())
    ]
    if new or sum(
        c.kind == "password" and bool(re.search(r"confirm|repeat|again|(?<!\d)2$", c.says, IGNORECASE))
        for c in typed
    ):
        return True
    if LOGIN.search(words):
        return False
    hints = re.sub(r"[/_-]", " ", form.hints)
    return bool(SIGN_UP.search(words) or SIGN_UP.search(hints) or RESET.search(words) or RESET.search(hints))


def _login_form(page: Page, signed_in: bool) -> Form | None:
    scored = [
        (score, -index, form)
        for index, form in enumerate(page.forms)
        if (score := _login_score(page, form)) > 0
    ]
    if not scored:
        return None
    best = max(scored, key=lambda entry: entry[:2])[2]
    # Signed-in pages are full of forms with an e-mail address; a password is asked for a reason.
    return best if not signed_in or _has_password(best) else None


def _login_score(page: Page, form: Form) -> int:
    """Above zero for a form that logs in; the best one has a password, an identifier and the right words."""
    typed = [control for control in form.typed if not _is_code(control)]
    if not typed or not form.action or _is_beside_the_point(form):
        return 0
    passwords = [control for control in typed if control.kind == "password"]
    if len(typed) - len(passwords) > 6 or len(passwords) > 3:
        return 0
    words = " ".join(button.label for button in form.buttons)
    identifiers = [control for control in typed if _is_identifier(control)]
    signs = bool(LOGIN.search(words)) + bool(LOGIN_PATH.search(form.hints.replace(" ", "/")))
    signs += any({"username", "webauthn"} & control.autocomplete for control in identifiers)
    if passwords:
        return 10 + 2 * signs + bool(identifiers)
    if not identifiers or len(typed) > 2:
        return 0
    # An e-mail address alone is what newsletters want, too: words, path or page must speak of logging in.
    signs += bool(LOGIN_PATH.search(urlsplit(form.action).path)) + bool(LOGIN.search(page.heading))
    signs += is_login_path(page.url) and bool(SUBMIT.search(words) or not words)
    return 2 * signs


def _is_identifier(control: Control) -> bool:
    if control.kind not in ("text", "email", "tel"):
        return False
    tokens = {"username", "email", "tel", "webauthn"}
    return (
        bool(tokens & control.autocomplete)
        or control.kind in ("email", "tel")
        or bool(IDENTIFIER.search(control.says))
    )


def _is_code(control: Control) -> bool:
    if "one-time-code" in control.autocomplete:
        return True
    if control.kind not in ("text", "tel", "number", "password") or NOT_CODE.search(control.says):
        return False
    if control.kind == "password" and (
        PASSWORD.search(control.says) or control.autocomplete & {"current-password"}
    ):
        return False
    return bool(CODE.search(control.says))


def _code_form(page: Page) -> Form | None:
    for form in page.forms:
        if (
            form.action
            and not _is_beside_the_point(form)
            and (any(map(_is_code, form.typed)) or _boxes(form.typed))
        ):
            return form
    return None


def _boxes(controls: Sequence[Control]) -> tuple[Control, ...]:
    """The little boxes of a code that is typed one character each; empty when there are none."""
    boxes = tuple(control for control in controls if control.max_length == 1 and control.kind != "password")
    return boxes if 4 <= len(boxes) <= 10 else ()


def _is_relay(page: Page) -> bool:
    """A form that only a script was to send, as SAML and OpenID Connect hand over their tokens."""
    hidden = [form for form in page.forms if form.method == "post" and form.action and not form.typed]
    if len(page.forms) != 1 or not hidden:
        return False
    names = {control.name.lower() for control in hidden[0].controls if control.kind == "hidden"}
    if names >= {"code", "state"} and not hidden[0].buttons:
        return True  # OAuth 2.0 form post response mode
    return (
        bool(names & {"samlresponse", "samlrequest", "id_token", "wresult"}) and len(hidden[0].buttons) <= 1
    )


# -- what is to be typed


def _wants(page: Page, form: Form) -> tuple[Want, ...]:
    boxes = _boxes(form.typed)
    wants: list[Want] = []
    taken: set[str] = set()
    password_seen = False
    for control in form.typed:
        if control in boxes:
            if control is boxes[0]:
                field = dataclasses.replace(_code_field(page, form, control), label="Code", placeholder=None)
                wants.append(_want(field, boxes, taken))
            continue
        if _is_code(control):
            field = _code_field(page, form, control)
        elif control.kind == "password":
            ref = control.name.lower() if password_seen else "password"
            password_seen = True
            field = _field(control, ref=ref, type="password", label=control.label or "Password")
        elif _is_identifier(control) or _stands_before_password(form, control):
            field = _identifier_field(control)
        else:
            field = _field(
                control, ref=control.name.lower(), type="text", label=control.label or control.name
            )
            field = dataclasses.replace(field, required=control.required)
        wants.append(_want(field, (control,), taken))
    return tuple(wants)


def _want(field: Field, controls: tuple[Control, ...], taken: set[str]) -> Want:
    identity, number = field.ref, 2
    while identity in taken:
        identity, number = f"{field.ref}-{number}", number + 1
    taken.add(identity)
    return Want(field=dataclasses.replace(field, id=identity, ref=identity), controls=controls)


def _field(
    control: Control, *, ref: str, type: FieldType, label: str, mode: InputMode | None = None
) -> Field:
    return Field(
        id=ref,
        ref=ref[:80],
        type=type,
        label=label,
        hint=control.hint or None,
        placeholder=control.placeholder or None,
        input_mode=mode,
        observed_selector=control.xpath,
    )


def _stands_before_password(form: Form, control: Control) -> bool:
    """The one text field before the password is the identifier, whatever it is called."""
    typed = [one for one in form.typed if one.kind in ("text", "email", "tel", "password")]
    texts = [one for one in typed if one.kind != "password"]
    return texts == [control] and typed[0] is control and len(typed) > 1


def _identifier_field(control: Control) -> Field:
    says, tokens = control.says, control.autocomplete
    also_name = re.search(r"\buser|\blogin\b|\bor\b|benutzer", says, IGNORECASE) and control.kind == "text"
    if control.kind == "email" or "email" in tokens or (EMAIL.search(says) and not also_name):
        return _field(control, ref="email", type="identifier", label=control.label or "E-mail", mode="email")
    if control.kind == "tel" or "tel" in tokens or (PHONE.search(says) and not also_name):
        return _field(control, ref="phone", type="identifier", label=control.label or "Phone", mode="tel")
    return _field(control, ref="username", type="identifier", label=control.label or "User name", mode="text")


def _code_field(page: Page, form: Form, control: Control) -> Field:
    """The field's own words decide first, then those of its form, then those of the page."""
    own = f"{control.says} {control.hint}"
    around = f"{own} . {form.text}", f"{page.heading} . {form.text} . {page.text}"
    kind = next((found for text in (own, *around) if (found := _code_type(text))), None)
    sent_to = destination_of(around[1])
    if kind is None and sent_to is not None:
        kind = "email" if "@" in sent_to else "sms"
    is_totp = kind == "totp"
    field = _field(
        control,
        ref="totp" if is_totp else "code",
        type="totp_code" if is_totp else "code",
        label=control.label or "Code",
        mode="text" if control.input_mode == "text" else "numeric",
    )
    hint = " ".join(
        part for part in (field.hint, f"Sent to {sent_to}" if sent_to and not is_totp else None) if part
    )
    return dataclasses.replace(field, hint=hint or None, linked_mfa_type=kind)


def _code_type(text: str) -> MfaType | None:
    kind = mfa_type_of(text)
    return kind if kind in ("totp", "sms", "call", "email") else None


# -- which ways there are


def _ways_beside(page: Page, form: Form | None) -> tuple[Way, ...]:
    """The other ways on of a page that wants something typed or waited for."""
    return _unique((*_sso_ways(page), *_alternatives(page, form)))


def _sso_ways(page: Page) -> Iterator[Way]:
    for link in page.links:
        provider = sso_of(link.label, link.hints)
        if provider and not NEVER_A_WAY.search(link.label):
            yield Way(choice=_provider_choice(provider, link.label, link.xpath), link=link)
    for form in page.forms:
        for button in form.buttons:
            hints = f"{button.form_action or form.action} {button.name} {button.value} {button.id}"
            provider = sso_of(button.label, hints)
            if provider:
                yield Way(
                    choice=_provider_choice(provider, button.label, button.xpath), form=form, button=button
                )


def _provider_choice(provider: str, label: str, xpath: str) -> Choice:
    return Choice(
        id=provider,
        type="sso_provider",
        label=label or provider.title(),
        provider=provider,
        observed_selector=xpath,
    )


def _alternatives(page: Page, main: Form | None) -> Iterator[Way]:
    """Links and buttons that lead elsewhere than the main form: "Use a code instead", "Not you?" ..."""
    for form in page.forms:
        for button in form.buttons:
            if button is form.primary and (form is main or form.typed):
                continue
            known = ELSEWHERE.search(button.label) or (main is None and CONFIRM.search(button.label))
            if known and not sso_of(button.label) and not NEVER_A_WAY.search(button.label):
                yield Way(choice=_alternative_choice(button.label, button.xpath), form=form, button=button)
    for link in page.links:
        if (
            ELSEWHERE.search(link.label)
            and not NEVER_A_WAY.search(link.label)
            and not sso_of(link.label, link.hints)
        ):
            yield Way(choice=_alternative_choice(link.label, link.xpath), link=link)


def _alternative_choice(label: str, xpath: str) -> Choice:
    kind = mfa_type_of(label)
    resend = re.search(r"\bresend|send .{0,12}\b(again|new)\b", label, IGNORECASE)
    another = re.search(r"\b(another|different|other|switch|change)\b", label, IGNORECASE)
    if resend:
        return _choice("other", label, xpath)
    if kind is not None or (
        another and re.search(r"\b(way|method|option|factor|verif\w+)\b", label, IGNORECASE)
    ):
        return _choice("mfa_method", label, xpath, mfa_type=kind or "switch")
    if re.search(r"\b(account|not you)\b", label, IGNORECASE):
        return _choice("account", label, xpath)
    return _choice("sign_in_method", label, xpath)


def _choice(
    type: ChoiceType,
    label: str,
    xpath: str,
    *,
    mfa_type: MfaType | None = None,
    value: str = "",
    context: str = "",
) -> Choice:
    slug = re.sub(r"[^a-z0-9]+", "-", (value or label).lower()).strip("-")[:40] or "choice"
    return Choice(
        id=slug,
        type=type,
        label=label,
        mfa_type=mfa_type,
        masked_destination=destination_of(label) if mfa_type else None,
        display_text=label if mfa_type else None,
        context=context or None,
        observed_selector=xpath,
    )


def _unique(ways: Sequence[Way]) -> tuple[Way, ...]:
    """Each way once, each with an id of its own."""
    result: list[Way] = []
    seen: set[tuple[str, str]] = set()
    ids: set[str] = set()
    for way in ways:
        target = (
            way.link.url
            if way.link
            else f"{way.form.xpath if way.form else ''}{way.choice.observed_selector}"
        )
        key = (target, "" if way.choice.provider else f"{way.choice.label}{way.entries}")
        if key in seen or not way.choice.label or len(result) >= 40:
            continue
        seen.add(key)
        identity, number = way.choice.id, 2
        while identity in ids:
            identity, number = f"{way.choice.id}-{number}", number + 1
        ids.add(identity)
        result.append(dataclasses.replace(way, choice=dataclasses.replace(way.choice, id=identity)))
    return tuple(result)


def _picker(page: Page, signed_in: bool) -> tuple[Way, ...]:
    """The ways of a page that lets one choose an account, an organisation, a second factor, yes or no."""
    if _has_fields(page):
        return ()
    heading = (
        page.heading
        if CHOOSE.search(page.heading)
        else page.text[:300]
        if CHOOSE.search(page.text[:300])
        else ""
    )
    if signed_in and not CHOOSE.search(page.heading):
        return ()
    ways = [way for form in page.forms for way in _form_ways(form, heading)]
    links = [
        link for link in page.links
        if link.label and not link.aside
        and not NEVER_A_WAY.search(link.label) and not sso_of(link.label, link.hints)
    ]  # fmt: skip
    if not heading:
        links = [link for link in links if ADDRESS.search(link.label) or _looks_like_method(link)]
        links = links if len(links) + len(ways) > 1 else []
    ways += [Way(choice=_picked(link.label, link.xpath, heading), link=link) for link in links]
    if ways and not heading and all(way.link is None for way in ways):
        # Buttons alone make a picker only when they are about a second factor, an account, or consent.
        ways = [
            w
            for w in ways
            if w.entries or w.choice.mfa_type or w.choice.type == "account" or CONFIRM.search(w.choice.label)
        ]
    return _unique(ways)


def _looks_like_method(link: Link) -> bool:
    return mfa_type_of(link.label) is not None and bool(
        ELSEWHERE.search(link.label) or destination_of(link.label)
    )


def _form_ways(form: Form, heading: str) -> Iterator[Way]:
    if not form.action or form.typed:
        return
    radios = [c for c in form.controls if c.kind == "radio" and c.name and not c.disabled and c.visible]
    selects = [c for c in form.controls if c.kind == "select" and c.name and not c.disabled and c.visible]
    if radios:
        for control in radios:
            if control.name == radios[0].name:
                choice = _picked(control.label or control.value, control.xpath, heading, value=control.value)
                yield Way(
                    choice=choice, form=form, button=form.primary, entries=((control.name, control.value),)
                )
        return
    if selects:
        yield from option_ways(selects[0], form, heading)
        return
    for button in form.buttons:
        if not NEVER_A_WAY.search(button.label) and not sso_of(button.label, form.hints):
            yield Way(
                choice=_picked(button.label, button.xpath, heading, value=button.value),
                form=form,
                button=button,
            )


def option_ways(select: Control, form: Form, heading: str = "") -> tuple[Way, ...]:
    """The options of a list as ways to send ``form``; the empty one ("please choose") is none."""
    return _unique(
        [
            Way(
                choice=_picked(option.label, select.xpath, heading or select.label, value=option.value),
                form=form,
                button=form.primary,
                entries=((select.name, option.value),),
            )
            for option in select.options
            if option.value
        ]
    )


def _picked(label: str, xpath: str, heading: str, *, value: str = "") -> Choice:
    method = mfa_type_of(f"{label} {value}")
    about_accounts = bool(ACCOUNT_HEADING.search(heading))
    if method is not None and not (about_accounts and ADDRESS.search(label)):
        return _choice("mfa_method", label, xpath, mfa_type=method, value=value)
    if ADDRESS.search(label) or about_accounts:
        return _choice("account", label, xpath, value=value)
    return _choice("other", label, xpath, value=value, context=heading[:200])
