"""Secrets and machine settings: environment variables or `.env`, never written to a run folder or a study."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from functools import cache

from pydantic import AliasChoices, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from saeopt.errors import UserError

DEFAULT_STORAGE = "sqlite:///studies/saeopt.db"
_URL_PASSWORD = re.compile(r"(?P<head>[a-z][a-z0-9+.-]*://[^\s:/]*:)\S+(?=@)", re.IGNORECASE)
_NAMED_PASSWORD = re.compile(r"(?P<head>(?:\b|ssl)(?:password|passwd|pwd)=)[^&\s'\"]+", re.IGNORECASE)


class Settings(BaseSettings):
    """What the environment or `.env` in the working directory says; `HF_ACCESS_TOKEN` is the old name of `HF_TOKEN`."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", env_ignore_empty=True)

    wandb_api_key: SecretStr | None = None
    wandb_entity: str | None = None
    hf_token: SecretStr | None = Field(None, validation_alias=AliasChoices("HF_TOKEN", "HF_ACCESS_TOKEN"))
    storage: SecretStr = Field(SecretStr(DEFAULT_STORAGE), validation_alias="SAEOPT_STORAGE")
    store_patience: float = Field(900.0, ge=0, allow_inf_nan=False, validation_alias="SAEOPT_STORE_PATIENCE")
    """Seconds that a worker waits for a store that cannot be reached before it ends."""
    fault_pause: float = Field(0.0, ge=0, le=86400, allow_inf_nan=False, validation_alias="SAEOPT_FAULT_PAUSE")
    """Seconds between the last word and the end of a worker that can train nothing here (exit code 3), for supervisors
    that start it again at once."""
    cache_dir: str | None = Field(None, validation_alias="SAEOPT_CACHE_DIR")


@cache
def settings() -> Settings:
    """The process's settings, read once.

    Raises:
        UserError: a variable that cannot be read.
    """
    try:
        return Settings.model_validate({})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or ".env"
        raise UserError(f"{name}: {first['msg']} (environment or .env)") from None


def export_tokens() -> None:
    """Let the libraries see what `.env` says, where the environment itself says nothing."""
    for name, secret in (("HF_TOKEN", settings().hf_token), ("WANDB_API_KEY", settings().wandb_api_key)):
        if secret is not None:
            os.environ.setdefault(name, secret.get_secret_value())


_MORE_SECRETS: set[str] = set()


def remember_secret(secret: str) -> None:
    """A secret that came by another way than the environment, so that :func:`redact` knows it."""
    if len(secret) >= 6:
        _MORE_SECRETS.add(secret)


def redact(text: str) -> str:
    """The text without known secrets and without the passwords of URLs and of connection strings."""
    with suppress(UserError):  # settings that cannot be read hold no secret that is in use
        _MORE_SECRETS.update(_tokens())
    for known in _MORE_SECRETS:
        text = text.replace(known, "***")
    return _NAMED_PASSWORD.sub(r"\g<head>***", _URL_PASSWORD.sub(r"\g<head>***", text))


def _tokens() -> list[str]:
    found = [t.get_secret_value() for t in (settings().wandb_api_key, settings().hf_token) if t is not None]
    return [token for token in found if len(token) >= 6]
