"""Secrets and machine settings: environment variables or `.env`, never written to a run folder or a study."""

from __future__ import annotations

import os
import re
from functools import cache

from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

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
    store_patience: float = Field(900.0, ge=0, validation_alias="SAEOPT_STORE_PATIENCE")
    """Seconds that a worker waits for a store that cannot be reached before it ends."""
    cache_dir: str | None = Field(None, validation_alias="SAEOPT_CACHE_DIR")


@cache
def settings() -> Settings:
    """The process's settings, read once."""
    return Settings.model_validate({})


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
    current = settings()
    for secret in (current.wandb_api_key, current.hf_token):
        if secret is not None and len(secret.get_secret_value()) >= 6:
            text = text.replace(secret.get_secret_value(), "***")
    for known in _MORE_SECRETS:
        text = text.replace(known, "***")
    return _NAMED_PASSWORD.sub(r"\g<head>***", _URL_PASSWORD.sub(r"\g<head>***", text))
