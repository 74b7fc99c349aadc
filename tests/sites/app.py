"""A small web site with many ways of signing in, for tests and for trying things by hand.

Plain WSGI on a threaded server of the standard library, state in memory, no framework: what the login driver meets
here is real HTTP, with real cookies, tokens that must match, and codes that are accepted once. Each scenario lives
under its own path prefix (``/totp/login``); ``Site(scenario="totp")`` also makes it the site's start page.
"""

from __future__ import annotations

import base64
import dataclasses
import hmac
import html
import io
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from http.cookies import SimpleCookie
from socketserver import ThreadingMixIn
from typing import Any, Self
from urllib.parse import parse_qsl, quote
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

USERNAME = "alice"
EMAIL = "alice@example.com"
PASSWORD = "correct horse battery staple"
TOTP_SECRET = "JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP"
SMS_CODE = "402877"
EMAIL_CODE = "918273"
CHOSEN_ORGANISATION = "acme"
#: Known to the site, but not allowed into /admin.
OUTSIDER, OUTSIDER_PASSWORD = "mallory", "mallory's password"


def _code_at(moment: int) -> str:
    """RFC 6238 with its defaults, written here once more: the site must not agree with Switchboard by sharing its code."""
    digest = hmac.digest(base64.b32decode(TOTP_SECRET), (moment // 30).to_bytes(8), "sha1")
    start = digest[-1] & 15
    return f"{(int.from_bytes(digest[start : start + 4]) & 0x7FFFFFFF) % 1_000_000:06d}"


SCENARIOS: Mapping[str, str] = {
    "simple": "user name and password, with a token that must match its cookie",
    "identifier": "e-mail address first, password on the next page",
    "totp": "password, then a code from an authenticator app; a code counts once",
    "sms": "password, then a code sent to ••42",
    "boxes": "password, then a code typed into six boxes",
    "methods": "password, then a choice of second factors",
    "accounts": "password, then a choice of accounts (links)",
    "organisations": "password, then a choice of organisations (radio buttons)",
    "sso": "buttons for Google and GitHub; GitHub's leads to a second site",
    "external": "password, then approve on the phone (number 47), or use a code instead",
    "mail": "e-mail address, then a link in the mail",
    "slow": "answers late",
    "broken": "markup as of 1998, in latin-1",
    "crowded": "search, newsletter, registration and login on one page",
    "captcha": "a CAPTCHA in the login form",
    "scripted": "a page that is nothing without JavaScript",
    "circle": "redirects for ever",
    "inward": "redirects to a private address",
    "huge": "a page without end",
    "silent": "the form again, whatever is sent, without a word",
    "get": "a login form sent by GET",
    "fault": "error 500",
    "pages": "region and e-mail address, then password with remember-me",
    "admin": "as Django's admin: staff only",
    "turnedaway": "a wrong password leads to a page of its own, without a form",
    "relay": "a form that only a script would send (SAML)",
    "foreign": "the form goes to another host",
    "forward": "the form's answer is a 307 to another host",
    "wall": "a wall against robots",
}


@dataclasses.dataclass(frozen=True)
class Logged:
    """One request as it came in. ``form`` holds the fields of the body, ``query`` those of the URL."""

    method: str
    path: str
    query: Mapping[str, str]
    form: Mapping[str, str]
    headers: Mapping[str, str]


@dataclasses.dataclass
class Request:
    """What a scenario gets to see."""

    method: str
    path: str
    query: dict[str, str]
    form: dict[str, str]
    cookies: dict[str, str]
    session: dict[str, Any]

    @property
    def posted(self) -> bool:
        return self.method == "POST"


@dataclasses.dataclass
class Response:
    body: bytes
    status: str = "200 OK"
    headers: list[tuple[str, str]] = dataclasses.field(default_factory=list)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the site keeps its own log."""


class Site:
    """The site as a context manager. Thread-safe; each instance has its own sessions.

    ``scenario`` is what ``/`` shows. ``identity_provider`` is the site behind the GitHub button. ``now`` is the clock
    of the one-time codes.
    """

    def __init__(
        self,
        scenario: str | None = None,
        *,
        port: int = 0,
        identity_provider: Site | None = None,
        slow_seconds: float = 0.2,
        now: Callable[[], float] = time.time,
        inward: str = "http://127.0.0.1:1/",
        form_host: str = "",
        linked: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.scenario = scenario
        self.identity_provider = identity_provider
        self.slow_seconds = slow_seconds
        self.inward = inward
        #: Where the form of "foreign" goes: "127.0.0.1:PORT".
        self.form_host = form_host
        self.requests: list[Logged] = []
        #: Whether the start page has a link to the login.
        self.linked = linked
        self._now = now
        self._tls = tls
        self._port = port
        self._lock = threading.Lock()
        self._sessions: dict[str, dict[str, Any]] = {}
        self._used_codes: set[str] = set()
        self._grants: dict[str, str] = {}
        self._approved = threading.Event()
        #: Cleared: every request waits until it is set.
        self.answers = threading.Event()
        self.answers.set()
        self._server: WSGIServer | None = None

    def __enter__(self) -> Self:
        self._server = make_server("127.0.0.1", self._port, self._application, _Server, _Handler)
        if self._tls is not None:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    @property
    def domain(self) -> str:
        assert self._server is not None, "the site is not running"
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def port(self) -> int:
        return int(self.domain.rpartition(":")[2])

    def url(self, path: str = "/") -> str:
        return f"{'https' if self._tls else 'http'}://{self.domain}{path}"

    @property
    def _cookie(self) -> str:
        """Cookies do not know ports, and every site here is 127.0.0.1."""
        return f"sid{self.port}"

    def approve(self) -> None:
        """Press "yes" on the phone, or follow the link in the mail."""
        self._approved.set()

    def expire_sessions(self) -> None:
        """Forget everybody."""
        with self._lock:
            self._sessions.clear()
        self._approved.clear()

    def forget_codes(self) -> None:
        """As if the codes that were used were long gone."""
        with self._lock:
            self._used_codes.clear()

    def seen(self, method: str, path: str) -> list[Logged]:
        """The requests for ``path`` so far."""
        return [entry for entry in list(self.requests) if entry.method == method and entry.path == path]

    def totp(self) -> str:
        """The code of this moment."""
        return _code_at(int(self._now()))

    # -- HTTP

    def _application(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        request = self._request(environ)
        self.answers.wait(60)
        response = self._answer(request)
        headers = [("Content-Type", "text/html; charset=utf-8"), *response.headers]
        if any(name == "Content-Type" for name, _ in response.headers):
            headers = response.headers
        if request.cookies.get(self._cookie) != request.session["sid"]:
            headers.append(
                ("Set-Cookie", f"{self._cookie}={request.session['sid']}; Path=/; HttpOnly; SameSite=Lax")
            )
        start_response(response.status, [*headers, ("Content-Length", str(len(response.body)))])
        return [response.body]

    def _request(self, environ: dict[str, Any]) -> Request:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = io.BytesIO(environ["wsgi.input"].read(length)).getvalue().decode("latin-1")
        charset = "latin-1" if environ["PATH_INFO"].startswith("/broken") else "utf-8"
        query = dict(parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True))
        form = dict(parse_qsl(body, keep_blank_values=True, encoding=charset))
        cookies = {
            name: morsel.value for name, morsel in SimpleCookie(environ.get("HTTP_COOKIE", "")).items()
        }
        headers = {
            key[5:].replace("_", "-").title(): value
            for key, value in environ.items()
            if key.startswith("HTTP_")
        }
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        with self._lock:
            self.requests.append(Logged(method, path, query, form, headers))
            sid = cookies.get(self._cookie, "")
            if sid not in self._sessions:
                sid = secrets.token_hex(16)
                self._sessions[sid] = {"sid": sid, "csrf": secrets.token_hex(8)}
            session = self._sessions[sid]
        return Request(method, path, query, form, cookies, session)

    def _answer(self, request: Request) -> Response:
        if request.path == "/control/expire":
            self.expire_sessions()
            return page("Done", "<p>All sessions ended.</p>")
        if request.path == "/":
            return self._start(request)
        _, name, *rest = request.path.split("/", 2)
        # With a scenario of its own, a site is only that: no login page of another one is to be found.
        known = name == "idp" or (name in SCENARIOS and self.scenario in (None, name))
        scenario = getattr(self, f"_{name}") if known else None
        if scenario is None:
            return page("Not found", "<p>There is nothing here.</p>", status="404 Not Found")
        action = rest[0].strip("/") if rest else ""
        if action == "home":
            return self._home_of(request, name)
        if action == "logout":
            request.session.pop(f"in:{name}", None)
            return redirect(f"/{name}/login")
        answer: Response = scenario(request, action)
        return answer

    def _start(self, request: Request) -> Response:
        if self.scenario is None:
            links = "".join(
                f'<li><a href="/{name}/">{name}</a>: {about}' for name, about in SCENARIOS.items()
            )
            return page("Test sites", f"<ul>{links}</ul>")
        if request.session.get(f"in:{self.scenario}"):
            return self._home_of(request, self.scenario)
        link = f'<a href="/{self.scenario}/login">Log in</a>' if self.linked else ""
        return page(
            "Welcome",
            '<form role="search" action="/search"><input name="q" placeholder="Search"></form>'
            f'<p>We sell things.</p><nav><a href="/about">About</a> {link}</nav>',
        )

    def _home_of(self, request: Request, name: str) -> Response:
        user = request.session.get(f"in:{name}")
        if not user:
            return redirect(f"/{name}/login?next=/{name}/home")
        return page(
            "Your account",
            f'<p>Signed in as <b>{html.escape(user)}</b></p><a href="/{name}/logout">Log out</a>'
            '<form action="/search"><input name="q"></form>',
        )

    # -- parts that scenarios share

    def _let_in(self, request: Request, name: str, user: str) -> Response:
        """A new session id, as sites should give on login."""
        with self._lock:
            self._sessions.pop(request.session["sid"], None)
            request.session["sid"] = secrets.token_hex(16)
            self._sessions[request.session["sid"]] = request.session
        request.session[f"in:{name}"] = user
        return redirect(f"/{name}/home")

    def _password_step(
        self, request: Request, action: str, name: str, onward: str | None, *, extra: str = ""
    ) -> Response | None:
        """User name and password at ``login``; None for the other actions. ``onward`` None means: let in."""
        if action not in ("", "login"):
            return None
        error = ""
        if request.posted:
            if request.form.get("csrf") != request.session["csrf"]:
                return page("Forbidden", "<p>CSRF verification failed.</p>", status="403 Forbidden")
            right = (
                request.form.get("username") in (USERNAME, EMAIL) and request.form.get("password") == PASSWORD
            )
            if right:
                if onward is None:
                    return self._let_in(request, name, USERNAME)
                request.session[f"half:{name}"] = True
                return redirect(f"/{name}/{onward}")
            wrong = html.escape(request.form.get("password", ""))
            error = (
                f'<div class="alert alert-danger" role="alert">Wrong user name or password ({wrong}).</div>'
            )
        return page(
            "Log in",
            f'{error}<form method="post" action="/{name}/login">'
            f'<input type="hidden" name="csrf" value="{request.session["csrf"]}">'
            '<label for="u">User name</label><input id="u" name="username" autocomplete="username" required>'
            '<label for="p">Password</label><input id="p" name="password" type="password" '
            'autocomplete="current-password" required>'
            f'<button type="submit">Log in</button></form>{extra}<a href="/{name}/forgot">Forgot your password?</a>',
        )

    def _half(self, request: Request, name: str) -> bool:
        return bool(request.session.get(f"half:{name}"))

    def _totp_is_right(self, code: str) -> bool:
        with self._lock:
            right = code == _code_at(int(self._now())) and code not in self._used_codes
            if right:
                self._used_codes.add(code)
        return right

    def _code_page(
        self, name: str, action: str, words: str, label: str, *, error: str = "", extra: str = ""
    ) -> Response:
        complaint = f'<p class="error">{error}</p>' if error else ""
        return page(
            "One more step",
            f'<p>{words}</p>{complaint}<form method="post" action="/{name}/{action}"><label>{label} '
            '<input name="code" inputmode="numeric" autocomplete="one-time-code"></label>'
            f"<button>Verify</button></form>{extra}",
        )

    def _code_step(self, request: Request, name: str, kind: str) -> Response:
        """A page that wants the code of an authenticator app, a text message or a mail."""
        if not self._half(request, name):
            return redirect(f"/{name}/login")
        words, label = {
            "totp": ("Open your authenticator app.", "Authentication code"),
            "sms": ("We sent a text message with a code to ••42.", "Code"),
            "email": ("We sent a code to a•••@example.com.", "Code"),
        }[kind]
        error = ""
        if request.posted:
            code = request.form.get("code", "").replace(" ", "")
            right = (
                self._totp_is_right(code)
                if kind == "totp"
                else code == {"sms": SMS_CODE, "email": EMAIL_CODE}[kind]
            )
            if right:
                return self._let_in(request, name, USERNAME)
            error = f"The code {html.escape(code)} is not right."
        extra = f'<a href="/{name}/{kind}?again=1">Resend code</a>' if kind != "totp" else ""
        return self._code_page(name, kind, words, label, error=error, extra=extra)

    # -- scenarios

    def _simple(self, request: Request, action: str) -> Response:
        return self._password_step(request, action, "simple", None) or not_found()

    def _identifier(self, request: Request, action: str) -> Response:
        if action == "password":
            return self._identifier_password(request)
        error = ""
        if request.posted:
            if request.form.get("email") == EMAIL:
                request.session["half:identifier"] = True
                return redirect("/identifier/password")
            error = '<span id="e">We know nobody of that address.</span>'
        invalid = 'aria-invalid="true" aria-describedby="e"' if error else ""
        return page(
            "Sign in",
            f'<form method="post"><label>E-mail address <input type="email" name="email" {invalid}></label>{error}'
            '<button>Next</button></form><a href="/identifier/join">Create account</a>',
        )

    def _identifier_password(self, request: Request) -> Response:
        if not self._half(request, "identifier"):
            return redirect("/identifier/login")
        error = ""
        if request.posted:
            if request.form.get("pw") == PASSWORD and request.form.get("email") == EMAIL:
                return self._let_in(request, "identifier", EMAIL)
            error = '<ul class="errorlist"><li>That is not the password.</li></ul>'
        return page(
            "Enter your password",
            f'{error}<form method="post"><input name="email" value="{EMAIL}" readonly>'
            '<input type="password" name="pw" placeholder="Password"><input type="submit" value="Sign in"></form>',
        )

    def _totp(self, request: Request, action: str) -> Response:
        first = self._password_step(request, action, "totp", "totp")
        return first or (self._code_step(request, "totp", "totp") if action == "totp" else not_found())

    def _sms(self, request: Request, action: str) -> Response:
        first = self._password_step(request, action, "sms", "sms")
        return first or (self._code_step(request, "sms", "sms") if action == "sms" else not_found())

    def _boxes(self, request: Request, action: str) -> Response:
        first = self._password_step(request, action, "boxes", "boxes")
        if first is not None:
            return first
        if request.posted and "".join(request.form.get(f"d{i}", "") for i in range(6)) == SMS_CODE:
            return self._let_in(request, "boxes", USERNAME)
        boxes = "".join(f'<input name="d{i}" maxlength="1" aria-label="Digit {i + 1}">' for i in range(6))
        words = "<p>Type the six digits we sent to +49 151 ••••42</p>"
        return page("Code", f'{words}<form method="post">{boxes}<button>Continue</button></form>')

    def _methods(self, request: Request, action: str) -> Response:
        first = self._password_step(request, action, "methods", "choose")
        if first is not None:
            return first
        if not self._half(request, "methods"):
            return redirect("/methods/login")
        if action in ("totp", "sms", "email"):
            return self._code_step(request, "methods", action)
        if action == "push":
            return self._push(request, "methods")
        if request.posted and request.form.get("method") in ("totp", "sms", "email", "push"):
            return redirect(f"/methods/{request.form['method']}")
        options = {
            "sms": "Text message to ••42",
            "email": "E-mail to a•••@example.com",
            "totp": "Authenticator app",
            "push": "Push notification to your phone",
        }
        radios = "".join(
            f'<label><input type="radio" name="method" value="{k}"> {v}</label>' for k, v in options.items()
        )
        return page(
            "Choose how to verify",
            f'<form method="post"><h1>Choose a verification method</h1>{radios}<button>Continue</button></form>'
            '<a href="/help">Help</a>',
        )

    def _accounts(self, request: Request, action: str) -> Response:
        first = self._password_step(request, action, "accounts", "choose")
        if first is not None:
            return first
        if not self._half(request, "accounts"):
            return redirect("/accounts/login")
        if action == "use":
            return self._let_in(request, "accounts", request.query.get("as", ""))
        people = (EMAIL, "team@example.com")
        items = "".join(
            f'<li><a href="/accounts/use?as={quote(one)}"><b>{one}</b></a></li>' for one in people
        )
        return page("Choose an account", f'<ul>{items}</ul><footer><a href="/privacy">Privacy</a></footer>')

    def _organisations(self, request: Request, action: str) -> Response:
        first = self._password_step(request, action, "organisations", "choose")
        if first is not None:
            return first
        if not self._half(request, "organisations"):
            return redirect("/organisations/login")
        if request.posted and request.form.get("org"):
            return self._let_in(request, "organisations", f"{USERNAME} at {request.form['org']}")
        return page(
            "Choose your organisation",
            '<form method="post"><fieldset><legend>Choose your organisation</legend>'
            f'<label><input type="radio" name="org" value="{CHOSEN_ORGANISATION}"> Acme Ltd</label>'
            '<label><input type="radio" name="org" value="globex"> Globex Corp</label></fieldset>'
            '<button>Continue</button></form><a href="/organisations/logout">Log out</a>',
        )

    def _sso(self, request: Request, action: str) -> Response:
        if action == "github":
            if self.identity_provider is None:
                return not_found()
            request.session["state"] = secrets.token_hex(8)
            back = quote(self.url("/sso/callback"))
            return redirect(
                self.identity_provider.url(f"/idp/authorize?back={back}&state={request.session['state']}")
            )
        if action == "callback":
            known = (
                request.query.get("state") == request.session.get("state")
                and self.identity_provider is not None
            )
            user = self.identity_provider.redeem(request.query.get("grant", "")) if known else None  # type: ignore[union-attr]
            return (
                self._let_in(request, "sso", user)
                if user
                else page("No", "<p class=error>Not signed in.</p>")
            )
        if action not in ("", "login"):
            return not_found()
        return page(
            "Sign in to Things",
            '<a class="btn" href="/sso/google" id="with-google">Continue with Google</a>'
            '<form action="/sso/github" method="get"><button><svg></svg> Sign in with GitHub</button></form>'
            '<footer><a href="https://github.example/things">Follow us on GitHub</a></footer>',
        )

    def redeem(self, grant: str) -> str | None:
        """The user behind a one-time grant of this site as an identity provider."""
        with self._lock:
            return self._grants.pop(grant, None)

    def _idp(self, request: Request, action: str) -> Response:
        back, state = request.query.get("back", ""), request.query.get("state", "")
        error = ""
        if request.posted:
            if request.form.get("login") == USERNAME and request.form.get("password") == PASSWORD:
                grant = secrets.token_hex(8)
                with self._lock:
                    self._grants[grant] = USERNAME
                return redirect(f"{back}?grant={grant}&state={state}")
            error = '<div class="flash flash-error">Incorrect username or password.</div>'
        return page(
            "Sign in to the provider",
            f'{error}<form method="post" action="/idp/{action}?back={quote(back)}&amp;state={state}">'
            '<label for="l">Username or email address</label><input id="l" name="login">'
            '<label for="p">Password</label><input id="p" name="password" type="password">'
            '<input type="submit" name="commit" value="Sign in"></form>',
        )

    def _push(self, request: Request, name: str) -> Response:
        if self._approved.is_set():
            return self._let_in(request, name, USERNAME)
        return page(
            "Approve this sign-in",
            "<main><h1>Approve the request on your phone</h1><p>Tap <b>47</b> in the app to sign in.</p>"
            f'<a href="/{name}/totp">Use a code instead</a></main>',
        )

    def _external(self, request: Request, action: str) -> Response:
        if action == "approve":
            self.approve()
            return page("Done", "<p>Approved.</p>")
        first = self._password_step(request, action, "external", "wait")
        if first is not None:
            return first
        if not self._half(request, "external"):
            return redirect("/external/login")
        return (
            self._code_step(request, "external", "totp")
            if action == "totp"
            else self._push(request, "external")
        )

    def _mail(self, request: Request, action: str) -> Response:
        if action == "sent":
            if self._approved.is_set():
                return self._let_in(request, "mail", EMAIL)
            return page(
                "Check your mail",
                f"<h1>Check your e-mail</h1><p>We sent a sign-in link to {EMAIL}. Click the link to sign in.</p>"
                '<meta http-equiv="refresh" content="3; url=/mail/sent?poll=1">',
            )
        if request.posted:
            return redirect("/mail/sent")
        return page(
            "Sign in",
            '<form method="post" action="/mail/login"><input type="email" name="address" aria-label="E-mail">'
            "<button>Continue with e-mail</button></form>",
        )

    def _slow(self, request: Request, action: str) -> Response:
        time.sleep(self.slow_seconds)
        return self._password_step(request, action, "slow", None) or not_found()

    def _broken(self, request: Request, action: str) -> Response:
        error = ""
        if request.posted:
            if request.form.get("USR") == "Jörg" and request.form.get("PWD") == "päss":
                return self._let_in(request, "broken", "Jörg")
            error = "<FONT COLOR=red CLASS=error>Falscher Benutzer oder falsches Kennwort"
        text = (
            f"<HTML><BODY BGCOLOR=#FFFFFF><CENTER><B>Willkommen für alle</B>{error}<TABLE><FORM METHOD=POST ACTION=/broken/login>"
            "<TR><TD>Benutzer:<TD><INPUT NAME=USR SIZE=20><TR><TD>Kennwort:<TD><INPUT TYPE=PASSWORD NAME=PWD>"
            "<TR><TD COLSPAN=2><INPUT TYPE=SUBMIT VALUE=Anmelden></FORM></TABLE><P>&copy; 1998 <A HREF=/impressum>Impressum"
        )
        return Response(text.encode("latin-1"), headers=[("Content-Type", "text/html; charset=ISO-8859-1")])

    def _crowded(self, request: Request, action: str) -> Response:
        if request.posted:
            return self._password_step(request, action, "crowded", None) or not_found()
        inner = self._password_step(request, action, "crowded", None)
        if inner is None:
            return not_found()
        login = inner.body.decode().partition("<body>")[2].partition("</body>")[0]
        return page(
            "Shop",
            '<header><form action="/search"><input name="q" type="text" placeholder="Search"><button>Go</button></form></header>'
            '<form method="post" action="/newsletter"><input type="email" name="email" placeholder="Your e-mail">'
            "<button>Subscribe</button></form>"
            '<form method="post" action="/register"><input name="username"><input type="password" name="password1">'
            '<input type="password" name="password2"><button>Create account</button></form>' + login,
        )

    def _captcha(self, request: Request, action: str) -> Response:
        return page(
            "Log in",
            '<form method="post"><input name="username"><input type="password" name="password">'
            '<div class="g-recaptcha" data-sitekey="x"></div><button>Log in</button></form>',
        )

    def _wall(self, request: Request, action: str) -> Response:
        return page(
            "Sorry",
            "<p>Our systems have detected unusual traffic from your network.</p>",
            status="403 Forbidden",
        )

    def _scripted(self, request: Request, action: str) -> Response:
        return page(
            "App",
            '<div id="root"></div><noscript>Please enable JavaScript.</noscript><script src="/app.js"></script>',
        )

    def _circle(self, request: Request, action: str) -> Response:
        return redirect("/circle/b" if action != "b" else "/circle/a")

    def _inward(self, request: Request, action: str) -> Response:
        return redirect(self.inward)

    def _huge(self, request: Request, action: str) -> Response:
        return page("Log in", "<p>" + "endless " * 500_000)

    def _silent(self, request: Request, action: str) -> Response:
        return page(
            "Log in",
            '<form method="post" action="/silent/login"><input name="username"><input type="password" name="password">'
            "<button>Log in</button></form>",
        )

    def _get(self, request: Request, action: str) -> Response:
        if "password" in request.query:
            if request.query.get("username") == USERNAME and request.query["password"] == PASSWORD:
                request.session["in:get"] = USERNAME
                return page("Welcome", '<p>Hello!</p><a href="/get/logout">Sign out</a>')
            return page("Log in", '<p class="error">Wrong.</p>' + self._get_form())
        return page("Log in", self._get_form())

    def _get_form(self) -> str:
        return (
            '<form action="/get/login"><input name="username"><input type="password" name="password">'
            "<button>Log in</button></form>"
        )

    def _fault(self, request: Request, action: str) -> Response:
        return page("Oops", "<p>Internal error.</p>", status="500 Internal Server Error")

    def _pages(self, request: Request, action: str) -> Response:
        if action == "password" and self._half(request, "pages"):
            if request.posted and request.form.get("secret") == PASSWORD:
                request.session["remembered"] = request.form.get("remember") == "yes"
                return self._let_in(request, "pages", f"{EMAIL} in {request.session['region']}")
            error = '<p role="alert">Not right.</p>' if request.posted else ""
            return page(
                "Password",
                f'{error}<form method="post"><label>Password <input type="password" name="secret"></label>'
                '<label><input type="checkbox" name="remember" value="yes"> Remember me</label>'
                '<select name="language"><option value="en" selected>English<option value="de">Deutsch</select>'
                "<button>Sign in</button></form>",
            )
        if request.posted and request.form.get("region") and request.form.get("email") == EMAIL:
            request.session |= {"half:pages": True, "region": request.form["region"]}
            return redirect("/pages/password")
        return page(
            "Sign in",
            '<form method="post" action="/pages/login"><label>E-mail <input type="email" name="email"></label>'
            '<label>Region <select name="region" required><option value="">Please choose<option value="eu">Europe'
            '<option value="us">America</select></label><button>Continue</button></form>',
        )

    def _admin(self, request: Request, action: str) -> Response:
        """The markup of Django's admin login (django/contrib/admin/templates/admin/login.html), 5.2."""
        if action == "" and not request.session.get("in:admin"):
            return redirect("/admin/login/?next=/admin/")
        if action == "":
            return page(
                "Site administration | Django site admin",
                '<div id="user-tools">Welcome, <strong>alice</strong>. <a href="/admin/password_change/">Change password</a> / '
                '<form id="logout-form" method="post" action="/admin/logout/"><button type="submit">Log out</button></form></div>',
            )
        error = ""
        if request.posted:
            if request.cookies.get("csrftoken") != request.form.get("csrfmiddlewaretoken"):
                return page(
                    "403 Forbidden",
                    "<h1>Forbidden</h1><p>CSRF verification failed.</p>",
                    status="403 Forbidden",
                )
            if (request.form.get("username"), request.form.get("password")) == (USERNAME, PASSWORD):
                self._let_in(request, "admin", USERNAME)
                return redirect(request.form.get("next") or "/admin/")
            error = (
                '<p class="errornote">Please enter the correct username and password for a staff account. '
                "Note that both fields may be case-sensitive.</p>"
            )
        token = request.cookies.get("csrftoken") or secrets.token_hex(16)
        answer = page(
            "Log in | Django site admin",
            f'{error}<div id="content-main"><form action="/admin/login/?next=/admin/" method="post" id="login-form">'
            f'<input type="hidden" name="csrfmiddlewaretoken" value="{token}">'
            '<div class="form-row"><label class="required" for="id_username">Username:</label> '
            '<input type="text" name="username" autofocus autocapitalize="none" autocomplete="username" maxlength="150" '
            'required id="id_username"></div><div class="form-row"><label class="required" for="id_password">Password:</label> '
            '<input type="password" name="password" autocomplete="current-password" required id="id_password">'
            '<input type="hidden" name="next" value="/admin/"></div>'
            '<div class="submit-row"><input type="submit" value="Log in"></div></form></div>',
        )
        answer.headers.append(("Set-Cookie", f"csrftoken={token}; Path=/; SameSite=Lax"))
        return answer

    def _turnedaway(self, request: Request, action: str) -> Response:
        if action == "session":
            if request.form.get("username") == USERNAME and request.form.get("password") == PASSWORD:
                return self._let_in(request, "turnedaway", USERNAME)
            return page("Sorry", '<p>Those are not the right ones.</p><a href="/turnedaway/login">Log in</a>')
        return page(
            "Log in",
            '<form method="post" action="/turnedaway/session"><input name="username"><input type="password" '
            'name="password"><button>Log in</button></form>',
        )

    def _relay(self, request: Request, action: str) -> Response:
        if action == "acs":
            return (
                self._let_in(request, "relay", USERNAME)
                if request.form.get("SAMLResponse") == "yes"
                else not_found()
            )
        first = self._password_step(request, action, "relay", "post")
        return first or page(
            "Working",
            '<body onload="document.forms[0].submit()"><form method="post" action="/relay/acs">'
            '<input type="hidden" name="SAMLResponse" value="yes"><noscript><button>Continue</button></noscript></form>',
        )

    def _forward(self, request: Request, action: str) -> Response:
        if request.posted:
            location = f"http://{self.form_host or self.domain}/simple/login"
            return Response(b"", status="307 Temporary Redirect", headers=[("Location", location)])
        return page("Log in", self._get_form().replace('<form action="/get/login"', '<form method="post"'))

    def _foreign(self, request: Request, action: str) -> Response:
        target = f"http://{self.form_host}/simple/login" if self.form_host else "/foreign/login"
        return page(
            "Log in",
            f'<form method="post" action="{target}"><input name="username"><input type="password" name="password">'
            "<button>Log in</button></form>",
        )


def page(title: str, body: str, *, status: str = "200 OK") -> Response:
    text = f"<!DOCTYPE html><html lang=en><head><title>{title}</title></head><body>{body}</body></html>"
    return Response(text.encode(), status=status)


def redirect(location: str) -> Response:
    return Response(b"", status="302 Found", headers=[("Location", location)])


def not_found() -> Response:
    return page("Not found", "<p>There is nothing here.</p>", status="404 Not Found")
