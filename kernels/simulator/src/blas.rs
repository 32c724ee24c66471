//! Products of matrices as cuBLAS has them, by columns, with sums in f32 (f64 of f64).

use crate::memory::holds;
use crate::report::{count, problem};
use half::{bf16, f16};
use std::ffi::{c_int, c_void};

const OK: c_int = 0;
const INVALID_VALUE: c_int = 7;

#[derive(Clone, Copy, PartialEq)]
enum Format {
    F16,
    Bf16,
    F32,
    F64,
}

/// A matrix in memory of the device; element (i, j) lies `i + j leading` from the beginning.
#[derive(Clone, Copy)]
struct Matrix {
    address: u64,
    format: Format,
    transposed: bool,
    leading: usize,
}

impl Format {
    fn of(number: c_int) -> Option<Self> {
        Some(match number {
            0 => Self::F32,
            1 => Self::F64,
            2 => Self::F16,
            14 => Self::Bf16,
            _ => return None,
        })
    }

    fn bytes(self) -> usize {
        match self {
            Self::F16 | Self::Bf16 => 2,
            Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

impl Matrix {
    fn holds(&self, rows: usize, columns: usize) -> bool {
        let (rows, columns) = if self.transposed { (columns, rows) } else { (rows, columns) };
        rows == 0 || columns == 0 || holds(self.address, ((columns - 1) * self.leading + rows) * self.format.bytes())
    }

    fn at(&self, row: usize, column: usize) -> u64 {
        let (row, column) = if self.transposed { (column, row) } else { (row, column) };
        self.address + ((row + column * self.leading) * self.format.bytes()) as u64
    }

    /// # Safety
    /// [`Matrix::holds`] it.
    unsafe fn read(&self, row: usize, column: usize) -> f64 {
        let at = self.at(row, column);
        // SAFETY: the caller's promise.
        unsafe {
            match self.format {
                Format::F16 => (at as *const f16).read_unaligned().to_f64(),
                Format::Bf16 => (at as *const bf16).read_unaligned().to_f64(),
                Format::F32 => f64::from((at as *const f32).read_unaligned()),
                Format::F64 => (at as *const f64).read_unaligned(),
            }
        }
    }

    /// # Safety
    /// [`Matrix::holds`] it, and nobody else uses it.
    unsafe fn write(&self, row: usize, column: usize, value: f64) {
        let at = self.at(row, column);
        // SAFETY: the caller's promise.
        unsafe {
            match self.format {
                Format::F16 => (at as *mut f16).write_unaligned(f16::from_f64(value)),
                Format::Bf16 => (at as *mut bf16).write_unaligned(bf16::from_f64(value)),
                Format::F32 => (at as *mut f32).write_unaligned(value as f32),
                Format::F64 => (at as *mut f64).write_unaligned(value),
            }
        }
    }
}

/// c = alpha a b + beta c, of m x k and k x n.
fn multiply(a: Matrix, b: Matrix, c: Matrix, [m, n, k]: [usize; 3], alpha: f64, beta: f64) -> c_int {
    if !a.holds(m, k) || !b.holds(k, n) || !c.holds(m, n) {
        problem(&format!("a product of {m} x {k} and {k} x {n} is outside of what is allocated"));
        return INVALID_VALUE;
    }
    // SAFETY: held, as asked above.
    let rows: Vec<f64> = (0..m * k).map(|at| unsafe { a.read(at / k.max(1), at % k.max(1)) }).collect();
    let halves = std::thread::available_parallelism().map_or(1, usize::from).min(n.max(1));
    std::thread::scope(|scope| {
        for half in 0..halves {
            let rows = &rows;
            scope.spawn(move || {
                for column in n * half / halves..n * (half + 1) / halves {
                    // SAFETY: held, and each column is one thread's.
                    let right: Vec<f64> = (0..k).map(|at| unsafe { b.read(at, column) }).collect();
                    for row in 0..m {
                        let sum = if c.format == Format::F64 {
                            rows[row * k..][..k].iter().zip(&right).map(|(a, b)| a * b).sum()
                        } else {
                            dot(&rows[row * k..][..k], &right)
                        };
                        // SAFETY: the same. What c holds is not read where it counts for nothing.
                        unsafe {
                            let before = if beta == 0.0 { 0.0 } else { beta * c.read(row, column) };
                            c.write(row, column, alpha * sum + before);
                        }
                    }
                }
            });
        }
    });
    OK
}

/// Sums in f32, sixteen at a time.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0f32; 16];
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += (a * b) as f32;
        }
    }
    f64::from(sums.iter().sum::<f32>())
}

/// As cuBLAS's.
///
/// # Safety
/// As cuBLAS's.
#[unsafe(no_mangle)]
#[allow(non_snake_case, clippy::too_many_arguments)]
pub unsafe extern "C" fn cublasGemmStridedBatchedEx(
    _handle: *mut c_void,
    transpose_a: c_int,
    transpose_b: c_int,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: *const c_void,
    a: u64,
    a_format: c_int,
    a_leading: c_int,
    a_stride: i64,
    b: u64,
    b_format: c_int,
    b_leading: c_int,
    b_stride: i64,
    beta: *const c_void,
    c: u64,
    c_format: c_int,
    c_leading: c_int,
    c_stride: i64,
    batch: c_int,
    compute: c_int,
    _algorithm: c_int,
) -> c_int {
    count("cublasGemmStridedBatchedEx", batch as usize);
    let (Some(a_format), Some(b_format), Some(c_format)) =
        (Format::of(a_format), Format::of(b_format), Format::of(c_format))
    else {
        return INVALID_VALUE;
    };
    // Factors of the result come in the format of the sums.
    let factor = |from: *const c_void| -> f64 {
        // SAFETY: the caller's promise.
        unsafe {
            match compute {
                64 | 65 => from.cast::<f16>().read().to_f64(),
                70 | 71 => from.cast::<f64>().read(),
                _ => f64::from(from.cast::<f32>().read()),
            }
        }
    };
    for at in 0..i64::from(batch) {
        let matrix = |address: u64, format: Format, transposed: c_int, leading: c_int, stride: i64| Matrix {
            address: address.wrapping_add_signed(at * stride * format.bytes() as i64),
            format,
            transposed: transposed != 0,
            leading: leading as usize,
        };
        let status = multiply(
            matrix(a, a_format, transpose_a, a_leading, a_stride),
            matrix(b, b_format, transpose_b, b_leading, b_stride),
            matrix(c, c_format, 0, c_leading, c_stride),
            [m, n, k].map(|one| one as usize),
            factor(alpha),
            factor(beta),
        );
        if status != OK {
            return status;
        }
    }
    OK
}

/// As cuBLAS's.
///
/// # Safety
/// As cuBLAS's.
#[unsafe(no_mangle)]
#[allow(non_snake_case, clippy::too_many_arguments)]
pub unsafe extern "C" fn cublasDgemmStridedBatched(
    handle: *mut c_void,
    transpose_a: c_int,
    transpose_b: c_int,
    m: c_int,
    n: c_int,
    k: c_int,
    alpha: *const c_void,
    a: u64,
    a_leading: c_int,
    a_stride: i64,
    b: u64,
    b_leading: c_int,
    b_stride: i64,
    beta: *const c_void,
    c: u64,
    c_leading: c_int,
    c_stride: i64,
    batch: c_int,
) -> c_int {
    // SAFETY: the caller's promise; 1 is f64, 70 sums of it.
    unsafe {
        cublasGemmStridedBatchedEx(
            handle,
            transpose_a,
            transpose_b,
            m,
            n,
            k,
            alpha,
            a,
            1,
            a_leading,
            a_stride,
            b,
            1,
            b_leading,
            b_stride,
            beta,
            c,
            1,
            c_leading,
            c_stride,
            batch,
            70,
            0,
        )
    }
}

/// As cuBLAS's.
///
/// # Safety
/// As cuBLAS's.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub unsafe extern "C" fn cublasCreate_v2(handle: *mut *mut c_void) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { handle.write(std::ptr::dangling_mut::<u64>().cast()) };
    OK
}

/// As cuBLAS's.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub extern "C" fn cublasDestroy_v2(_handle: *mut c_void) -> c_int {
    OK
}

/// As cuBLAS's.
#[unsafe(no_mangle)]
#[allow(non_snake_case)]
pub extern "C" fn cublasSetStream_v2(_handle: *mut c_void, _stream: *mut c_void) -> c_int {
    OK
}
