"""YAML in and out, overrides, and one clear line for whatever is wrong with them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from saeopt.config.base import explain
from saeopt.config.places import located
from saeopt.config.roles import sections
from saeopt.config.run import RunConfig, run_model
from saeopt.config.saes import SAEConfig
from saeopt.config.shipped import hint
from saeopt.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: dates are words, 1:30 is no 90, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' stands twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)


def _word_or(construct: Callable[[_Loader, yaml.ScalarNode], Any]) -> Callable[[_Loader, yaml.ScalarNode], Any]:
    return lambda loader, node: node.value if ":" in node.value else construct(loader, node)


_Loader.add_constructor("tag:yaml.org,2002:int", _word_or(yaml.SafeLoader.construct_yaml_int))
_Loader.add_constructor("tag:yaml.org,2002:float", _word_or(yaml.SafeLoader.construct_yaml_float))
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda _loader, node: node.value)


def parse_yaml(text: str) -> Any:
    """YAML text as plain values; a `yaml.YAMLError` says what is wrong with it."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except yaml.YAMLError:
        raise
    except Exception as error:  # a number of thousands of digits, a tag whose value is none of its kind
        raise yaml.YAMLError(str(error).partition(":")[0][:100]) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping from a file."""
    try:
        loaded = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{hint(path)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: cannot be read: it is no UTF-8 text") from None
    except (OSError, ValueError) as error:  # a name that no file can have
        raise UserError(f"{str(path)[:300]}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}: not valid YAML{where}: {getattr(error, 'problem', error)}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: must hold 'key: value' pairs")
    return loaded


def parse_override(text: str) -> tuple[str, Any]:
    """`key.path=value` as key and YAML value."""
    key, sign, value = text.partition("=")
    shown = text if len(text) < 200 else text[:80] + " …"
    if not sign or not key.strip():
        raise UserError(f"--set {shown}: must be key.path=value")
    try:
        return key.strip(), parse_yaml(value)
    except yaml.YAMLError:
        raise UserError(f"--set {shown}: the value is not valid YAML") from None


def apply_overrides(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with dotted keys set; `saes.field@hook point` goes to `saes.per_hook`.

    Choosing another `sae_type` drops the fields of `saes` that the new architecture does not have.
    """
    result: dict[str, Any] = copy.deepcopy(dict(raw))
    for key in sorted(values, key=lambda k: k != "saes.sae_type"):
        field, at, hook = key.partition("@")
        path = field.split(".")
        if at and not hook:
            raise UserError(f"'{key}': the hook point behind '@' is missing")
        if hook:
            if path[0] != "saes" or len(path) != 2:
                raise UserError(f"'{key}': only fields of 'saes' can differ per hook point")
            path = ["saes", "per_hook", hook, path[1]]
        if key == "saes.sae_type":
            _drop_foreign_fields(result, str(values[key]))
        section = result
        for part in path[:-1]:
            child = section.get(part)
            if child is None:
                child = section[part] = {}
            if not isinstance(child, dict):
                raise UserError(f"'{key}': '{part}' has no fields")
            section = child
        section[path[-1]] = values[key]
    return result


def changed(raw: dict[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """`raw` with the `key=value` of the command line applied in order; :class:`UserError` names the one at fault."""
    for text in changes:
        value = dict([parse_override(text)])
        try:
            raw = apply_overrides(raw, value)
        except UserError as error:
            raise UserError(f"--set {text[:200]}: {error}") from None
    return raw


def _drop_foreign_fields(raw: dict[str, Any], sae_type: str) -> None:
    from saeopt.saes.registry import sae_config_class

    saes = raw.get("saes")
    if isinstance(saes, dict) and saes.get("sae_type") != sae_type:
        known = sae_config_class(sae_type).model_fields
        raw["saes"] = {k: v for k, v in saes.items() if k in known}


def known_names(raw: Mapping[str, Any]) -> dict[tuple[str, ...], list[str]]:
    """The names that each section of a run config accepts."""
    found = sections(_sae_class(raw))
    return {(section,) if section else (): list(model.model_fields) for section, model in found.items()}


def _sae_class(raw: Mapping[str, Any]) -> type[SAEConfig]:
    saes = raw.get("saes")
    if not isinstance(saes, dict) or "sae_type" not in saes:
        return SAEConfig
    from saeopt.saes.registry import sae_config_class

    return sae_config_class(saes["sae_type"])


def validate_run(raw: Mapping[str, Any], source: str | Path, changes: Sequence[str] = ()) -> RunConfig:
    """A run config from a mapping, its paths absolute; :class:`UserError` names `source` and the field.

    Where one of the `changes` (`key=value`) of the command line is at fault, it is named instead.
    """
    try:
        return run_model(_sae_class(raw)).model_validate(located(raw))
    except ValidationError as error:
        saes = raw.get("saes")
        sae_type = str(saes.get("sae_type")) if isinstance(saes, dict) else ""
        raise explain(error, str(source), known_names(raw), sae_type, changes) from None
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


_FIELD = re.compile(r"'([a-z_][\w.]*)(?:@[^']*)?(?:: [^']*)?'")
"""How a message about a field begins."""


@contextmanager
def told_of(config: RunConfig, source: str | Path, changes: Sequence[str] = ()) -> Iterator[None]:
    """What is found out late (sizes of the model, what the data hold) and is a field's mistake also names the file, or
    the `key=value` of the command line, that the field's value is from."""
    try:
        yield
    except UserError as error:
        found = _FIELD.match(str(error))
        if type(error) is not UserError or found is None or not _is_field(found[1], config):
            raise
        own = [c for c in changes if c.partition("=")[0].partition("@")[0].strip() == found[1]]
        raise UserError(f"{f'--set {own[-1][:200]}' if own else source}: {error}") from None


def _is_field(name: str, config: RunConfig) -> bool:
    owner: Any = config
    for part in name.split("."):
        if part not in getattr(type(owner), "model_fields", ()):
            return False
        owner = getattr(owner, part)
    return True


STORED_NAME = "final_config.yaml"


def stored(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping that saeopt itself wrote: it was under recipe 1 where it names none, and `encoder_start` matched."""
    saes = raw.get("saes")
    own = {"saes": {"encoder_start": "matched", **saes}} if isinstance(saes, Mapping) else {}
    return {"recipe": 1, **raw, **own}


def read_run_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping of a run config; one that a run folder holds was under recipe 1 where it names none."""
    raw = read_yaml(path)
    return stored(raw) if Path(path).name == STORED_NAME else raw


def recipe_notice(source: str | Path) -> str:
    """What a file that names no recipe means now."""
    return (
        f"{source} names no recipe: 3 holds (activations are centred, attention outputs start in their subspace, dead"
        " latents of relu and gates are resampled; since recipe 2 lr falls to 0 over the last 20 %, λ rises over the"
        " first 5 %, Adam's decay rates are 0.9 and 0.99, gated and topk keep decoder rows at norm 1, topk's AuxK and"
        " start are its paper's); recipe: 2 and recipe: 1 keep the older defaults, recipe: 3 silences this"
    )


def load_run_config(path: str | Path, overrides: Iterable[str] = (), recipe: int | None = None) -> RunConfig:
    """A run config from a YAML file, with `key.path=value` overrides applied in order.

    `recipe` is that of a file that names none (None: what its kind of file means by it).
    """
    raw = read_run_yaml(path)
    if recipe is not None:
        raw = {"recipe": recipe, **raw}
    overrides = list(overrides)
    return validate_run(changed(raw, overrides), path, overrides)


def dump_yaml(config: RunConfig) -> str:
    """The complete config as YAML, in the order of the fields; loading it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
