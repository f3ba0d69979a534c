"""Products of sparse levels, tier by tier, against torch's dense ones in float64."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rbe.kernels.sparse import Sparse

TIERS = ["portable", "avx2", "avx512"]


def levels(rows: int, columns: int, share: float) -> Tensor:
    """Mostly +1 and -1; some are larger."""
    sizes = torch.tensor([1, 1, 1, 2, 3, 255])[torch.randint(0, 6, (rows, columns))]
    signs = torch.randint(0, 2, (rows, columns)) * 2 - 1
    return (sizes * signs * (torch.rand(rows, columns) < share)).to(torch.int16)


def check(y: Tensor, exact: Tensor, naive: Tensor) -> None:
    """Within twice the error of the same product in float32."""
    assert y.shape == exact.shape
    assert y.dtype == torch.float32
    assert (y - exact).abs().max() <= 2 * (naive - exact).abs().max() + 1e-5 * exact.abs().max()


@pytest.mark.parametrize(
    ("rows", "columns", "share"), [(40, 300, 0.1), (7, 5, 0.6), (1, 1, 1.0), (33, 17, 0.0), (20, 70_000, 0.01)]
)
@pytest.mark.parametrize("n", [0, 1, 2, 6, 7, 16, 33, 64, 200])
def test_rows_of_x(tier: str, rows: int, columns: int, share: float, n: int) -> None:
    torch.manual_seed(rows + n)
    some, bias, x = levels(rows, columns, share), torch.randint(-3, 4, (rows,)), torch.randn(n, columns)
    matrix = Sparse(some, bias if rows % 2 else None)
    added = bias if rows % 2 else 0 * bias
    exact = (x.double() @ some.double().T + added) * 0.3
    naive = (x @ some.float().T + added) * 0.3
    y = matrix.matmul(x, 0.3)
    if n:
        check(y, exact, naive)
        # The scale is one of the call.
        torch.testing.assert_close(matrix.matmul(x, 0.6), 2 * y)
    assert y.shape == (n, rows)


def test_columns_that_lie_apart_in_memory(tier: str) -> None:
    matrix, x = Sparse(levels(30, 20, 0.2)), torch.randn(20, 9)
    torch.testing.assert_close(matrix.matmul(x.T, 1.0), matrix.matmul(x.T.contiguous(), 1.0))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 3)])
def test_images(tier: str, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]) -> None:
    torch.manual_seed(0)
    for n, channels, height, width in ((1, 5, 7, 9), (3, 1, 12, 6), (40, 2, 5, 5), (0, 2, 5, 5)):
        some = levels(6, channels * kernel[0] * kernel[1], 0.4)
        bias, x = torch.randint(-3, 4, (6,)), torch.randn(n, channels, height, width)
        matrix = Sparse(some, bias)
        assert matrix.convolves(x, kernel, stride, padding)
        weight = some.view(6, channels, *kernel)
        exact, naive = (
            functional.conv2d(x.to(dtype), 0.3 * weight.to(dtype), 0.3 * bias.to(dtype), stride, padding)
            for dtype in (torch.float64, torch.float32)
        )
        y = matrix.conv2d(x.to(memory_format=torch.channels_last), 0.3, kernel, stride, padding)
        if n:
            check(y, exact, naive)
        assert y.shape == exact.shape


def test_an_image_smaller_than_the_kernel_is_left_to_torch() -> None:
    matrix = Sparse(levels(2, 25, 0.5))
    assert not matrix.convolves(torch.zeros(1, 1, 3, 9), (5, 5), (1, 1), (0, 0))
    assert matrix.convolves(torch.zeros(1, 1, 3, 9), (5, 5), (1, 1), (1, 0))
    assert not matrix.convolves(torch.empty(1, 1, 1 << 16, 1 << 16, device="meta"), (5, 5), (1, 1), (0, 0))


def test_threads_change_nothing() -> None:
    torch.manual_seed(0)
    matrix, before = Sparse(levels(500, 700, 0.2)), torch.get_num_threads()
    images, kernels = torch.randn(3, 7, 30, 30), Sparse(levels(40, 63, 0.8))
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs.append([matrix.matmul(images.view(-1, 700)[:n], 1.0) for n in (1, 5, 27)])
        outputs[-1] += [kernels.conv2d(images[:n], 1.0, (3, 3), (1, 1), (1, 1)) for n in (1, 2, 3)]
    torch.set_num_threads(before)
    for others in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], others, strict=True))


@pytest.mark.parametrize(("rows", "columns"), [(9, 40), (4, 70_000)])
def test_rows_and_the_whole_are_the_levels(rows: int, columns: int) -> None:
    some = levels(rows, columns, 0.1)
    matrix = Sparse(some)
    assert torch.equal(matrix.decode(), some.float())
    with_bias = Sparse(some, torch.arange(rows) - 2).decode()
    assert torch.equal(with_bias, torch.cat((some, torch.arange(rows)[:, None] - 2), 1).float())
    assert torch.equal(matrix.rows(torch.tensor([3, 0, 3]), 2.0), some[[3, 0, 3]] * 2.0)
    assert matrix.entries == int((some != 0).sum())
    assert matrix.density == matrix.entries / some.numel()


def test_memory_is_a_few_bytes_an_entry() -> None:
    torch.manual_seed(0)
    some = levels(1000, 1000, 0.05)
    matrix = Sparse(some)
    large = int((some.abs() > 1).sum())
    assert matrix.nbytes == 2 * matrix.entries + 2 * large + 16 * 1001


def test_a_copy_is_a_matrix_of_its_own() -> None:
    matrix, x = Sparse(levels(8, 9, 0.5)), torch.randn(2, 9)
    y = matrix.matmul(x, 0.5)
    again = copy.deepcopy(matrix)
    del matrix
    assert torch.equal(again.matmul(x, 0.5), y)


def test_threads_of_python_do_not_disturb_each_other() -> None:
    torch.manual_seed(0)
    some, bias, x = levels(64, 80, 0.3), torch.randint(-3, 4, (64,)), torch.randn(3, 80)
    matrix = Sparse(some, bias)
    wanted = {scale: matrix.matmul(x, scale) for scale in (0.5, 1.0, 2.0)}

    def work(k: int) -> bool:
        scale = (0.5, 1.0, 2.0)[k % 3]
        y = matrix.matmul(x, scale)
        torch.full((64,), 1e9)  # where freed memory would be used again
        return torch.equal(y, wanted[scale])

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(600)))
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_torchs_defaults_change_nothing(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    matrix, x, images = Sparse(levels(64, 72, 0.3)), torch.randn(9, 72), torch.randn(2, 8, 5, 5)
    index = torch.tensor([3, 5])

    def results() -> list[Tensor]:
        image = matrix.conv2d(images, 1.0, (3, 3), (1, 1), (1, 1))
        return [matrix.matmul(x, 1.0), matrix.matmul(x[:1], 1.0), image, matrix.rows(index, 1.0), matrix.decode()]

    wanted, before = results(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = results()
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
