"""The differences of two models, tensor by tensor."""

from collections.abc import Iterator
from dataclasses import dataclass

from operators.comparison import Comparison, compare
from operators.rounding import expected_cosine, loses, squared_spacings
from pipelines.checkpoints import Source, open_model
from pipelines.checkpoints.named_like import named_like
from pipelines.errors import InputError
from pipelines.progress import Progress

STEP_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor of two models.

    Attributes:
        delta: the norm of B - A.
        relative: delta divided by the norm of A; 0 if A is zero.
        cosine: between A and B; with a base, between their deltas.
        norms: of the deltas from the base; None without a base.
        kept: how much of B's change (from the base, or from A) its own rounding leaves, as far as
            the two models tell: the cosine between the change before it was rounded to B's dtype
            and the one that is seen, if each rounding error is uniform within half the spacing of
            the numbers at B's elements. It is an estimate from sizes alone: 1 for changes of many
            spacings, 0 where all that is seen may be rounding. Tensors that did not change count
            nothing; None where no changed tensor of B has a dtype that loses bits of float32.
        conflict: the fraction with opposite signs among the elements where both deltas are
            nonzero; None without a base.
    """

    name: str
    num_elements: int
    delta: float
    relative: float
    cosine: float
    norms: tuple[float, float] | None
    conflict: float | None
    kept: float | None


def diff_models(a: str, b: str, base: str | None = None) -> list[TensorDiff]:
    """Compare two models; the last entry, `all`, covers all common tensors.

    Raises:
        InputError: a model that cannot be read, or models without a common tensor.
    """
    one, two, origin = _opened(a, b, base)
    names = [name for name in one.names() if _comparable(name, one, two, origin)]
    if not names:
        raise InputError(f"{a} and {b}: have no tensor of the same name and shape")
    totals, kept = (Comparison(), Comparison()), (0.0, 0.0)
    found = []
    with Progress(len(names), "compare") as progress:
        for name in names:
            plain, deltas, spacings = _compared(name, one, two, origin)
            totals = (totals[0] + plain, totals[1] + deltas)
            change = plain.distance**2 if origin is None else deltas.yy
            sizes = (change, spacings) if change and spacings else (0.0, 0.0)
            kept = kept[0] + sizes[0], kept[1] + sizes[1]
            found.append(_described(name, plain, deltas, sizes, has_base=origin is not None))
            progress.advance()
    return [*found, _described("all", *totals, kept, has_base=origin is not None)]


def unmatched(a: str, b: str, base: str | None = None) -> Iterator[str]:
    """A line for each tensor that cannot be compared: only one model has it, the shapes differ, or
    the base does not have it in the same shape and kind.
    """
    one, two, origin = _opened(a, b, base)
    for name in dict.fromkeys([*one.names(), *two.names()]):
        first, second = one.find(name), two.find(name)
        if first is None or second is None:
            yield f"{name}: only in {b if first is None else a}"
        elif first.shape != second.shape:
            yield f"{name}: {list(first.shape)} in {a}, {list(second.shape)} in {b}"
        elif origin is not None and not _comparable(name, one, two, origin):
            yield f"{name}: not in {base}, or of another shape or kind there"


def _opened(a: str, b: str, base: str | None) -> tuple[Source, Source, Source | None]:
    """The models, all by the names of the first."""
    one = open_model(a, base)
    two = named_like(open_model(b, base), one)
    return one, two, None if base is None else named_like(open_model(base), one)


def _comparable(name: str, *sources: Source | None) -> bool:
    """Whether all sources have a floating tensor with this name and the same shape."""
    specs = [source.find(name) for source in sources if source is not None]
    return all(spec is not None and spec.dtype.is_floating_point for spec in specs) and (
        len({spec.shape for spec in specs if spec is not None}) == 1
    )


def _compared(
    name: str, one: Source, two: Source, origin: Source | None
) -> tuple[Comparison, Comparison, float]:
    """The comparison of two tensors, and of their deltas if there is a base; and the sum of the
    squared spacings of the second one, 0 if its dtype loses nothing.
    """
    spec = one.find(name)
    assert spec is not None
    plain, deltas, spacings = Comparison(), Comparison(), 0.0
    for start in range(0, spec.num_elements, STEP_ELEMENTS):
        stop = min(start + STEP_ELEMENTS, spec.num_elements)
        stored = two.read(name, start, stop)
        if loses(stored.dtype):
            spacings += squared_spacings(stored)
        x, y = one.read(name, start, stop).double(), stored.double()
        plain += compare(x, y)
        if origin is not None:
            base = origin.read(name, start, stop).double()
            deltas += compare(x - base, y - base)
    return plain, deltas, spacings


def _described(
    name: str,
    plain: Comparison,
    deltas: Comparison,
    sizes: tuple[float, float],
    *,
    has_base: bool,
) -> TensorDiff:
    """A tensor's numbers; `sizes` are the squared norm of the change and of the spacings."""
    # Deltas from a common base are small, so their distance is more precise than the models'.
    delta = deltas.distance if has_base else plain.distance
    return TensorDiff(
        name=name,
        num_elements=plain.num_elements,
        delta=delta,
        relative=delta / plain.xx**0.5 if plain.xx else 0.0,
        cosine=deltas.cosine if has_base else plain.cosine,
        norms=(deltas.xx**0.5, deltas.yy**0.5) if has_base else None,
        conflict=deltas.conflict if has_base else None,
        kept=expected_cosine(*sizes) if sizes[1] else None,
    )
