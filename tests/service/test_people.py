"""Accounts, passwords, tokens and browser sessions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pydantic import SecretStr
from sqlalchemy import func, select, text, update

from jobs import people
from jobs.database import Sessions
from jobs.problems import Conflict, Forbidden, Invalid, NotFound, TooMany, Unauthenticated
from jobs.settings import Settings
from jobs.tables import Audit, SignInAttempt, Token, User, WebSession
from tests.conftest import SECRET

PASSWORD = "correct horse battery"


def test_addresses_are_unique_whatever_their_case(sessions: Sessions) -> None:
    with sessions.begin() as session:
        user = people.create_user(session, " Ann@Example.org ", name="Ann")
        assert user.email == "ann@example.org" and people.user_by_email(session, "ANN@example.org")
        with pytest.raises(Conflict) as caught:
            people.create_user(session, "ann@EXAMPLE.org")
        assert caught.value.field == "email"
        with pytest.raises(NotFound):
            people.user_by_email(session, "nobody\x00@example.org")
        assert people.list_users(session) == [user]
        assert session.scalars(select(Audit.action)).all() == ["user.create"]


@pytest.mark.parametrize("email", ["", "ann", "a b@c", "a@b\n", "@x", "a\x00@b", "<a@b>"[:-1]])
def test_bad_addresses(sessions: Sessions, email: str) -> None:
    with sessions.begin() as session, pytest.raises(Invalid) as caught:
        people.create_user(session, email if email != "a@b\n" else "a@b\nc")
    assert caught.value.field == "email"


def test_bad_roles_and_passwords(sessions: Sessions) -> None:
    with sessions.begin() as session:
        with pytest.raises(Invalid, match="viewer, member, admin"):
            people.create_user(session, "a@example.org", role="root")
        for password in ("short", "x" * 1001):
            with pytest.raises(Invalid) as caught:
                people.create_user(session, "a@example.org", password=password)
            assert caught.value.field == "password"


def test_first_admin_only_once(sessions: Sessions, make_settings: Callable[..., Settings]) -> None:
    settings = make_settings(admin_email="root@example.org", admin_password=SecretStr(PASSWORD))
    with sessions.begin() as session:
        made = people.ensure_first_admin(session, settings)
        assert made is not None and made.role == "admin"
        assert people.verify_password(session, "root@example.org", PASSWORD, "::1") == made
    with sessions.begin() as session:
        assert people.ensure_first_admin(session, settings) is None
        assert session.execute(select(func.count()).select_from(User)).scalar_one() == 1
        assert people.ensure_first_admin(session, make_settings()) is None


def test_passwords_are_hashed_and_checked(sessions: Sessions) -> None:
    with sessions.begin() as session:
        user = people.create_user(session, "a@example.org", password=PASSWORD)
        people.create_user(session, "nopassword@example.org")
        assert user.password_hash is not None and user.password_hash.startswith("$argon2id$")
        assert people.verify_password(session, "A@example.org", PASSWORD, "") == user
        words = set()
        for email, password in (
            ("a@example.org", PASSWORD + "!"),
            ("nobody@example.org", PASSWORD),
            ("nopassword@example.org", ""),
            ("a\x00@example.org", "\ud800"),
        ):
            with pytest.raises(Unauthenticated) as caught:
                people.verify_password(session, email, password, "")
            words.add(caught.value.detail)
        assert len(words) == 1  # nothing tells whether the account exists
        user.disabled = True
        with pytest.raises(Unauthenticated):
            people.verify_password(session, "a@example.org", PASSWORD, "")


@pytest.mark.parametrize("same", ["email", "address"])
def test_ten_failures_are_enough(sessions: Sessions, same: str) -> None:
    with sessions.begin() as session:
        people.create_user(session, "a@example.org", password=PASSWORD)
        for attempt in range(10):
            email = "a@example.org" if same == "email" else f"{attempt}@example.org"
            address = "10.0.0.1" if same == "address" else f"10.0.0.{attempt}"
            with pytest.raises(Unauthenticated):
                people.verify_password(session, email, "wrong password", address)
        with pytest.raises(TooMany):
            people.verify_password(session, "a@example.org", PASSWORD, "10.0.0.1")
        session.execute(update(SignInAttempt).values(at=func.now() - text("interval '16 min'")))
        assert people.verify_password(session, "a@example.org", PASSWORD, "10.0.0.1")


def test_a_token_is_shown_once_and_kept_as_a_digest(sessions: Sessions, member: User) -> None:
    with sessions.begin() as session:
        row, plain = people.issue_token(session, member, name="ci", secret=SECRET)
        assert plain.startswith("ns_") and len(plain) == 46 and plain.startswith(row.prefix)
    with sessions.begin() as session:
        user, token = people.authenticate(session, plain, SECRET)
        assert (user.id, token.id) == (member.id, row.id)
        assert people.scopes_of(user, token) == ("read", "write")
        dump = session.execute(text("SELECT json_agg(t)::text FROM tokens t")).scalar_one()
        assert plain[3:] not in dump
        with pytest.raises(Unauthenticated):
            people.authenticate(session, plain, SECRET + "x")


def test_unknown_expired_and_revoked_each_say_so(sessions: Sessions, member: User) -> None:
    with sessions.begin() as session:
        old, expired = people.issue_token(session, member, days=1, secret=SECRET)
        session.execute(update(Token).where(Token.id == old.id).values(expires_at=func.now()))
        gone, revoked = people.issue_token(session, member, secret=SECRET)
        people.revoke_token(session, member, gone.id)
        for plain, word in (("ns_x", "not known"), (expired, "expired"), (revoked, "revoked")):
            with pytest.raises(Unauthenticated, match=word):
                people.authenticate(session, plain, SECRET)
        assert len(people.list_tokens(session, member)) == 2


def test_last_use_is_written_at_most_once_a_minute(sessions: Sessions, member: User) -> None:
    with sessions.begin() as session:
        row, plain = people.issue_token(session, member, secret=SECRET)
    used = []
    for _ in range(2):
        with sessions.begin() as session:
            people.authenticate(session, plain, SECRET)
        with sessions.begin() as session:
            used.append(session.get_one(Token, row.id).last_used_at)
    assert used[0] is not None and used[0] == used[1]


def test_scopes_stay_within_the_role(
    sessions: Sessions, make_user: Callable[..., User], member: User
) -> None:
    viewer = make_user(role="viewer")
    with sessions.begin() as session:
        with pytest.raises(Forbidden):
            people.issue_token(session, viewer, scopes=["write"], secret=SECRET)
        with pytest.raises(Forbidden):
            people.issue_token(session, member, scopes=["admin"], secret=SECRET)
        with pytest.raises(Invalid, match="read, write, admin"):
            people.issue_token(session, member, scopes=["all"], secret=SECRET)
        row, _ = people.issue_token(session, member, scopes=["read"], secret=SECRET)
        assert people.scopes_of(member, row) == ("read",)
        with pytest.raises(NotFound):
            people.revoke_token(session, viewer, row.id)


def test_browser_sessions(sessions: Sessions, member: User) -> None:
    with sessions.begin() as session:
        cookie = people.open_session(session, member, hours=1, secret=SECRET)
        other = people.open_session(session, member, hours=1, secret=SECRET)
        found = people.user_of_session(session, cookie, SECRET)
        assert found is not None and found.id == member.id
        assert people.user_of_session(session, cookie + "x", SECRET) is None
        people.close_session(session, cookie, SECRET)
        assert people.user_of_session(session, cookie, SECRET) is None
        session.execute(update(WebSession).values(expires_at=func.now()))
        assert people.user_of_session(session, other, SECRET) is None
        third = people.open_session(session, member, hours=1, secret=SECRET)
        people.set_password(session, session.get_one(User, member.id), PASSWORD)
        assert people.user_of_session(session, third, SECRET) is None
