"""Which weights of a model are in which format: all linears in one, or a mixture, chosen weight by weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from converters.console.errors import InputError
from converters.console.notes import note
from converters.model.config import ModelConfig
from converters.model.parameters import LM_HEAD, Parameter, parameters, table
from quantize.formats.floating import Floating
from quantize.formats.table import CHANNEL, FORMATS, GROUP_SIZES, KINDS, find_format, format_title
from quantize.formats.weight_format import WeightFormat

MIXED = "mixed"  # the name of every mixture
UNQUANTIZED = "unquantized"  # in place of a format's name: in the model's own dtype


@dataclass(frozen=True)
class Scheme:
    """Which weights are in which format: the blocks' linears (and lm_head on demand) in ``default``, by the table.

    ``overrides`` has the names of those that are in another format, or UNQUANTIZED; other floating formats stand for
    that too. Where it names lm_head, that decides whether lm_head is quantized. It may name layers that the model was
    cut by. Everything else is in the model's own dtype, or in that of ``default`` where it is a floating format.
    Raises ValueError for overrides of such a one: ``mixture`` finds a scheme for them.
    """

    default: str
    quantize_lm_head: bool = False
    overrides: tuple[tuple[str, str], ...] = ()  # in the order of the layers; none is of the default format

    def __post_init__(self) -> None:
        formats = {name: _quantized_or_not(each) for name, each in self.overrides}
        if formats and not self.default_format.quantizes:
            raise ValueError(f"{self.default} quantizes nothing, so no weight can be an exception to it")
        head = formats.pop(LM_HEAD.name, None)
        if head is not None:
            object.__setattr__(self, "quantize_lm_head", head != UNQUANTIZED)
            formats |= {LM_HEAD.name: head} if head != UNQUANTIZED else {}
        kept = sorted((name for name, each in formats.items() if each != self.default), key=_in_order)
        object.__setattr__(self, "overrides", tuple((name, formats[name]) for name in kept))

    @property
    def name(self) -> str:
        """The format's, or MIXED."""
        return MIXED if self.overrides else self.default

    @property
    def default_format(self) -> WeightFormat:
        return FORMATS[self.default]

    @property
    def formats(self) -> tuple[WeightFormat, ...]:
        """All that weights are in, the default first, but for weights that a mixture leaves unquantized."""
        names = dict.fromkeys((self.default, *(each for _, each in self.overrides if each != UNQUANTIZED)))
        return tuple(FORMATS[name] for name in names)

    @property
    def names_by_format(self) -> dict[str, list[str]]:
        """The overrides as JSON has them, in the order of the table; UNQUANTIZED comes last."""
        names: dict[str, list[str]] = {}
        for name, form in self.overrides:
            names.setdefault(form, []).append(name)
        return {each: names[each] for each in (*FORMATS, UNQUANTIZED) if each in names}

    @property
    def searches(self) -> bool:
        """Whether there is a choice of how scales are found."""
        return any(each.searches for each in self.formats)

    @property
    def flags(self) -> str:
        """The options of llama-quantize that ask for it; none do for a mixture."""
        if self.overrides:
            return ""
        form = self.default_format
        said = form.group_size is not None or (form.kind in KINDS and KINDS[form.kind].in_groups)
        size = f" --group-size {form.group_size or CHANNEL}" if said else ""
        zero = " --zero-points" if form.zero_points else ""
        return f"--{form.kind}{size}{zero}" + (" --quantize-lm-head" if self.quantize_lm_head else "")

    def floating_dtype(self, config: ModelConfig) -> str:
        """The dtype of what is not quantized."""
        return config.dtype if self.default_format.quantizes else self.default_format.parts[0].dtype

    def covers(self, parameter: Parameter) -> bool:
        """Whether it is one of those that are in ``default`` unless ``overrides`` has them."""
        return parameter.row.quantized or (self.quantize_lm_head and parameter.row is LM_HEAD)

    def format_of(self, parameter: Parameter, config: ModelConfig) -> WeightFormat:
        """The format of a parameter."""
        if not self.default_format.quantizes:
            return self.default_format
        name = self._name_of(parameter)
        return Floating(config.dtype) if name == UNQUANTIZED else FORMATS[name]

    def format_named(self, name: str, config: ModelConfig) -> WeightFormat:
        """The format of a linear of the layers, by its name."""
        return self.format_of(choices(config)[name], config)

    def cut(self, config: ModelConfig) -> Scheme:
        """The same for a model of fewer layers: nothing is said of the others."""
        if not self.overrides:
            return self
        return mixture(config, {each.name: self._name_of(each) for each in parameters(config) if self.covers(each)})

    def title(self, config: ModelConfig) -> str:
        """In words; of a mixture the share of every format in the weights that formats are chosen for."""
        if not self.overrides:
            return format_title(self.default_format)
        counts: Counter[str] = Counter()
        for each in parameters(config):
            if self.covers(each):
                counts[self.format_of(each, config).name] += each.elements
        shares = [f"{name} {_percent(count / counts.total())}" for name, count in counts.most_common()]
        return f"{MIXED} ({', '.join(shares)})"

    def check(self, config: ModelConfig) -> None:
        """Raise InputError where the scheme doesn't fit the model."""
        if self.quantize_lm_head and (not self.default_format.quantizes or config.tie_word_embeddings):
            why = (
                "it has no lm_head of its own (tied embeddings)"
                if self.default_format.quantizes
                else f"--{self.default} quantizes nothing"
            )
            raise InputError(f"--quantize-lm-head can't be applied to {config.name}: {why}. Leave it out.")
        for name, _ in self.overrides:
            if not _may_be_chosen_for(name, config):
                raise InputError(f"{name[:80]!r} is no linear of {config.name} that a format can be chosen for.")

    def _name_of(self, parameter: Parameter) -> str:
        return self._by_name.get(parameter.name, self.default) if self.covers(parameter) else UNQUANTIZED

    @cached_property
    def _by_name(self) -> dict[str, str]:
        return dict(self.overrides)


def choices(config: ModelConfig) -> dict[str, Parameter]:
    """By name, the linears that formats can be chosen for: those of the layers, and an output head of its own."""
    return {each.name: each for each in parameters(config) if _may_be_chosen_for(each.name, config)}


def mixture(config: ModelConfig, formats: Mapping[str, str]) -> Scheme:
    """The scheme with every weight that ``formats`` names in the format, by its name in the table, or UNQUANTIZED.

    All linears of the layers must be there; lm_head is not quantized unless it is there too. bf16 stands for
    UNQUANTIZED. The default becomes the format that most weights are quantized to. Raises InputError for a name that is
    none, for linears that are left out, and where nothing is quantized of a model that isn't in bfloat16.
    """
    linears = choices(config)
    strangers = [name for name in formats if name not in linears]
    left_out = [name for name, each in linears.items() if each.row.quantized and name not in formats]
    unknown = [name for name in formats.values() if name not in FORMATS and name != UNQUANTIZED]
    if strangers:
        raise InputError(f"{strangers[0][:80]!r} is no linear of {config.name} that a format can be chosen for.")
    if left_out:
        raise InputError(f"{left_out[0]} of {config.name} is given no format; give {UNQUANTIZED} to leave it as it is.")
    if unknown:
        raise InputError(f"{unknown[0][:80]!r} is no format; give one of {', '.join([*FORMATS, UNQUANTIZED])}.")
    counts: Counter[str] = Counter()
    for name, each in formats.items():
        counts[_quantized_or_not(each)] += linears[name].elements
    del counts[UNQUANTIZED]
    if counts:
        return Scheme(min(counts, key=lambda each: (-counts[each], each)), overrides=tuple(formats.items()))
    if config.dtype != "bfloat16":
        raise InputError(
            f"{config.name} is in {config.dtype} and nothing of it is to be quantized. Give a weight a format."
        )
    return Scheme("bf16")


def default_scheme(kind: str, config: ModelConfig, quantize_lm_head: bool = False, zero_points: bool = False) -> Scheme:
    """The scheme of a kind of format where no group size is given.

    A kind in groups takes the largest of GROUP_SIZES that divides the inputs of all weights to quantize, and says so
    where it isn't the first; where none does, a scale per output channel. Raises InputError as ``find_format`` does.
    """
    sizes: Sequence[int | None] = (*GROUP_SIZES, None) if KINDS[kind].in_groups else (None,)
    for size in sizes:
        scheme = Scheme(find_format(kind, size, zero_points).name, quantize_lm_head)
        misfits = _misfits(config.cut(1), scheme)
        if not misfits:
            break
        last = misfits[0]
    if size != sizes[0]:
        chosen = "one scale per output channel is" if size is None else f"groups of {size} are"
        note(f"{last.name} has {last.shape[-1]} inputs, no multiple of {sizes[sizes.index(size) - 1]}: {chosen} taken.")
    return scheme


def check_groups(config: ModelConfig, scheme: Scheme) -> None:
    """Raise InputError, naming it, where a weight's inputs can't be divided into its format's groups."""
    misfits = _misfits(config, scheme)
    if not misfits:
        return
    sizes = [*(str(each) for each in GROUP_SIZES if not _misfits(config, scheme, each)), CHANNEL]
    advice = "Choose another format for it" if scheme.overrides else f"Give --group-size {' or '.join(sizes)}"
    raise InputError(
        f"{misfits[0].name} has {misfits[0].shape[-1]} inputs, which is no multiple of "
        f"{scheme.format_of(misfits[0], config).group_size}. {advice}."
    )


def _misfits(config: ModelConfig, scheme: Scheme, size: int | None = None) -> list[Parameter]:
    """The weights to quantize whose inputs are no multiple of ``size``; by default, of their format's group size."""
    formats = [(each, scheme.format_of(each, config)) for each in parameters(config)]
    return [each for each, form in formats if form.quantizes and each.shape[-1] % (size or form.group_size or 1)]


def _quantized_or_not(name: str) -> str:
    """A format's name, or UNQUANTIZED for a floating one."""
    return name if name != UNQUANTIZED and FORMATS[name].quantizes else UNQUANTIZED


def _may_be_chosen_for(name: str, config: ModelConfig) -> bool:
    """Whether it is a linear that a scheme can decide on, of this model with any number of layers."""
    if name == LM_HEAD.name:
        return not config.tie_word_embeddings
    prefix = f"{config.architecture.prefix}layers."
    layer, _, rest = name.removeprefix(prefix).partition(".")
    rows = table(config.architecture, config.word_embed_proj_dim is not None).block
    return name.startswith(prefix) and layer.isdecimal() and any(rest == row.name and row.quantized for row in rows)


def _in_order(name: str) -> list[tuple[int, str]]:
    """By which layer 10 comes after layer 9."""
    return [(len(part), part) for part in name.split(".")]


def _percent(share: float) -> str:
    """Whole percents, 100 only of all."""
    return "<1%" if share < 0.01 else f"{share if share == 1 else min(share, 0.99):.0%}"
