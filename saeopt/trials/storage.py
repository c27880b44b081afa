"""The store of studies: SQLite for one host, PostgreSQL for several.

Every connection survives a server that restarts; every message shows the URL without its password.
"""

from __future__ import annotations

import datetime as dt
import json
import shlex
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy as sa
import tenacity
from filelock import FileLock
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from saeopt.config.places import expanded
from saeopt.config.settings import DEFAULT_STORAGE, redact, remember_secret, settings
from saeopt.config.study import StudySpec
from saeopt.console import log, program
from saeopt.errors import UserError
from saeopt.trials import internals as db

T = TypeVar("T")
SPEC_KEY, IDENTITY_KEY = "saeopt:spec", "saeopt:identity"
_HOPELESS = ("password authentication failed", "no password supplied", "does not exist", "no pg_hba.conf entry")

optuna.logging.set_verbosity(optuna.logging.WARNING)


class StudyGone(Exception):
    """The study was deleted, or another one has its key now."""


def store_url(url: str | None = None) -> URL:
    """The store's address: the argument, `SAEOPT_STORAGE`, or the SQLite file in `studies/`."""
    text = url or settings().storage.get_secret_value() or DEFAULT_STORAGE
    if "://" not in text and text.endswith((".db", ".sqlite", ".sqlite3")):
        text = f"sqlite:///{text}"
    try:
        parsed = sa.make_url(text)
        if "@" in (parsed.host or "") or "@" in (parsed.database or ""):
            raise ValueError("a password that is cut in two")
    except (sa.exc.ArgumentError, ValueError):  # nothing of it is shown: it may be a password
        raise UserError(
            "--storage: not a URL (sqlite:///file.db or postgresql://USER:PASSWORD@HOST:PORT/NAME;"
            " in user and password @ is written %40, : is %3A, / is %2F)"
        ) from None
    secrets = [str(value) for key, value in parsed.query.items() if _is_secret(key)]
    for secret in [parsed.password, *secrets]:
        if secret:
            remember_secret(secret)
    if parsed.drivername in ("postgres", "postgresql", "postgresql+psycopg2"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise UserError(f"--storage {shown(parsed)}: sqlite:///… or postgresql://… is needed")
    if parsed.drivername != "sqlite":
        return parsed
    if parsed.database in (None, "", ":memory:"):
        raise UserError("--storage: an SQLite store needs a file, as in sqlite:///studies/saeopt.db")
    try:
        return parsed.set(database=expanded(str(parsed.database)))
    except UserError as error:
        raise UserError(f"--storage {shown(parsed)}: {error}") from None


def shown(url: URL) -> str:
    """The address without its passwords."""
    query = {key: "***" if _is_secret(key) else value for key, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True)


def _is_secret(key: str) -> bool:
    return any(word in key.lower() for word in ("password", "passwd", "secret", "token"))


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: the server restarts, the connection broke, the file is locked."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OperationalError | InterfaceError | PoolTimeoutError):
            return not any(text in str(seen) for text in _HOPELESS)
        if isinstance(seen, DBAPIError) and seen.connection_invalidated:
            return True
        seen = seen.__cause__
    return False


def patience() -> float:
    """Seconds that a worker waits for a lost store (`SAEOPT_STORE_PATIENCE`)."""
    return settings().store_patience


def persistently(action: Callable[[], T], what: str, seconds: float | None = None) -> T:
    """Run `action` until it succeeds, while the store cannot be reached for up to `seconds` (None: `patience()`)."""

    def warn_once(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            cause = redact(" ".join(str(state.outcome.exception()).split())[:200])
            log.warning("the store cannot be reached (%s); trying again: %s", what, cause)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=3),
        stop=tenacity.stop_after_delay(patience() if seconds is None else seconds),
        before_sleep=warn_once,
        reraise=True,
    )
    return retrying(action)


def _engine_kwargs(url: URL) -> dict[str, Any]:
    if url.drivername == "sqlite":
        return {"connect_args": {"timeout": 60}}
    return {
        "pool_pre_ping": True,
        "pool_size": 2,
        "max_overflow": 4,
        "connect_args": {
            "connect_timeout": 5,
            # a worker that is frozen in the middle of a transaction loses its locks, which others wait for
            "options": "-c timezone=UTC -c idle_in_transaction_session_timeout=20s",
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 20_000,
        },
    }


@dataclass
class Store:
    """An open store. Importing and opening it needs no torch."""

    url: URL
    optuna: optuna.storages.RDBStorage
    _cached: Any = field(default=None, repr=False)
    _blind: Any = field(default=None, repr=False)
    given: bool = False
    """Whether the address was given with the command, so that the next command needs it too."""

    @classmethod
    def open(cls, url: str | None = None, *, create: bool = True, patience: float = 10.0) -> Store:
        """Open the store and set up its tables, also when many processes do so at the same moment.

        Raises:
            UserError: it cannot be reached within `patience` seconds, or (`create` false) there is no file.
        """
        parsed = store_url(url)
        if parsed.drivername == "sqlite":
            path = Path(str(parsed.database))
            if not create and not path.exists():
                raise UserError(f"{shown(parsed)}: no such store (create a study first, or give --storage)")
            path.parent.mkdir(parents=True, exist_ok=True)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_while_others_set_up),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=2),
            stop=tenacity.stop_after_delay(patience),
            reraise=True,
        )
        try:
            return cls(parsed, retrying(_open, parsed), given=url is not None)
        except (sa.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError, RuntimeError, OSError) as error:
            cause = " ".join(str(getattr(error, "orig", None) or error).split())
            raise UserError(f"cannot open the store {shown(parsed)}: {redact(cause)[:300]}") from None

    @property
    def engine(self) -> sa.Engine:
        """SQLAlchemy's engine."""
        return self.optuna.engine

    @cached_property
    def shown(self) -> str:
        """The address without its password."""
        return shown(self.url)

    def command(self, *words: object) -> str:
        """`saeopt WORDS` as a person would type it for this store (a password stays hidden)."""
        more = ["--storage", self.shown] if self.given else []
        return " ".join([program(), *(shlex.quote(str(word)) for word in (*words, *more))])

    @property
    def is_sqlite(self) -> bool:
        """One host only."""
        return self.url.drivername == "sqlite"

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that will write; on SQLite it takes the writer's lock first (a late upgrade would fail)."""
        if not self.is_sqlite:
            with self.engine.begin() as connection:
                yield connection
            return
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.exec_driver_sql("ROLLBACK")
                raise
            connection.exec_driver_sql("COMMIT")

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A connection to read from."""
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """One process at a time, over all hosts that use the store."""
        with _lock(self.url, self.engine, name):
            yield

    def now(self) -> dt.datetime:
        """The store's clock: naive UTC."""
        with self.read() as connection:
            return db.db_now(connection)

    def study_names(self) -> list[str]:
        """All studies, oldest first."""
        with self.read() as connection:
            return list(db.study_keys(connection))

    def study_id(self, name: str) -> int:
        """A study's key; :class:`UserError` if there is none of that name."""
        with self.read() as connection:
            keys = db.study_keys(connection)
        if name not in keys:
            from saeopt.config.base import nearest

            names = list(keys)
            raise UserError(f"no study '{name}' in {self.shown}{nearest(name, names) if names else ' (it is empty)'}")
        return keys[name]

    def spec(self, name: str) -> StudySpec:
        """The spec that the study holds."""
        study_id = self.study_id(name)
        with self.read() as connection:
            text = db.get_attrs(connection, db.study_attrs, study_id, SPEC_KEY).get(SPEC_KEY)
        if text is None:
            raise UserError(f"study '{name}' in {self.shown} was not made by 'saeopt study create'")
        return StudySpec.from_json(text)

    def identity(self, study_id: int) -> str:
        """What no other study ever has, unlike name and key; a study of an older version is given one."""
        with self.read() as connection:
            known = identity_of(connection, study_id)
        if known is not None:
            return known
        with self.write() as connection:
            if identity_of(connection, study_id) is None:
                fresh = {"study_id": study_id, "key": IDENTITY_KEY, "value_json": json.dumps(new_identity())}
                db.insert_missing(connection, db.study_attrs, ("study_id", "key"), fresh)
            return str(identity_of(connection, study_id))

    def study(self, name: str, **kwargs: Any) -> optuna.Study:
        """The study as an Optuna object."""
        self.study_id(name)
        if self._cached is None:
            self._cached = optuna.storages.get_storage(self.optuna)
        return optuna.load_study(study_name=name, storage=self._cached, **kwargs)

    def sampling_study(self, name: str, **kwargs: Any) -> optuna.Study:
        """The study as samplers and pruners see it, without its waiting trials: fast in a long queue."""
        if self._blind is None:
            self._blind = db.QueueBlindStorage(self.optuna)
        return optuna.load_study(study_name=name, storage=self._blind, **kwargs)

    def close(self) -> None:
        """Close all connections."""
        self.optuna.remove_session()
        self.engine.dispose()


def identity_of(connection: sa.Connection, study_id: int) -> str | None:
    """The identity of the study that has this key now."""
    found = db.get_attrs(connection, db.study_attrs, study_id, IDENTITY_KEY).get(IDENTITY_KEY)
    return None if found is None else str(found)


def check_identity(connection: sa.Connection, study_id: int, identity: str | None) -> None:
    """Raise :class:`StudyGone` where the study is not the one with this identity (None: any)."""
    if identity is not None and identity_of(connection, study_id) != identity:
        raise StudyGone(f"study {study_id}")


def new_identity() -> str:
    """A name for a study that is never used twice."""
    return uuid.uuid4().hex


def _while_others_set_up(error: BaseException) -> bool:
    """Errors of several processes that create the tables, or of a server that is starting."""
    causes = (error, error.__cause__)
    return any(
        isinstance(e, IntegrityError | OperationalError | ProgrammingError | InterfaceError)
        and not any(text in str(e) for text in _HOPELESS)
        for e in causes
    )


def _open(url: URL) -> optuna.storages.RDBStorage:
    text = url.render_as_string(hide_password=False)
    kwargs = _engine_kwargs(url)
    probe = sa.create_engine(url, **kwargs)
    try:
        if url.drivername == "sqlite":
            with probe.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        if db.schema_is_there(probe):
            storage = db.make_storage(text, kwargs)
        else:
            with _lock(url, probe, "schema"):
                storage = db.make_storage(text, kwargs)
    finally:
        probe.dispose()
    if url.drivername == "sqlite":
        storage.engine.dispose()
        sa.event.listen(storage.engine, "connect", _fast_sqlite)
    return storage


def _fast_sqlite(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA synchronous=NORMAL")


@contextmanager
def _lock(url: URL, engine: sa.Engine, name: str) -> Iterator[None]:
    if url.drivername == "sqlite":
        with FileLock(f"{url.database}.{name}.lock", timeout=120):
            yield
        return
    import hashlib

    key = int.from_bytes(hashlib.sha256(f"saeopt:{name}".encode()).digest()[:7], "big")
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        deadline = time.monotonic() + 120
        while not connection.execute(sa.text("SELECT pg_try_advisory_lock(:key)"), {"key": key}).scalar():
            if time.monotonic() > deadline:
                raise UserError(f"another process has held the lock '{name}' of the store for two minutes")
            time.sleep(0.1)
        try:
            yield
        finally:
            connection.execute(sa.text("SELECT pg_advisory_unlock(:key)"), {"key": key})
