"""People: accounts, passwords, API tokens and browser sessions."""

from __future__ import annotations

import datetime as dt
import hmac
import re
import secrets
import uuid
from functools import lru_cache

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import delete, func, or_, select, text
from sqlalchemy.orm import Session

from jobs import audit
from jobs.problems import Conflict, Forbidden, Invalid, NotFound, TooMany, Unauthenticated
from jobs.settings import Settings
from jobs.tables import SignInAttempt, Token, User, WebSession

ROLES = ("viewer", "member", "admin")
SCOPES = ("read", "write", "admin")
SCOPES_OF_ROLE = {"viewer": ("read",), "member": ("read", "write"), "admin": SCOPES}
ATTEMPTS, WINDOW_MINUTES = 10, 15
PASSWORD_MIN, PASSWORD_MAX = 10, 1000
_EMAIL = re.compile(r"[^\s@\x00-\x1f<>\"]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
_hasher = PasswordHasher()
_ADMIN_LOCK = 7_310_001  # one process at a time makes the first admin


def create_user(
    session: Session,
    email: str,
    *,
    name: str = "",
    role: str = "member",
    password: str | None = None,
) -> User:
    """A new account. Conflict when the address is taken; Invalid names the field."""
    address = _address(email)
    if role not in ROLES:
        raise Invalid(f"A role is one of {', '.join(ROLES)}.", field="role")
    if session.scalars(select(User.id).where(User.email == address)).first() is not None:
        raise Conflict(f"{address} already has an account.", field="email")
    user = User(email=address, name=name.strip()[:120], role=role)
    if password is not None:
        set_password(session, user, password)
    session.add(user)
    session.flush()
    session.refresh(user)
    audit.record(session, None, "user.create", user.id, email=address, role=role)
    return user


def ensure_first_admin(session: Session, settings: Settings) -> User | None:
    """Make the admin named by the environment, once: only while there are no accounts at all."""
    if settings.admin_email is None or settings.admin_password is None:
        return None
    session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADMIN_LOCK})
    if session.execute(select(func.count()).select_from(User)).scalar_one():
        return None
    password = settings.admin_password.get_secret_value()
    return create_user(session, settings.admin_email, role="admin", password=password)


def set_password(session: Session, user: User, password: str) -> None:
    """Replace the password and end the account's browser sessions. Invalid: too short or long."""
    if not PASSWORD_MIN <= len(password) <= PASSWORD_MAX:
        raise Invalid(
            f"A password has {PASSWORD_MIN} to {PASSWORD_MAX} characters.", field="password"
        )
    user.password_hash = _hasher.hash(password)
    if user.id is not None:
        session.execute(delete(WebSession).where(WebSession.user_id == user.id))


def verify_password(session: Session, email: str, password: str, address: str) -> User:
    """The account, if the password is right. Unauthenticated; TooMany after ten failures.

    Failures count per e-mail and per network address within 15 minutes. The failed attempt is only
    remembered if the caller commits (also after Unauthenticated).
    """
    wanted = _lookup(email)
    recent = SignInAttempt.at > func.now() - dt.timedelta(minutes=WINDOW_MINUTES)
    failures = session.execute(
        select(func.count())
        .where(or_(SignInAttempt.email == wanted, SignInAttempt.address == address))
        .where(recent)
    ).scalar_one()
    if failures >= ATTEMPTS:
        raise TooMany(f"Too many failed sign-ins. Try again in {WINDOW_MINUTES} minutes.")
    user = session.scalars(select(User).where(User.email == wanted)).one_or_none()
    # an unknown address takes as long as a wrong password
    stored = user.password_hash if user is not None and user.password_hash else _decoy()
    right = _matches(stored, password)
    if not right or user is None or user.password_hash is None or user.disabled:
        session.add(SignInAttempt(email=wanted, address=address))
        session.flush()
        raise Unauthenticated("The e-mail address or the password is wrong.")
    if _hasher.check_needs_rehash(user.password_hash):
        user.password_hash = _hasher.hash(password)
    session.execute(delete(SignInAttempt).where(SignInAttempt.email == wanted))
    return user


def _matches(stored: str, password: str) -> bool:
    try:
        return _hasher.verify(stored, password[: PASSWORD_MAX + 1])
    except (VerificationError, InvalidHashError, UnicodeEncodeError):
        return False


@lru_cache(maxsize=1)
def _decoy() -> str:
    return _hasher.hash(secrets.token_urlsafe(16))


def list_users(session: Session) -> list[User]:
    """All accounts by e-mail."""
    return list(session.scalars(select(User).order_by(User.email)))


def user_by_email(session: Session, email: str) -> User:
    """The account with this address. NotFound."""
    wanted = _lookup(email)
    user = session.scalars(select(User).where(User.email == wanted)).one_or_none()
    if user is None:
        raise NotFound(f"Nobody here has the address {wanted}.")
    return user


def issue_token(
    session: Session,
    user: User,
    *,
    name: str = "",
    scopes: list[str] | None = None,
    days: int | None = None,
    secret: str,
) -> tuple[Token, str]:
    """A new API token: its row, and the token itself, which is shown once and never kept.

    `scopes` is a subset of read, write, admin that the role has; empty: all that the role has.
    `days` is its life, None: until revoked.
    """
    wanted = list(dict.fromkeys(scopes or []))
    for scope in wanted:
        if scope not in SCOPES:
            raise Invalid(f"A scope is one of {', '.join(SCOPES)}.", field="scopes")
        if scope not in SCOPES_OF_ROLE[user.role]:
            raise Forbidden(f"The role {user.role} does not include {scope}.", field="scopes")
    if days is not None and not 1 <= days <= 3650:
        raise Invalid("A token lives 1 to 3650 days.", field="days")
    if len(name) > 120 or "\x00" in name:
        raise Invalid("A token's name has at most 120 characters.", field="name")
    plain = "ns_" + secrets.token_urlsafe(32)
    token = Token(
        user_id=user.id,
        name=name,
        prefix=plain[:10],
        digest=_digest(plain, secret),
        scopes=wanted,
        expires_at=None if days is None else func.now() + dt.timedelta(days=days),
    )
    session.add(token)
    session.flush()
    session.refresh(token)
    audit.record(session, user.id, "token.issue", token.id, scopes=wanted, days=days)
    return token, plain


def authenticate(session: Session, token: str, secret: str) -> tuple[User, Token]:
    """Whose token this is. Unauthenticated says whether it is unknown, expired or revoked."""
    row = session.execute(
        select(
            Token,
            User,
            (Token.expires_at <= func.now()).label("expired"),
            func.coalesce(Token.last_used_at < func.now() - dt.timedelta(minutes=1), True).label(
                "stale"
            ),
        )
        .join(User, User.id == Token.user_id)
        .where(Token.digest == _digest(token, secret))
    ).one_or_none()
    if row is None:
        raise Unauthenticated("This token is not known here. Make a new one under Tokens.")
    found, user = row.Token, row.User
    if found.revoked_at is not None:
        raise Unauthenticated("This token was revoked. Make a new one under Tokens.")
    if row.expired:
        raise Unauthenticated("This token has expired. Make a new one under Tokens.")
    if user.disabled:
        raise Unauthenticated("This account is disabled. Ask an administrator.")
    if row.stale:
        found.last_used_at = func.now()
    return user, found


def scopes_of(user: User, token: Token | None) -> tuple[str, ...]:
    """What a caller may do: the role's scopes, cut to the token's where it names any."""
    allowed = SCOPES_OF_ROLE.get(user.role, ())
    if token is None or not token.scopes:
        return allowed
    return tuple(scope for scope in allowed if scope in token.scopes)


def list_tokens(session: Session, user: User) -> list[Token]:
    """The user's tokens, newest first, revoked ones too."""
    return list(
        session.scalars(
            select(Token).where(Token.user_id == user.id).order_by(Token.created_at.desc())
        )
    )


def revoke_token(session: Session, user: User, token_id: uuid.UUID) -> None:
    """End a token of this user. NotFound for anybody else's."""
    token = session.get(Token, token_id)
    if token is None or token.user_id != user.id:
        raise NotFound("There is no such token.")
    if token.revoked_at is None:
        token.revoked_at = func.now()
        audit.record(session, user.id, "token.revoke", token.id)
    session.flush()


def open_session(session: Session, user: User, *, hours: float, secret: str) -> str:
    """A browser session; returns the cookie's value, of which only an HMAC is kept."""
    session.execute(delete(WebSession).where(WebSession.expires_at <= func.now()))
    cookie = secrets.token_urlsafe(32)
    expires = func.now() + dt.timedelta(hours=hours)
    session.add(WebSession(digest=_digest(cookie, secret), user_id=user.id, expires_at=expires))
    session.flush()
    return cookie


def user_of_session(session: Session, cookie: str, secret: str) -> User | None:
    """Who signed in with this cookie; None when it is unknown, over, or the account disabled."""
    return session.scalars(
        select(User)
        .join(WebSession, WebSession.user_id == User.id)
        .where(
            WebSession.digest == _digest(cookie, secret),
            WebSession.expires_at > func.now(),
            User.disabled.is_(False),
        )
    ).one_or_none()


def close_session(session: Session, cookie: str, secret: str) -> None:
    """Sign out."""
    session.execute(delete(WebSession).where(WebSession.digest == _digest(cookie, secret)))


def _address(email: str) -> str:
    plain = email.strip().lower()
    if not _EMAIL.fullmatch(plain):
        raise Invalid("This is not an e-mail address.", field="email")
    return plain


def _lookup(email: str) -> str:
    """An address as it is looked up: in small letters, without what PostgreSQL cannot hold."""
    return email.strip().lower().replace("\x00", "").encode("utf-8", "replace").decode()[:320]


def _digest(plain: str, secret: str) -> str:
    return hmac.new(secret.encode(), plain.encode("utf-8", "replace"), "sha256").hexdigest()
