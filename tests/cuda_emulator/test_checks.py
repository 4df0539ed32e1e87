"""What a kernel must not do is found, and said with its thread and line."""

import numpy as np
import pytest

from tests import cuda_emulator as emulator
from tests.cuda_emulator import EmulatorError, InOut, Out

BOTH = pytest.mark.parametrize("checked", [False, True])


def kernel(body: str, parameters: str = "int* y, const int* x") -> str:
    return f'extern "C" __global__ void __launch_bounds__(64) k({parameters}) {{\n{body}\n}}\n'


def run(body: str, *, checked: bool = True, threads: int = 64, shared: int = 0, seed: int = 0) -> np.ndarray:
    y = np.zeros(64, np.int32)
    kernels = emulator.compile(kernel(body), checked=checked)
    kernels.launch("k", 1, threads, shared, [Out(y), np.arange(64, dtype=np.int32)], seed=seed)
    return y


REVERSE = """
__shared__ alignas(16) int s[64];
s[threadIdx.x] = x[threadIdx.x];
{barrier}
y[threadIdx.x] = s[63 - threadIdx.x];
"""


@BOTH
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_correct_kernel_passes(checked: bool, seed: int) -> None:
    y = run(REVERSE.format(barrier="__syncthreads();"), checked=checked, seed=seed)
    np.testing.assert_array_equal(y, np.arange(64)[::-1])


def test_a_missing_barrier_is_a_read_of_what_is_not_written() -> None:
    with pytest.raises(EmulatorError, match=r"thread \(0,0,0\).* reads 4 bytes .*line 6: `y\[.*which no thread"):
        run(REVERSE.format(barrier=""))


def test_without_checks_a_missing_barrier_shows_poison() -> None:
    y = run(REVERSE.format(barrier=""), checked=False)
    assert not np.array_equal(y, np.arange(64)[::-1])


def test_write_after_read_without_a_barrier_is_a_race() -> None:
    body = """
    __shared__ int s[64];
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    int v = s[63 - threadIdx.x];
    s[threadIdx.x] = v;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
    """
    with pytest.raises(EmulatorError, match=r"race in shared memory: (writes|reads) .*line [56].*with no barrier"):
        run(body)


def test_two_writers_of_one_shared_element_race() -> None:
    with pytest.raises(EmulatorError, match=r"race in shared memory: writes .* which thread \(0,0,0\).* wrote"):
        run("__shared__ int s[1]; s[0] = x[0]; __syncthreads(); y[threadIdx.x] = s[0];")


def test_bytes_next_to_each_other_do_not_race() -> None:
    y = run("__shared__ char s[64]; s[threadIdx.x] = x[threadIdx.x]; __syncthreads(); y[threadIdx.x] = s[threadIdx.x];")
    np.testing.assert_array_equal(y, np.arange(64))


@pytest.mark.parametrize(("order", "racy"), [("__syncwarp();", False), ("__shfl_sync(0xffffffff, 1, 0);", True)])
def test_only_syncwarp_orders_memory_within_a_warp(order: str, racy: bool) -> None:
    body = f"""
    __shared__ int s[64];
    s[threadIdx.x] = x[threadIdx.x];
    {order}
    y[threadIdx.x] = s[threadIdx.x ^ 1];
    """
    if racy:
        with pytest.raises(EmulatorError, match="race in shared memory: reads"):
            run(body)
    else:
        np.testing.assert_array_equal(run(body), np.arange(64) ^ 1)


def test_syncwarp_does_not_order_two_warps() -> None:
    with pytest.raises(EmulatorError, match=r"which no thread of the block wrote|race in shared memory"):
        run(REVERSE.format(barrier="__syncwarp();"))


@BOTH
def test_a_read_past_the_end_is_found(checked: bool) -> None:
    with pytest.raises(EmulatorError, match=r"thread \(63,0,0\).*x \(256 bytes\) at offset 256"):
        run("y[threadIdx.x] = x[threadIdx.x + 1];", checked=checked)


@BOTH
def test_a_read_before_the_start_is_found(checked: bool) -> None:
    with pytest.raises(EmulatorError, match=r"x \(256 bytes\) at offset -4096"):
        run("y[threadIdx.x] = x[int(threadIdx.x) - 1024];", checked=checked)


@BOTH
def test_a_write_to_an_input_is_found(checked: bool) -> None:
    with pytest.raises(EmulatorError, match=r"x \(256 bytes\) at offset 0"):
        run("y[threadIdx.x] = 1; ((int*)x)[threadIdx.x] = 3;", checked=checked)


@BOTH
def test_an_unwritten_output_is_found(checked: bool) -> None:
    with pytest.raises(EmulatorError, match=r"no thread writes element 5 of output y \(argument 0"):
        run("if (threadIdx.x != 5) y[threadIdx.x] = x[threadIdx.x];", checked=checked)


def test_writing_what_looks_like_poison_is_writing() -> None:
    y = np.zeros(64, np.int8)
    source = kernel("for (int i = 0; i < 64; ++i) y[i] = i % 2 ? 127 : -3;", "signed char* y")
    emulator.compile(source, checked=False).launch("k", 1, 1, 0, [Out(y)])
    assert y[0] == -3
    assert y[1] == 127


def test_two_threads_that_write_one_output_element_are_found() -> None:
    with pytest.raises(EmulatorError, match=r"writes 4 bytes of y .* which in the same launch block number 0"):
        run("y[threadIdx.x / 2] = 1;")


def test_reading_an_output_before_writing_it_is_found() -> None:
    with pytest.raises(EmulatorError, match=r"reads 4 bytes of y .* which nothing wrote"):
        run("y[threadIdx.x] += x[threadIdx.x];")


@BOTH
def test_in_and_out(checked: bool) -> None:
    y = np.ones(64, np.int32)
    source = kernel("y[threadIdx.x] += x[threadIdx.x];")
    emulator.compile(source, checked=checked).launch("k", 1, 64, 0, [InOut(y), np.arange(64, dtype=np.int32)])
    np.testing.assert_array_equal(y, np.arange(64) + 1)


@BOTH
def test_atomics_of_many_threads_are_no_race(checked: bool) -> None:
    total = np.zeros(1, np.int32)
    body = """
    __shared__ int s[1];
    if (threadIdx.x == 0) s[0] = 0;
    __syncthreads();
    atomicAdd(s, x[threadIdx.x]);
    __syncthreads();
    if (threadIdx.x == 0) atomicAdd(y, s[0]);
    """
    emulator.compile(kernel(body), checked=checked).launch("k", 3, 64, 0, [InOut(total), np.arange(64, dtype=np.int32)])
    assert total[0] == 3 * 64 * 63 // 2


@pytest.mark.parametrize(
    "copying",
    ["for (int i = 0; i < n; ++i) y[i] = x[i];", "memcpy(y, x, 4 * n);", "for (int i = 0; i < n; ++i) y[i] = 0;"],
)
def test_loops_that_become_vectors_or_calls_are_watched(copying: str) -> None:
    x, y = np.arange(64, dtype=np.int32), np.zeros(64, np.int32)
    kernels = emulator.compile(kernel(copying, "int* y, const int* x, int n"))
    kernels.launch("k", 1, 1, 0, [Out(y), x, 64])
    with pytest.raises(EmulatorError, match="no thread writes element 61"):
        kernels.launch("k", 1, 1, 0, [Out(y), x, 61])
    with pytest.raises(EmulatorError, match=r"past its end|where no memory is"):
        kernels.launch("k", 1, 1, 0, [Out(y), x, 65])


def test_a_misaligned_vector_load_is_found() -> None:
    with pytest.raises(EmulatorError, match="isn't a multiple of 16"):
        run("if (threadIdx.x < 16) *(int4*)(y + 4 * threadIdx.x) = *(const int4*)(x + threadIdx.x);")


@BOTH
def test_lanes_missing_at_a_collective_are_found(checked: bool) -> None:
    body = "int v = x[threadIdx.x]; if (threadIdx.x < 16) v += __shfl_xor_sync(0xffffffff, v, 1); y[threadIdx.x] = v;"
    with pytest.raises(
        EmulatorError,
        match=r"diverges at a collective: lanes 0-15 wait at __shfl_xor_sync \(line 2, .*lanes 16-31 have ended",
    ):
        run(body, checked=checked)


@BOTH
def test_lanes_at_different_collectives_are_found(checked: bool) -> None:
    body = """int v;
    if (threadIdx.x & 1) v = __shfl_sync(-1u, 1, 0);
    else v = __shfl_sync(-1u, 2, 0);
    y[threadIdx.x] = v;"""
    with pytest.raises(EmulatorError, match=r"lanes 0-0 wait at __shfl_sync \(line 4.*lanes 1-1 .*\(line 3"):
        run(body, checked=checked)


@BOTH
def test_a_product_needs_the_whole_warp(checked: bool) -> None:
    body = """
    unsigned a[4] = {}, b[2] = {};
    int d[4] = {};
    if (threadIdx.x % 32 != 7) tt_emu_mma_m16n8k32_u8s8(d, a, b);
    y[threadIdx.x] = d[0];
    """
    with pytest.raises(EmulatorError, match=r"lanes 0-6 wait at mma.m16n8k32.u8.s8 .*lanes 7-7 have ended"):
        run(body, checked=checked)


@BOTH
def test_threads_missing_at_a_barrier_are_found(checked: bool) -> None:
    with pytest.raises(EmulatorError, match="not all threads come to one barrier"):
        run("if (threadIdx.x < 32) __syncthreads(); y[threadIdx.x] = 3;", checked=checked)


COPY = """
extern __shared__ __align__(1024) unsigned char buffer[];
const int i = threadIdx.x;
tt_emu_cp_async(buffer + 4 * i, x + i, 4, 4);
tt_emu_cp_async_commit();
{between}
y[i] = *(int*)(buffer + 4 * (63 - i));
"""


@BOTH
def test_an_asynchronous_copy_arrives_when_waited_for(checked: bool) -> None:
    y = run(COPY.format(between="tt_emu_cp_async_wait(0); __syncthreads();"), shared=256, checked=checked)
    np.testing.assert_array_equal(y, np.arange(64)[::-1])


@pytest.mark.parametrize("between", ["__syncthreads();", "tt_emu_cp_async_wait(1); __syncthreads();"])
def test_a_copy_that_nobody_waits_for_is_found(between: str) -> None:
    with pytest.raises(EmulatorError, match=r"while an asynchronous copy of thread .* isn't waited for"):
        run(COPY.format(between=between), shared=256)
    y = run(COPY.format(between=between), shared=256, checked=False)
    assert not np.array_equal(y, np.arange(64)[::-1])


def test_a_copy_waited_for_by_its_thread_alone_is_found() -> None:
    with pytest.raises(EmulatorError, match=r"which no thread of the block wrote|race in shared memory"):
        run(COPY.format(between="tt_emu_cp_async_wait(0);"), shared=256)


def test_bytes_that_a_copy_leaves_out_are_zero() -> None:
    body = """
    __shared__ alignas(16) int s[256];
    const int valid = threadIdx.x == 63 ? 0 : 8;
    tt_emu_cp_async(s + 4 * threadIdx.x, x + 64 * (threadIdx.x / 63), 16, threadIdx.x < 63 ? 8 : valid);
    tt_emu_cp_async_commit();
    tt_emu_cp_async_wait_all();
    y[threadIdx.x] = s[4 * threadIdx.x] + 10 * s[4 * threadIdx.x + 1] + 100 * s[4 * threadIdx.x + 2];
    """
    np.testing.assert_array_equal(run(body), [10] * 63 + [0])


@BOTH
def test_dynamic_shared_memory_has_its_size(checked: bool) -> None:
    body = "extern __shared__ int s[]; s[threadIdx.x] = 1; y[threadIdx.x] = s[threadIdx.x];"
    np.testing.assert_array_equal(run(body, shared=256, checked=checked), np.ones(64))
    with pytest.raises(EmulatorError, match=r"past (its|the) 252 bytes"):
        run(body, shared=252, checked=checked)


def test_a_launch_beyond_the_device_is_refused() -> None:
    with pytest.raises(EmulatorError, match="65 threads, __launch_bounds__ allows 64"):
        run("y[threadIdx.x] = 1;", threads=65)
    with pytest.raises(EmulatorError, match="bytes of shared memory, the device has"):
        run("y[threadIdx.x] = 1;", shared=300_000)


def test_a_source_that_is_wrong_is_refused() -> None:
    with pytest.raises(EmulatorError, match=r"g\+\+ refuses the source"):
        emulator.compile(kernel("y[0] = undeclared;"))
    with pytest.raises(EmulatorError, match="defines no kernel"):
        emulator.compile("int f() { return 1; }")


def test_arguments_are_checked() -> None:
    kernels = emulator.compile(kernel("y[threadIdx.x] = x[threadIdx.x];"))
    y = np.zeros(64, np.int32)
    with pytest.raises(EmulatorError, match="takes 2 arguments"):
        kernels.launch("k", 1, 64, 0, [Out(y)])
    with pytest.raises(EmulatorError, match="argument 1 is a pointer, got int"):
        kernels.launch("k", 1, 64, 0, [Out(y), 3])
    with pytest.raises(EmulatorError, match="no kernel l; there are k"):
        kernels.launch("l", 1, 64, 0, [])
