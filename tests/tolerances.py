"""How far a kernel may be from the float64 reference, one place for all operator tests."""

import torch

# Relative to the largest value of the reference: the rounding of coordinates up to some hundred cells, and of sums.
ACCUMULATED = {torch.float64: 1e-12, torch.float32: 1e-5}

# Half types: at most this many times the error of PyTorch's own rounding of the exact result to that type.
HALF_ROUNDINGS = 2.0


def assert_close_to_reference(result: torch.Tensor, exact: torch.Tensor, largest_term: float = 1e-30) -> None:
    """Compares a kernel's result with the reference in float64, by the rule of the result's dtype.

    largest_term: of the sums that the result consists of, where they may cancel out.
    """
    assert result.shape == exact.shape, f"shape {list(result.shape)}, reference {list(exact.shape)}"
    assert exact.dtype == torch.float64, "the reference must be evaluated in float64"
    if exact.numel() == 0:
        return
    assert torch.isfinite(result).all(), "the result is not finite"
    error = (result.double() - exact).abs().max().item()
    if result.dtype in ACCUMULATED:
        allowed = ACCUMULATED[result.dtype] * max(exact.abs().max().item(), largest_term)
    else:
        allowed = HALF_ROUNDINGS * (exact.to(result.dtype).double() - exact).abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g} ({result.dtype})"
