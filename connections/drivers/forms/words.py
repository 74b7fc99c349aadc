"""What words mean. English first, then the words of the larger European languages."""

from __future__ import annotations

import re

from connections.drivers.base import MfaType

TYPABLE = frozenset({"text", "email", "tel", "password", "number", "search", "url", "textarea", "date"})
IGNORECASE = re.IGNORECASE
IDENTIFIER = re.compile(
    r"\b(user ?(name|id)?|login( ?(name|id))?|log|e-?mail|phone|mobile|account|identifier|identity|member|"
    r"customer|"
    r"benutzer(name)?|nutzername|kennung|anmeldename|identifiant|usuario|correo|utente|gebruikersnaam|"
    r"session.?key)\b",
    IGNORECASE,
)
EMAIL, PHONE = (
    re.compile(r"\be-?mail|correo|courriel", IGNORECASE),
    re.compile(r"\b(phone|mobile|tel|telefon)", IGNORECASE),
)
PASSWORD = re.compile(
    r"pass(word|wd|phrase)?\b|passwort|kennwort|mot de passe|contraseña|wachtwoord|\bpwd\b", IGNORECASE
)
CODE = re.compile(
    r"\b(otp|totp|2fa|mfa|tfa|one.?time|passcode|auth(entication)? ?code|verif\w* ?code|security ?code|"
    r"sms ?code|login ?code|access ?code|confirmation ?code|backup ?code|(digit|6.digit).{0,12}code|code|"
    r"token|"
    r"einmal\w*|bestätigungscode|sicherheitscode|código|codice)\b",
    IGNORECASE,
)
NOT_CODE = re.compile(
    r"\b(zip|post(al)?|country|promo|coupon|voucher|discount|gift|area|language|csrf)\b", IGNORECASE
)
LOGIN = re.compile(
    r"\b(log.?(in|on)|sign.?(in|on)|anmelden|einloggen|connexion|se connecter|iniciar sesión|acceder|accedi|"
    r"entrar|inloggen|logga in|log ind|zaloguj)\b",
    IGNORECASE,
)
LOGIN_PATH = re.compile(
    r"(^|[/._-])(log-?in|log-?on|sign-?in|sign_in|signon|auth|sso|session|sessions|oauth2?|identifier|"
    r"wp-login)\b",
    IGNORECASE,
)
LOGOUT = re.compile(
    r"\b(log.?(out|off)|sign.?(out|off)|abmelden|ausloggen|déconnexion|se déconnecter|cerrar sesión|esci|"
    r"sair|"
    r"uitloggen|logga ut|wyloguj)\b",
    IGNORECASE,
)
LOGOUT_PATH = re.compile(r"[/._-](log-?out|log-?off|sign-?out|sign_out|signoff)\b", IGNORECASE)
SUBMIT = re.compile(
    rf"{LOGIN.pattern}|\b(continue|next|submit|verify|confirm|enter|go|proceed|weiter|bestätigen|suivant|"
    rf"continuer|"
    r"valider|siguiente|continuar|avanti|volgende)\b",
    IGNORECASE,
)
SIGN_UP = re.compile(
    r"\b(sign.?up|register|registration|create|join|subscribe|newsletter|notify|konto erstellen|registrieren|"
    r"s'inscrire|inscription|crear)\b",
    IGNORECASE,
)
RESET = re.compile(r"\b(forgot|forgotten|reset|recover|lost|vergessen|oublié|olvid)", IGNORECASE)
SEARCH = re.compile(r"\b(search|suche|recherche|buscar|query)\b", IGNORECASE)
ELSEWHERE = re.compile(
    r"\b(another|different|instead|other (way|method|option)|can.?t|trouble|don.?t have|switch|change|resend|"
    r"send (me )?(a |an |another |new )?(new )?(code|link|text|sms|email|push)|text me|call me|e-?mail me|"
    r"use (a|an|your|my) |try (again|another)|passkey|magic link|not you|andere)\b",
    IGNORECASE,
)
NEVER_A_WAY = re.compile(
    rf"{RESET.pattern}|{LOGOUT.pattern}|\b(privacy|terms|help|support|contact|about|imprint|cookies?|legal|"
    r"learn more|language|cancel|home|faq|sign.?up|register|create (an |a new )?(account|organi[sz]ation|"
    r"workspace))\b",
    IGNORECASE,
)
CHOOSE = re.compile(
    r"\b(choose|select|pick|wähle\w*|choisi\w*|elige|which)\b.{0,60}\b(account|organi[sz]ation|workspace|"
    r"team|tenant|"
    r"method|profile|way|option|konto|compte|cuenta|verif\w*|company)\b|how (would|do) you (like|want) to\b",
    IGNORECASE,
)
ACCOUNT_HEADING = re.compile(r"\b(account|profile|konto|compte|cuenta)\b", IGNORECASE)
CONFIRM = re.compile(
    r"\b(continue|yes|no|allow|authori[sz]e|accept|agree|confirm|approve|skip|not now|later|trust|weiter|ja|"
    r"nein|done)\b",
    IGNORECASE,
)
EXTERNAL = re.compile(
    r"check your (e-?mail|mail|inbox|phone|mobile|device|authenticator)|approve (the |this |your )?(sign|"
    r"log|request|"
    r"notification|on your|in the|it)|approve .{0,40}\bon your (phone|device|mobile)|"
    r"(sent|pushed) (you )?(a|an|the) ([\w-]+ ){0,2}(link|notification|push|request|prompt)|"
    r"(open|click|follow|tap) (the|on the|your) ([\w-]+ ){0,3}(link|app|notification)|magic link|"
    r"waiting for (your )?(approval|confirmation)|tap .{0,20}\b(yes|approve|\d{1,3})\b|"
    r"confirm .{0,40}\bon your (phone|device|mobile)|prüfen sie ihr|bestätigen sie .{0,40}(handy|telefon|"
    r"gerät)",
    IGNORECASE,
)
BOT = re.compile(
    r"unusual traffic|verify (that )?you(.re| are) (a )?human|are you a robot|not a robot|"
    r"checking your browser|"
    r"just a moment\.\.\.|automated (queries|requests|access|traffic)|bot (detected|protection)|"
    r"(suspicious|unusual) activity (from|has been)|attention required! \| cloudflare",
    IGNORECASE,
)
CAPTCHA = re.compile(r"g-recaptcha|h-captcha|cf-turnstile|frc-captcha|arkose|funcaptcha|captcha", IGNORECASE)
NEEDS_SCRIPT = re.compile(
    r"(enable|requires?|need|activate|turn on|aktivieren).{0,30}java ?script", IGNORECASE
)
REMEMBER = re.compile(
    r"remember|keep me|stay (signed|logged)|trust (this|my)|angemeldet bleiben|rester connect", IGNORECASE
)

METHODS: tuple[tuple[MfaType, re.Pattern[str]], ...] = (
    (
        "totp",
        re.compile(
            r"authenticat(or|ion) app|authenticator|authy|\btotp\b|time.based|two.factor app|2fa app",
            IGNORECASE,
        ),
    ),
    (
        "sms",
        re.compile(
            r"\bsms\b|text (message|me)|\btext(ed)?\b.{0,20}\b(code|phone|number)|per sms", IGNORECASE
        ),
    ),
    ("call", re.compile(r"\b(phone call|call me|voice call|anruf)\b|\bcall\b", IGNORECASE)),
    ("passkey", re.compile(r"passkey|security key|webauthn|yubikey|fido", IGNORECASE)),
    (
        "push",
        re.compile(
            r"\bpush\b|notification|approve .{0,30}(phone|device|app)|on your (phone|device)|duo\b",
            IGNORECASE,
        ),
    ),
    ("email", re.compile(r"e-?mail|inbox|magic link", IGNORECASE)),
    ("password", PASSWORD),
)
SENT_TO = re.compile(
    r"(?:sent|texted|e-?mailed|sending|ending|code to|call(?:ed|ing)?|text|sms|e-?mail)\b[^.!?]{0,60}?"
    r"(?:\b(?:to|at|in|with)\b)?\s*[:(]?\s*"
    r"((?:[\w.+•*…-]+@[\w.•*…-]+\w)|(?:\+?[\d() -]*[•*…x]{1,}[\d •*…x()-]*\d{1,4})|(?:\+\d[\d -]{5,}\d))",
    IGNORECASE,
)
ENDING = re.compile(r"\bending (?:in|with) (\d{2,4})\b", IGNORECASE)
ADDRESS = re.compile(r"[\w.+•*…-]+@[\w•*…-]+(\.[\w•*…-]+)*", IGNORECASE)

_PROVIDERS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("google", re.compile(r"\bgoogle\b|google-oauth2?|accounts\.google\.", IGNORECASE)),
    ("github", re.compile(r"\bgithub\b", IGNORECASE)),
    (
        "microsoft",
        re.compile(r"\b(microsoft|azure|entra|office ?365|live\.com|outlook)\b|microsoftonline", IGNORECASE),
    ),
    ("apple", re.compile(r"\bapple(id)?\b", IGNORECASE)),
    ("okta", re.compile(r"\bokta\b", IGNORECASE)),
    ("facebook", re.compile(r"\bfacebook\b", IGNORECASE)),
    ("linkedin", re.compile(r"\blinked.?in\b", IGNORECASE)),
    ("gitlab", re.compile(r"\bgitlab\b", IGNORECASE)),
    ("bitbucket", re.compile(r"\bbitbucket\b", IGNORECASE)),
    ("twitter", re.compile(r"\btwitter\b|\bwith x\b", IGNORECASE)),
    ("amazon", re.compile(r"\bamazon\b|amazoncognito", IGNORECASE)),
    ("slack", re.compile(r"\bslack\b", IGNORECASE)),
    ("discord", re.compile(r"\bdiscord\b", IGNORECASE)),
    ("auth0", re.compile(r"\bauth0\b", IGNORECASE)),
    ("onelogin", re.compile(r"\bonelogin\b", IGNORECASE)),
    ("ping", re.compile(r"\bping ?(one|identity)\b", IGNORECASE)),
    ("sso", re.compile(r"\b(sso|saml|single sign.?on)\b", IGNORECASE)),
)
_WITH = re.compile(r"\b(with|using|via|mit|avec|con|through)\b|single sign.?on|\bsso\b", IGNORECASE)
_AUTH_PATH = re.compile(
    r"o?auth|/login|/connect|/social|/sso|saml|sign-?in|openid|/begin|accounts\.google", IGNORECASE
)


def sso_of(label: str, hints: str = "") -> str | None:
    """The identity provider that a button or link leads to; None when it leads to none.

    ``hints`` is its address, id and class: with it, an icon without words is enough ("Follow us on GitHub" is
    not).
    """
    for provider, pattern in _PROVIDERS:
        if pattern.search(label) and (_WITH.search(label) or _AUTH_PATH.search(hints)):
            return provider
        if not label.strip() and pattern.search(hints) and _AUTH_PATH.search(hints):
            return provider
    return None
