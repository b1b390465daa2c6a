"""Configurations: one declaration per option gives its default, its check, its help and its command-line flag."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from gradmem_kernels import UPDATE_RULES
from gradmem_kernels.checks import ArgumentError
from gradmem_kernels.update_rules import rule_options

if TYPE_CHECKING:
    from typing_extensions import Self

    from gradmem_kernels.learning_rates import LearningRate
    from gradmem_kernels.update_rules import Update

__all__ = ["Config", "GradMemConfig", "LMConfig", "option"]


def option(default: Any, text: str, *, minimum: float | None = None, above: float | None = None,
           maximum: float | None = None, below: float | None = None, choices: Collection[str] = ()) -> Any:
    """A dataclass field that is checked when the configuration is made and offered on the command line.

    ``choices`` are looked at then, and may have grown since.
    """
    bounds = {"minimum": minimum, "above": above, "maximum": maximum, "below": below}
    return dataclasses.field(default=default, metadata={"help": text, "choices": choices, **bounds})


@dataclass(frozen=True)
class Config:
    """Base of all configurations: frozen, checked field by field, and the same after a round trip through JSON."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, self._checked(field, hints[field.name], getattr(self, field.name)))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration with these values; the others have their defaults.

        Raises:
            ArgumentError: for a name that is no option, or a value its option does not take.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ArgumentError(f"{cls.__name__}: {name}: expected one of {', '.join(sorted(known))}")
        return cls(**values)

    def fail(self, argument: str, expected: str, got: object, remedy: str = "") -> None:
        raise ArgumentError(f"{type(self).__name__}: {argument}: expected {expected}, got {got!r}"
                            f"{'; ' if remedy else ''}{remedy}")

    def _checked(self, field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
        kinds = get_args(hint) or (hint,)
        if value is None and type(None) in kinds:
            return None
        rule = field.metadata
        kind = next(k for k in kinds if k is not type(None))
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            self.fail(field.name, {int: "an integer", float: "a number", bool: "True or False", str: "a string"}[kind],
                      value)
        if kind is str and rule["choices"] and value not in rule["choices"]:
            self.fail(field.name, f"one of {', '.join(rule['choices'])}", value)
        if kind in (int, float):
            low, above, high, below = (rule[name] for name in ("minimum", "above", "maximum", "below"))
            if (not math.isfinite(value) or (low is not None and value < low) or (above is not None and value <= above)
                    or (high is not None and value > high) or (below is not None and value >= below)):
                bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", low), (">", above), ("<=", high), ("<", below))
                          if bound is not None]
                self.fail(field.name, f"a finite number {' and '.join(bounds)}".rstrip(), value)
        return value


@dataclass(frozen=True)
class LMConfig(Config):
    """The small built-in decoder of the Llama family."""

    vocab_size: int = option(72, "tokens in the vocabulary; the task sets it", minimum=1)
    hidden_size: int = option(128, "width of the model", minimum=1)
    num_layers: int = option(4, "transformer layers", minimum=1)
    num_heads: int = option(4, "attention heads", minimum=1)
    num_kv_heads: int | None = option(None, "key-value heads, a divisor of the heads (default: as many)", minimum=1)
    intermediate_size: int = option(512, "width of the SwiGLU layer", minimum=1)
    rope_theta: float = option(10000.0, "base of the rotary frequencies", above=0)
    norm_eps: float = option(1e-6, "epsilon of the RMSNorms", minimum=0)
    tie_embeddings: bool = option(False, "use the embedding table as the head")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            self.fail("hidden_size", f"an even multiple of num_heads={self.num_heads}", self.hidden_size)
        if self.num_kv_heads is not None and self.num_heads % self.num_kv_heads:
            self.fail("num_kv_heads", f"a divisor of num_heads={self.num_heads}", self.num_kv_heads)


@dataclass(frozen=True)
class GradMemConfig(Config):
    """What GradMem adds to a language model: the memory, and how WRITE makes it."""

    memory_tokens: int = option(8, "memory vectors per context", minimum=1)
    steps: int = option(2, "inner gradient steps of WRITE", minimum=0)
    inner_optimizer: str = option("sgd", "rule of the inner steps", choices=UPDATE_RULES)
    inner_lr: float = option(0.04, "inner learning rate", minimum=0)
    learn_inner_lr: str = option("none", "learn a factor of the inner learning rate for each step, each memory vector, "
                                 "or each of both", choices=("none", "step", "token", "step_token"))
    inner_momentum: float | None = option(None, "decay of momentum's velocity (default: 0.9)", minimum=0, below=1)
    inner_nesterov: bool = option(False, "momentum looks a step ahead, as Nesterov's")
    inner_beta1: float | None = option(None, "decay of adam's first moment (default: 0.9)", minimum=0, below=1)
    inner_beta2: float | None = option(None, "decay of adam's second moment (default: 0.999)", minimum=0, below=1)
    inner_eps: float | None = option(None, "added to adam's square root (default: 1e-8)", minimum=0)
    inner_eps_root: float | None = option(None, "added under adam's square root (default: 0)", minimum=0)
    inner_weight_decay: float | None = option(None, "adam's decay of the memory, decoupled from the gradient "
                                                    "(default: 0)", minimum=0)
    order: str = option("second", "order of the meta-gradient through WRITE", choices=("none", "first", "second"))
    second_order_steps: int | None = option(None, "only the last N steps are second order (default: all)", minimum=0)
    recompute: str = option("step", "what the backward pass of WRITE recomputes; auto: what free memory asks for",
                            choices=("none", "step", "layer", "auto"))
    inner_clip_value: float | None = option(None, "clip each entry of the inner gradient", above=0)
    inner_clip_norm: float | None = option(None, "clip the norm of a sample's inner gradient", above=0)
    control_tokens: int = option(0, "learned vectors on each side of the memory, other ones for WRITE and READ",
                                 minimum=0)
    memory_projection: str = option("none", "a linear map of the memory: one for all samples, WRITE and READ; or "
                                    "one for each, written by the inner steps too",
                                    choices=("none", "shared", "per_sample"))
    write_head: bool = option(False, "a head of its own for the WRITE loss")
    freeze_backbone: bool = option(False, "train what GradMem adds alone, and adapters")
    write_lora_rank: int = option(0, "rank of LoRA matrices beside the backbone's layers, in WRITE alone", minimum=0)
    write_lora_alpha: float = option(16.0, "of these matrices: their product is scaled by alpha / rank", above=0)
    write_lora_dropout: float = option(0.0, "dropout of their input in training", minimum=0, maximum=0.99)
    write_lora_targets: str = option("all-linear", "layers that have them: names, separated by commas, or all-linear")
    inner_loss_weight: float = option(0.0, "weight of the last inner loss in the training loss", minimum=0)
    memory_init_std: float = option(0.02, "standard deviation of the initial memory", minimum=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory_projection == "per_sample" and self.learn_inner_lr in ("token", "step_token"):
            self.fail("learn_inner_lr", "'none' or 'step' with memory_projection='per_sample', whose weights have no "
                      "tokens", self.learn_inner_lr)
        if self.learn_inner_lr != "none" and self.steps == 0:
            self.fail("learn_inner_lr", "'none' where steps=0", self.learn_inner_lr)
        if self.second_order_steps is not None and (self.order != "second" or self.second_order_steps > self.steps):
            self.fail("second_order_steps", f"None, or at most steps={self.steps} with order='second'",
                      self.second_order_steps)
        known = rule_options(self.inner_optimizer)
        taken = ", ".join(f"inner_{name}" for name in _RULE_OPTIONS if name in known) or "no options"
        for name, value in self._rule_options().items():
            if name not in known:
                self.fail(f"inner_{name}", f"none where inner_optimizer={self.inner_optimizer!r}, which takes {taken}",
                          value)
        self.update_rule(self.inner_lr)  # checks the options' values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        learned = values.get("learn_inner_lr")
        if isinstance(learned, bool):  # files from before there were rates for each memory vector
            values = {**values, "learn_inner_lr": "step" if learned else "none"}
        return super().from_dict(values)

    def update_rule(self, lr: LearningRate) -> Update:
        """The rule of the inner steps: what :func:`gradmem_kernels.write` takes as ``update``."""
        return UPDATE_RULES[self.inner_optimizer](lr=lr, **self._rule_options())

    def rule_name(self) -> str:
        """The rule with all its options but the learning rate, as ``momentum(momentum=0.9, nesterov=False)``."""
        options = {**rule_options(self.inner_optimizer), **self._rule_options()}
        given = ", ".join(f"{name}={value!r}" for name, value in options.items() if value is not None)
        return f"{self.inner_optimizer}({given})"

    def _rule_options(self) -> dict[str, Any]:
        """The options of the rule that were set, by their names there."""
        values = {name: getattr(self, f"inner_{name}") for name in _RULE_OPTIONS}
        return {name: value for name, value in values.items() if value is not None and value is not False}


#: Options of inner_optimizer, inner_<name> here and <name> there.
_RULE_OPTIONS = ("clip_value", "clip_norm", "momentum", "nesterov", "beta1", "beta2", "eps", "eps_root",
                 "weight_decay")
