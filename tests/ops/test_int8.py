"""Codes and scales of rows: nearest in float64, within half a scale, at every size and type."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlm_cli.ops import dequantize_rows, quantize_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(rows: int, columns: int, seed: int, size: float, dtype: torch.dtype) -> torch.Tensor:
    """Rows of very different size, one with an outlier, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * size
    matrix *= 10.0 ** torch.randint(-3, 1, (rows, 1), generator=generator)
    matrix[0, 0] *= 30
    matrix[-1] *= 0.0 if rows > 1 else 1.0
    return matrix.to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9), st.integers(1, 70), st.integers(0, 99), st.sampled_from(DTYPES), st.sampled_from(DTYPES),
    st.sampled_from([1e-7, 1e-3, 0.02, 50.0]),
)  # fmt: skip
def test_every_entry_is_within_half_a_scale(
    rows: int, columns: int, seed: int, dtype: torch.dtype, scale_dtype: torch.dtype, size: float
) -> None:
    matrix = draw(rows, columns, seed, size, dtype)
    codes, scales = quantize_rows(matrix, scale_dtype)
    assert codes.dtype == torch.int8 and scales.dtype == scale_dtype and codes.min() >= -127
    exact, unit = matrix.double(), scales.double()[:, None]
    assert ((exact - codes.double() * unit).abs() <= unit / 2).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_those_of_plain_arithmetic(dtype: torch.dtype) -> None:
    """More rows than are worked off at a time."""
    matrix = draw(2500, 33, 1, 0.02, dtype)
    codes, scales = quantize_rows(matrix, torch.float32)
    largest = matrix.double().abs().amax(1)
    torch.testing.assert_close(scales[:-1].double(), largest[:-1] / 127, rtol=1e-7, atol=0)
    assert scales[-1] == 1 and not codes[-1].any()
    assert codes.double().equal((matrix.double() / scales.double()[:, None]).round())
    assert (codes[:-1].abs().amax(1) == 127).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_codes_stand_for(dtype: torch.dtype) -> None:
    codes, scales = quantize_rows(draw(40, 50, 2, 0.02, torch.float32), dtype)
    exact = codes.double() * scales.double()[:, None]
    assert dequantize_rows(codes, scales, torch.float32).equal(exact.float())
    # In 16 bits: of a product that float32 holds in full, rounded once.
    narrow = dequantize_rows(codes, scales, torch.bfloat16)
    assert dtype == torch.float32 or narrow.equal(exact.to(torch.float32).to(torch.bfloat16))
    torch.testing.assert_close(narrow.double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_has_no_code(value: float) -> None:
    matrix = torch.ones(3, 4)
    matrix[1, 2] = value
    with pytest.raises(ValueError, match="no code"):
        quantize_rows(matrix)
