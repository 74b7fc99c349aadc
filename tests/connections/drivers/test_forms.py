"""What is read out of HTML: forms, labels, errors, ways on; and that no HTML makes the reader raise."""

from __future__ import annotations

import warnings
from urllib.parse import parse_qsl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from connections.drivers import forms
from connections.drivers.forms import Reading, budget

URL = "https://shop.test/account/login"
LOGIN = "<form method=post action=/in><input name=user><input type=password name=pw><button>Log in</button></form>"


def reading(markup: str, url: str = URL) -> Reading:
    return forms.read(forms.parse(markup, url))


def only_form(markup: str) -> forms.Form:
    (form,) = forms.parse(markup, URL).forms
    return form


def refs(found: Reading) -> list[tuple[str, str]]:
    return [(want.field.ref, want.field.type) for want in found.wants]


def choices(found: Reading) -> list[tuple[str, str]]:
    return [(way.choice.id, way.choice.type) for way in found.ways]


# -- never raising


PIECES = st.sampled_from(
    [
        "<form>", "</form>", "<form method=post action='javascript:x'>", "<input type=password name=p>", "<input name=u>",
        "<table>", "<tr>", "<td>", "</table>", "<select>", "<option>", "<svg>", "<math>", "<foreignObject>", "<template>",
        "<label for=a>", "<b>", "</b>", "<a href='http://[::1'>", "<a href='http://x:99999/'>", "<p>", "</p>", "<base href='//'>",
        "<meta http-equiv=refresh content='0;url=http://['>", "<!-- -- -", "-->", "<![CDATA[", "]]>", "<!DOCTYPE x PUBLIC \"'\">",
        "<script>", "</script>", "<style>", "<noscript>", "<button form=f>", "<frameset>", "<plaintext>", "<html @click=x :a=b>",
        "<body xmlns:a=b>", "&#0;", "&#x1;", "&#xD800;", "\0", "\x0c", "\ud800", "\x85", "<ünter>", "<a\0b>", "<input maxlength=9999999999>",
        "<img alt=x>", "<textarea>", "<li>", "<h1>", "<br/>", "<isindex>", "<image>", "</br>", "<col>", "<caption>", "<rp>", "text",
    ]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=300), st.lists(PIECES, max_size=25).map("".join)))
def test_no_markup_makes_the_reader_raise_or_warn(markup: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = forms.parse(markup, URL)
        forms.read(page)
        forms.login_link(page)
        for form in page.forms:
            forms.fill(form, form.primary, {control.xpath: "v" for control in form.controls})


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from(
        [None, "utf-8", "utf-16", "shift_jis", "no-such-charset", "replacement", "x-user-defined"]
    ),
)
def test_no_bytes_make_the_reader_raise(body: bytes, charset: str | None) -> None:
    forms.read(forms.parse(body, URL, charset))


@pytest.mark.parametrize(
    "markup",
    [
        "<div>" * 20_000,
        "<b>" * 5_000 + "<p>" * 5_000,
        "".join(f"<b a={i}>" for i in range(3_000)) + "<p>x" * 3_000,
        "<a " + " ".join(f"x{i}" for i in range(50_000)) + ">",
        "<!--" + "- " * 300_000,
        "<table>" * 5_000,
        "<option>" * 50_000,
        "&amp" * 100_000,
    ],
    ids=[
        "deep",
        "formatting",
        "distinct formatting",
        "attributes",
        "comment",
        "tables",
        "options",
        "entities",
    ],
)
def test_a_page_made_to_be_slow_is_given_up_and_the_rest_still_counts(
    markup: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_MAX_SECONDS", 0.3)
    assert forms.read(forms.parse(LOGIN + markup, URL)).kind == "login"


# -- text and encodings


@pytest.mark.parametrize(
    ("body", "charset", "name"),
    [
        ("<title>für</title>".encode("latin-1"), "iso-8859-1", "windows-1252"),
        (b"<meta charset=latin1><title>f\xfcr</title>", None, "windows-1252"),
        (b'<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-15"><title>f\xfcr</title>', None, "iso-8859-15"),
        ("<title>für</title>".encode(), None, "utf-8"),
        (b"<title>f\xfcr</title>", None, "windows-1252"),
        (b"\xef\xbb\xbf" + "<title>für</title>".encode(), "latin-1", "utf-8"),
        (b"\xff\xfe" + "<title>für</title>".encode("utf-16le"), None, "utf-8"),
        ("<title>für</title>".encode(), "no-such-charset", "utf-8"),
    ],
)  # fmt: skip
def test_the_encoding_is_found_as_browsers_find_it(body: bytes, charset: str | None, name: str) -> None:
    assert forms.parse(body, URL, charset).title == "für"
    assert forms.decode(body, charset)[1] == name


def test_a_form_is_sent_in_the_encoding_of_its_page() -> None:
    (form,) = forms.parse(b"<meta charset=latin1><form method=post><input name=u></form>", URL).forms
    assert forms.fill(form, None, {form.controls[0].xpath: "für €☃"}).body == b"u=f%FCr+%80%26%239731%3B"


# -- labels


@pytest.mark.parametrize(
    ("markup", "label"),
    [
        ("<label for=a>User name:</label><input id=a name=x>", "User name"),
        ("<label>E-mail <input name=x></label>", "E-mail"),
        ('<input name=x aria-label="Your login">', "Your login"),
        (
            '<span id=l>Account</span> <b id=m>number</b><input name=x aria-labelledby="l m">',
            "Account number",
        ),
        ('<input name=x placeholder="Who?">', "Who?"),
        ("<table><tr><td>Benutzer:</td><td><input name=x></td></tr></table>", "Benutzer"),
        ("User: <input name=x>", "User"),
        (
            "<label for=a><svg><title>icon</title></svg> Name <select><option>no</select></label><input id=a name=x>",
            "Name",
        ),
        ("<input name=x>", ""),
    ],
)
def test_a_control_is_called_what_a_person_would_call_it(markup: str, label: str) -> None:
    assert [
        control.label for control in only_form(f"<form>{markup}</form>").controls if control.name == "x"
    ] == [label]


# -- which form


def test_the_login_form_is_found_among_search_newsletter_and_registration() -> None:
    found = reading(
        "<form role=search action=/s><input name=q></form>"
        "<form method=post action=/news><input type=email name=email><button>Subscribe</button></form>"
        "<form method=post action=/register><input name=user><input type=password name=a autocomplete=new-password>"
        "<input type=password name=b><button>Sign up</button></form>"
        f"{LOGIN}<form action=/reset><input type=email name=e><button>Reset password</button></form>"
    )
    assert found.kind == "login"
    assert found.form is not None
    assert found.form.action == "https://shop.test/in"


@pytest.mark.parametrize(
    "markup",
    [
        "<form method=post action=/news><input type=email name=email><button>Subscribe</button></form>",
        "<form method=post action=/invite><input type=email name=email><button>Invite</button></form>",
        "<form action=/s><input type=text name=q><button>Go</button></form>",
        "<form method=post action=/register><input name=u><input type=password name=p autocomplete=new-password></form>",
        "<form method=post action=/password/reset><input type=email name=e><button>Send</button></form>",
        "<form method=post><input type=hidden name=t><button>OK</button></form>",
        f"<template>{LOGIN}</template>",
        f"<div hidden>{LOGIN}</div>",
    ],
)
def test_a_form_that_logs_nobody_in_is_not_a_login_form(markup: str) -> None:
    assert reading(markup, "https://shop.test/").kind not in ("login", "code")


@pytest.mark.parametrize(
    ("markup", "ref"),
    [
        ("<input type=email name=x><button>Next</button>", "email"),
        ("<input name=email><button>Continue</button>", "email"),
        ("<input name=user_or_email placeholder='User name or e-mail'><button>Next</button>", "username"),
        ("<input type=tel name=x><button>Sign in</button>", "phone"),
        ("<input name=x autocomplete='username webauthn'><button>Go on</button>", "username"),
        ("<input name=identifier><input type=submit value=Weiter>", "username"),
    ],
)
def test_an_identifier_alone_is_a_login_form_on_a_login_page(markup: str, ref: str) -> None:
    found = reading(f"<form method=post action=/login>{markup}</form>")
    assert (found.kind, refs(found)) == ("login", [(ref, "identifier")])


def test_controls_outside_of_their_form_belong_to_it() -> None:
    inside_table = "<table><form method=post action=/in><tr><td><input name=u><td><input type=password name=p></form></table>"
    by_attribute = (
        "<form id=f method=post action=/in></form><input form=f name=u><input form=f type=password name=p>"
    )
    for markup in (inside_table, by_attribute):
        assert [control.name for control in only_form(markup).controls] == ["u", "p"]


def test_a_password_field_without_a_form_needs_a_browser() -> None:
    assert (
        reading(
            "<div><input name=u><input type=password name=p><button onclick=x()>Log in</button></div>"
        ).kind
        == "scripted"
    )


def test_ids_of_fields_are_unique() -> None:
    found = reading(
        "<form method=post action=/login><input name=user><input name=user_id><input name=username>"
        "<input type=password name=p><input type=password name=p></form>"
    )
    ids = [want.field.id for want in found.wants]
    assert len(set(ids)) == len(ids) == 5


# -- codes


@pytest.mark.parametrize(
    ("around", "control", "ref", "type", "mfa"),
    [
        ("Open your authenticator app", "name=otp", "totp", "totp_code", "totp"),
        ("We sent a text message to ••42", "name=code", "code", "code", "sms"),
        (
            "Enter the code we sent to a•••@x.test",
            "autocomplete=one-time-code name=c",
            "code",
            "code",
            "email",
        ),
        ("Verification", "name=verification_code", "code", "code", None),
        ("We called you", "name=pin_code aria-label='Code from the phone call'", "code", "code", "call"),
        (
            "Two factors",
            "name=c placeholder='6-digit code from Google Authenticator'",
            "totp",
            "totp_code",
            "totp",
        ),
        ("Code", "type=password name=otp", "code", "code", None),
    ],
)
def test_a_code_is_known_by_its_words(
    around: str, control: str, ref: str, type: str, mfa: str | None
) -> None:
    found = reading(
        f"<p>{around}</p><form method=post><input {control}><button>Verify</button></form><a href=/x>Text me a code instead</a>"
    )
    (want,) = found.wants
    assert (found.kind, want.field.ref, want.field.type, want.field.linked_mfa_type) == (
        "code",
        ref,
        type,
        mfa,
    )


def test_a_postal_code_is_no_one_time_code() -> None:
    assert reading("<form method=post><label>Postal code <input name=code></label></form>").kind == "other"


def test_boxes_of_one_character_are_one_field() -> None:
    boxes = "".join(f"<input name=d{i} maxlength=1>" for i in range(6))
    found = reading(f"<form method=post>{boxes}<button>Go</button></form>")
    (want,) = found.wants
    assert (found.kind, len(want.controls)) == ("code", 6)


@pytest.mark.parametrize(
    ("text", "destination"),
    [
        ("We sent a code to ••42.", "••42"),
        ("Code sent to +49 151 ••••42", "+49 151 ••••42"),
        ("A text message to the number ending in 42", "••42"),
        ("We e-mailed it to a•••@example.com.", "a•••@example.com"),
        ("Text message to ***-***-1234", "***-***-1234"),
        ("Open your app", None),
    ],
)
def test_it_is_read_where_a_code_went(text: str, destination: str | None) -> None:
    assert forms.destination_of(text) == destination


# -- ways


def test_sso_buttons_are_told_from_links_to_social_media() -> None:
    found = reading(
        f"{LOGIN}<a id=g href=/auth/google>Continue with Google</a>"
        "<form method=post action=/sso><button name=p value=ms>Sign in with Microsoft</button></form>"
        "<a href=https://appleid.apple.com/auth/authorize><img alt=''></a>"
        "<a href=https://github.com/shop>Follow us on GitHub</a><a href=https://facebook.com/shop>Facebook</a>"
    )
    sso = [way.choice for way in found.ways if way.choice.type == "sso_provider"]
    assert {choice.id: (choice.provider, choice.observed_selector) for choice in sso} == {
        "google": ("google", "//*[@id='g']"),
        "microsoft": ("microsoft", "/html/body/form[2]/button"),
        "apple": ("apple", "/html/body/a[2]"),
    }


def test_second_factors_as_radio_buttons_are_choices() -> None:
    found = reading(
        "<h1>Choose how to verify</h1><form method=post>"
        "<label><input type=radio name=m value=sms> Text message to ••42</label>"
        "<label><input type=radio name=m value=app> Authenticator app</label><button>Continue</button></form>"
    )
    assert found.kind == "picker"
    assert [(w.choice.id, w.choice.mfa_type, w.choice.masked_destination) for w in found.ways] == [
        ("sms", "sms", "••42"), ("app", "totp", None),
    ]  # fmt: skip
    assert found.ways[0].entries == (("m", "sms"),)


def test_accounts_as_links_are_choices_and_the_footer_is_not() -> None:
    found = reading(
        "<title>Choose an account</title><ul><li><a href=/u/1>Ann ann@x.test</a><li><a href=/u/2>bob@x.test</a></ul>"
        "<a href=/other>Use another account</a><footer><a href=/privacy>Privacy</a><a href=/jobs>Jobs</a></footer>"
    )
    assert (found.kind, choices(found)) == (
        "picker",
        [("ann-ann-x-test", "account"), ("bob-x-test", "account"), ("use-another-account", "account")],
    )


def test_consent_is_a_choice() -> None:
    found = reading(
        "<h1>Things wants to know your name</h1><form method=post><button name=a value=yes>Authorize</button>"
        "<button name=a value=no>Cancel</button></form>"
    )
    assert (found.kind, choices(found)) == ("picker", [("yes", "other")])


def test_other_ways_are_offered_beside_a_code_field() -> None:
    found = reading(
        "<p>Open your authenticator app</p><form method=post><input name=otp><button>Verify</button>"
        "<button name=resend value=1>Resend code</button></form><a href=/sms>Text me a code instead</a>"
        "<a href=/m>Try another way</a><a href=/help>Help</a><a href=/logout>Log out</a>"
    )
    assert [(w.choice.label, w.choice.type, w.choice.mfa_type) for w in found.ways] == [
        ("Resend code", "other", None),
        ("Text me a code instead", "mfa_method", "sms"),
        ("Try another way", "mfa_method", "switch"),
    ]


# -- the rest of the pages


@pytest.mark.parametrize(
    ("markup", "kind"),
    [
        ("<h1>Check your e-mail</h1><p>We sent a link to you.</p>", "external"),
        ("<p>Approve the sign-in on your phone.</p><a href=/c>Use a code instead</a>", "external"),
        (
            "<h1>Check your phone</h1><p>Tap 47</p><form method=post><button>Resend</button></form>",
            "external",
        ),
        (
            "<form method=post><input name=u><input type=password name=p><div class=h-captcha></div></form>",
            "captcha",
        ),
        ("<h1>One moment</h1><div class='cf-turnstile'></div>", "captcha"),
        ("<title>Just a moment...</title><script src=x></script>", "bot"),
        ("<p>We have detected unusual traffic.</p>", "bot"),
        ("<div id=root></div><script src=/app.js></script>", "scripted"),
        ("<noscript>Please enable JavaScript.</noscript><div id=app></div><script></script>", "scripted"),
        ("<p>Hello Ann</p><a href=/logout>Log out</a>", "signed_in"),
        ("<p>Hi</p><form action=/users/sign_out method=post><button>Bye</button></form>", "signed_in"),
        ("<p>Hi</p><form method=post action=/x><button>Abmelden</button></form>", "signed_in"),
        ("<p>Just words</p>", "other"),
        (
            "<form method=post action=https://sp.test/acs><input type=hidden name=SAMLResponse value=x></form>",
            "relay",
        ),
        ("", "other"),
    ],
)
def test_a_page_is_told_by_what_it_says(markup: str, kind: str) -> None:
    assert reading(markup).kind == kind


def test_an_invisible_captcha_elsewhere_does_not_stop_a_login() -> None:
    assert (
        reading(
            LOGIN + "<form action=/news><input type=email name=e><div class=g-recaptcha></div></form>"
        ).kind
        == "login"
    )
    assert (
        reading('<script src="https://www.google.com/recaptcha/api.js?render=k"></script>' + LOGIN).kind
        == "login"
    )


@pytest.mark.parametrize(
    ("markup", "errors"),
    [
        ("<div role=alert>Wrong.</div>", ("Wrong.",)),
        ("<ul class=errorlist><li>One</li><li>Two</li></ul>", ("One Two",)),
        (
            "<p class=errornote>Please enter the correct username.</p>",
            ("Please enter the correct username.",),
        ),
        ("<div class='alert alert-danger'><b>Oh</b> no</div>", ("Oh no",)),
        ("<div role=alert class='alert-success'>You have been logged out</div>", ()),
        ("<div role=alert hidden>Wrong.</div><div class=error style='display: none'>x</div>", ()),
        ("<input name=a aria-invalid=true aria-describedby=e><i id=e>Unknown user</i>", ("Unknown user",)),
        ("<div class=error></div>", ()),
    ],
)
def test_what_the_site_complains_about_is_found(markup: str, errors: tuple[str, ...]) -> None:
    assert forms.parse(markup, URL).errors == errors


@pytest.mark.parametrize(
    ("content", "refresh"),
    [
        ("3; url=/next", (3.0, "https://shop.test/next")),
        ("0;URL='https://x.test/a'", (0.0, "https://x.test/a")),
        ("5", (5.0, URL)),
        ("0; url=javascript:alert(1)", None),
        ("soon", None),
    ],
)
def test_a_refresh_is_read(content: str, refresh: tuple[float, str] | None) -> None:
    assert forms.parse(f'<meta http-equiv="Refresh" content="{content}">', URL).refresh == refresh


@pytest.mark.parametrize(
    ("markup", "link"),
    [
        ("<a href=/register>Sign up</a><a href=/login>Log in</a>", "https://shop.test/login"),
        ("<a href=/konto/anmelden>Anmelden</a>", "https://shop.test/konto/anmelden"),
        ("<a href=/signin><img alt=''></a>", "https://shop.test/signin"),
        ("<a href=/auth/google>Log in with Google</a>", None),
        ("<form action=/start><button>Sign in</button></form>", "https://shop.test/start"),
        ("<a href='javascript:login()'>Log in</a><a href=#login>Log in</a>", None),
    ],
)
def test_the_way_to_the_login_is_found(markup: str, link: str | None) -> None:
    assert forms.login_link(forms.parse(markup, URL)) == link


# -- filling in


def test_a_form_is_sent_as_a_browser_sends_it() -> None:
    form = only_form(
        "<form method=post action='/in?x=1#top'><input type=hidden name=csrf value=t><input name=u value=old>"
        "<input name=off value=1 disabled><fieldset disabled><input name=off2></fieldset><input value=nameless>"
        "<input type=checkbox name=terms><input type=checkbox name=on checked>"
        "<label><input type=checkbox name=remember value=1> Remember me</label>"
        "<input type=radio name=r value=1><input type=radio name=r value=2 checked>"
        "<select name=s><option value=a>A<option value=b selected>B</select><textarea name=t>x</textarea>"
        "<input type=file name=f><button name=go value=1>Log in</button><button name=other value=1>Cancel</button></form>"
    )
    sent = forms.fill(form, form.primary, {form.controls[1].xpath: "ann & bob"})
    assert (sent.method, sent.url) == ("post", "https://shop.test/in?x=1")
    assert parse_qsl(sent.body.decode()) == [
        ("csrf", "t"), ("u", "ann & bob"), ("on", "on"), ("remember", "1"), ("r", "2"), ("s", "b"), ("t", "x"), ("go", "1"),
    ]  # fmt: skip


def test_a_form_by_get_replaces_the_query() -> None:
    form = only_form("<form action='/in?old=1'><input name=u></form>")
    assert forms.fill(form, None, {form.controls[0].xpath: "a"}).url == "https://shop.test/in?u=a"


def test_a_button_may_send_the_form_elsewhere() -> None:
    form = only_form(
        "<form action=/a><input name=u><button formaction=/b formmethod=post>Log in</button></form>"
    )
    sent = forms.fill(form, form.primary, {})
    assert (sent.method, sent.url) == ("post", "https://shop.test/b")


def test_a_multipart_form_is_sent_in_parts() -> None:
    form = only_form("<form method=post enctype=multipart/form-data><input name='a\"b' value=1></form>")
    sent = forms.fill(form, None, {})
    assert sent.content_type.startswith("multipart/form-data; boundary=")
    assert b'name="a%22b"\r\n\r\n1\r\n' in sent.body


def test_submissions_do_not_print_what_they_carry() -> None:
    form = only_form("<form action=/a><input name=u></form>")
    assert "hunter2" not in repr(forms.fill(form, None, {form.controls[0].xpath: "hunter2"}))


@pytest.mark.parametrize(
    ("markup", "message"),
    [
        ("<h1>Approve it on your phone</h1><p>Tap <b>47</b> in the app.</p>", "Approve it on your phone. Tap 47 in the app."),
        ("<h1>Almost there!</h1><p>Look at your phone</p>", "Almost there! Look at your phone"),
        ("<div><div>Tap the number</div><div>47</div><p>on your phone</p></div>", "Tap the number 47 on your phone"),
    ],
)  # fmt: skip
def test_the_sentences_of_a_message_are_kept_apart(markup: str, message: str) -> None:
    assert forms.parse(f"<main>{markup}</main>", URL).message == message
