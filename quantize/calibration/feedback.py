"""Rounding with error feedback: the error of every weight is made up for by those of its row that are rounded later.

GPTQ (Frantar et al. 2022): of a linear with inputs x [n, in] the squared error of the outputs is e H e^T for a row's
errors e and H = x^T x / n. Columns are rounded one after the other, from the last to the first; after each, the ones
before it move to where that sum is least. With H = L L^T they do so by the rows of M = L^-1, which is lower triangular:
by -error / M[i, i] * M[i, :i].

Within a group the inputs that are largest in the mean square are rounded first, while there are most to make up for it.

Where the inputs differ from those of the model that isn't quantized (since earlier layers are), rows first move to
where they give its outputs from these inputs, part of the way: by all of it they would follow the text's chance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.console.notes import note
from quantize.formats.scales import choose_scales, value_range
from quantize.formats.weight_format import Encoded, RowErrors

if TYPE_CHECKING:
    import torch

    from quantize.formats.integers import Integers

DAMPING = 0.01  # of the mean second moment, added to each: it keeps H regular and errors from piling up
CORRECTION = 0.5  # the share of the earlier layers' errors that rows make up for
_BLOCK = 128  # columns at once where a group is a whole row
_STEP = 1024  # inputs, and columns of their moments' matrix, at once
_MOST = 10**6  # times the damping, at most


@dataclass(frozen=True)
class Feedback:
    """What rounding a linear's rows needs to know of its inputs."""

    inputs: torch.Tensor  # float32 [n, in]
    change: torch.Tensor | None  # float32 [n, in]: the unquantized model's inputs, less these; None: they are alike
    order: torch.Tensor  # [in]: which input is at which place below; groups stay in place
    moments: torch.Tensor  # float32 [in], the mean square of every input
    inverse: torch.Tensor  # float32 [in, in], lower triangular: M above

    @classmethod
    def of(
        cls, inputs: torch.Tensor, exact: torch.Tensor | None = None, group: int | None = None, name: str = ""
    ) -> Feedback:
        """From the inputs [n, in] of a linear and, where they differ, those that it had before anything was quantized.

        ``exact`` is lost. ``group`` is the format's group size; None: a whole row. ``name`` is what a note calls the
        linear where its second moments are singular in spite of the usual damping.
        """
        import torch

        width = inputs.shape[1]
        moments = torch.linalg.vector_norm(inputs, dim=0).square_().div_(len(inputs))
        starts = width // (group or width)
        order = moments.view(starts, -1).argsort(stable=True, dim=1)
        order = (order + (group or width) * order.new_tensor(range(starts))[:, None]).flatten()
        change = None if exact is None else exact.sub_(inputs)
        return cls(inputs, change, order, moments[order], _inverse_factor(inputs, order, name))

    def encode(self, weight: torch.Tensor, form: Integers) -> Encoded:
        """Quantize whole rows [r, in] of a floating weight. Rows are independent; NaN or infinity shows in a scale.

        The errors are against ``weight``; those of the outputs are of these inputs.
        """
        import torch

        weight = weight.float()
        ordered, scale, zeros = self._round(self._corrected(weight), form)
        values = ordered.new_empty(ordered.shape).index_copy_(1, self.order, ordered)
        tensors = form.stored(values, scale, zeros)
        difference = form.decode(tensors) - weight
        errors = RowErrors(
            difference.double().square().sum(1),
            weight.double().square().sum(1),
            difference.abs().amax(1).double(),
            *(torch.linalg.vector_norm(self.inputs @ rows.T, dim=0).double().square() for rows in (difference, weight)),
        )
        return Encoded(tensors, errors)

    def _corrected(self, weight: torch.Tensor) -> torch.Tensor:
        """Rows that give, from these inputs, more nearly what the exact inputs gave; a copy, in the order of places."""
        ordered = weight[:, self.order]
        if self.change is None:
            return ordered
        cross = ((weight @ self.change.T) @ self.inputs).div_(len(self.inputs))[:, self.order]  # [r, in]
        return ordered.addmm_(cross @ self.inverse.T, self.inverse, alpha=CORRECTION)

    def _round(self, rows: torch.Tensor, form: Integers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Integers [r, in], and the scale and zero point of every group [r, groups]; ``rows`` are lost."""
        import torch

        count, width = rows.shape
        group = form.group_size or width
        size = min(group, _BLOCK)
        values = torch.empty(count, width, dtype=torch.int8)
        scales, zeros = torch.empty(count, width // group), torch.empty(count, width // group)
        for stop in range(width, 0, -size):
            start = max(stop - size, 0) if group == width else stop - size
            number = start // group
            if stop % group == 0:
                at = slice(stop - group, stop)
                found = choose_scales(
                    rows[:, at],
                    form.bits,
                    form.group_size is not None,
                    zero_points=form.zero_points,
                    importance=self.moments[at],
                )
                scales[:, number], zeros[:, number] = (column.squeeze(1) for column in found)
            values[:, start:stop] = self._round_block(
                rows, slice(start, stop), scales[:, number], zeros[:, number], form
            )
        return values, scales, zeros

    def _round_block(
        self, rows: torch.Tensor, at: slice, scale: torch.Tensor, zero: torch.Tensor, form: Integers
    ) -> torch.Tensor:
        """Integers [r, columns] for the columns ``at``; the errors move those before them."""
        import torch

        lowest, highest = value_range(form.bits, form.zero_points)
        columns = rows[:, at].T.contiguous()  # [columns, r]: one column after the other
        inverse = self.inverse[at, at]
        errors, values = torch.empty_like(columns), torch.empty_like(columns)
        for i in range(len(columns) - 1, -1, -1):
            whole = columns[i].div(scale).round_().add_(zero).clamp_(lowest, highest)
            values[i] = whole
            errors[i] = columns[i].sub_(whole.sub_(zero).mul_(scale)).div_(inverse[i, i])
            columns[:i].addr_(inverse[i, :i], errors[i], alpha=-1)
        rows[:, : at.start].addmm_(errors.T, self.inverse[at, : at.start], alpha=-1)
        return values.T.to(torch.int8)


def _inverse_factor(inputs: torch.Tensor, order: torch.Tensor, name: str) -> torch.Tensor:
    """M [in, in] of the second moments' matrix of inputs [n, in], taken in this order, with the damping."""
    times = 1
    matrix = _damped_moments(inputs, order, times)
    while not _factor(matrix) and times < _MOST:
        times *= 10
        matrix = _damped_moments(inputs, order, times)
    if times > 1:
        note(f"The inputs of {name} are so alike that their moments are damped {times} times as much as usual.")
    _invert(matrix)
    return matrix


def _damped_moments(inputs: torch.Tensor, order: torch.Tensor, times: int) -> torch.Tensor:
    """The matrix of second moments [in, in], with so many times the damping."""
    matrix = inputs.new_zeros(len(order), len(order))
    for some in inputs.split(_STEP):
        some = some[:, order]
        matrix.addmm_(some.T, some)
    matrix /= len(inputs)
    diagonal = matrix.diagonal()
    mean = diagonal.mean()
    # An input that is always zero costs nothing, however it is rounded: it moves no other.
    diagonal[diagonal == 0] = mean if mean else 1.0
    diagonal += times * DAMPING * mean
    return matrix


# Both by blocks, in the matrix's own memory: for the widest layers there is no room for a second one.
def _factor(matrix: torch.Tensor) -> bool:
    """Put L into the lower triangle of a matrix L L^T, and zeros above. False, and anything, where there is none."""
    import torch

    for start in range(0, len(matrix), _STEP):
        at, rest = slice(start, start + _STEP), slice(start + _STEP, None)
        corner, problem = torch.linalg.cholesky_ex(matrix[at, at])
        if problem:
            return False
        matrix[at, at] = corner
        panel = torch.linalg.solve_triangular(corner, matrix[rest, at].T, upper=False).T
        matrix[rest, at] = panel
        matrix[rest, rest].addmm_(panel, panel.T, alpha=-1)
    matrix.tril_()
    return True


def _invert(factor: torch.Tensor) -> None:
    """Replace a lower triangular matrix by its inverse."""
    import torch

    for start in range(0, len(factor), _STEP):
        at, before = slice(start, start + _STEP), slice(0, start)
        corner = factor[at, at]
        inverse = torch.linalg.solve_triangular(corner, torch.eye(len(corner)), upper=False)
        factor[at, before] = -inverse @ (factor[at, before] @ factor[before, before])
        factor[at, at] = inverse
