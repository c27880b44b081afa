"""What an unknown name of a config was probably meant to be."""

from __future__ import annotations

from collections.abc import Iterable

from saeopt.config.base import nearest

_OTHER_NAMES = {
    "lr": "learning_rate",
    "data.train_batch_size": "batch_size train_batch_size_tokens",
    "data.dataset_name": "dataset dataset_path data_path hf_dataset",
    "data.context_length": "context_size ctx ctx_len seq_len sequence_length max_seq_len max_length",
    "data.n_train_samples": "n_samples num_samples train_samples n_tokens training_tokens total_tokens steps epochs",
    "data.n_eval_samples": "eval_samples num_eval_samples",
    "data.eval_batch_size": "eval_batch",
    "tlens_model_name": "model model_name lm llm",
    "tlens_model_path": "model_path model_dir",
    "save_dir": "output_dir out_dir output checkpoint_dir",
    "wandb_project": "wandb project",
    "warmup_samples": "warmup warmup_steps lr_warm_up_steps",
    "lm_dtype": "dtype model_dtype",
    "saes.sae_type": "architecture arch sae type activation",
    "saes.sparsity_coeff": "lambda lambda_ lam l1 l1_coeff l1_coefficient l1_lambda l1_penalty sparsity"
    " sparsity_coefficient sparsity_penalty",
    "saes.k": "topk top_k",
    "saes.target_l0": "l0 l0_target target_sparsity",
    "saes.sae_positions": "hook_point hook_points hook hooks hook_name layer layers position positions",
    "saes.dict_size_to_input_ratio": "expansion expansion_factor expansion_ratio ratio dict_size dict_ratio d_sae"
    " dictionary_size n_latents num_latents n_features",
    "adam_betas": "betas",
    "max_grad_norm": "grad_clip gradient_clip gradient_clipping clip_grad_norm",
    "gradient_accumulation_steps": "grad_accum accumulation_steps grad_acc_steps",
    "lr_schedule": "scheduler lr_scheduler lr_scheduler_name",
}
"""Field → what people bring from other libraries and from papers."""
_FIELDS = {other: field for field, others in _OTHER_NAMES.items() for other in others.split()}


_MIXTURES = "mixtures of data sets are planned and not there yet; join the texts into one file or folder"
CHAT = "chat templates are planned and not there yet; give text to which the template was applied"
_PLANNED = {
    _MIXTURES: "mixture mixtures mix data_mixture dataset_mixture datasets dataset_names sources data_sources weights"
    " dataset_weights mixture_weights mixing_weights proportions ratios probabilities sampling_weights",
    CHAT: "chat_template apply_chat_template chat_format chat messages conversations system_prompt prompt_template"
    " template add_generation_prompt",
}
"""What is asked for and will come → how people write it."""
_COMING = {name: what for what, names in _PLANNED.items() for name in names.split()}


Known = dict[tuple[str, ...], list[str]]
"""Section → the names that it accepts."""


def suggestion(location: tuple[str, ...], known: Known, sae_type: str) -> str:
    """`; did you mean 'data.seed'?`: where the name would be right, what others call it, or what it resembles."""
    if sure := _sure(location, known, sae_type):
        return sure
    near = nearest(location[-1], known.get(location[:-1], []))
    return f" of sae_type '{sae_type}'{near}" if sae_type and location[:-1] == ("saes",) else near


def one_data_set(value: object) -> object:
    """The value of a field that names one data set.

    Raises:
        ValueError: it names several.
    """
    if isinstance(value, list | dict):
        raise ValueError(f"must be one data set: {_MIXTURES}")
    return value


def field_suggestion(field: str, fields: Iterable[str], sae_type: str) -> str:
    """The same for a dotted field among all dotted fields of a config with this architecture."""
    known: Known = {}
    for path in fields:
        section, _, name = path.rpartition(".")
        known.setdefault((section,) if section else (), []).append(name)
    return _sure(tuple(field.split(".")), known, sae_type) or nearest(field, list(fields))


def _sure(location: tuple[str, ...], known: Known, sae_type: str) -> str:
    section, name = location[:-1], location[-1]
    if section in ((), ("data",)) and (coming := _COMING.get(name.lower().replace("-", "_"))):
        return f": {coming}"
    elsewhere = [".".join((*at, name)) for at, names in known.items() if name in names]
    if elsewhere:
        return f"; did you mean '{elsewhere[0]}'?"
    other = _FIELDS.get(name.lower().replace("-", "_"), "")
    at, _, field = other.rpartition(".")
    if field and field in known.get((at,) if at else (), []):
        return f"; did you mean '{other}'?"
    wanted = field or name
    owners = _architectures_with(wanted) if section in ((), ("saes",)) else []
    if not owners:
        return ""
    here = f" of sae_type '{sae_type}'" if sae_type else ""
    instead = f"; {sae_type} has 'saes.sparsity_coeff'" if sae_type and wanted == "k" else ""
    return f"{here}: 'saes.{wanted}' is a field of sae_type {', '.join(owners)}{instead}"


def _architectures_with(field: str) -> list[str]:
    """The registered architectures that have a field of their own of this name."""
    from saeopt.config.saes import SAEConfig
    from saeopt.saes.registry import ARCHITECTURES, sae_config_class

    if field in SAEConfig.model_fields:
        return []
    return [name for name in ARCHITECTURES if field in sae_config_class(name).model_fields]
